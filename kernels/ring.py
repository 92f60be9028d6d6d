"""Attention to one part of a row's keys, around a ring of devices that each hold some of its tokens, or on one.

In a ring (Ring Attention, arXiv 2310.01889) queries stay, keys and values pass by, one neighbour a step; the next ones
travel while the present ones are used. Tokens lie in zigzag order (kernels/zigzag.py): device r holds chunks r and 2n -
1 - r, its `lo` and `hi`. Step 0 of a causal part is causal attention of the local tokens. At every later step half of
the products of chunks are seen, and those whole:

    src < me: lo and hi of queries x lo of src's keys,    else hi of queries x lo and hi of src's keys

Of the same size on all devices, and in sum the work of causal attention; which it is, is a branch. The backward pass
goes round once more, given the global lse; the gradients of keys and values travel with them and are home after n
steps. The causal attention of a device's own tokens is then two calls, of each chunk to itself first and of hi to lo
last, so that the first hop and the last have work to hide behind. Left out: skipping a step whose keys lengths,
segments or windows hide, since another device may need it and all wait for the slowest.

Dimensions: R rows of keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.block import MASKED, Block, Mask
from kernels.zigzag import chunk_lengths


def merge(a, b):
    """Output and lse of two disjoint sets of keys as one's. What a query does not see may hold any finite output."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    floor = jnp.maximum(lse, MASKED / 2)  # exp(MASKED - floor) is 0 even where both are masked
    w_a, w_b = (jnp.exp(x - floor).swapaxes(1, 2)[..., None] for x in (lse_a, lse_b))
    return o_a * w_a + o_b * w_b, lse


def add(a, b):
    return a.astype(jnp.float32) + b


