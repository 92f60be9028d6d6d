"""Attention to one or more parts of keys, on one device or around a ring of them: one custom_vjp over any block kernel.

A block (kernels/block.py) gives output and lse over some of a query's keys; disjoint ones merge exactly, in float32:

    lse = logaddexp(lse_1, lse_2),  o = o_1 exp(lse_1 - lse) + o_2 exp(lse_2 - lse)

So a completion's own tokens and the prompt it shares with other samples are two parts, and the keys of each device of a
ring are more of them. In the ring (Ring Attention, arXiv 2310.01889) queries stay, keys and values pass by, one
neighbour a step; the next ones travel while the present ones are used. Tokens lie in zigzag order (kernels/zigzag.py):
device r holds chunks r and 2n - 1 - r, its `lo` and `hi`. Step 0 of a causal part is causal attention of the local
tokens. At every later step two of the four products of chunks are seen whole, the others not at all:

    A = hi x lo of src,    B = lo x lo of src if src < me, else hi x hi of src

Stacked on the batch they are one call without a causal mask, alike on all devices: no branch, and in sum the work of
causal attention. The backward pass goes round once more, given the global lse; the gradients of keys and values travel
with them and are home after n steps. The causal attention of a device's own tokens is then two calls, of each chunk to
itself first and of hi to lo last, so that the first hop and the last have work to hide behind. Left out: skipping a
step whose keys lengths, segments or windows hide, since another device may need it and all wait for the slowest.

Dimensions: R rows of a part's keys, G = B / R rows of queries for each; C tokens of a chunk.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.block import MASKED, Block, Mask
from kernels.zigzag import Pair, chunk_lengths


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
        call = _Call(_fold_mask(part), scale, block, axis)
        o, lse = call.forward(_fold(q_BTHD, part), _keys(part))
        found.append((_unfold(o, rows), _unfold(lse.swapaxes(1, 2), rows).swapaxes(1, 2)))
    o, lse = functools.reduce(_merge, found)
    o = checkpoint_name(o.astype(q_BTHD.dtype), "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return o, (q_BTHD, parts, o, lse)


def _attend_backward(scale: float, block: Block, axis: str | None, residuals, do_BTHD):
    q_BTHD, parts, o_BTHD, lse_BHT = residuals
    delta_BTH = jnp.sum(o_BTHD.astype(jnp.float32) * do_BTHD, axis=-1)
    dq_BTHD, d_parts = [], []
    for part in parts:
        call = _Call(_fold_mask(part), scale, block, axis)
        lse, delta = (_fold(x, part).swapaxes(1, 2) for x in (lse_BHT.swapaxes(1, 2), delta_BTH))
        queries = _Queries(_fold(q_BTHD, part), _fold(o_BTHD, part), lse, delta, _fold(do_BTHD, part))
        dq, dk, dv = call.backward(queries, _keys(part))
        dq_BTHD.append(_unfold(dq, len(q_BTHD)))
        d_parts.append(Part(dk.astype(part.k_RSKD.dtype), dv.astype(part.v_RSKD.dtype), None))
    return functools.reduce(_add, dq_BTHD).astype(q_BTHD.dtype), tuple(d_parts)


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


def _merge(a, b):
    """Output and lse of two disjoint sets of keys as one's. What a query does not see may hold any finite output."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    floor = jnp.maximum(lse, MASKED / 2)  # exp(MASKED - floor) is 0 even where both are masked
    w_a, w_b = (jnp.exp(x - floor).swapaxes(1, 2)[..., None] for x in (lse_a, lse_b))
    return o_a * w_a + o_b * w_b, lse


def _add(a, b):
    return a.astype(jnp.float32) + b


