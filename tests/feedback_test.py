import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cli import compose_config
from curriculum import feedback, triage
from curriculum.triage import DomainStats, drawable, roster, statistics, steps_waited

D = 5
CONFIG = compose_config("config", None, ["curriculum=faithful"]).curriculum


@functools.cache
def updating(**changes):
    return jax.jit(functools.partial(feedback.update, dataclasses.replace(CONFIG, **changes)))


update = updating()
init = jax.jit(functools.partial(triage.init, CONFIG))
can_draw = jax.jit(functools.partial(drawable, CONFIG))
statistics_jit = jax.jit(statistics, static_argnums=5)


def fresh(**leaves):
    return init(0, roster(D))._replace(**leaves)


def stats(tried=None, **sums) -> DomainStats:
    """Zero but for the named sums; tried defaults to n_groups."""
    zeros = {field: np.zeros(D, np.float32) for field in DomainStats._fields}
    zeros |= {field: np.asarray(value, np.float32) for field, value in sums.items()}
    zeros["tried"] = zeros["n_groups"] if tried is None else np.asarray(tried, np.float32)
    return DomainStats(**zeros)


def identical(a, b):
    np.testing.assert_array_equal(np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8))


def batch(rng, groups, samples=4):
    """Random groups as a grader would return them, some rows and some whole groups without a grade."""
    grade_PG = rng.integers(1, 5, (groups, samples)).astype(np.float32)
    valid_PG = rng.random((groups, samples)) < rng.choice([0.0, 0.5, 1.0], (groups, 1))
    cost_P = rng.uniform(1, 9, groups).astype(np.float32)
    return rng.integers(0, D, groups).astype(np.int32), grade_PG, (grade_PG - 1) / 3, valid_PG, cost_P