class Keys(NamedTuple):
    """What travels."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    positions: jax.Array | None


class Queries(NamedTuple):
    """What the backward pass needs of the queries, which stay."""

    q: jax.Array
    o: jax.Array
    lse: jax.Array  # [R, H, T], as delta
    delta: jax.Array
    do: jax.Array


def _all(x, axis: int = 1):
    return x


def _lo(x, axis: int = 1):
    return jnp.split(x, 2, axis)[0]


def _hi(x, axis: int = 1):
    return jnp.split(x, 2, axis)[1]


def _whole(x, half, axis: int = 1, nothing: float = 0):
    """x, of all tokens or of a half, as of all."""
    if half is _all:
        return x
    size = x.shape[axis]
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size) if half is _lo else (size, 0)
    return jnp.pad(x, width, constant_values=nothing)


class Ring(NamedTuple):
    """Attention to one part, around the ring if there is one."""

    mask: Mask  # of the local queries and the local keys
    scale: float
    block: Block
    axis: str | None

    def forward(self, q, keys: Keys) -> tuple[jax.Array, jax.Array]:
        """o [R, T, H, D], float32 or, if nothing was merged, as the block left it, and lse [R, H, T]."""

        def visit(total, keys, step):
            product = functools.partial(self.forward_product, q, keys, step)
            found = self.seen(product, step)
            return merge(total, found) if step else found

        return self.travel(keys, visit)

    def forward_product(self, q, keys: Keys, step: int, of_queries=_all, of_keys=_all):
        """o and lse of all queries from the attention of these queries to these keys."""
        mask = self.product_mask(keys, step, of_queries, of_keys)
        o, lse = self.block.forward(of_queries(q), of_keys(keys.k), of_keys(keys.v), mask, self.scale)
        return _whole(o, of_queries), _whole(lse, of_queries, 2, MASKED)

    def backward(self, queries: Queries, keys: Keys):
        """dq [R, T, H, D], float32 or, without a ring, as the block left it; dk, dv [R, S, K, D] in the keys' dtype."""
        split = self.mask.causal and self.devices > 1  # the local tokens' attention, in two

        def visit(total, keys, step):
            if step:  # the gradients follow their keys; what this step adds does not wait for them
                total = total[0], *self.passed_on(total[1:])
            product = functools.partial(self.backward_product, queries, keys, step)
            found = self.backward_diagonal(queries, keys) if split and not step else self.seen(product, step)
            return tuple(map(add, total, found)) if step else found

        dq, *d_keys = self.travel(keys, visit)
        if split:
            d_keys, keys = jax.lax.optimization_barrier((d_keys, keys))  # else the rest may be done before the last hop
            added, *to_keys = self.backward_product(queries, keys, 0, _hi, _lo)
            dq, d_keys = add(dq, added), map(add, self.passed_on(d_keys), to_keys)
        d_keys = [x.astype(keys.k.dtype) for x in d_keys]
        if self.devices > 1 and not split:  # nothing hides this hop: the sums travel in the dtype they are returned in
            d_keys = self.passed_on(d_keys)
        return dq, *d_keys

    def backward_product(self, queries: Queries, keys: Keys, step: int, of_queries=_all, of_keys=_all):
        """Gradients of all queries, keys and values from the attention of these queries to these keys."""
        mask = self.product_mask(keys, step, of_queries, of_keys)
        q, o, do = (of_queries(x) for x in (queries.q, queries.o, queries.do))
        lse, delta = (of_queries(x, 2) for x in (queries.lse, queries.delta))
        k, v = of_keys(keys.k), of_keys(keys.v)
        dq, *d_keys = self.block.backward(q, k, v, o, lse, delta, do, mask, self.scale)
        return _whole(dq, of_queries), *(_whole(x, of_keys) for x in d_keys)

    def backward_diagonal(self, queries: Queries, keys: Keys):
        """Gradients of q, k and v from the causal attention of each local chunk to itself."""

        def rows(x, axis: int = 1):
            """The chunks as rows of their own."""
            x = x.reshape(*x.shape[:axis], 2, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 1).reshape(-1, *x.shape[1:axis], *x.shape[axis + 1 :])

        q, k, v, o, do = map(rows, (queries.q, keys.k, keys.v, queries.o, queries.do))
        lse, delta = (rows(x, 2) for x in (queries.lse, queries.delta))
        lengths = None
        if self.mask.lengths_B is not None:
            lengths = jnp.stack(self.chunk_lengths(keys, 0), 1).ravel()
        mask = Mask(True, lengths, self.mask.segments and tuple(map(rows, self.mask.segments)))
        found = self.block.backward(q, k, v, o, lse, delta, do, mask, self.scale)
        return tuple(x.reshape(-1, 2 * x.shape[1], *x.shape[2:]) for x in found)

    def seen(self, product, step: int):
        """The product of the queries and the keys that are here, of what causality leaves."""
        if not (self.mask.causal and step):
            return product()
        all_to_lo, hi_to_all = functools.partial(product, of_keys=_lo), functools.partial(product, _hi)
        return jax.lax.cond(self.source(step) < jax.lax.axis_index(self.axis), all_to_lo, hi_to_all)

    def product_mask(self, keys: Keys, step: int, of_queries, of_keys) -> Mask:
        """Of the queries and those of the keys that are here."""
        if self.devices == 1:
            return self.mask
        pairs = [
            pair and (of_queries(pair[0]), of_keys(here))
            for pair, here in ((self.mask.segments, keys.segments), (self.mask.positions, keys.positions))
        ]
        lengths = None
        if self.mask.lengths_B is not None:
            lo, hi = self.chunk_lengths(keys, step)
            lengths = lo if of_keys is _lo else lo + hi  # lo is full before hi begins: the first keys, without a gap
        causal = self.mask.causal and step == 0 and of_queries is of_keys
        return Mask(causal, lengths, *pairs, self.mask.window)

    def chunk_lengths(self, keys: Keys, step: int) -> tuple[jax.Array, jax.Array]:
        return chunk_lengths(self.mask.lengths_B, self.source(step), self.devices, keys.k.shape[1] // 2)

    def travel(self, keys: Keys, visit):
        """total after total = visit(total, keys, step) on each device's keys, the device's own first."""
        total = None
        for step in range(self.devices - 1):
            ids = jax.tree.map(self.exchanged, keys[2:])
            ahead, total = Keys(*self.passed_on(keys[:2]), *ids), visit(total, keys, step)
            keys, total = jax.lax.optimization_barrier((ahead, total))  # else all permutes may start at once
        return visit(total, keys, self.devices - 1)

    def passed_on(self, pair):
        """Two arrays of one shape as the neighbour before has them: one exchange, since of two XLA hides but one."""
        return tuple(self.exchanged(jnp.stack(pair)))

    def exchanged(self, x):
        return jax.lax.ppermute(x, self.axis, [(r, (r + 1) % self.devices) for r in range(self.devices)])

    @property
    def devices(self) -> int:
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    def source(self, step: int) -> jax.Array:
        """The device whose keys are here at a step."""
        return (jax.lax.axis_index(self.axis) - step) % self.devices
