"""Chunked log-probs against the naive ones in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.logprob import token_logp

B, T, E, V = 3, 7, 5, 11
RNG = np.random.default_rng(0)
HIDDEN, HEAD = RNG.normal(size=(B, T, E)), RNG.normal(size=(E, V))
TOKEN = RNG.integers(0, V, size=(B, T))


def naive(hidden, head, temperature):
    logits = hidden @ head / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logp, TOKEN[..., None], -1)[..., 0], -(np.exp(logp) * logp).sum(-1)


def chunked(hidden, head, temperature, max_logits):
    return token_logp(lambda h: h @ head, hidden, jnp.asarray(TOKEN), temperature, max_logits)


@pytest.mark.parametrize("max_logits", [1, B * V * 2, B * V * 3, 10**9])  # chunks of 1, 2, 3 (2 and 3 leave a rest), 7
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_naive_log_prob_and_entropy(max_logits, temperature):
    found = chunked(jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD, jnp.float32), temperature, max_logits)
    for a, b in zip(found, naive(HIDDEN, HEAD, temperature)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradients_reach_the_hidden_states_and_the_head():
    def total(hidden, head, max_logits):
        logp, entropy = chunked(hidden, head, 0.6, max_logits)
        return jnp.sum(logp * jnp.arange(T)) + 0.1 * entropy.sum()

    arrays = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD, jnp.float32)
    split = jax.grad(total, (0, 1))(*arrays, B * V * 2)
    for which in (0, 1):  # central differences in float64 along a random direction
        direction = RNG.normal(size=(HIDDEN, HEAD)[which].shape)

        def objective(step, which=which, direction=direction):
            moved = [HIDDEN, HEAD]
            moved[which] = moved[which] + step * direction
            logp, entropy = naive(*moved, 0.6)
            return (logp * np.arange(T)).sum() + 0.1 * entropy.sum()

        slope = (objective(1e-5) - objective(-1e-5)) / 2e-5
        np.testing.assert_allclose(float(jnp.sum(split[which] * direction)), slope, rtol=2e-5)


def test_extreme_logits_stay_finite():
    head = jnp.asarray(HEAD * 1e4, jnp.float32)
    logp, entropy = chunked(jnp.asarray(HIDDEN, jnp.float32), head, 1.0, B * V)
    assert np.isfinite(logp).all() and np.isfinite(entropy).all() and (np.asarray(logp) <= 0).all()
