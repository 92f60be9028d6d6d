import numpy as np
import pytest
from scipy.optimize import brentq

from infinite_jax.statistics import (
    Estimate,
    cluster_mean,
    macro_average,
    paired,
    paired_difference,
    why_not_paired,
    wilson,
)

NAN = np.nan


def close(estimate, mean, low, high, digits=4):
    np.testing.assert_allclose(estimate, (mean, low, high), atol=0.6 * 10**-digits)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_numbers_of_newcombe_1998(k, n, low, high):
    """Statist. Med. 17:857, table I, method 3."""
    np.testing.assert_allclose(wilson(k, n), (low, high), atol=0.6e-4)
    np.testing.assert_allclose(wilson(n - k, n), (1 - high, 1 - low), atol=0.6e-4)


def test_wilson_at_its_ends():
    assert wilson(0, 0) is None
    assert wilson(0, 7)[0] == 0.0 and wilson(7, 7)[1] == 1.0
    # k = 0: (0, z^2 / (n + z^2)); at 90 % z = 1.644854
    np.testing.assert_allclose(wilson(0, 10, 0.9), (0, 2.705543 / 12.705543), rtol=1e-6)


def test_cluster_mean_of_one_sample_a_prompt_is_wilson():
    values_NS = np.array([1.0] * 15 + [0.0] * 133)[:, None]
    close(cluster_mean(values_NS), 15 / 148, 0.0624, 0.1605)


def test_cluster_mean_by_hand():
    """Prompt means 1, 1/2, 1/2, 0: m = 1/2, sum (y - m)^2 = 1/2, n* = 16 (1/4) / (1/2) = 8, so Wilson's 4 of 8:

    1/2 -+ 1.959964 sqrt(1/32 + 3.841459 / 256) / (1 + 3.841459 / 8) = 1/2 -+ 0.284784.
    """
    values_NS = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], np.float32)
    close(cluster_mean(values_NS), 0.5, 0.215216, 0.784784, digits=6)
    with_gaps = np.array([[1, 1, NAN], [1, 0, NAN], [NAN, 0, 1], [0, NAN, NAN], [NAN, NAN, NAN]])
    n_star = cluster_mean(with_gaps)  # the same means; 7 valid samples are fewer than 8
    close(n_star, 0.5, *wilson(3.5, 7), digits=9)


def test_a_prompts_samples_are_not_independent_prompts():
    """64 prompts of which half always pass: 8 samples of each say no more than one."""
    once = np.repeat([0.0, 1.0], 32)[:, None]
    assert cluster_mean(np.repeat(once, 8, axis=1)) == cluster_mean(once)
    alike = np.tile([0.0, 1.0], (64, 4))  # every prompt passes half of its 8: as good as 512 prompts
    close(cluster_mean(alike), 0.5, *wilson(256, 512), digits=9)


def test_cluster_mean_where_nothing_varies():
    assert cluster_mean(np.ones((20, 4))) == Estimate(1.0, *wilson(20, 20))
    assert cluster_mean(np.zeros((20, 4))) == Estimate(0.0, *wilson(0, 20))
    assert cluster_mean(np.full((3, 2), NAN)) is None and cluster_mean(np.zeros((0, 2))) is None


def test_macro_average_where_nothing_varies_by_hand():
    """4 of 4 and 0 of 4: N / (N - 1) = 8 / 7, z^2 8 / 7 = 4.390239. Downwards only the first can move: to n / (n +
    4.390239) = .476744, Wilson's limit but for the factor; upwards only the second, to 1 - .476744. So 1/2 -+ .261628.

    Eight domains of 64 prompts that all pass move together: z^2 512 / 505 = 3.894707, 512 / 515.894707 = .992451.
    """
    ones, zeros = np.ones((4, 1)), np.zeros((4, 1))
    close(macro_average([ones, zeros]), 0.5, 0.238372, 0.761628, digits=6)
    close(macro_average([np.ones((64, 3))] * 8), 1.0, 0.992451, 1.0, digits=6)
    close(macro_average([np.zeros((64, 1))] * 8), 0.0, 0.0, 0.007549, digits=6)


def test_macro_average_weighs_domains_and_not_prompts():
    """90 of 90 and 0 of 10: z^2 100 / 99 = 3.880262; to 90 / 93.880262 / 2, up to (1 + 3.880262 / 13.880262) / 2."""
    big, small = np.ones((90, 1)), np.zeros((10, 1))
    close(macro_average([big, small]), 0.5, 0.479334, 0.639776, digits=6)
    assert macro_average([]) is None and macro_average([big, np.full((5, 1), NAN)]) is None
    assert macro_average([big, np.ones((1, 1))]) is None


