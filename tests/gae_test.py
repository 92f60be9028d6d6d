"""Advantages of a critic against loops over the paper's sums, and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from infinite_jax import gae


def by_hand(reward, value, mask, discount, trace):
    """A_t = sum_l (discount trace)^l delta_t+l over the masked tokens of a row."""
    advantage = np.zeros(reward.shape)
    for b in range(len(mask)):
        steps = np.flatnonzero(mask[b])
        values = [*value[b, steps], 0.0]
        delta = [reward[b, t] + discount * values[i + 1] - values[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            advantage[b, t] = sum((discount * trace) ** (j - i) * delta[j] for j in range(i, len(steps)))
    return advantage


def test_advantages_are_the_papers_sums_over_the_generated_tokens():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 5, 9))
    mask = rng.random((5, 9)) < 0.6
    mask[2] = False
    found, returns = jax.jit(gae.advantages, static_argnums=(3, 4))(*map(jnp.asarray, (reward, value, mask)), 0.9, 0.8)
    expected = by_hand(reward, value, mask, 0.9, 0.8)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + value, 0), atol=1e-5)


def test_without_discount_and_trace_the_return_is_the_sum_of_rewards():
    reward = jnp.array([[5.0, 0.0, 7.0, 1.0, 9.0]])
    mask = jnp.array([[False, True, False, True, False]])
    advantage, returns = gae.advantages(reward, jnp.full((1, 5), 0.25), mask, 1.0, 1.0)
    np.testing.assert_allclose(returns, [[0, 1, 0, 1, 0]])
    np.testing.assert_allclose(advantage, [[0, 0.75, 0, 0.75, 0]])


def test_whitened_over_the_mask_alone():
    advantage, mask = jnp.array([[1.0, 3.0, 99.0]]), jnp.array([[True, True, False]])
    np.testing.assert_allclose(gae.whiten(advantage, mask), [[-1, 1, 0]], rtol=1e-5)
    assert (np.asarray(gae.whiten(advantage, mask & False)) == 0).all()


def test_the_clipped_value_loss_takes_the_worse_of_the_two():
    """Old 0, return 1: at 0.5 a clip of 0.2 leaves (0.2 - 1)^2 / 2; at -0.5 the value itself is worse."""
    value, old, target = jnp.array([0.5, -0.5]), jnp.zeros(2), jnp.ones(2)
    np.testing.assert_allclose(gae.value_loss(value, old, target, 0.2), [0.32, 1.125], rtol=1e-6)
    np.testing.assert_allclose(gae.value_loss(value, old, target, 0.0), [0.125, 1.125], rtol=1e-6)
    slope = jax.grad(lambda v: gae.value_loss(v, old, target, 0.2).sum())(value)
    np.testing.assert_allclose(slope, [0, -1.5], rtol=1e-6)  # beyond the clip nothing pulls further


def test_error_and_explained_variance_of_each_domain_by_hand():
    """Domain 0: outcomes 0, 1, 0, 1, values 0, 1, 0, 0: gaps 0 0 0 1, error 1/2, variances 3/16 of 1/4: 1/4 explained.

    Domain 1: always off by 2, so all is explained; domain 2: rewards without a spread; domain 3: no row.
    """
    outcome = jnp.array([[0.0, 1.0, 9.0], [0.0, 1.0, 9.0], [1.0, 3.0, 9.0], [5.0, 5.0, 9.0]])
    value = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [5.0, 4.0, 0.0]])
    mask = jnp.array([[True, True, False]] * 4)
    error, explained = jax.jit(gae.foresight, static_argnums=4)(value, outcome, mask, jnp.array([0, 0, 1, 2]), 4)
    np.testing.assert_allclose(error, [0.5, 2.0, np.sqrt(0.5), np.nan], rtol=1e-6)
    np.testing.assert_allclose(explained, [0.25, 1.0, np.nan, np.nan], rtol=1e-6)
