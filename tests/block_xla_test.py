"""Blocks as plain jnp against dense attention in numpy float64, for each mask, in one tile and in many."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import block_xla
from kernels.block import MASKED, Mask

B, T, S, H, K, D, SCALE = 2, 14, 11, 6, 2, 8, 0.3
CAUSAL = np.tri(T, dtype=bool)[None].repeat(B, 0)


def reference(q, do, parts, scale):
    """o, lse, dq and (dk, dv) of each part in float64, by the formulas of kernels/block.py.

    parts: (k, v, seen [B, T, S]); where k has fewer rows than q, as many neighbouring rows of q share one.
    """
    q, do = np.asarray(q, np.float64), np.asarray(do, np.float64)
    group = q.shape[2] // parts[0][0].shape[2]
    spread = lambda x: np.asarray(x, np.float64).repeat(len(q) // len(x), 0).repeat(group, 2)  # noqa: E731
    k, v = (np.concatenate([spread(part[which]) for part in parts], 1) for which in (0, 1))
    seen = np.concatenate([part[2] for part in parts], -1)[:, None]
    s = np.where(seen, scale * np.einsum("bthd,bshd->bhts", q, k), -np.inf)
    top = np.where(seen.any(-1, keepdims=True), s.max(-1, keepdims=True), 0)
    total = np.exp(s - top).sum(-1, keepdims=True)
    some = np.where(total > 0, total, 1)
    p = np.exp(s - top) / some
    o = np.einsum("bhts,bshd->bthd", p, v)
    ds = scale * p * (np.einsum("bthd,bshd->bhts", do, v) - (o * do).sum(-1).swapaxes(1, 2)[..., None])
    d_keys = np.einsum("bhts,bthd->bshd", ds, q), np.einsum("bhts,bthd->bshd", p, do)
    cuts = np.cumsum([part[0].shape[1] for part in parts])[:-1]
    d_parts = []
    for part, pair in zip(parts, zip(*(np.split(x, cuts, 1) for x in d_keys))):
        rows, length, heads, size = part[0].shape
        d_parts.append([x.reshape(rows, -1, length, heads, group, size).sum((1, 4)) for x in pair])
    lse = np.where(total > 0, top + np.log(some), MASKED)[..., 0]
    return o, lse, np.einsum("bhts,bshd->bthd", ds, k), d_parts


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


def random(seed, dtype, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def inputs(keys=T, dtype=jnp.float32):
    """q, k, v, do."""
    return random(0, dtype, (B, T, H, D), (B, keys, K, D), (B, keys, K, D), (B, T, H, D))


@functools.partial(jax.jit, static_argnames="scale", compiler_options={"xla_backend_optimization_level": 0})
def block(q, k, v, do, mask, scale=SCALE):
    o, lse = block_xla.forward(q, k, v, mask, scale)
    delta = (o * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    return o, lse, *block_xla.backward(q, k, v, o, lse, delta, do, mask, scale)


def masks():
    """name: mask, what it shows [B, T, keys], whether some query sees no key."""
    rng = np.random.default_rng(1)
    row = lambda *x: np.asarray([x] * B, np.int32)  # noqa: E731
    lengths, segments = (
        np.array([7, 0], np.int32),
        (row(*[0] * 3, *[2] * 6, *[3] * 5), row(*[0] * 4, *[1] * 3, *[2] * 4)),
    )
    mixed, positions = rng.integers(0, 3, (B, T)).astype(np.int32), (row(*range(5, 5 + T)), row(*range(S)))
    short = (np.arange(S) < lengths[:, None])[:, None].repeat(T, 1)
    same = segments[0][:, :, None] == segments[1][:, None]
    distance = positions[0][:, :, None] - positions[1][:, None]
    within = lambda window: (distance >= 0) & (distance < window)  # noqa: E731
    return {
        "none": (Mask(), np.ones((B, T, S), bool), False),
        "causal": (Mask(True), CAUSAL, False),
        "lengths": (Mask(lengths_B=lengths), short, True),
        "segments": (Mask(segments=segments), same, True),
        "causal_segments": (Mask(True, segments=(mixed, mixed)), CAUSAL & (mixed[:, :, None] == mixed[:, None]), False),
        "window": (Mask(positions=positions, window=np.int32(4)), within(4), True),
        "window_off": (Mask(positions=positions, window=np.int32(0)), distance >= 0, False),
        "all": (Mask(False, lengths, segments, positions, np.int32(9)), short & same & within(9), True),
    }


@pytest.fixture
def small(monkeypatch):
    """Tiles of 4 x 4: 4 x 3 of them or, causal, 10 of 4 x 4, the last ones padded."""
    monkeypatch.setattr(block_xla, "CHUNK", 4)
    monkeypatch.setattr(block_xla, "AREA", 16)
    block.clear_cache()
    yield
    block.clear_cache()


def check(name):
    mask, seen, some_see_nothing = masks()[name]
    q, k, v, do = inputs(seen.shape[-1])
    o, lse, dq, [(dk, dv)] = reference(q, do, [(k, v, seen)], SCALE)
    found = block(q, k, v, do, mask)
    unseen = ~seen.any(-1)
    assert unseen.any() == some_see_nothing
    assert (np.asarray(found[0])[unseen] == 0).all() and (np.asarray(found[2])[unseen] == 0).all()
    np.testing.assert_array_equal(found[1] == np.float32(MASKED), lse == MASKED)
    for a, b in zip(found, (o, lse, dq, dk, dv)):
        assert a.dtype == jnp.float32 and relative(np.where(b == MASKED, 0, a), np.where(b == MASKED, 0, b)) < 2e-6


@pytest.mark.parametrize("name", masks())
def test_many_tiles_are_dense_attention(name, small):
    check(name)


@pytest.mark.parametrize("name", ["causal_segments", "all"])
def test_one_tile_is_dense_attention(name):
    check(name)


def test_bfloat16_is_as_good_as_dense_bfloat16(small):
    q, k, v, do = inputs(dtype=jnp.bfloat16)

    def dense(q, k, v):
        k, v = (jnp.repeat(x, H // K, 2) for x in (k, v))
        s = SCALE * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(CAUSAL[:, None], s, MASKED)).astype(v.dtype)
        return jnp.einsum("bhts,bshd->bthd", p, v)

    out, *usual = jax.jit(lambda *a: (lambda o, vjp: (o, *vjp(do)))(*jax.vjp(dense, *a)))(q, k, v)
    o, _, dq, [(dk, dv)] = reference(q, do, [(k, v, CAUSAL)], SCALE)
    found = block(q, k, v, do, Mask(True))
    for a, other, right in zip((found[0], *found[2:]), (out, *usual), (o, dq, dk, dv)):
        assert relative(a, right) < min(1e-2, 1.5 * relative(other, right))


def test_gradients_of_parts_of_the_keys_add_up():
    """Given lse and delta of the whole row, the backward passes of two halves of the keys are the whole row's."""
    q, k, v, do = inputs(12)
    o, lse, dq, [(dk, dv)] = reference(q, do, [(k, v, np.ones((B, T, 12), bool))], SCALE)
    lse, delta = jnp.float32(lse), jnp.float32((o * do).sum(-1).swapaxes(1, 2))
    left, right = (
        jax.jit(block_xla.backward, static_argnums=8)(q, k[:, cut], v[:, cut], o, lse, delta, do, Mask(), SCALE)
        for cut in (slice(0, 6), slice(6, 12))
    )
    assert relative(left[0] + right[0], dq) < 2e-6
    for which, whole in ((1, dk), (2, dv)):
        assert relative(np.concatenate([left[which], right[which]], 1), whole) < 2e-6