class _Keys(NamedTuple):
    """What travels."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    positions: jax.Array | None


def _keys(part: Part) -> _Keys:
    return _Keys(*part[:2], *(pair and pair[1] for pair in (part.mask.segments, part.mask.positions)))


class _Queries(NamedTuple):
    """What the backward pass needs of the queries, which stay."""

    q: jax.Array
    o: jax.Array
    lse: jax.Array  # [R, H, T], as delta
    delta: jax.Array
    do: jax.Array


class _Call(NamedTuple):
    """Attention to one part, around the ring if there is one. Totals are of one piece or, if causal, of lo and hi."""

    mask: Mask  # of the local queries and the local keys
    scale: float
    block: Block
    axis: str | None

    def forward(self, q, keys: _Keys) -> tuple[jax.Array, jax.Array]:
        """o [R, T, H, D], float32 or, if nothing was merged, as the block left it, and lse [R, H, T]."""
        if self.devices == 1:
            return self.block.forward(q, keys.k, keys.v, self.mask, self.scale)

        def visit(total, keys, step):
            if self.mask.causal and step:
                return self.forward_pair(total, q, keys, step)
            o, lse = self.block.forward(q, keys.k, keys.v, self.whole(keys, step), self.scale)
            found = tuple(zip(self.pieces(o), self.pieces(lse, 2)))
            return tuple(map(_merge, total, found)) if step else found

        o, lse = zip(*self.travel(keys, None, visit))
        return jnp.concatenate(o, 1), jnp.concatenate(lse, 2)

    def forward_pair(self, total, q, keys: _Keys, step: int):
        pair, mask = self.pair(keys, step)
        o, lse = self.block.forward(pair.queries(q), pair.keys(keys.k), pair.keys(keys.v), mask, self.scale)
        (o_a, o_b), (lse_a, lse_b) = jnp.split(o, 2), jnp.split(lse, 2)
        lse_lo, lse_hi = pair.halves(lse_b, MASKED)
        lo, hi = total
        return _merge(lo, (o_b, lse_lo)), _merge(_merge(hi, (o_a, lse_a)), (o_b, lse_hi))

    def backward(self, queries: _Queries, keys: _Keys):
        """dq [R, T, H, D], float32, dk, dv [R, S, K, D] in the keys' dtype; without a ring as the block left them."""
        if self.devices == 1:
            return self.block.backward(queries.q, *keys[:2], *queries[1:], self.mask, self.scale)

        def visit(total, keys, step):
            if step:  # the gradients follow their keys; what this step adds does not wait for them
                total = total[0], *self.passed_on(total[1:])
            if self.mask.causal:
                found = self.backward_pair(queries, keys, step) if step else self.backward_diagonal(queries, keys)
            else:
                mask = self.whole(keys, step)
                found = self.block.backward(queries.q, *keys[:2], *queries[1:], mask, self.scale)
                found = tuple((x,) for x in found)
            return jax.tree.map(_add, total, found) if step else found

        dq, *d_keys = self.travel(keys, None, visit)
        if self.mask.causal:  # the last hop has what is left of the device's own keys to hide behind
            d_keys = self.passed_on(tuple(d_keys))
            added, *to_keys = self.backward_below(queries, keys)
            dq = dq[0], _add(dq[1], added)
            d_keys = [(_add(lo, x), hi) for (lo, hi), x in zip(d_keys, to_keys)]
        d_keys = [jnp.concatenate([piece.astype(keys.k.dtype) for piece in pieces], 1) for pieces in d_keys]
        if not self.mask.causal:  # nothing to hide behind: the sums travel in the dtype they are returned in
            d_keys = self.passed_on(d_keys)
        return jnp.concatenate(dq, 1), *d_keys

    def backward_diagonal(self, queries: _Queries, keys: _Keys):
        """Gradients of q, k and v as (lo, hi), from the causal attention of each local chunk to itself."""

        def chunks(x, axis: int = 1):  # as rows of their own
            x = x.reshape(*x.shape[:axis], 2, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 1).reshape(-1, *x.shape[1:axis], *x.shape[axis + 1 :])

        def pieces(x):
            x = x.reshape(-1, 2, *x.shape[1:])
            return x[:, 0], x[:, 1]

        q, o, do = (chunks(x) for x in (queries.q, queries.o, queries.do))
        lse, delta = (chunks(x, 2) for x in (queries.lse, queries.delta))
        lengths = None
        if self.mask.lengths_B is not None:
            lengths = jnp.stack(self.chunk_lengths(keys, 0), 1).ravel()
        segments = self.mask.segments and tuple(map(chunks, self.mask.segments))
        mask = Mask(True, lengths, segments)
        return tuple(
            map(pieces, self.block.backward(q, chunks(keys.k), chunks(keys.v), o, lse, delta, do, mask, self.scale))
        )

    def backward_below(self, queries: _Queries, keys: _Keys):
        """Gradients of q hi, k lo and v lo, from the attention of the one to the other, all of it seen."""
        lo, hi = (lambda x, axis=1, half=half: jnp.split(x, 2, axis)[half] for half in (0, 1))
        lengths, segments = None, self.mask.segments
        if self.mask.lengths_B is not None:
            lengths, _ = self.chunk_lengths(keys, 0)
        mask = Mask(False, lengths, segments and (hi(segments[0]), lo(segments[1])))
        q, o, do = (hi(x) for x in (queries.q, queries.o, queries.do))
        lse, delta = (hi(x, 2) for x in (queries.lse, queries.delta))
        return self.block.backward(q, lo(keys.k), lo(keys.v), o, lse, delta, do, mask, self.scale)

    def backward_pair(self, queries: _Queries, keys: _Keys, step: int):
        """Gradients of q, k and v as (lo, hi)."""
        pair, mask = self.pair(keys, step)
        q, o, do = (pair.queries(x) for x in (queries.q, queries.o, queries.do))
        lse, delta = (pair.queries(x, 2) for x in (queries.lse, queries.delta))
        k, v = pair.keys(keys.k), pair.keys(keys.v)
        dq, dk, dv = (jnp.split(x, 2) for x in self.block.backward(q, k, v, o, lse, delta, do, mask, self.scale))
        halves = [(a.astype(jnp.float32), *pair.halves(b)) for a, b in (dq, dk, dv)]
        (a, lo, hi), *of_keys = halves
        return (lo, a + hi), *((a + lo, hi) for a, lo, hi in of_keys)

    def travel(self, keys: _Keys, total, visit):
        """total after visit(total, keys, step) on each device's keys, the device's own first."""
        for step in range(self.devices):
            ahead = self.passed_on(keys) if step < self.devices - 1 else None
            total = visit(total, keys, step)
            keys, total = jax.lax.optimization_barrier((ahead, total))  # else all permutes may start at once
        return total

    def passed_on(self, tree):
        ring = [(r, (r + 1) % self.devices) for r in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, ring), tree)

    @property
    def devices(self) -> int:
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    def source(self, step: int) -> jax.Array:
        """The device whose keys are here at a step."""
        return (jax.lax.axis_index(self.axis) - step) % self.devices

    def pieces(self, x, axis: int = 1):
        return tuple(jnp.split(x, 2 if self.mask.causal else 1, axis))

    def whole(self, keys: _Keys, step: int) -> Mask:
        """Mask of all local queries on all of the keys that are here."""
        lengths = None
        if self.mask.lengths_B is not None:
            lengths = sum(self.chunk_lengths(keys, step))  # lo is full before hi begins: the first keys, without a gap
        segments, positions = self.paired(keys)
        return Mask(self.mask.causal, lengths, segments, positions, self.mask.window)

    def pair(self, keys: _Keys, step: int) -> tuple[Pair, Mask]:
        pair = Pair(self.source(step) < jax.lax.axis_index(self.axis))
        lengths, segments = None, None
        if self.mask.lengths_B is not None:
            lo, hi = self.chunk_lengths(keys, step)
            lengths = pair.stack(lo, lo, hi)
        if keys.segments is not None:
            segments = pair.queries(self.mask.segments[0]), pair.keys(keys.segments)
        return pair, Mask(False, lengths, segments)

    def chunk_lengths(self, keys: _Keys, step: int) -> tuple[jax.Array, jax.Array]:
        return chunk_lengths(self.mask.lengths_B, self.source(step), self.devices, keys.k.shape[1] // 2)

    def paired(self, keys: _Keys):
        """The mask's segments and positions, with those of the keys that are here."""
        own = self.mask.segments, self.mask.positions
        return [pair and (pair[0], other) for pair, other in zip(own, (keys.segments, keys.positions))]