def test_the_macro_average_of_one_domain_is_its_cluster_mean():
    rng = np.random.default_rng(4)
    for shape in ((148, 1), (20, 4), (9, 2)):
        values_NS = (rng.random(shape) < 0.2).astype(float)
        close(macro_average([values_NS], 0.9), *cluster_mean(values_NS, 0.9), digits=8)


def test_two_domains_agree_with_a_search_over_all_probabilities():
    """3 of 10 and 19 of 20: for a mean theta the likeliest (p, 2 theta - p) of 20,000; then the score's roots."""
    k, n = np.array([3, 19]), np.array([10, 20])

    def excess(theta):
        p = np.linspace(max(0, 2 * theta - 1) + 1e-9, min(1, 2 * theta) - 1e-9, 20_000)
        p_2 = np.stack([p, 2 * theta - p])
        best = np.argmax((k[:, None] * np.log(p_2) + (n - k)[:, None] * np.log(1 - p_2)).sum(0))
        variance = (p_2[:, best] * (1 - p_2[:, best]) / n).sum() / 4 * 30 / 29
        return abs(0.625 - theta) - 1.959964 * np.sqrt(variance)

    wanted = [brentq(excess, *ends, xtol=1e-6) for ends in ((0.3, 0.625), (0.625, 0.9))]
    found = macro_average([np.repeat([0.0, 1.0], [b - a, a])[:, None] for a, b in zip(k, n)])
    close(found, 0.625, *wanted, digits=4)


def changed(gained: int, lost: int, n: int):
    """(before, after) of n prompts: the rest as before."""
    before = np.array([0.0] * gained + [1.0] * lost + [1.0] * (n - gained - lost))[:, None]
    after = np.array([1.0] * gained + [0.0] * lost + [1.0] * (n - gained - lost))[:, None]
    return before, after


def tango(gained: int, lost: int, n: int, z: float = 1.959964):
    """His limits, from his closed form of the nuisance parameter."""

    def excess(theta):
        a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * theta
        rare = (np.sqrt(max(b**2 + 4 * a * lost * theta * (1 - theta), 0)) - b) / (2 * a)
        variance = (2 * rare + theta * (1 - theta)) / n
        return abs((gained - lost) / n - theta) - z * np.sqrt(max(variance, 0))

    middle = (gained - lost) / n
    return brentq(excess, -1 + 1e-9, middle), brentq(excess, middle, 1 - 1e-9)


@pytest.mark.parametrize(("gained", "lost", "n"), [(10, 4, 64), (1, 12, 44), (5, 0, 20), (7, 3, 10), (9, 2, 256)])
def test_a_change_of_single_samples_is_tangos(gained, lost, n):
    before, after = changed(gained, lost, n)
    close(paired_difference([before], [after]), (gained - lost) / n, *tango(gained, lost, n), digits=6)
    low, high = tango(gained, lost, n)
    close(paired_difference([after], [before]), (lost - gained) / n, -high, -low, digits=6)


def test_paired_difference_by_hand():
    """Nothing changed in 20 prompts: 0 -+ z^2 / (n + z^2) = 3.841459 / 23.841459; twice that: z^2 40 / 39 =
    3.939958 / 43.939958. Five gained, none lost: upwards only zeros become gains, Wilson's .468701 of 5 of 20."""
    same = changed(0, 0, 20)
    close(paired_difference([same[0]], [same[1]]), 0.0, -0.161125, 0.161125, digits=6)
    close(paired_difference([same[0]] * 2, [same[1]] * 2), 0.0, -0.089667, 0.089667, digits=6)
    before, after = changed(5, 0, 20)
    assert paired_difference([before], [after]).high == pytest.approx(0.468701, abs=1e-6)
    assert paired_difference([before], [after]).low < 0.25


@pytest.mark.parametrize("shape", [(3, 3), (96, 3), (96, 5), (2, 7), (50, 6)])
def test_paired_difference_where_all_prompts_change_alike(shape):
    """By k / S: the likeliest probability of it, p, is n / (n + z^2), the rest at -1 (at 1), as of Wilson's n of n."""
    prompts, samples = shape
    before, p = np.zeros(shape), prompts / (prompts + 3.841459)
    for k in range(samples + 1):
        change, after = k / samples, np.tile(np.arange(samples) < k, (prompts, 1)).astype(float)
        low, high = (1 + change) * p - 1, 1 - (1 - change) * p
        close(paired_difference([before], [after]), change, low, high, digits=6)
        close(paired_difference([after], [before]), -change, -high, -low, digits=6)
        several = paired_difference([before] * 3, [after] * 3)
        assert several.low < change - 0.01 and (several.high > change + 1e-3 or k == samples)


