"""Attention: of whole rows, sharded, through kernels/ring_attention.py, and of one token over a key/value cache; RoPE.

    softmax(scale q.k + mask) v       scores, softmax and accumulation float32, products in the arrays' own dtype

Grouped queries are a dimension of their own (Q queries of one key/value head K), so keys and values are never repeated.
Rows are split as the activations are: batch, tokens (zigzag), and kv heads over `tensor`; where that does not divide K,
it splits the Q queries of each head, whose key and value every device then has; where it divides neither, none.

Dimensions beyond infinite_jax/types.py: Q = H / K query heads of one key/value head, S keys, C completion slots.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.block import MASKED, Block
from kernels.ring_attention import Part, ring_attention
from sharding import rules


class Cache(NamedTuple):
    """Keys and values of the tokens seen, in the compute dtype.

    K stands before T: the batch dimensions of a product with one query a row are then the major ones, so that no
    transposed copy of the cache is made each step.
    """

    k: jax.Array  # [L, rows, K, T, D], after norm and rotary embedding
    v: jax.Array  # [L, rows, K, T, D]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns pairs (i, i + D/2) of x [..., K, S, D] by the angles [..., D/2] of its token (RoPE, arXiv 2104.09864)."""
    cos, sin = cos[..., None, None, :], sin[..., None, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q_BTKQD, parts: tuple[Part, ...], scale: float, block: Block) -> jax.Array:
    """Attention of rows to one or several parts of keys under one softmax, [B, T, K, Q, D] in q's dtype.

    Differentiable; as kernels/ring_attention.py has it, for arrays that are split over the current mesh: a part's keys
    and values are [R, S, K, D], where R divides B and row b belongs to part row b // (B / R). With `seq` above 1 tokens
    and keys are in zigzag order, and T and S multiples of 2 seq: a ValueError names what is not.
    """
    mesh = rules.current()
    if mesh is None:
        return _heads(q_BTKQD, parts, scale, block, None)
    seq = mesh.shape["seq"]
    for length in (q_BTKQD.shape[1], *(part.k_RSKD.shape[1] for part in parts)) if seq > 1 else ():
        if length % (2 * seq):
            raise ValueError(
                f"attention: {length} tokens over mesh.seq={seq}: pad them to a multiple of {2 * seq} (zigzag.padded)"
            )
    q_spec = rules.spec(mesh, ("batch", "length", "kv_heads", "heads", "head_dim"), q_BTKQD.shape)
    batch = rules.split(("batch",), q_BTKQD.shape[:1])
    parts = tuple(_spread(part, len(q_BTKQD), batch) for part in parts)
    specs = tuple(jax.tree.map(functools.partial(_spec, mesh), part) for part in parts)
    attend = functools.partial(_heads, scale=scale, block=block, axis="seq" if seq > 1 else None)
    # check_vma: the kernels' outputs carry no such types
    mapped = jax.shard_map(attend, in_specs=(q_spec, specs), out_specs=q_spec, check_vma=False)
    return mapped(q_BTKQD, parts)


def _heads(q_BTKQD, parts: tuple[Part, ...], scale: float, block: Block, axis: str | None) -> jax.Array:
    q_BTHD = q_BTKQD.reshape(*q_BTKQD.shape[:2], -1, q_BTKQD.shape[-1])
    return ring_attention(q_BTHD, parts, scale=scale, block=block, axis=axis).reshape(q_BTKQD.shape)


def _spread(part: Part, rows: int, batch: int) -> Part:
    """A part whose rows split over the `batch` devices as the queries' do: each is there as often as devices share it.

    Its masks of one row are repeated for all.
    """
    held = len(part.k_RSKD)
    copies = batch // math.gcd(held, batch)

    def wide(x, target):
        return jnp.repeat(x, target // len(x), axis=0) if len(x) != target else x

    k, v = (wide(x, held * copies) for x in (part.k_RSKD, part.v_RSKD))
    q_rows = (rows, held * copies)
    pairs = {
        name: tuple(map(wide, pair, q_rows))
        for name in ("segments", "positions")
        if (pair := getattr(part.mask, name)) is not None
    }
    if part.mask.lengths_B is not None:
        pairs["lengths_B"] = wide(part.mask.lengths_B, held * copies)
    return Part(k, v, dataclasses.replace(part.mask, **pairs))


def _spec(mesh, x: jax.Array):
    """The split of an array of a part: keys and values [R, S, K, D], masks [R, S], lengths [R], window []."""
    axes = ("batch", "length", "kv_heads", "head_dim") if x.ndim == 4 else ("batch", "length")[: x.ndim]
    return rules.spec(mesh, axes, x.shape)


def decode_attention(
    q_NKQD, prefix: Cache, prefix_length_P, completion: Cache, step: jax.Array, window: jax.Array | None, scale: float
) -> jax.Array:
    """Attention of one token a row to its prompt and its completion so far, [N, K, Q, D] in q's dtype.

    prefix [P, K, T, D] and completion [N, K, C, D] are one layer's. Row n belongs to prompt n // (N / P) and stands at
    position prefix_length_P[p] + step; it sees the prompt's first prefix_length_P[p] keys and slots 0..step. `step` is
    of all rows, i32[], or each row's own, i32[N]. A prompt's keys and values are read once for all its rows. One
    softmax over both parts.
    """
    rows, prompts, slots = len(q_NKQD), len(prefix.k), completion.k.shape[2]
    groups, split = rows // prompts, prefix.k.shape[2]
    q_PGKQD = q_NKQD.reshape(prompts, groups, *q_NKQD.shape[1:])
    before = jnp.einsum("PGKQD,PKTD->PKGQT", q_PGKQD, prefix.k, preferred_element_type=jnp.float32)
    after = jnp.einsum("NKQD,NKCD->NKQC", q_NKQD, completion.k, preferred_element_type=jnp.float32)
    step_PG1 = step.reshape(prompts if step.ndim else 1, -1, 1)  # or [1, 1, 1]
    length_P11 = prefix_length_P[:, None, None]
    seen_PGT = (jnp.arange(split) < length_P11) & _seen(length_P11 + step_PG1 - jnp.arange(split), window)
    seen_NC = _seen(step.reshape(-1, 1) - jnp.arange(slots), window)
    before = jnp.where(seen_PGT[:, None, :, None], scale * before, MASKED)
    after = jnp.where(seen_NC[:, None, None], scale * after, MASKED)
    before = before.swapaxes(1, 2).reshape(*after.shape[:-1], split)
    weights, total = _exp(jnp.concatenate([before, after], axis=-1))
    weights = weights.astype(completion.v.dtype)
    before = weights[..., :split].reshape(*q_PGKQD.shape[:-1], split).swapaxes(1, 2)
    out = jnp.einsum("PKGQT,PKTD->PKGQD", before, prefix.v, preferred_element_type=jnp.float32)
    out = out.swapaxes(1, 2).reshape(q_NKQD.shape)
    out += jnp.einsum("NKQC,NKCD->NKQD", weights[..., split:], completion.v, preferred_element_type=jnp.float32)
    return (out / total).astype(q_NKQD.dtype)


def _seen(distance: jax.Array, window: jax.Array | None) -> jax.Array:
    """Whether a key `distance` tokens back is seen. window: None where no layer has one, else i32[], 0 = none."""
    if window is None:
        return distance >= 0
    return (distance >= 0) & ((distance < window) | (window == 0))


def _exp(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numerator, and denominator with its dimension kept, of a softmax over the last axis."""
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return weights, weights.sum(axis=-1, keepdims=True)
