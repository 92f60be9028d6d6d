"""The block as plain jnp, for every backend and every mask: tiles of scores under one lax.scan.

Forward, a tile at a time, with the running maximum m, sum l and unnormalised output of each query (online softmax):

    m' = max(m, max s),  l' = l exp(m - m') + sum exp(s - m'),  o' = o exp(m - m') + exp(s - m') v

(Milakov & Gimelshein, arXiv 1805.02867; FlashAttention-2, 2307.08691). Backward, a tile computes its weights anew from
lse. Memory grows with T + S, never with T x S; tiles that causality hides are left out. What fits one tile takes no
scan: it is dense attention. Grouped queries are a dimension of the products, so keys and values are never repeated.
Left out: tiles that segments, lengths or windows hide are computed all the same, since which they are depends on data.

Dimensions inside: queries [B, K, Q, T, X], keys [B, K, S, X]; of a tile, C queries and R = Q x C rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block import MASKED, Block, Mask

CHUNK = 256  # keys of a tile and, in a causal one, queries
AREA = CHUNK * CHUNK  # scores of a tile, for each head: few keys leave room for more queries

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def forward(q_BTHD, k_BSKD, v_BSKD, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, D] and lse [B, H, T] of one block, both float32; kernels/block.py says what they are."""
    tiles = _tiles(q_BTHD, k_BSKD, mask)
    q, k, v = tiles.queries(q_BTHD), tiles.keys(k_BSKD), tiles.keys(v_BSKD)

    def step(carry, tile):
        i, j = tile
        o, m, l = (tiles.rows(x, i) for x in carry)
        s = scale * _dot("BKRD,BKSD->BKRS", tiles.rows(q, i), tiles.columns(k, j))
        s = tiles.hide(s, i, j, MASKED)
        m_new = jnp.maximum(m, s.max(-1, keepdims=True))
        weights, kept = jnp.exp(s - m_new), jnp.exp(m - m_new)
        l = l * kept + weights.sum(-1, keepdims=True)
        o = o * kept + _dot("BKRS,BKSD->BKRD", weights.astype(v.dtype), tiles.columns(v, j))
        return tuple(tiles.with_rows(x, new, i) for x, new in zip(carry, (o, m_new, l))), None

    zero = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), zero + MASKED / 2, zero  # half: exp of what is masked is then 0, not 1
    o, m, l = (x[:, :, :, : tiles.length_T] for x in tiles.run(step, start))
    total = jnp.where(l > 0, l, 1)
    lse = jnp.where(l > 0, m + jnp.log(total), MASKED)
    o_BTKQD = jnp.moveaxis(o / total, 3, 1)
    return o_BTKQD.reshape(q_BTHD.shape), lse.reshape(len(lse), -1, tiles.length_T)