def test_paired_difference_where_all_prompts_of_one_domain_change_alike():
    rng = np.random.default_rng(0)
    for prompts in (2, 3, 7, 96):
        for samples in (3, 5, 6):
            sides = [[np.zeros((prompts, samples)), rng.integers(2, size=(9, samples))] for _ in range(2)]
            sides[1][0][:, : rng.integers(1, samples + 1)] = 1
            found = paired_difference(*sides)
            assert -1 <= found.low < found.mean < found.high <= 1


def test_paired_difference_leaves_a_prompt_out_on_both_sides():
    before = np.array([[1.0, NAN], [NAN, NAN], [0.0, 0.0], [0.0, 1.0]])
    after = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [NAN, 1.0]])
    assert paired_difference([before], [after]).mean == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert paired_difference([before], [np.full((4, 2), NAN)]) is None
    with pytest.raises(ValueError, match="use the same prompts"):
        paired_difference([before], [after[:3]])
    with pytest.raises(ValueError, match="use the same prompts"):
        paired_difference([before, before], [after])


def test_the_interval_is_that_of_a_bootstrap_over_prompts():
    rng = np.random.default_rng(1)
    rates = [rng.beta(a, b, size=n) for a, b, n in ((2, 2, 200), (0.5, 2, 100), (5, 1, 150))]
    before = [(rng.random((len(p), 4)) < p[:, None]).astype(float) for p in rates]
    after = [(rng.random((len(p), 4)) < np.sqrt(p)[:, None]).astype(float) for p in rates]

    def resampled(measure):
        chosen = [rng.integers(len(p), size=len(p)) for p in rates]
        return measure([x[i] for x, i in zip(before, chosen)], [x[i] for x, i in zip(after, chosen)])

    for estimate, measure in (
        (macro_average(before), lambda x, _: np.mean([d.mean() for d in x])),
        (paired_difference(before, after), lambda x, y: np.mean([b.mean() - a.mean() for a, b in zip(x, y)])),
        (cluster_mean(before[0]), lambda x, _: x[0].mean()),
    ):
        draws = [resampled(measure) for _ in range(3000)]
        low, high = np.quantile(draws, [0.025, 0.975])
        np.testing.assert_allclose(estimate[1:], (low, high), atol=0.1 * (high - low))


def covered(rounds, seed, interval, truth):
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(rounds):
        estimate = interval(rng)
        hits += estimate.low <= truth <= estimate.high
    return hits / rounds


def test_coverage():
    """New prompts each round; over 400 rounds three standard errors of a true 95 % are 3.3 points."""
    shapes = ((2.0, 2.0), (0.5, 1.5), (6.0, 2.0))  # of the prompts' pass rates: means 1/2, 1/4, 3/4

    def samples(rng, rate_N, S):
        return (rng.random((len(rate_N), S)) < rate_N[:, None]).astype(float)

    def one_domain(rng):
        return cluster_mean(samples(rng, rng.beta(0.5, 1.5, size=64), 4))

    def three_domains(rng):
        return macro_average([samples(rng, rng.beta(a, b, size=64), 1) for a, b in shapes])

    def change(rng):
        """Each prompt's rate moves half of the way to 1: the macro average by 1/4."""
        rates = [rng.beta(a, b, size=64) for a, b in shapes]
        return paired_difference([samples(rng, p, 2) for p in rates], [samples(rng, (1 + p) / 2, 2) for p in rates])

    for seed, (interval, truth) in enumerate(((one_domain, 0.25), (three_domains, 0.5), (change, 0.25))):
        assert 0.917 < covered(400, seed, interval, truth) < 0.983
    # counting the samples as prompts would cover far less: what clustering is for
    naive = covered(500, 9, lambda rng: cluster_mean(one_domain_flat(rng)), 0.25)
    assert naive < 0.85


RATES = {"rare": [0.05], "even": [0.5], "mixed": [0.05, 0.5, 0.95, 1.0], "nearly all": [0.95, 1.0]}


def covered_average(rates: list[float], prompts: int, domains: int, rounds: int) -> float:
    rate_D = np.resize(rates, domains)

    def average(rng):
        return macro_average([(rng.random((prompts, 1)) < rate).astype(float) for rate in rate_D])

    return covered(rounds, prompts, average, rate_D.mean())


