"""Attention to one or more parts of keys, on one device or around a ring of them: one custom_vjp over any block kernel.

A block (kernels/block.py) gives output and lse over some of a query's keys; disjoint ones merge exactly, in float32:

    lse = logaddexp(lse_1, lse_2),  o = o_1 exp(lse_1 - lse) + o_2 exp(lse_2 - lse)

So a completion's own tokens and the prompt it shares with other samples are two parts, and the keys of each device of a
ring are more of them. kernels/ring.py goes around the ring.

Dimensions: R rows of a part's keys, G = B / R rows of queries for each.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.block import Block, Mask
from kernels.ring import Keys, Queries, Ring, add, merge


class Part(NamedTuple):
    """Keys that queries attend to. With R < B rows, query row b attends to row b // (B / R): samples share a prompt."""

    k_RSKD: jax.Array
    v_RSKD: jax.Array
    mask: Mask  # arrays of queries [B, T], of keys [R, S]; in a ring local too, but lengths_B [R] are of the whole row


def ring_attention(
    q_BTHD: jax.Array, parts: tuple[Part, ...], *, scale: float, block: Block, axis: str | None = None
) -> jax.Array:
    """softmax(scale q.k) v over the keys of all parts, [B, T, H, D] in q's dtype; 0 where a query sees no key.

    Args:
      parts: their keys are disjoint. One with fewer rows than q, or another length, is not causal.
      scale: static.
      block: the kernel; kernels/select.py picks it.
      axis: mesh axis over which the tokens of q and of every part are split in zigzag order; the caller is then inside
        jax.shard_map(check_vma=False), on local arrays. None: whole rows.

    For jax.checkpoint policies the residuals are named "attention_out" and "attention_lse". Raises ValueError where
    shapes and masks contradict each other.
    """
    chex.assert_rank([q_BTHD, *(x for part in parts for x in part[:2])], 4)
    for part in parts:
        _check(q_BTHD, part, ring=axis is not None and jax.lax.axis_size(axis) > 1)
    return _attend(q_BTHD, parts, scale, block, axis)


def _check(q_BTHD, part: Part, ring: bool) -> None:
    mask, shape, keys = part.mask, q_BTHD.shape, part.k_RSKD.shape
    if shape[0] % keys[0] or shape[2] % keys[2] or shape[3] != keys[3] or part.v_RSKD.shape != keys:
        raise ValueError(
            f"attention: queries {shape} do not fit keys {keys} and values {part.v_RSKD.shape}: rows and heads of the "
            "queries must be multiples of theirs, the width the same"
        )
    if part.k_RSKD.dtype != part.v_RSKD.dtype:
        raise ValueError(
            f"attention: keys in {part.k_RSKD.dtype}, values in {part.v_RSKD.dtype}: cast one to the other"
        )
    if mask.causal and shape[:2] != keys[:2]:
        raise ValueError(f"attention: a causal part needs as many keys as queries: {keys[:2]}, not {shape[:2]}")
    if mask.causal and mask.positions is not None:
        raise ValueError("attention: Mask(causal=True, positions=...): positions are causal by themselves, drop causal")
    if mask.window is not None and mask.positions is None:
        raise ValueError("attention: Mask(window=...) needs positions, between which it is measured")
    if ring and keys[1] % 2:
        raise ValueError(f"attention: {keys[1]} tokens a device are not two chunks: pad rows to zigzag.padded")
    for pair in (mask.segments, mask.positions):
        if pair is not None:
            chex.assert_shape(pair, [shape[:2], keys[:2]])
    if mask.lengths_B is not None:
        chex.assert_shape(mask.lengths_B, keys[:1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(q_BTHD, parts: tuple[Part, ...], scale: float, block: Block, axis: str | None):
    return _attend_forward(q_BTHD, parts, scale, block, axis)[0]


def _attend_forward(q_BTHD, parts: tuple[Part, ...], scale: float, block: Block, axis: str | None):
    rows = len(q_BTHD)
    found = []
    for part in parts:
        call = Ring(_fold_mask(part), scale, block, axis)
        o, lse = call.forward(_fold(q_BTHD, part), _keys(part))
        found.append((_unfold(o, rows), _unfold(lse.swapaxes(1, 2), rows).swapaxes(1, 2)))
    o, lse = functools.reduce(merge, found)
    o = checkpoint_name(o.astype(q_BTHD.dtype), "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return o, (q_BTHD, parts, o, lse)


def _attend_backward(scale: float, block: Block, axis: str | None, residuals, do_BTHD):
    q_BTHD, parts, o_BTHD, lse_BHT = residuals
    delta_BTH = jnp.sum(o_BTHD.astype(jnp.float32) * do_BTHD, axis=-1)
    dq_BTHD, d_parts = [], []
    for part in parts:
        call = Ring(_fold_mask(part), scale, block, axis)
        lse, delta = (_fold(x, part).swapaxes(1, 2) for x in (lse_BHT.swapaxes(1, 2), delta_BTH))
        queries = Queries(_fold(q_BTHD, part), _fold(o_BTHD, part), lse, delta, _fold(do_BTHD, part))
        dq, dk, dv = call.backward(queries, _keys(part))
        dq_BTHD.append(_unfold(dq, len(q_BTHD)))
        d_parts.append(Part(dk, dv, None))
    return functools.reduce(add, dq_BTHD).astype(q_BTHD.dtype), tuple(d_parts)


_attend.defvjp(_attend_forward, _attend_backward)


def _fold(x_BT, part: Part):
    """[B, T, ...] -> [R, G x T, ...]: the queries of one row of keys as one row."""
    rows = len(part.k_RSKD)
    return x_BT.reshape(rows, -1, *x_BT.shape[2:]) if rows != len(x_BT) else x_BT


def _unfold(x_RT, rows: int):
    return x_RT.reshape(rows, -1, *x_RT.shape[2:]) if rows != len(x_RT) else x_RT


def _fold_mask(part: Part) -> Mask:
    fold = lambda pair: pair and (_fold(pair[0], part), pair[1])  # noqa: E731
    mask = part.mask
    return Mask(mask.causal, mask.lengths_B, fold(mask.segments), fold(mask.positions), mask.window)


def _keys(part: Part) -> Keys:
    return Keys(*part[:2], *(pair and pair[1] for pair in (part.mask.segments, part.mask.positions)))