def test_huge_scores_stay_finite():
    q, k, v, do = inputs()
    for x in block(q * 1e4, k * 1e4, v, do, Mask(True)):
        assert np.isfinite(x).all()


def test_short_rows_are_one_dense_product_and_long_ones_never_hold_their_scores():
    def memory(length, batch=1, heads=2):
        q = jax.ShapeDtypeStruct((batch, length, heads, D), jnp.float32)
        traced = block.trace(q, q, q, q, Mask(True))
        return traced.lower().compile().memory_analysis().temp_size_in_bytes, "scan" in str(traced.jaxpr)

    scores = 2 * 8192 * 8192 * 4  # bytes of [H, T, S]: 512 MiB
    (few, short), (many, long) = memory(block_xla.CHUNK), memory(8192)
    assert not short and long
    assert few > 2 * block_xla.CHUNK**2 * 4  # the measure sees scores
    assert many < scores / 16


def test_causality_leaves_half_of_the_work():
    def tiles(mask):  # scanned, forward and backward, in a row of 8 chunks
        q = jax.ShapeDtypeStruct((1, 8 * block_xla.CHUNK, 1, D), jnp.float32)
        return [int(x) for x in re.findall(r"\blength=(\d+)", str(block.trace(q, q, q, q, mask).jaxpr))]

    assert tiles(Mask(True)) == [36, 36] and tiles(Mask()) == [64, 64]
