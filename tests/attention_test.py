"""Attention against loops over tokens and heads in numpy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import select
from kernels.block import Mask
from kernels.ring_attention import Part
from models.attention import Cache, attention, decode_attention, rotate

XLA = select.block("xla")


def by_hand(q, k, v, scale):
    """One query [D] over its visible keys [S, D]."""
    scores = scale * k.astype(np.float64) @ q
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def attend(q, parts, scale):
    return attention(q, parts, scale, XLA)


@pytest.mark.parametrize("window", [None, 0, 1, 3])
def test_attention_sees_the_past_within_the_window(window):
    B, T, K, Q, D = 2, 7, 2, 3, 4
    q, k, v = random(0, B, T, K, Q, D), random(1, B, T, K, D), random(2, B, T, K, D)
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    by_place = Mask(positions=(places, places), window=None if window is None else jnp.int32(window))
    ours = attend(q, (Part(k, v, Mask(causal=True) if window is None else by_place),), 0.7)
    for b, t, h, i in np.ndindex(B, T, K, Q):
        first = max(0, t - window + 1) if window else 0
        expected = by_hand(q[b, t, h, i], k[b, first : t + 1, h], v[b, first : t + 1, h], 0.7)
        np.testing.assert_allclose(ours[b, t, h, i], expected, atol=2e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_completions_share_their_prompts_keys_under_one_softmax(window):
    """Prompts of 5, none and 3 tokens of room for 5: a completion's first token may see nothing before it."""
    P, G, T, C, K, Q, D = 3, 2, 5, 4, 2, 2, 4
    lengths = np.array([5, 0, 3])
    q, k, v = random(0, P * G, C, K, Q, D), random(1, P * G, C, K, D), random(2, P * G, C, K, D)
    k_P, v_P = random(3, P, T, K, D), random(4, P, T, K, D)
    places = jnp.asarray(np.repeat(lengths, G)[:, None] + np.arange(C))
    own, prompt = Mask(causal=True), Mask(lengths_B=jnp.asarray(lengths))
    if window:
        near, before = jnp.int32(window), jnp.broadcast_to(jnp.arange(T), (P, T))
        own = Mask(positions=(places, places), window=near)
        prompt = Mask(lengths_B=jnp.asarray(lengths), positions=(places, before), window=near)
    ours = attend(q, (Part(k, v, own), Part(k_P, v_P, prompt)), 0.6)
    for n, c, h, i in np.ndindex(P * G, C, K, Q):
        p = n // G
        keys, values = (
            np.concatenate([shared[p, : lengths[p], h], mine[n, : c + 1, h]])[-(window or 99) :]
            for shared, mine in ((k_P, k), (v_P, v))
        )
        np.testing.assert_allclose(ours[n, c, h, i], by_hand(q[n, c, h, i], keys, values, 0.6), atol=2e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_decode_attention_joins_shared_prompt_and_own_completion(window):
    P, G, K, Q, D, T, C, step = 3, 2, 2, 2, 4, 6, 5, 2
    lengths = np.array([6, 1, 3])
    q = random(0, P * G, K, Q, D)
    prefix, own = Cache(random(1, P, K, T, D), random(2, P, K, T, D)), Cache(*random(3, 2, P * G, K, C, D))
    given = None if window is None else jnp.int32(window)
    ours = jax.jit(decode_attention, static_argnums=6)(q, prefix, lengths, own, jnp.int32(step), given, 0.6)
    for n, h, i in np.ndindex(P * G, K, Q):
        p = n // G
        keys, values = (
            np.concatenate([shared[p, h, : lengths[p]], mine[n, h, : step + 1]])[-(window or 99) :]
            for shared, mine in zip(prefix, own)
        )
        np.testing.assert_allclose(ours[n, h, i], by_hand(q[n, h, i], keys, values, 0.6), atol=2e-6)


def test_rotation_turns_pairs_by_hand():
    x = jnp.array([3.0, 5.0, 4.0, 12.0]).reshape(1, 1, 4)  # pairs (3, 4) and (5, 12)
    cos, sin = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])  # the first by 90 degrees, the second not
    np.testing.assert_allclose(rotate(x, cos, sin)[0, 0], [-4.0, 5.0, 3.0, 12.0])
