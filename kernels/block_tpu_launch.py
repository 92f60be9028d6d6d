"""Layouts inside the TPU kernels (kernels/block_tpu.py), and what the three of them do alike.

Heads come before tokens and both lengths are padded to whole tiles: queries [B, K, Q, T, D], keys [B, K, S, D]; what a
query has one number of lies along the lanes, [B, K, Q, 1, T]. A kernel's grid is (B, K, outer tiles, steps): either the
outer tiles are queries and the steps run over keys, or the other way round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.block import MASKED
from kernels.block_tpu_mask import ALL, SOME, Ids, Schedule, column, seen
from kernels.block_tpu_tiles import LANES, Problem


def heads_first(x, length: int, groups: int | None = None) -> jax.Array:
    """[B, T, H, D] -> [B, H, length, D], or with groups K -> [B, K, H / K, length, D]; zeros behind T."""
    x = jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))
    return x if groups is None else x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def heads_last(x, length: int) -> jax.Array:
    """The inverse of heads_first, from either form."""
    x = x.reshape(x.shape[0], -1, *x.shape[-2:])
    return jnp.swapaxes(x[:, :, :length], 1, 2)


def rows_first(x_BHT, p: Problem) -> jax.Array:
    """lse or delta [B, H, T] -> [B, K, Q, 1, padded T]; 0 behind T and where a query sees nothing: all masked."""
    x = jnp.where(x_BHT <= MASKED / 2, 0.0, x_BHT)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, p.padded[0] - p.T)))
    return x.reshape(p.B, p.K, p.Q, 1, p.padded[0])


class Step(NamedTuple):
    """Where a kernel stands in its grid, and what it knows of the mask there. Its fields are refs or traced scalars."""

    p: Problem
    over_keys: bool  # the outer tile is of queries, the steps run over keys; else the other way round
    row: Any  # of the batch
    outer: Any  # index of the outer tile
    index: Any  # of the step
    length: Any  # keys of the row that count
    window: Any
    kind: Any  # [1, inner tiles]
    inner_ids: list[Any]  # [1, inner tokens of the step]
    outer_ids: list[Any]  # [1, outer tokens]
    outer_columns: list[Any]  # [outer tokens, LANES], scratch

    @property
    def run(self) -> int:
        return self.p.tiles.k_run if self.over_keys else self.p.tiles.q_run

    @property
    def inner(self) -> int:
        """Tokens of an inner tile."""
        return self.p.tiles.k if self.over_keys else self.p.tiles.q

    def start(self, *accumulators) -> None:
        """Before the first step: accumulators are 0, the outer ids are columns."""

        @pl.when(self.index == 0)
        def _():
            for ref in accumulators:
                ref[...] = jnp.zeros_like(ref)
            for row, columns in zip(self.outer_ids, self.outer_columns):
                columns[...] = column(row[...])

    def each_tile(self, add) -> None:
        """Calls add(cut, hide) for the step's tiles that are not NONE: their slice of the inner tokens, and a function
        that hides the scores [outer tokens, inner tokens] which the mask does."""

        def tile(c, _):
            cut = pl.ds(pl.multiple_of(c * self.inner, self.inner), self.inner)
            kind = self.kind[0, self.index * self.run + c]
            if any(self.p.sight):
                pl.when(kind == SOME)(lambda: add(cut, lambda s: self.hide(s, c, cut)))
            pl.when(kind == ALL)(lambda: add(cut, lambda s: s))

        jax.lax.fori_loop(0, self.run, tile, None)

    def hide(self, s, c, cut):
        inner, columns = [ids[:, cut] for ids in self.inner_ids], [ids[...] for ids in self.outer_columns]
        i, j = self.outer, self.index * self.run + c
        (i, j), (q_ids, k_ids) = ((i, j), (columns, inner)) if self.over_keys else ((j, i), (inner, columns))
        q_at, k_at = i * self.p.tiles.q, j * self.p.tiles.k
        q_axis = 0 if self.over_keys else 1
        visible = seen(self.p.sight, s.shape, q_axis, k_at - q_at, self.length - k_at, self.window, q_ids, k_ids)
        return jnp.where(visible, s, MASKED)

    def each_head(self, body) -> None:
        """body(g) for each query head of the key/value head."""
        jax.lax.fori_loop(0, self.p.Q, lambda g, _: body(g), None)

    def finish(self, body) -> None:
        """body() after the last step."""
        pl.when(self.index == pl.num_programs(3) - 1)(body)


def launch(
    kernel,
    scale: float,
    p: Problem,
    mask: tuple[Ids, Schedule],
    arrays,
    out,
    scratch,
    cost,
    *,
    over_keys: bool,
    interpret,
):
    """Runs kernel(scale, step, *arrays, *out, *scratch) on refs of blocks of `arrays` and `out`, which are as above."""
    ids, schedule = mask
    (I, J), tiles = p.grid, p.tiles
    outer, inner, run = (I, J, tiles.k_run) if over_keys else (J, I, tiles.q_run)
    q, k = (tiles.q, tiles.k * run) if over_keys else (tiles.q * run, tiles.k)

    def body(_first, _last, length, window, kind, q_ids, k_ids, *refs):
        row, columns = pl.program_id(0), refs[-1]
        inner_ids, outer_ids = (k_ids, q_ids) if over_keys else (q_ids, k_ids)
        at = pl.program_id(2), pl.program_id(3)
        kernel(
            scale, Step(p, over_keys, row, *at, length[row], window[0], kind, inner_ids, outer_ids, columns), *refs[:-1]
        )

    columns = [pltpu.VMEM((q if over_keys else k, LANES), jnp.int32) for _ in ids.q]
    specs = _specs(p, outer, q, k, over_keys)
    of_kind = pl.BlockSpec((None, None, 1, inner), lambda b, h, o, *_: (b, o, 0, 0), memory_space=pltpu.SMEM)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(p.B, p.K, outer, inner // run),
            in_specs=[of_kind, [specs.q_ids for _ in ids.q], [specs.k_ids for _ in ids.k], *map(specs.of, arrays)],
            out_specs=[specs.of(x) for x in out],
            scratch_shapes=[*scratch, columns],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=p.vmem
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=kernel.__name__,
    )(*schedule, ids.q, ids.k, *arrays)


class _Specs(NamedTuple):
    queries: pl.BlockSpec
    rows: pl.BlockSpec
    keys: pl.BlockSpec
    q_ids: pl.BlockSpec
    k_ids: pl.BlockSpec

    def of(self, x) -> pl.BlockSpec:
        return self.keys if len(x.shape) == 4 else self.rows if x.shape[3] == 1 else self.queries


def _specs(p: Problem, outer: int, q: int, k: int, over_keys: bool) -> _Specs:
    """Blocks of q queries and of k keys."""

    def at_outer(b, h, o, *_):
        return o

    def at_inner(b, h, o, step, first, last, *_):
        return jnp.clip(step, first[b * outer + o], last[b * outer + o])  # the same block again is not fetched again

    q_at, k_at = (at_outer, at_inner) if over_keys else (at_inner, at_outer)
    return _Specs(
        queries=pl.BlockSpec((None, None, p.Q, q, p.D), lambda *at: (*at[:2], 0, q_at(*at), 0)),
        rows=pl.BlockSpec((None, None, p.Q, 1, q), lambda *at: (*at[:2], 0, 0, q_at(*at))),
        keys=pl.BlockSpec((None, None, k, p.D), lambda *at: (*at[:2], k_at(*at), 0)),
        q_ids=pl.BlockSpec((None, 1, q), lambda *at: (at[0], 0, q_at(*at))),
        k_ids=pl.BlockSpec((None, 1, k), lambda *at: (at[0], 0, k_at(*at))),
    )


def dot(a, b, contract: tuple[int, int]) -> jax.Array:
    """a.b over one axis of each, float32, of operands of one dtype; float32 operands are not rounded to bfloat16."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)
