"""The forward kernel of kernels/block_tpu.py: online softmax over the keys of a tile of queries.

    m' = max(m, max_k s),  l' = exp(m - m') l + sum_k exp(s - m'),  a' = exp(m - m') a + exp(s - m') v;   o = a / l

(FlashAttention-2, arXiv 2307.08691.) The running maximum starts above the masked score, so that a tile which shows a
query nothing adds exp(MASKED - m) = 0.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.block import MASKED, Mask
from kernels.block_tpu_launch import Step, dot, heads_first, heads_last, launch
from kernels.block_tpu_mask import plan, widened
from kernels.block_tpu_tiles import LANES, problem


def forward(q, k, v, mask: Mask, scale: float, interpret) -> tuple[jax.Array, jax.Array]:
    """The Forward of kernels/block.py: o in q's dtype, lse."""
    p = problem(q, k, mask)
    ids, over_keys, _ = plan(p, mask)
    T, S = p.padded
    columns = pltpu.VMEM((p.Q, p.tiles.q, LANES), jnp.float32)
    o, lse = launch(
        attention_forward,
        scale,
        p,
        (ids, over_keys),
        (heads_first(q, T, p.K), heads_first(k, S), heads_first(v, S)),
        [
            jax.ShapeDtypeStruct((p.B, p.K, p.Q, T, p.D), q.dtype),
            jax.ShapeDtypeStruct((p.B, p.K, p.Q, 1, T), jnp.float32),
        ],
        [columns, columns, pltpu.VMEM((p.Q, p.tiles.q, p.D), jnp.float32)],
        p.cost(flops=4, of_queries=2, of_keys=2, over_keys=True),
        over_keys=True,
        interpret=interpret,
    )
    return heads_last(o, p.T), lse.reshape(p.B, p.K * p.Q, T)[:, :, : p.T]


def attention_forward(scale: float, step: Step, q, k, v, o, lse, m, l, a) -> None:
    """One step: a tile of queries, Q heads of them, with a run of tiles of keys."""
    step.start(l, a)

    @pl.when(step.index == 0)
    def _():
        m[...] = jnp.full_like(m, MASKED / 2)

    def add(cut, hide):
        @step.each_head
        def _(g):
            s = hide(dot(q[g], k[cut, :], (1, 1)) * scale)
            largest = jnp.maximum(m[g], jnp.max(s, axis=1, keepdims=True))
            weights = jnp.exp(s - widened(largest, s.shape[1]))
            shrink = jnp.exp(m[g] - largest)
            m[g], l[g] = largest, shrink * l[g] + jnp.sum(weights, axis=1, keepdims=True)
            a[g] = widened(shrink, a.shape[2]) * a[g] + dot(weights.astype(v.dtype), v[cut, :], (1, 0))

    step.each_tile(add)

    @step.finish
    def _():
        @step.each_head
        def _(g):
            total = jnp.where(l[g] == 0, 1.0, l[g])
            o[g] = (a[g] / widened(total, a.shape[2])).astype(o.dtype)
            lse[g] = jnp.where(l[g] == 0, MASKED, m[g] + jnp.log(total)).T[:1]
