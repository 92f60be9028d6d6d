"""What a Mask becomes for the TPU kernels: the kind of each tile, found before a kernel starts, and the mask in a tile.

From the smallest and largest position and segment of its queries and keys a tile is NONE: neither computed nor, before
the first and behind the last step that is needed, fetched; SOME: it computes its mask; or ALL: it needs none. Segments
and positions need not be sorted; in another order a tile may be SOME and yet show nothing, which costs time only.

Ids (segments, positions) lie along the lanes in memory, since a column would be padded there to 128 lanes; a kernel
that needs them along the sublanes turns them (`column`).
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.block import Mask
from kernels.block_tpu_tiles import LANES, Problem, Sight

NONE, SOME, ALL = 0, 1, 2  # of a tile's scores are seen


class Schedule(NamedTuple):
    """For a grid of outer tiles O, each of which accumulates over inner tiles N, a run of them a step."""

    first: jax.Array  # i32 [B O], the first step with a tile that is not NONE; 0 where there is none
    last: jax.Array  # i32 [B O], the last one
    length: jax.Array  # i32 [B], keys that count
    window: jax.Array  # i32 [1], distances below it are seen
    kind: jax.Array  # i32 [B, O, 1, N]


class Ids(NamedTuple):
    """Segments, then positions, as far as the mask has them: i32 [B, 1, T] and [B, 1, S]."""

    q: list[jax.Array]
    k: list[jax.Array]


def plan(p: Problem, mask: Mask) -> tuple[Ids, Schedule, Schedule]:
    """(ids, the schedule of each query tile's keys, the schedule of each key tile's queries)"""
    pairs = [pair for pair in (mask.segments, mask.positions) if pair is not None]
    ids = Ids(*([_padded(pair[side], p.padded[side]) for pair in pairs] for side in (0, 1)))
    length_B = jnp.full(p.B, p.S) if mask.lengths_B is None else jnp.minimum(mask.lengths_B, p.S)
    window = jnp.int32(0) if mask.window is None else mask.window
    window = jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max)
    kind = _kinds(p, ids, length_B, window)
    scalars = length_B.astype(jnp.int32), window.astype(jnp.int32)[None]
    of_keys = _schedule(kind.swapaxes(1, 2), p.tiles.q_run, *scalars)
    return ids, _schedule(kind, p.tiles.k_run, *scalars), of_keys


def _padded(ids, length: int) -> jax.Array:
    """[B, T] -> [B, 1, length], the last one repeated so that it widens no tile's range."""
    return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, length - ids.shape[1])), mode="edge")[:, None]


def _kinds(p: Problem, ids: Ids, length_B, window) -> jax.Array:
    """i32 [B, tiles of queries, tiles of keys]."""
    (I, J), (q, k, *_) = p.grid, p.tiles
    i, j = jnp.arange(I)[:, None], jnp.arange(J)
    some, every = [jnp.ones((p.B, I, J), bool)], []
    if p.sight.causal:
        some.append(i * q + q - 1 >= j * k)
        every.append(i * q >= j * k + k - 1)
    if p.sight.bounded:
        some.append(j * k < length_B[:, None, None])
        every.append(j * k + k <= length_B[:, None, None])
    low_q, high_q = ([f(x.reshape(p.B, I, 1, q), axis=3) for x in ids.q] for f in (jnp.min, jnp.max))
    low_k, high_k = ([f(x.reshape(p.B, 1, J, k), axis=3) for x in ids.k] for f in (jnp.min, jnp.max))
    if p.sight.segments:
        some.append((low_q[0] <= high_k[0]) & (low_k[0] <= high_q[0]))
        every.append((low_q[0] == high_k[0]) & (low_k[0] == high_q[0]))
    if p.sight.positions:
        nearest, farthest = low_q[-1] - high_k[-1], high_q[-1] - low_k[-1]
        some.append((farthest >= 0) & (nearest < window))
        every.append((nearest >= 0) & (farthest < window))
    some = functools.reduce(operator.and_, some)
    every = functools.reduce(operator.and_, every, some)
    return jnp.where(every, ALL, jnp.where(some, SOME, NONE)).astype(jnp.int32)


def _schedule(kind, run: int, length, window) -> Schedule:
    """kind [B, O, N]"""
    needed = (kind > NONE).reshape(*kind.shape[:2], -1, run).any(axis=3)
    first, last = jnp.argmax(needed, axis=2), needed.shape[2] - 1 - jnp.argmax(needed[:, :, ::-1], axis=2)
    last = jnp.where(needed.any(axis=2), last, 0)
    return Schedule(first.ravel().astype(jnp.int32), last.ravel().astype(jnp.int32), length, window, kind[:, :, None])


def column(row: jax.Array) -> jax.Array:
    """[1, n] along the lanes -> [n, LANES] along the sublanes, each value in all lanes. 32 bits a value."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def widened(columns: jax.Array, lanes: int) -> jax.Array:
    """[n, LANES] with each value in all lanes -> [n, lanes]."""
    return columns[:, :lanes] if lanes <= LANES else jnp.tile(columns, (1, -(-lanes // LANES)))[:, :lanes]


def seen(sight: Sight, shape: tuple[int, int], q_axis: int, apart, left, window, q_ids, k_ids) -> jax.Array:
    """The mask of a tile, bool `shape`, with the queries along q_axis.

    Args:
      apart: index of the tile's first key minus that of its first query.
      left: keys that count from the tile's first key on.
      window: as in Schedule.
      q_ids, k_ids: the tile's Ids, [n, LANES] along axis 0 (see `column`) and [1, n] along axis 1.
    """
    k_at = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
    parts = []
    if sight.causal:
        parts.append(jax.lax.broadcasted_iota(jnp.int32, shape, q_axis) - k_at >= apart)
    if sight.bounded:
        parts.append(k_at < left)
    if q_axis == 0:
        q_ids = [widened(ids, shape[1]) for ids in q_ids]
    else:
        k_ids = [widened(ids, shape[1]) for ids in k_ids]
    if sight.segments:
        parts.append(q_ids[0] == k_ids[0])
    if sight.positions:
        distance = q_ids[-1] - k_ids[-1]
        parts.append(distance >= 0)
        if sight.window:
            parts.append(distance < window)
    return functools.reduce(operator.and_, parts)