def covered_change(moves: list[tuple[float, float]], prompts: int, domains: int, rounds: int) -> float:
    """moves: probabilities that a prompt is gained, and lost."""
    moves = [moves[d % len(moves)] for d in range(domains)]

    def change(rng):
        pairs = [changed(*rng.multinomial(prompts, (up, down, 1 - up - down))[:2], prompts) for up, down in moves]
        return paired_difference(*zip(*pairs))

    return covered(rounds, prompts, change, np.mean([up - down for up, down in moves]))


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_coverage_of_an_average_of_few_prompts(rates):
    """400 rounds: three standard errors are 3.3 points."""
    assert 0.917 < covered_average(rates, 16, 4, 400) < 0.99


def test_coverage_of_a_change_of_few_prompts():
    assert 0.917 < covered_change([(0.3, 0.05), (0.0, 0.1)], 16, 4, 400) < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [8, 32, 64, 256])
def test_coverage_at_every_size(prompts):
    """1000 rounds: two standard errors below .93, where rare passes of few prompts, whole numbers, bring the truth."""
    for rates in RATES.values():
        for domains in (2, 4, 12):
            if domains >= len(rates):
                assert 0.915 < covered_average(rates, prompts, domains, 1000) < 0.99, (rates, domains)
    for moves in ([(0.05, 0.05)], [(0.3, 0.05), (0.02, 0.02), (0.0, 0.0), (0.0, 0.1)]):
        assert 0.915 < covered_change(moves, prompts, 12, 1000) < 0.99, moves
    assert covered_average([1.0], prompts, 4, 10) == 1 and covered_change([(0.0, 0.0)], prompts, 4, 10) == 1


def one_domain_flat(rng):
    rate_N = rng.beta(0.5, 1.5, size=64)
    return (rng.random((64, 8)) < rate_N[:, None]).astype(float).reshape(-1, 1)


def test_paired_seeds_by_hand():
    """a - b = .02, .04, .06: mean .04, s = .02, half-width t_2 s / sqrt 3 = 4.302653 * .02 / 1.7320508 = .0496828.

    In per cent of b: 10, 10, 20: mean 13.3333, s = 5.773503, half-width 4.302653 * 5.773503 / 1.7320508 = 14.342177.
    At 50 % t_2 = .8164966: half-width .8164966 * 5.773503 / 1.7320508 = 2.721655.
    """
    a, b = [0.22, 0.44, 0.36], [0.20, 0.40, 0.30]
    close(paired(a, b), 0.04, 0.04 - 0.0496828, 0.04 + 0.0496828, digits=6)
    close(paired(b, a), -0.04, -0.04 - 0.0496828, -0.04 + 0.0496828, digits=6)
    close(paired(a, b, relative=True), 40 / 3, 40 / 3 - 14.342177, 40 / 3 + 14.342177, digits=5)
    close(paired(a, b, True, 0.5), 40 / 3, 40 / 3 - 2.721655, 40 / 3 + 2.721655, digits=5)


def test_what_seeds_share_does_not_widen_their_difference():
    seeds = np.random.default_rng(0).normal(size=12)
    close(paired(seeds + 0.5, seeds), 0.5, 0.5, 0.5, digits=12)


def test_paired_leaves_a_seed_out_on_both_sides():
    a, b = [0.22, None, 0.44, 0.36, 0.9], [0.20, 0.1, 0.40, 0.30, NAN]
    assert paired(a, b) == paired([0.22, 0.44, 0.36], [0.20, 0.40, 0.30])


def test_paired_says_why_it_is_undefined():
    assert paired([], []) is None and why_not_paired([], []).startswith("0 of 0 seeds")
    few = ([0.1, None, 0.3], [NAN, 0.2, 0.2])
    assert paired(*few) is None and why_not_paired(*few).startswith("1 of 3 seeds")
    dead = ([0.1, 0.2], [0.0, 0.2])  # x per cent more than nothing
    assert paired(*dead) is not None and paired(*dead, relative=True) is None
    assert "baseline is 0 in one seed" in why_not_paired(*dead, relative=True)
    assert paired([0.1, 0.2], [-0.1, 0.2], relative=True) is None  # a negative BWT
    assert why_not_paired([0.1, 0.2], [0.1, 0.2], relative=True) == ""
    with pytest.raises(ValueError, match="2 and 1 seeds: run both arms on the same"):
        paired([0.1, 0.2], [0.1])


def test_coverage_of_paired_seeds():
    """Six seeds, differences of mean .1: over 4000 rounds three standard errors of a true 95 % are one point."""

    def six(rng):
        b = rng.normal(size=6)
        return paired(b + rng.normal(0.1, 0.3, size=6), b)

    assert 0.94 < covered(4000, 3, six, 0.1) < 0.96
