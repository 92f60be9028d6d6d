"""The two backward kernels of kernels/block_tpu.py: dq over the keys of a tile of queries; dk, dv the other way round.

    p = exp(s - lse),  ds = p (do.v - delta);    dq = scale sum_k ds k;    dv = sum_q p^T do,  dk = scale sum_q ds^T q

The second works on transposed scores [keys, queries]: lse and delta are then rows, as they lie in memory, and no
product has a transposed left operand. Both compute the scores anew, 14 D operations a score in all; left out: a single
kernel of 10 D, which would have to write a partial dq for each tile of keys and add them up.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.block import Mask
from kernels.block_tpu_launch import Step, dot, heads_first, heads_last, launch, rows_first
from kernels.block_tpu_mask import column, plan, widened
from kernels.block_tpu_tiles import LANES, problem


def backward(q, k, v, lse, delta, do, mask: Mask, scale: float, interpret) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Backward of kernels/block.py, which needs no o: dq, dk, dv in their arrays' dtype."""
    p = problem(q, k, mask)
    ids, over_keys, over_queries = plan(p, mask)
    T, S = p.padded
    q, do = heads_first(q, T, p.K), heads_first(do.astype(v.dtype), T, p.K)
    k, v = heads_first(k, S), heads_first(v, S)
    arrays = q, k, v, do, rows_first(lse, p), rows_first(delta, p)
    of_queries, columns = (pltpu.VMEM((p.Q, p.tiles.q, wide), jnp.float32) for wide in (p.D, LANES))
    of_keys = pltpu.VMEM((p.tiles.k, p.D), jnp.float32)
    dq = launch(
        attention_dq,
        scale,
        p,
        (ids, over_keys),
        arrays,
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        [of_queries, columns, columns],
        p.cost(flops=6, of_queries=3, of_keys=2, over_keys=True),
        over_keys=True,
        interpret=interpret,
    )[0]
    dk, dv = launch(
        attention_dkv,
        scale,
        p,
        (ids, over_queries),
        arrays,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        [of_keys, of_keys],
        p.cost(flops=8, of_queries=2, of_keys=4, over_keys=False),
        over_keys=False,
        interpret=interpret,
    )
    return heads_last(dq, p.T), heads_last(dk, p.S), heads_last(dv, p.S)


def attention_dq(scale: float, step: Step, q, k, v, do, lse, delta, dq, a, lse_columns, delta_columns) -> None:
    """One step: a tile of queries, Q heads of them, with a run of tiles of keys."""
    step.start(a)

    @pl.when(step.index == 0)
    def _():
        @step.each_head
        def _(g):
            lse_columns[g], delta_columns[g] = column(lse[g]), column(delta[g])

    def add(cut, hide):
        @step.each_head
        def _(g):
            s = hide(dot(q[g], k[cut, :], (1, 1)) * scale)
            weights = jnp.exp(s - widened(lse_columns[g], s.shape[1]))
            ds = weights * (dot(do[g], v[cut, :], (1, 1)) - widened(delta_columns[g], s.shape[1]))
            a[g] += dot(ds.astype(k.dtype), k[cut, :], (1, 0))

    step.each_tile(add)

    @step.finish
    def _():
        dq[...] = (scale * a[...]).astype(dq.dtype)


def attention_dkv(scale: float, step: Step, q, k, v, do, lse, delta, dk, dv, a_k, a_v) -> None:
    """One step: a tile of keys with a run of tiles of queries, Q heads of each."""
    step.start(a_k, a_v)

    def add(cut, hide):
        @step.each_head
        def _(g):
            s = hide(dot(k[...], q[g, cut, :], (1, 1)) * scale)
            weights = jnp.exp(s - lse[g, :, cut])
            a_v[...] += dot(weights.astype(do.dtype), do[g, cut, :], (1, 0))
            ds = weights * (dot(v[...], do[g, cut, :], (1, 1)) - delta[g, :, cut])
            a_k[...] += dot(ds.astype(q.dtype), q[g, cut, :], (1, 0))

    step.each_tile(add)

    @step.finish
    def _():
        dk[...], dv[...] = (scale * a_k[...]).astype(dk.dtype), a_v[...].astype(dv.dtype)