def backward(q_BTHD, k_BSKD, v_BSKD, o_BTHD, lse_BHT, delta_BHT, do_BTHD, mask: Mask, scale: float):
    """Float32 gradients of q, k and v from one block, given lse and delta of the whole row; o is not needed."""
    del o_BTHD
    tiles = _tiles(q_BTHD, k_BSKD, mask)
    q, k, v, do = tiles.queries(q_BTHD), tiles.keys(k_BSKD), tiles.keys(v_BSKD), tiles.queries(do_BTHD)
    lse, delta = (tiles.queries(x.swapaxes(1, 2)[..., None]) for x in (lse_BHT, delta_BHT))

    def step(carry, tile):
        i, j = tile
        dq, dk, dv = carry
        q_i, do_i, lse_i, delta_i = (tiles.rows(x, i) for x in (q, do, lse, delta))
        k_j, v_j = tiles.columns(k, j), tiles.columns(v, j)
        p = jnp.exp(scale * _dot("BKRD,BKSD->BKRS", q_i, k_j) - lse_i)
        p = tiles.hide(p, i, j, 0.0)
        ds = (scale * p * (_dot("BKRD,BKSD->BKRS", do_i, v_j) - delta_i)).astype(k.dtype)
        dq_i = tiles.rows(dq, i) + _dot("BKRS,BKSD->BKRD", ds, k_j)
        dk_j = tiles.columns(dk, j) + _dot("BKRS,BKRD->BKSD", ds, q_i)
        dv_j = tiles.columns(dv, j) + _dot("BKRS,BKRD->BKSD", p.astype(do.dtype), do_i)
        return (tiles.with_rows(dq, dq_i, i), tiles.with_columns(dk, dk_j, j), tiles.with_columns(dv, dv_j, j)), None

    dq, dk, dv = tiles.run(step, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    dq_BTKQD = jnp.moveaxis(dq[:, :, :, : tiles.length_T], 3, 1)
    return dq_BTKQD.reshape(q_BTHD.shape), *(x[:, :, : tiles.keys_S].swapaxes(1, 2) for x in (dk, dv))


class _Tiles(NamedTuple):
    """How T queries and S keys are cut: into pieces of C queries and of `width` keys, the last ones padded."""

    mask: Mask
    heads_K: int
    length_T: int
    keys_S: int
    C: int
    width: int

    def run(self, step, carry):
        """`step` over the tiles that causality leaves; one tile needs no scan."""
        i, j = np.indices((-(-self.length_T // self.C), -(-self.keys_S // self.width))).reshape(2, -1)
        if self.mask.causal:
            i, j = i[j <= i], j[j <= i]
        if len(i) == 1:
            return step(carry, (0, 0))[0]
        return jax.lax.scan(step, carry, (jnp.asarray(i), jnp.asarray(j)))[0]

    def queries(self, x_BTHX):
        rows, length, heads, size = x_BTHX.shape
        x = x_BTHX.reshape(rows, length, self.heads_K, heads // self.heads_K, size)
        return _pad(x.transpose(0, 2, 3, 1, 4), 3, self.C)

    def keys(self, x_BSKD):
        return _pad(x_BSKD.swapaxes(1, 2), 2, self.width)

    def rows(self, x, i):
        """Piece i of queries [B, K, Q, T, X] as [B, K, R, X]: a CPU is slow to contract Q and C as two."""
        return _cut(x, 3, i, self.C).reshape(*x.shape[:2], -1, x.shape[-1])

    def columns(self, x, j):
        return _cut(x, 2, j, self.width)

    def with_rows(self, x, new, i):
        new = new.reshape(*x.shape[:3], self.C, x.shape[-1])
        return jax.lax.dynamic_update_slice_in_dim(x, new, i * self.C, 3)

    def with_columns(self, x, new, j):
        return jax.lax.dynamic_update_slice_in_dim(x, new, j * self.width, 2)

    def hide(self, s, i, j, value: float):
        """Tile (i, j) of [B, K, R, S] with `value` where the mask hides a key."""
        seen = self.seen(i, j)
        if seen is None:
            return s
        split = s.reshape(*s.shape[:2], -1, self.C, self.width)
        return jnp.where(seen[:, None, None], split, value).reshape(s.shape)

    def seen(self, i, j) -> jax.Array | None:
        """Which keys of tile (i, j) its queries see, bool [B or 1, C, S]; None: all."""
        mask, found = self.mask, []
        rows, keys = i * self.C + jnp.arange(self.C)[:, None], j * self.width + jnp.arange(self.width)
        if mask.causal:
            found.append((keys <= rows)[None])
        elif self.keys_S % self.width:
            found.append((keys < self.keys_S)[None, None])  # the last piece's padding, which causality hides by itself
        if mask.lengths_B is not None:
            found.append((keys < mask.lengths_B[:, None])[:, None])
        if mask.segments is not None:
            q_BC1, k_B1S = self.pair(mask.segments, i, j)
            found.append(q_BC1 == k_B1S)
        if mask.positions is not None:
            q_BC1, k_B1S = self.pair(mask.positions, i, j)
            found.append(q_BC1 >= k_B1S)
            if mask.window is not None:
                found.append((q_BC1 - k_B1S < mask.window) | (mask.window == 0))
        return functools.reduce(jnp.logical_and, found) if found else None

    def pair(self, of_mask: tuple[jax.Array, jax.Array], i, j) -> tuple[jax.Array, jax.Array]:
        """A mask's arrays (q_BT, k_BS) at tile (i, j)."""
        q_BT, k_BS = _pad(of_mask[0], 1, self.C), _pad(of_mask[1], 1, self.width)
        return _cut(q_BT, 1, i, self.C)[:, :, None], _cut(k_BS, 1, j, self.width)[:, None]


def _tiles(q_BTHD, k_BSKD, mask: Mask) -> _Tiles:
    length, keys = q_BTHD.shape[1], k_BSKD.shape[1]
    width = _even(keys, CHUNK)
    return _Tiles(mask, k_BSKD.shape[2], length, keys, width if mask.causal else _even(length, AREA // width), width)


def _even(length: int, most: int) -> int:
    """Size of the fewest equal pieces of at most `most`."""
    return -(-length // -(-length // most))


def _pad(x, axis: int, multiple: int):
    tail = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, tail if a == axis else 0) for a in range(x.ndim)]) if tail else x


def _cut(x, axis: int, which, size: int):
    return jax.lax.dynamic_slice_in_dim(x, which * size, size, axis)


BLOCK = Block("xla", forward, backward)
