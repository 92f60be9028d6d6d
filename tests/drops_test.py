"""The monitor's two tests against scipy and hand-computed numbers, and what they can detect against simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from curriculum import drops

mcnemar = jax.jit(drops.mcnemar, static_argnums=2)


@pytest.mark.parametrize("alpha, num_prior, z", [(0.05, 5, 2.3263), (0.05, 20, 2.8070), (1.0, 20, 1.6449), (9, 5, 0)])
def test_the_threshold_is_the_normal_quantile_after_bonferroni(alpha, num_prior, z):
    got = jax.jit(drops.threshold, static_argnums=0)(alpha, num_prior)
    np.testing.assert_allclose(got, z, atol=1e-4)
    np.testing.assert_allclose(got, norm.isf(min(alpha / num_prior, 0.5)), atol=1e-5)


def test_two_proportions_by_hand():
    """K/N = 80/100, k/n = 30/50: p = 110/150, se = sqrt(.195556 * .03) = .0765942, z = .2 / se = 2.61116."""
    given = [np.float32(x) for x in ([80, 40, 0], [100, 40, 0], [30, 10, 3], [50, 10, 0])]
    drop_D, error_D, z_D = jax.jit(drops.two_proportions)(*given)
    np.testing.assert_allclose([drop_D[0], error_D[0], z_D[0]], [0.2, 0.0765942, 2.61116], rtol=1e-5)
    assert drop_D[1] == error_D[1] == z_D[1] == 0  # all passed on both sides
    assert np.isfinite([drop_D[2], error_D[2], z_D[2]]).all()


def test_mcnemar_is_the_one_sided_binomial_test():
    """Lost 3, gained 1: P(X >= 3) = (4 + 1) / 16, mid-p 4/32 less. Nothing differs: 1, mid-p 1/2."""
    np.testing.assert_allclose(mcnemar([3, 0], [1, 0], False), [5 / 16, 1.0], atol=1e-6)
    np.testing.assert_allclose(mcnemar([3, 0], [1, 0], True), [3 / 16, 0.5], atol=1e-6)
    lost, gained = (x.ravel() for x in np.meshgrid([0, 1, 2, 7, 40, 130, 500], [0, 1, 5, 38, 100, 480]))
    both = lost + gained
    exact = [binomtest(k, m, alternative="greater").pvalue if m else 1.0 for k, m in zip(lost.tolist(), both.tolist())]
    np.testing.assert_allclose(mcnemar(lost, gained, False), exact, rtol=1e-3, atol=1e-30)
    half = (binom.sf(lost - 1, both, 0.5) + binom.sf(lost, both, 0.5)) / 2
    np.testing.assert_allclose(mcnemar(lost, gained, True), half, rtol=1e-3, atol=1e-30)


def test_the_paired_test_by_hand():
    """Of 100 prompts 12 were lost and 4 gained: drop .08, se = sqrt(16 - 64/100) / 100 = .0391918, p = .0384064."""
    paired = jax.jit(drops.paired, static_argnums=3)
    lost_D, gained_D, n_D = (np.array(x) for x in ([12, 0, 900], [4, 0, 0], [100, 100, 900]))
    drop_D, error_D, z_D = paired(lost_D, gained_D, n_D, False)
    np.testing.assert_allclose([drop_D[0], error_D[0], z_D[0]], [0.08, 0.0391918, norm.isf(0.0384064)], rtol=1e-4)
    assert drop_D[1] == error_D[1] == 0 and z_D[1] < 0 and drop_D[2] == 1 and 12 < z_D[2] < 14
    assert paired(lost_D, gained_D, n_D, True)[2][0] > z_D[0]  # mid-p sees more


def test_disagreements_give_one_verdict_a_prompt():
    x = np.nan
    before_PS = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [x, x, x], [0, 0, 1], [1, x, 0], [1, 1, 1]])
    now_PS = jnp.array([[0, 0, 1], [1, 1, x], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, x], [0, 0, 0]])
    domain_P = jnp.array([0, 0, 0, 0, 1, 1, 9])  # 9 is padding
    n_D, lost_D, gained_D = jax.jit(drops.disagreements, static_argnums=3)(domain_P, before_PS, now_PS, 3)
    np.testing.assert_array_equal([n_D, lost_D, gained_D], [[3, 2, 0], [1, 1, 0], [1, 0, 0]])


def test_detectable_drops_by_hand_and_by_simulation():
    """n 1000, N 4000, five priors, p = .7: se = sqrt(.21 / 800) = .0162019, (2.3263 + .8416) se = .0513."""
    given = dict(num_prior=5, alpha=0.05, delta=0.01, variance=0.21, power=0.8)
    assert abs(drops.detectable_drop(1000, 4000, **given) - 0.051328) < 1e-5
    assert abs(drops.detectable_drop(1e9, 4e9, **given) - 0.01) < 1e-4  # nothing up to delta is a drop
    paired = drops.detectable_drop(1000, np.inf, **given | dict(variance=0.1))
    assert abs(paired - (2.3263479 + 0.8416212) * 0.01) < 1e-6

    rng, drop = np.random.default_rng(0), 0.051328
    K, k = rng.binomial(4000, 0.7, 20_000), rng.binomial(1000, 0.7 - drop, 20_000)
    _, _, z = drops.two_proportions(*(np.float32(x) for x in (K, np.full(20_000, 4000), k, np.full(20_000, 1000))))
    assert abs(np.mean(z > 2.3263) - 0.8) < 0.02  # the variance under the drop is larger, .015; chance, .003


def test_prompts_needed_turns_detectable_drop_round():
    given = dict(num_prior=20, alpha=0.05, delta=0.01, variance=0.25, power=0.9)
    for drop in (0.011, 0.02, 0.05, 0.3):
        n = drops.prompts_needed(drop, 4, **given)
        least = functools.partial(drops.detectable_drop, **given)
        assert least(n, 4 * n) <= drop + 1e-9 and (n == 1 or least(n - 1, 4 * (n - 1)) > drop)
    with pytest.raises(ValueError, match=r"drop=0.01: at most delta=0.01"):
        drops.prompts_needed(0.01, 4, **given)