def test_one_group_weighs_beta_and_many_compound():
    n = np.array([1, 2, 104, 0, 0])
    state = update(fresh(), stats(n_groups=n, pass_sum=n, n_grades=n, grade_sum=4 * n, grade_sq_sum=16 * n))
    np.testing.assert_allclose(state.acc_ema, [0.525, 0.54875, 0.9976, 0.5, 0.5], atol=1e-4)
    np.testing.assert_array_equal(state.performance_band, [1, 1, 2, 1, 1])
    np.testing.assert_array_equal(state.visits, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(state.n_prompts, n)
    assert state.n_prompts.dtype == jnp.int32 and state.step == 1


def test_beta_one_remembers_the_last_batch_only():
    n = np.array([1, 3, 0, 0, 0])
    state = updating(beta=1.0)(fresh(), stats(n_groups=n, pass_sum=n, n_grades=n, grade_sum=4 * n, grade_sq_sum=16 * n))
    np.testing.assert_allclose(state.acc_ema, [1, 1, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(state.grade_uncertainty, [0, 0, 0.5625, 0.5625, 0.5625])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 9), st.floats(1, 4), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_grade_moments_are_those_of_the_mixture(grades, groups, mean, spread):
    """The old distribution stands in as two points at mean -+ deviation; numpy then weighs old and new values."""
    variance = spread * (4 - mean) * (mean - 1)
    ones = np.ones(D, np.float32)
    state = fresh(grade_mean=ones * np.float32(mean), grade_uncertainty=ones * np.float32(variance))
    sums = dict(n_groups=groups, n_grades=len(grades), grade_sum=sum(grades), grade_sq_sum=np.square(grades).sum())
    got = update(state, stats(**{name: value * ones for name, value in sums.items()}))

    w = 1 - 0.95**groups
    values = np.array([mean - variance**0.5, mean + variance**0.5, *grades])
    weights = np.array([(1 - w) / 2, (1 - w) / 2, *[w / len(grades)] * len(grades)])
    mu = np.average(values, weights=weights)
    np.testing.assert_allclose(got.grade_mean, mu, atol=1e-5)
    np.testing.assert_allclose(got.grade_uncertainty, np.average((values - mu) ** 2, weights=weights), atol=2e-5)


def test_rounding_does_not_lift_the_variance_over_its_bound():
    """Grades of 1 and 4 only keep the variance at its bound (4 - mu)(mu - 1) exactly, rounding aside."""
    state, n = fresh(grade_uncertainty=np.full(D, 2.25, np.float32)), np.ones(D)
    for step in range(40):
        fours = (step + np.arange(D)) % 3
        sums = stats(n_groups=n, n_grades=2 * n, grade_sum=2 + 3 * fours, grade_sq_sum=2 + 15 * fours)
        state = jax.device_get(update(state, sums))
        mu, variance = state.grade_mean, state.grade_uncertainty
        assert np.all(variance <= (4 - mu) * (mu - 1))
        np.testing.assert_allclose(variance, (4 - mu) * (mu - 1), atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_an_update_equals_two_with_the_same_means(first, second, seed):
    rng = np.random.default_rng(seed)
    grade = rng.uniform(1, 4, D)
    mean = {"pass_sum": rng.random(D), "zero_var_sum": rng.random(D), "abs_adv_sum": rng.random(D)}

    def sums(n):
        grades = dict(n_grades=n * np.ones(D), grade_sum=n * grade, grade_sq_sum=n * (grade**2 + 0.1))
        return stats(n_groups=n * np.ones(D), **grades, **{name: n * value for name, value in mean.items()})

    once = update(fresh(), sums(first + second))
    twice = update(update(fresh(), sums(first)), sums(second))
    for leaf in ("acc_ema", "zvf_ema", "adv_ema", "grade_mean", "grade_uncertainty", "n_prompts"):
        np.testing.assert_allclose(getattr(once, leaf), getattr(twice, leaf), atol=2e-5, err_msg=leaf)


PER_DOMAIN = [leaf for leaf, value in fresh()._asdict().items() if value.shape == (D,)]


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_invariants_along_a_run(seed):
    rng = np.random.default_rng(seed)
    state = fresh()
    for _ in range(6):
        sums = statistics_jit(*batch(rng, 4), D)
        before, state = jax.device_get(state), jax.device_get(update(state, sums))
        unseen, untried = np.asarray(sums.n_groups) == 0, np.asarray(sums.tried) == 0
        for leaf in PER_DOMAIN:
            kept = untried if leaf in ("last_tried_step", "failures", "cost_ema") else unseen
            identical(getattr(before, leaf)[kept], getattr(state, leaf)[kept])
        mu, variance = state.grade_mean, state.grade_uncertainty
        assert np.all((0 <= state.acc_ema) & (state.acc_ema <= 1)) and np.all((1 <= mu) & (mu <= 4))
        assert np.all(0 <= variance) and np.all(variance <= (4 - mu) * (mu - 1) + 1e-6) and np.all(variance <= 2.25)
        np.testing.assert_array_equal(state.last_seen_step[~unseen], before.step)
        np.testing.assert_array_equal(state.failures[unseen & ~untried], before.failures[unseen & ~untried] + 1)
        assert np.all(state.failures[~unseen] == 0)


def test_both_thresholds_belong_to_medium():
    acc = np.array([0.3999, 0.4, 0.8, 0.8001, 1.0], np.float32)
    n = np.ones(D)
    state = update(fresh(acc_ema=acc), stats(n_groups=n, pass_sum=acc, n_grades=n, grade_sum=n, grade_sq_sum=n))
    np.testing.assert_array_equal(state.performance_band, [0, 1, 1, 2, 2])
    assert state.band_names == ("low", "medium", "medium", "high", "high")


def test_a_domain_rests_after_failed_tries():
    """Domain 0 is tried whenever it may be and never graded: rests of 1, 3, 7, 15, 31, then the cap of 32 steps."""
    state, tries = fresh(), []
    for step in range(161):
        if can_draw(state)[0]:
            tries.append(step)
        state = update(state, stats(tried=[step in tries, 0, 0, 0, 0]))
    np.testing.assert_array_equal(np.diff(tries) - 1, [1, 3, 7, 15, 31, 32, 32])
    assert state.failures[0] == len(tries) and state.last_seen_step[0] == -1
    assert int(steps_waited(state)[0]) == 161 - tries[-1] - 1
    graded = update(state, stats(n_groups=[1, 0, 0, 0, 0], n_grades=[1, 0, 0, 0, 0]))
    assert graded.failures[0] == 0 and can_draw(graded)[0]


def visit(state, rate, groups=1, advance=update, **sums):
    """One step in which every domain had so many groups of that mean pass rate; grades stay at 2.5."""
    n = groups * np.ones(D)
    given = dict(n_groups=n, pass_sum=n * rate, pass_sq_sum=n * np.square(rate), n_grades=4 * n)
    return advance(state, stats(**given | dict(grade_sum=10 * n, grade_sq_sum=25 * n) | sums))


def test_a_band_is_left_only_beyond_its_threshold():
    """Pass rates walk from 0.5 up over 0.8 and down again in steps; beta = 1, so that acc is the last rate."""
    walk = [0.5, 0.81, 0.84, 0.79, 0.76, 0.41, 0.38, 0.36, 0.42, 0.44]
    for width, expected in ((0.0, [1, 2, 2, 1, 1, 1, 0, 0, 1, 1]), (0.03, [1, 1, 2, 2, 1, 1, 1, 0, 0, 1])):
        state, bands = fresh(), []
        for rate in walk:
            state = visit(state, rate, advance=updating(beta=1.0, hysteresis=width))
            bands.append(int(state.performance_band[0]))
        assert bands == expected
    jump = visit(fresh(performance_band=np.full(D, 2, np.int32)), 0.1, advance=updating(beta=1.0, hysteresis=0.03))
    assert jump.performance_band[0] == 0  # from high to low at once


def test_the_cost_of_a_prompt_is_averaged_over_prompts_drawn_graded_or_not():
    state = update(fresh(), stats(tried=[2, 1, 0, 1, 1], cost_sum=[10, 30, 9, 0, np.nan]))
    np.testing.assert_allclose(state.cost_ema, [5, 30, 0, 0, 0])  # the first one stands alone; none, none, broken
    assert state.num_prompts == 5 and state.failures[0] == 1
    state = update(state, stats(n_groups=[2, 0, 0, 0, 0], tried=[2, 0, 1, 0, 0], cost_sum=[30, 0, 8, 0, 0]))
    np.testing.assert_allclose(state.cost_ema, [5 + (1 - 0.95**2) * 10, 30, 8, 0, 0], rtol=1e-6)


def test_the_window_is_a_plain_mean_at_first_and_keeps_the_memory_of_39_groups():
    state, seen = fresh(), []
    for step in range(60):
        seen.append(0.9 if step < 30 else 0.1)
        state = visit(state, 0.5, norm_adv_sum=np.full(D, seen[-1]))
        if step < 20:  # 1 / n stays above beta until n = 20
            np.testing.assert_allclose(state.norm_adv, np.mean(seen), rtol=1e-5)
    np.testing.assert_allclose(state.norm_adv[0], 0.1 + 0.8 * 0.95**30, atol=1e-5)
    np.testing.assert_array_equal(state.n_samples, [240] * D)


def test_the_bandit_value_moves_half_way_a_step_however_many_groups():
    state = visit(fresh(), 0.5, groups=7, norm_adv_sum=np.full(D, 7 * 0.8))
    np.testing.assert_allclose(state.value, [0.4] * D, rtol=1e-6)
    state = visit(state, 0.5, norm_adv_sum=np.full(D, 0.2))
    np.testing.assert_allclose(state.value, [0.3] * D, rtol=1e-6)


def test_the_half_life_grows_with_passed_reviews_that_were_due_and_shrinks_with_lapses():
    rate = np.array([1.0, 0.8, 0.7, 0.0, 1.0])
    state = visit(fresh(half_life=np.array([4, 4, 4, 1, 150], np.float32), step=jnp.int32(4)), rate)
    # the first review comes 4 + 1 steps after the step before 0: due, so passed ones double; 150 by a gap of 5 only
    np.testing.assert_allclose(state.half_life, [8, 8, 2, 1, 155], rtol=1e-6)
    early = visit(state, 1.0)
    np.testing.assert_allclose(early.half_life, [9, 9, 3, 2, 156], rtol=1e-6)  # a gap of one step teaches one step
    late = visit(state._replace(step=jnp.int32(999)), 1.0)
    np.testing.assert_allclose(late.half_life, [16, 16, 4, 2, 200])  # twice as long, 200 at most


def test_a_level_settles_where_half_is_passed():
    """The learner passes level l with probability sigmoid(skill - l); the level used is the rounded one."""
    advance, rng = updating(difficulty="adaptive", beta=0.3), np.random.default_rng(0)
    skill, levels, rates = np.array([2.0, 5.0, 9.0, 30.0, 5.0]), [], []
    state = init(0, roster(D, level=1, level_min=[1, 1, 1, 1, 4], level_max=[12, 12, 12, 12, 4]))
    for _ in range(300):
        level = np.round(np.asarray(state.level))
        rate = rng.binomial(16, 1 / (1 + np.exp(level - skill))) / 16  # two groups of eight
        state = visit(state, rate, groups=2, advance=advance)
        levels.append(level), rates.append(rate)
    np.testing.assert_allclose(np.mean(levels[100:], 0), [2, 5, 9, 12, 4], atol=0.35)
    np.testing.assert_allclose(np.mean(rates[100:], 0)[:3], 0.5, atol=0.06)
    np.testing.assert_array_equal(visit(state, 0.0).level, state.level)  # fixed difficulty


def test_a_level_never_moves_by_more_than_one_a_step_and_a_new_one_restarts_the_detector():
    advance = updating(difficulty="adaptive")
    state = init(0, roster(D, level=3, level_min=[0, 0, 0, 0, 3], level_max=[9, 9, 9, 9, 3]))
    state = visit(state._replace(cusum=state.cusum + 1, ref_visits=state.ref_visits + 50), 0.0, 64, advance)
    np.testing.assert_array_equal(state.level, [2, 2, 2, 2, 3])
    np.testing.assert_array_equal(state.cusum > 0, [False] * 4 + [True])
    np.testing.assert_array_equal(state.ref_visits, [0] * 4 + [51])


def test_mute_domains_count_as_seen_and_keep_their_averages():
    mute = np.array([True, True, False, False, False])
    grades = dict(
        n_groups=[2, 0, 2, 0, 1], pass_sum=[2, 0, 2, 0, 1], grade_sum=[32, 0, 32, 0, 16], n_grades=[8, 0, 8, 0, 4]
    )
    grades |= dict(grade_sq_sum=[128, 0, 128, 0, 64], zero_var_sum=[2, 0, 2, 0, 1], pass_sq_sum=[2, 0, 2, 0, 1])
    before = fresh(failures=np.array([3, 0, 0, 0, 0], np.int32))
    heard, told = update(before, stats(**grades)), update(before, stats(**grades), mute)
    counted = ("last_seen_step", "last_tried_step", "failures", "visits", "n_prompts", "n_samples")
    for name, old, new, plain in zip(before._fields, before, told, heard):
        if np.ndim(old) and len(old) == D and name not in counted:
            identical(new[:2], old[:2])  # as they were
        if np.ndim(old) and len(old) == D:
            identical(new[2:], plain[2:])  # as ever
    np.testing.assert_array_equal(
        [told.visits[0], told.n_prompts[0], told.failures[0], told.last_seen_step[0]], [1, 2, 0, 0]
    )
    assert heard.acc_ema[0] > before.acc_ema[0] and told.visits[1] == 0
