"""Sizes of a call of the TPU kernels (kernels/block_tpu.py): the tiles of queries and keys, and the VMEM they take.

A tile is `q` queries of one head by `k` keys: one piece of straight-line code, which the compiler unrolls. In its
schedules larger tiles spill registers and smaller ones leave the matrix units waiting. Since a step of the grid has a
price too, one step takes a tile for each query head of a key/value head and, where those are few, several tiles in a
row (a run).
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.block import Mask

LANES = 128  # of a vector register and of an HBM tile; its 8 sublanes divide any multiple of it
TILE = 512  # tokens
RUN = 8  # tiles of a step of the grid, over heads and along the run
VMEM = 16 * 2**20  # bytes: what a kernel gets unasked on every chip up to v6e


class Tiles(NamedTuple):
    q: int  # queries of a tile, of one head
    k: int  # keys of a tile
    q_run: int  # tiles of queries that a step takes where the grid runs over queries (dk and dv)
    k_run: int  # tiles of keys that a step takes where it runs over keys (forward and dq)


class Sight(NamedTuple):
    """Which parts a mask has. Static."""

    causal: bool
    bounded: bool  # by lengths, or by padding of the keys that causality does not hide
    segments: bool
    positions: bool
    window: bool


class Problem(NamedTuple):
    """Sizes of one call. Static."""

    B: int
    K: int
    Q: int  # query heads of one key/value head
    T: int
    S: int
    D: int
    dtype: np.dtype
    tiles: Tiles
    sight: Sight

    @property
    def grid(self) -> tuple[int, int]:
        """(tiles of queries, tiles of keys)"""
        return -(-self.T // self.tiles.q), -(-self.S // self.tiles.k)

    @property
    def padded(self) -> tuple[int, int]:
        """(T, S) as whole tiles"""
        return self.grid[0] * self.tiles.q, self.grid[1] * self.tiles.k

    def cost(self, flops: int, of_queries: int, of_keys: int, *, over_keys: bool) -> pl.CostEstimate:
        """Of a kernel with that many operations a score and dimension, and arrays read or written.

        What masks hide by data (lengths, segments, positions) is counted: the compiler cannot know it.
        """
        heads, size = self.B * self.K, self.dtype.itemsize
        queries = of_queries * self.Q * self.D * size + 8 * self.Q  # bytes a query, with two rows such as lse
        keys = of_keys * self.D * size
        scores = heads * self.Q * (self.T * (self.T + 1) // 2 if self.sight.causal else self.T * self.S)
        if over_keys:  # each tile of queries is there once, the keys are fetched anew for each
            moved = heads * self.T * queries + scores // (self.Q * self.tiles.q) * keys
        else:
            moved = heads * self.S * keys + scores // (self.Q * self.tiles.k) * queries
        return pl.CostEstimate(flops=flops * scores * self.D, transcendentals=scores, bytes_accessed=moved)

    @property
    def vmem(self) -> int:
        """VMEM in bytes that a kernel may take: never less than it gets unasked."""
        return max(VMEM, vmem_bytes(self.tiles, self.D, self.Q, self.dtype))


def problem(q, k, mask: Mask) -> Problem:
    """Sizes of a call with q [B, T, H, D] and k [B, S, K, D], on the chip that the program is traced for."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    tiles = choose_tiles(T, S, D, H // K, q.dtype, chip_vmem())
    bounded = mask.lengths_B is not None or (S % tiles.k > 0 and not mask.causal)
    sight = Sight(mask.causal, bounded, mask.segments is not None, mask.positions is not None, mask.window is not None)
    return Problem(B, K, H // K, T, S, D, q.dtype, tiles, sight)


def chip_vmem() -> int:
    """VMEM in bytes of a core of the chip that the program is traced for; VMEM, the smallest, if it is traced for none.

    Inside jax.shard_map that is the mesh's chip: a CPU host then compiles for a TPU what the TPU's own host would.
    """
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return VMEM


def choose_tiles(T: int, S: int, D: int, Q: int, dtype, vmem: int) -> Tiles:
    """The largest tiles, then runs, that fit into VMEM and half of the chip's `vmem` bytes, of those that pad little.

    T queries and S keys, any number; D wide; Q query heads of one key/value head.
    """
    room, sizes = min(VMEM, vmem // 2), range(TILE, 0, -LANES)
    for k_size, q_size in itertools.product(sizes, sizes):  # heads multiply the queries, so that those shrink first
        q, k = _tile(T, q_size), _tile(S, k_size)
        for run in (8, 4, 2, 1):
            tiles = Tiles(q, k, _run(-(-T // q), run), _run(-(-S // k), run))
            if run * Q <= max(RUN, Q) and vmem_bytes(tiles, D, Q, dtype) <= room:
                return tiles
    return Tiles(LANES, LANES, 1, 1)


def _run(tiles: int, most: int) -> int:
    """The longest run of at most `most` into which so many tiles divide."""
    return max(n for n in range(1, most + 1) if tiles % n == 0)


def _tile(length: int, largest: int) -> int:
    """Of the multiples of LANES from half of `largest` to it, the one that pads `length` least; of two, the larger."""
    largest = min(largest, -(-length // LANES) * LANES)
    sizes = range(max(LANES, largest // 2 // LANES * LANES), largest + 1, LANES)
    return min(sizes, key=lambda size: (-length % size, -size))


def vmem_bytes(tiles: Tiles, D: int, Q: int, dtype) -> int:
    """Bound on the VMEM of the widest kernel: two buffers an operand, what stays from tile to tile, scores."""
    size, wide = jnp.dtype(dtype).itemsize, -(-D // LANES) * LANES
    q, k, rows = Q * tiles.q * wide, tiles.k * wide, 4 * Q * tiles.q
    dq = 2 * size * (3 * q + 2 * k * tiles.k_run) + 4 * q + rows * (2 * LANES + 4)
    dkv = 2 * (2 * size * q + 2 * rows) * tiles.q_run + (8 * size + 8) * k
    return max(dq, dkv) + 6 * size * tiles.q * tiles.k
