"""Attention as plain jnp: over whole rows, of completions to their shared prompt, and over a key/value cache; RoPE.

    softmax(scale q.k + mask) v       scores, softmax and accumulation float32, products in the arrays' own dtype

Grouped queries are a dimension of their own (Q queries of one key/value head K), so keys and values are never repeated.
The weights are divided by their sum after the product with the values, as flash attention does. Left out: packed rows
(segments) and padding masks: rows are left-aligned and padding comes last, where causality already hides it.

Dimensions beyond infinite_jax/types.py: Q = H / K query heads of one key/value head, S keys, C completion slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a part of a row that is masked as a whole must not turn into NaN


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


def attention(q_BTKQD, k_BTKD, v_BTKD, positions_BT, window: jax.Array | None, scale: float) -> jax.Array:
    """Causal attention, [B, T, K, Q, D] in q's dtype; positions_BT may be [1, T].

    A token sees those at positions up to its own; with a window > 0, only the `window` last of them, itself included.
    """
    scores = scale * jnp.einsum("BTKQD,BSKD->BKQTS", q_BTKQD, k_BTKD, preferred_element_type=jnp.float32)
    seen_BTS = _seen(positions_BT[:, :, None] - positions_BT[:, None, :], window)
    weights, total = _exp(jnp.where(seen_BTS[:, None, None], scores, MASKED))
    out = jnp.einsum("BKQTS,BSKD->BKQTD", weights.astype(v_BTKD.dtype), v_BTKD, preferred_element_type=jnp.float32)
    return jnp.moveaxis((out / total).astype(q_BTKQD.dtype), 3, 1)


def extend_attention(
    q_NCKQD, k_NCKD, v_NCKD, prefix: Cache, prefix_length_P, window: jax.Array | None, scale: float
) -> jax.Array:
    """Attention of whole completions to their prompt and, causally, to themselves, [N, C, K, Q, D] in q's dtype.

    prefix [P, K, T, D] is one layer's. Row n belongs to prompt n // (N / P), whose first prefix_length_P[p] keys it
    sees; its slot c stands at position prefix_length_P[p] + c. One softmax over both parts.
    """
    prompts, keys, slots = len(prefix.k), prefix.k.shape[2], q_NCKQD.shape[1]
    q_PGCKQD = q_NCKQD.reshape(prompts, -1, *q_NCKQD.shape[1:])
    before = jnp.einsum("PGCKQD,PKTD->PGKQCT", q_PGCKQD, prefix.k, preferred_element_type=jnp.float32)
    after = jnp.einsum("NCKQD,NSKD->NKQCS", q_NCKQD, k_NCKD, preferred_element_type=jnp.float32)
    slot_C1, length_P11 = jnp.arange(slots)[:, None], prefix_length_P[:, None, None]
    seen_PCT = (jnp.arange(keys) < length_P11) & _seen(length_P11 + slot_C1 - jnp.arange(keys), window)
    before = jnp.where(seen_PCT[:, None, None, None], scale * before, MASKED)
    after = jnp.where(_seen(slot_C1 - jnp.arange(slots), window), scale * after, MASKED)
    after = after.reshape(*before.shape[:-1], slots)
    largest = jax.lax.stop_gradient(jnp.maximum(before.max(-1, keepdims=True), after.max(-1, keepdims=True)))
    before, after = jnp.exp(before - largest), jnp.exp(after - largest)
    total = before.sum(-1, keepdims=True) + after.sum(-1, keepdims=True)
    out = jnp.einsum("PGKQCT,PKTD->PGKQCD", before.astype(prefix.v.dtype), prefix.v, preferred_element_type=jnp.float32)
    v_PGCKD = v_NCKD.reshape(prompts, -1, *v_NCKD.shape[1:])
    out += jnp.einsum("PGKQCS,PGSKD->PGKQCD", after.astype(v_NCKD.dtype), v_PGCKD, preferred_element_type=jnp.float32)
    out = (out / total).astype(q_NCKQD.dtype)
    return jnp.moveaxis(out, 4, 2).reshape(q_NCKQD.shape)


def decode_attention(
    q_NKQD, prefix: Cache, prefix_length_P, completion: Cache, step: jax.Array, window: jax.Array | None, scale: float
) -> jax.Array:
    """Attention of one token a row to its prompt and its completion so far, [N, K, Q, D] in q's dtype.

    prefix [P, K, T, D] and completion [N, K, C, D] are one layer's. Row n belongs to prompt n // (N / P) and stands at
    position prefix_length_P[p] + step; it sees the prompt's first prefix_length_P[p] keys and slots 0..step. A prompt's
    keys and values are read once for all its rows. One softmax over both parts.
    """
    rows, prompts, slots = len(q_NKQD), len(prefix.k), completion.k.shape[2]
    groups, split = rows // prompts, prefix.k.shape[2]
    q_PGKQD = q_NKQD.reshape(prompts, groups, *q_NKQD.shape[1:])
    before = jnp.einsum("PGKQD,PKTD->PKGQT", q_PGKQD, prefix.k, preferred_element_type=jnp.float32)
    after = jnp.einsum("NKQD,NKCD->NKQC", q_NKQD, completion.k, preferred_element_type=jnp.float32)
    length_P1 = prefix_length_P[:, None]
    seen_PT = (jnp.arange(split) < length_P1) & _seen(length_P1 + step - jnp.arange(split), window)
    before = jnp.where(seen_PT[:, None, None, None], scale * before, MASKED)
    after = jnp.where(_seen(step - jnp.arange(slots), window), scale * after, MASKED)
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
