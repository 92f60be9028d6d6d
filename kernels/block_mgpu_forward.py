"""Forward kernel of a block on Hopper: flash attention on tiles that the copy engine (TMA) brings and wgmma multiplies.

A program has 128 queries of one head, 64 a computing warpgroup; a third warpgroup only fetches keys and values into
buffers in shared memory. The two that compute take turns: one is at its softmax while the other keeps the tensor cores
busy (FlashAttention-3, arXiv 2407.08608). Online softmax in registers, float32, base 2, with s = scale log2(e) q.k:

    m' = max(m, max_k s),  l' = l 2^(m - m') + sum_k 2^(s - m'),  o' = o 2^(m - m') + 2^(s - m') v
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import block_mgpu_tiles as tiles
from kernels.block import MASKED, Mask


def forward(
    q_BTHD, k_BSKD, v_BSKD, mask: Mask, scale: float, sizes: tiles.Sizes | None = None, interpret=None
) -> tuple[jax.Array, jax.Array]:
    """Output in q's dtype and lse float32 [B, H, T]; see kernels/block.py. interpret: pallas's, for tests on a CPU."""
    (B, T, H, D), (S, K), dtype = q_BTHD.shape, k_BSKD.shape[1:3], q_BTHD.dtype
    sizes = sizes or tiles.SIZES[D]
    rule, ids = tiles.rule(mask, S, sizes.keys), tiles.ids(mask, tiles.OUTER, sizes.keys)
    table = tiles.table(mask, T, S, tiles.OUTER, sizes.keys)
    q, k, v = tiles.padded(q_BTHD, tiles.OUTER, 1), *(tiles.padded(x, sizes.keys, 1) for x in (k_BSKD, v_BSKD))
    groups = tiles.WARPGROUPS
    scratch = [
        tiles.matrix(groups, tiles.ROWS, D, dtype=dtype),  # queries, and the output in the end
        tiles.matrix(sizes.stages, sizes.keys, D, dtype=dtype),
        tiles.matrix(sizes.stages, sizes.keys, D, dtype=dtype),
        plgpu.SMEM((groups, tiles.ROWS), jnp.float32),  # lse
        *[plgpu.SMEM((groups, tiles.ROWS), jnp.int32)] * rule.ids,
        *[plgpu.SMEM((sizes.stages, sizes.keys), jnp.int32)] * rule.ids,
        plgpu.Barrier(num_barriers=groups, num_arrivals=1 + rule.ids),  # queries are there
        plgpu.Barrier(num_barriers=sizes.stages, num_arrivals=1 + rule.ids),  # keys are there
        plgpu.Barrier(num_barriers=sizes.stages),  # values are there
        plgpu.Barrier(num_barriers=sizes.stages, num_arrivals=groups),  # keys are done with
        plgpu.Barrier(num_barriers=sizes.stages, num_arrivals=groups),  # values are done with
        plgpu.Barrier(num_barriers=1, num_arrivals=groups),  # the other's turn
    ]
    o, lse = plgpu.kernel(
        functools.partial(_program, rule, sizes.stages, scale * tiles.LOG2E),
        out_type=(jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, H, q.shape[1]), jnp.float32)),
        scratch_types=scratch,
        grid=(B * K, q.shape[1] // tiles.OUTER, H // K),  # the last varies fastest: its programs read the same keys
        grid_names=("row", "tile", "head"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_forward",
        interpret=interpret,
    )(q, k, v, table, *ids.q, *ids.k)
    return o[:, :T], lse[:, :, :T]


def _program(rule: tiles.Rule, stages: int, factor: float, q_ref, k_ref, v_ref, table_ref, *refs):
    """One program. refs: ids of queries, of keys, outputs, scratch."""
    (q_ids, k_ids), refs = tiles.split(rule, refs)
    (o_ref, lse_ref, q_own, k_own, v_own, lse_own), refs = refs[:6], refs[6:]
    (q_ids_own, k_ids_own), (q_there, k_there, v_there, k_free, v_free, turn) = tiles.split(rule, refs)
    dtype, D, keys = q_ref.dtype, q_ref.shape[-1], k_own.shape[1]
    warpgroup, kv_heads = lax.axis_index("warpgroup"), k_ref.shape[2]
    row, kv_head = (op(lax.axis_index("row"), jnp.int32(kv_heads)) for op in (lax.div, lax.rem))
    head = kv_head * (q_ref.shape[2] // kv_heads) + lax.axis_index("head")
    tile = q_ref.shape[1] // tiles.OUTER - 1 - lax.axis_index("tile")  # the longest of a causal row come first
    span = tiles.span(table_ref, row, tile)
    steps = span[tiles.STOP] - span[tiles.FIRST]

    def slot(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(warpgroup < tiles.WARPGROUPS)
    def compute():
        plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
        own = warpgroup
        q_low = tile * tiles.OUTER + own * tiles.ROWS
        rows = pl.ds(q_low, tiles.ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_own.at[own], q_there.at[own])
        for ids, ids_own in zip(q_ids, q_ids_own):
            plgpu.copy_gmem_to_smem(ids.at[row, rows], ids_own.at[own], q_there.at[own])
        plgpu.barrier_wait(q_there.at[own])

        def swap_turns():
            plgpu.barrier_arrive(turn.at[0])
            plgpu.barrier_wait(turn.at[0])

        def visit(step, state, masked: bool):
            o, m, l = state
            at = slot(step)
            plgpu.barrier_wait(k_there.at[at])
            s = tiles.product(q_own.at[own], tiles.transposed(k_own.at[at]), swap_turns)
            if masked:
                k_low = (span[tiles.FIRST] + step) * keys
                lines = [tiles.load(x.at[own], tiles.LINES) for x in q_ids_own]
                columns = [tiles.load(x.at[at], tiles.COLUMNS) for x in k_ids_own]
                visible = tiles.seen(rule, s.shape, 0, q_low, k_low, span, lines, columns)
                s = jnp.where(visible, s * factor, MASKED)
            plgpu.barrier_arrive(k_free.at[at])
            inside = 1.0 if masked else factor
            m_new = jnp.maximum(m, s.max(axis=1) * inside)
            weights = jnp.exp2(s * inside - tiles.spread(m_new, s.shape, 0))
            kept = jnp.exp2(m - m_new)
            l = l * kept + weights.sum(axis=1)
            o = o * tiles.spread(kept, o.shape, 0)
            weights = weights.astype(dtype)
            swap_turns()
            plgpu.barrier_wait(v_there.at[at])
            o = tiles.accumulate(o, weights, v_own.at[at])
            plgpu.barrier_arrive(v_free.at[at])
            return o, m_new, l

        pl.when(own == 1)(swap_turns)
        state = tiles.constant((tiles.ROWS, D), 0), *(tiles.constant((tiles.ROWS,), x) for x in (MASKED / 2, 0))
        o, m, l = tiles.visit_all(rule, span, visit, state)
        pl.when(own == 0)(swap_turns)

        some = l > 0
        q_own.at[own][...] = (o * tiles.spread(jnp.where(some, 1 / l, 0.0), o.shape, 0)).astype(dtype)
        lse_own.at[own][...] = jnp.where(some, m * math.log(2) + jnp.log(l), MASKED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_own.at[own], o_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse_own.at[own], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tiles.WARPGROUPS)
    def fetch():
        plgpu.set_max_registers(tiles.FETCH_REGISTERS, action="decrease")

        @pl.loop(0, steps)
        def _(step):
            at, rows = slot(step), pl.ds((span[tiles.FIRST] + step) * keys, keys)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[at]))
            plgpu.copy_gmem_to_smem(k_ref.at[row, rows, kv_head], k_own.at[at], k_there.at[at])
            for ids, ids_own in zip(k_ids, k_ids_own):
                plgpu.copy_gmem_to_smem(ids.at[row, rows], ids_own.at[at], k_there.at[at])
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[at]))
            plgpu.copy_gmem_to_smem(v_ref.at[row, rows, kv_head], v_own.at[at], v_there.at[at])

        @pl.loop(0, jnp.minimum(steps, stages))
        def _(at):
            plgpu.barrier_wait(k_free.at[at])
            plgpu.barrier_wait(v_free.at[at])
