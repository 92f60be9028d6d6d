"""Backward kernels of a block on Hopper: one that sums dq over keys, one that sums dk and dv over queries.

    p = 2^(s - lse),  ds = p (do.v - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do

Each recomputes p: two products of seven more than one kernel for all three would need. That one would have to add dq
up in memory, in an order that changes from run to run. A program has 128 queries (dq) or 128 keys of one key/value head
(dk and dv, summed over the head's queries), 64 a computing warpgroup; a third warpgroup fetches the other side's tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import block_mgpu_tiles as tiles
from kernels.block import Mask


def backward(
    q_BTHD, k_BSKD, v_BSKD, lse_BHT, delta_BHT, do_BTHD, mask: Mask, scale: float, sizes=None, interpret=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in their arrays' dtype; see kernels/block.py. interpret: pallas's, for tests on a CPU."""
    sizes = sizes or tiles.SIZES[q_BTHD.shape[-1]]
    given = (q_BTHD, k_BSKD, v_BSKD, lse_BHT, delta_BHT, do_BTHD, mask, scale, sizes, interpret)
    dk, dv = _keys_gradient(*given)
    return _queries_gradient(*given), dk, dv


def _queries_gradient(q, k, v, lse, delta, do, mask, scale, sizes, interpret):
    (_, T, H, D), (S, K), groups = q.shape, k.shape[1:3], tiles.WARPGROUPS
    keys, stages = sizes.keys_dq, sizes.stages_backward
    rule, ids = tiles.rule(mask, S, keys), tiles.ids(mask, tiles.OUTER, keys)
    table = tiles.table(mask, T, S, tiles.OUTER, keys)
    q, do = (tiles.padded(x, tiles.OUTER, 1) for x in (q, do))
    lse, delta = (tiles.padded(x, tiles.OUTER, 2) for x in (lse * tiles.LOG2E, delta))
    k, v = (tiles.padded(x, keys, 1) for x in (k, v))
    scratch = [
        *[tiles.matrix(groups, tiles.ROWS, D, dtype=q.dtype)] * 2,  # queries, and dq in the end; do
        *[tiles.matrix(stages, keys, D, dtype=q.dtype)] * 2,
        *[plgpu.SMEM((groups, tiles.ROWS), jnp.float32)] * 2,  # lse, delta
        *[plgpu.SMEM((groups, tiles.ROWS), jnp.int32)] * rule.ids,
        *[plgpu.SMEM((stages, keys), jnp.int32)] * rule.ids,
        plgpu.Barrier(num_barriers=groups, num_arrivals=4 + rule.ids),  # what belongs to the queries is there
        plgpu.Barrier(num_barriers=stages, num_arrivals=2 + rule.ids),  # keys and values are there
        plgpu.Barrier(num_barriers=stages, num_arrivals=groups),  # and done with
    ]
    return plgpu.kernel(
        functools.partial(_queries_program, rule, scale),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch,
        grid=(len(q) * K, q.shape[1] // tiles.OUTER, H // K),
        grid_names=("row", "tile", "head"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_queries_gradient",
        interpret=interpret,
    )(q, k, v, lse, delta, do, table, *ids.q, *ids.k)[:, :T]


def _queries_program(rule, scale, q_ref, k_ref, v_ref, lse_ref, delta_ref, do_ref, table_ref, *refs):
    """One program. refs: ids of queries, of keys, output, scratch."""
    (q_ids, k_ids), refs = tiles.split(rule, refs)
    (dq_ref, q_own, do_own, k_own, v_own, lse_own, delta_own), refs = refs[:7], refs[7:]
    (q_ids_own, k_ids_own), (q_there, k_there, k_free) = tiles.split(rule, refs)
    warpgroup, kv_heads, (stages, keys) = lax.axis_index("warpgroup"), k_ref.shape[2], k_own.shape[:2]
    row, kv_head = (op(lax.axis_index("row"), jnp.int32(kv_heads)) for op in (lax.div, lax.rem))
    head = kv_head * (q_ref.shape[2] // kv_heads) + lax.axis_index("head")
    tile = q_ref.shape[1] // tiles.OUTER - 1 - lax.axis_index("tile")  # the longest of a causal row come first
    span = tiles.span(table_ref, row, tile)

    @pl.when(warpgroup < tiles.WARPGROUPS)
    def compute():
        plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
        own = warpgroup
        q_low = tile * tiles.OUTER + own * tiles.ROWS
        rows = pl.ds(q_low, tiles.ROWS)
        copies = [(q_ref.at[row, rows, head], q_own), (do_ref.at[row, rows, head], do_own)]
        copies += [(lse_ref.at[row, head, rows], lse_own), (delta_ref.at[row, head, rows], delta_own)]
        copies += [(ids.at[row, rows], ids_own) for ids, ids_own in zip(q_ids, q_ids_own)]
        for there, here in copies:
            plgpu.copy_gmem_to_smem(there, here.at[own], q_there.at[own])
        plgpu.barrier_wait(q_there.at[own])
        lse, delta = (tiles.load(x.at[own], tiles.LINES) for x in (lse_own, delta_own))

        def visit(step, dq, masked: bool):
            at = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(k_there.at[at])

            def weigh(s):
                p = jnp.exp2(s * (scale * tiles.LOG2E) - tiles.spread(lse, s.shape, 0))
                if not masked:
                    return p
                lines = [tiles.load(x.at[own], tiles.LINES) for x in q_ids_own]
                columns = [tiles.load(x.at[at], tiles.COLUMNS) for x in k_ids_own]
                k_low = (span[tiles.FIRST] + step) * keys
                return jnp.where(tiles.seen(rule, s.shape, 0, q_low, k_low, span, lines, columns), p, 0.0)

            k_own_T, v_own_T = (tiles.transposed(x.at[at]) for x in (k_own, v_own))
            p, dp = tiles.two_products(q_own.at[own], k_own_T, do_own.at[own], v_own_T, weigh)
            ds = (p * (dp - tiles.spread(delta, p.shape, 0))).astype(q_ref.dtype)
            dq = tiles.accumulate(dq, ds, k_own.at[at])
            plgpu.barrier_arrive(k_free.at[at])
            return dq

        dq = tiles.visit_all(rule, span, visit, tiles.constant((tiles.ROWS, q_ref.shape[-1]), 0))
        q_own.at[own][...] = (dq * scale).astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_own.at[own], dq_ref.at[row, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tiles.WARPGROUPS)
    def fetch():
        def copies(step):
            rows = pl.ds((span[tiles.FIRST] + step) * keys, keys)
            return [
                (k_ref.at[row, rows, kv_head], k_own),
                (v_ref.at[row, rows, kv_head], v_own),
                *[(ids.at[row, rows], ids_own) for ids, ids_own in zip(k_ids, k_ids_own)],
            ]

        tiles.fetch_all(span[tiles.STOP] - span[tiles.FIRST], stages, copies, k_there, k_free)


def _keys_gradient(q, k, v, lse, delta, do, mask, scale, sizes, interpret):
    (_, T, _, D), (S, K), groups = q.shape, k.shape[1:3], tiles.WARPGROUPS
    queries, stages = sizes.queries_dkv, sizes.stages_backward
    rule, ids = tiles.rule(mask, S, tiles.OUTER), tiles.ids(mask, queries, tiles.OUTER)
    table = tiles.table(mask, T, S, queries, tiles.OUTER, outer_keys=True)
    q, do = (tiles.padded(x, queries, 1) for x in (q, do))
    lse, delta = (tiles.padded(x, queries, 2) for x in (lse * tiles.LOG2E, delta))
    k, v = (tiles.padded(x, tiles.OUTER, 1) for x in (k, v))
    scratch = [
        *[tiles.matrix(groups, tiles.ROWS, D, dtype=q.dtype)] * 2,  # keys and values, and their gradients in the end
        *[tiles.matrix(stages, queries, D, dtype=q.dtype)] * 2,  # queries, do
        *[plgpu.SMEM((stages, queries), jnp.float32)] * 2,  # lse, delta
        *[plgpu.SMEM((stages, queries), jnp.int32)] * rule.ids,
        *[plgpu.SMEM((groups, tiles.ROWS), jnp.int32)] * rule.ids,
        plgpu.Barrier(num_barriers=groups, num_arrivals=2 + rule.ids),  # what belongs to the keys is there
        plgpu.Barrier(num_barriers=stages, num_arrivals=4 + rule.ids),  # what belongs to the queries is there
        plgpu.Barrier(num_barriers=stages, num_arrivals=groups),  # and done with
    ]
    dk, dv = plgpu.kernel(
        functools.partial(_keys_program, rule, scale),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=scratch,
        grid=(len(q) * K, k.shape[1] // tiles.OUTER),
        grid_names=("row", "tile"),
        num_threads=groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_keys_gradient",
        interpret=interpret,
    )(q, k, v, lse, delta, do, table, *ids.q, *ids.k)
    return dk[:, :S], dv[:, :S]


def _keys_program(rule, scale, q_ref, k_ref, v_ref, lse_ref, delta_ref, do_ref, table_ref, *refs):
    """One program; scores lie with their keys along the rows. refs: ids of queries, of keys, outputs, scratch."""
    (q_ids, k_ids), refs = tiles.split(rule, refs)
    (dk_ref, dv_ref, k_own, v_own, q_own, do_own, lse_own, delta_own), refs = refs[:8], refs[8:]
    (q_ids_own, k_ids_own), (k_there, q_there, q_free) = tiles.split(rule, refs)
    warpgroup, kv_heads, dtype = lax.axis_index("warpgroup"), k_ref.shape[2], q_ref.dtype
    row, kv_head = (op(lax.axis_index("row"), jnp.int32(kv_heads)) for op in (lax.div, lax.rem))
    heads, tile, (stages, queries) = q_ref.shape[2] // kv_heads, lax.axis_index("tile"), q_own.shape[:2]
    span = tiles.span(table_ref, row, tile)
    steps = span[tiles.STOP] - span[tiles.FIRST]  # a head

    @pl.when(warpgroup < tiles.WARPGROUPS)
    def compute():
        plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
        own = warpgroup
        k_low = tile * tiles.OUTER + own * tiles.ROWS
        rows = pl.ds(k_low, tiles.ROWS)
        copies = [(k_ref.at[row, rows, kv_head], k_own), (v_ref.at[row, rows, kv_head], v_own)]
        copies += [(ids.at[row, rows], ids_own) for ids, ids_own in zip(k_ids, k_ids_own)]
        for there, here in copies:
            plgpu.copy_gmem_to_smem(there, here.at[own], k_there.at[own])
        plgpu.barrier_wait(k_there.at[own])

        def visit(head, step, state, masked: bool):
            dk, dv = state
            at = lax.rem(head * steps + step, jnp.int32(stages))
            plgpu.barrier_wait(q_there.at[at])

            def weigh(s):
                lse = tiles.load(lse_own.at[at], tiles.COLUMNS)
                p = jnp.exp2(s * (scale * tiles.LOG2E) - tiles.spread(lse, s.shape, 1))
                if not masked:
                    return p
                lines = [tiles.load(x.at[own], tiles.LINES) for x in k_ids_own]
                columns = [tiles.load(x.at[at], tiles.COLUMNS) for x in q_ids_own]
                q_low = (span[tiles.FIRST] + step) * queries
                return jnp.where(tiles.seen(rule, s.shape, 1, q_low, k_low, span, columns, lines), p, 0.0)

            q_own_T, do_own_T = (tiles.transposed(x.at[at]) for x in (q_own, do_own))
            p, dp = tiles.two_products(k_own.at[own], q_own_T, v_own.at[own], do_own_T, weigh)

            def ds():
                delta = tiles.load(delta_own.at[at], tiles.COLUMNS)
                return (p * (dp - tiles.spread(delta, p.shape, 1))).astype(dtype)

            dv, dk = tiles.accumulate_two(dv, p.astype(dtype), do_own.at[at], dk, ds, q_own.at[at])
            plgpu.barrier_arrive(q_free.at[at])
            return dk, dv

        def visit_head(head, state):
            return tiles.visit_all(rule, span, functools.partial(visit, head), state)

        zero = tiles.constant((tiles.ROWS, q_ref.shape[-1]), 0)
        dk, dv = lax.fori_loop(0, heads, visit_head, (zero, zero))
        k_own.at[own][...], v_own.at[own][...] = (dk * scale).astype(dtype), dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_own.at[own], dk_ref.at[row, rows, kv_head])
        plgpu.copy_smem_to_gmem(v_own.at[own], dv_ref.at[row, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tiles.WARPGROUPS)
    def fetch():
        def copies(step):
            head = kv_head * heads + lax.div(step, steps)
            rows = pl.ds((span[tiles.FIRST] + lax.rem(step, steps)) * queries, queries)
            return [
                (q_ref.at[row, rows, head], q_own),
                (do_ref.at[row, rows, head], do_own),
                (lse_ref.at[row, head, rows], lse_own),
                (delta_ref.at[row, head, rows], delta_own),
                *[(ids.at[row, rows], ids_own) for ids, ids_own in zip(q_ids, q_ids_own)],
            ]

        tiles.fetch_all(heads * steps, stages, copies, q_there, q_free)
