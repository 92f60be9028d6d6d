import dataclasses
import functools
import importlib.resources
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from curriculum.triage import DomainStats, TriageConfig, TriageStateManager, drawable, statistics, steps_waited

D = 5


@functools.cache
def faithful() -> TriageConfig:
    numbers = OmegaConf.to_container(OmegaConf.load(importlib.resources.files("configs") / "curriculum/faithful.yaml"))
    del numbers["policy"]
    return TriageConfig(**numbers | {"capacity": tuple(numbers["capacity"])})


update = jax.jit(TriageStateManager(faithful()).update)
init = jax.jit(TriageStateManager(faithful()).init)
statistics_jit = jax.jit(statistics, static_argnums=4)
can_draw = jax.jit(functools.partial(drawable, faithful()))


def fresh(**leaves):
    ones = np.ones(D)
    return init(0, ones, ones, 0 * ones, 0 * ones)._replace(**leaves)


def stats(tried=None, **sums) -> DomainStats:
    """Zero but for the named sums; tried defaults to n_groups."""
    zeros = {field: np.zeros(D, np.float32) for field in DomainStats._fields}
    zeros |= {field: np.asarray(value, np.float32) for field, value in sums.items()}
    zeros["tried"] = zeros["n_groups"] if tried is None else np.asarray(tried, np.float32)
    return DomainStats(**zeros)


def identical(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def batch(rng, groups, samples=4):
    """Random groups as a grader would return them, some rows and some whole groups without a grade."""
    grade_PG = rng.integers(1, 5, (groups, samples)).astype(np.float32)
    valid_PG = rng.random((groups, samples)) < rng.choice([0.0, 0.5, 1.0], (groups, 1))
    return rng.integers(0, D, groups).astype(np.int32), grade_PG, (grade_PG - 1) / 3, valid_PG


NAN = math.nan
GRADE = np.array([[4, 3, 1], [2, 2, 2], [4, NAN, NAN], [3, 3, 3], [4, 4, 4], [4, 4, 4]], np.float32)
VALID = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
DOMAIN = np.array([0, 2, 2, 1, -1, 3], np.int32)  # the last two are padding


@pytest.mark.parametrize("wrap", [lambda f, **_: f, jax.jit], ids=["eager", "jit"])
def test_statistics_by_hand(wrap):
    got = wrap(statistics, static_argnames="num_domains")(DOMAIN, GRADE, (GRADE - 1) / 3, VALID, num_domains=3)
    expected = DomainStats(
        n_groups=[1, 0, 2],
        pass_sum=[2 / 3, 0, 0 + 1],
        grade_sum=[8, 0, 6 + 4],
        grade_sq_sum=[26, 0, 12 + 16],
        n_grades=[3, 0, 3 + 1],
        zero_var_sum=[0, 0, 1 + 1],  # all alike; a single row
        abs_adv_sum=[10 / 27, 0, 0],  # rewards 1, 2/3, 0 around 5/9
        tried=[1, 1, 2],
    )
    for field, value, hand in zip(DomainStats._fields, got, expected):
        np.testing.assert_allclose(value, hand, atol=1e-6, err_msg=field)


def test_statistics_count_no_row_that_is_not_finite():
    valid_PG = np.ones_like(VALID)
    got = statistics_jit(DOMAIN, GRADE, (GRADE - 1) / 3, valid_PG, 3)
    assert got.n_grades[2] == 4
    reward_PG = np.where(GRADE == 4, np.inf, 0.0).astype(np.float32)
    assert statistics_jit(DOMAIN, np.ones_like(GRADE), reward_PG, valid_PG, 3).n_grades[0] == 2


def test_statistics_of_eight_shards_add_to_those_of_one_host():
    domain_P, *rows = batch(np.random.default_rng(0), 32)
    whole = statistics_jit(domain_P, *rows, D)
    shards = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), (domain_P, *rows))
    psum = jax.vmap(lambda *shard: jax.lax.psum(statistics(*shard, D), "data"), axis_name="data")
    first = jax.tree.map(lambda x: x[0], jax.jit(psum)(*shards))
    for one, other in zip(whole, first):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert whole.n_groups.sum() < 32 == whole.tried.sum()
    for one, other in zip(update(fresh(), whole), update(fresh(), first)):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_one_group_weighs_beta_and_many_compound():
    n = np.array([1, 2, 104, 0, 0])
    state = update(fresh(), stats(n_groups=n, pass_sum=n, n_grades=n, grade_sum=4 * n, grade_sq_sum=16 * n))
    np.testing.assert_allclose(state.acc_ema, [0.525, 0.54875, 0.9976, 0.5, 0.5], atol=1e-4)
    np.testing.assert_array_equal(state.performance_band, [1, 1, 2, 1, 1])
    np.testing.assert_array_equal(state.visits, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(state.n_prompts, n)
    assert state.n_prompts.dtype == jnp.int32 and state.step == 1


def test_beta_one_remembers_the_last_batch_only():
    manager = TriageStateManager(dataclasses.replace(faithful(), beta=1.0))
    n = np.array([1, 3, 0, 0, 0])
    state = manager.update(fresh(), stats(n_groups=n, pass_sum=n, n_grades=n, grade_sum=4 * n, grade_sq_sum=16 * n))
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
            kept = untried if leaf in ("last_tried_step", "failures") else unseen
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


def test_drawable_by_arrival_activity_and_rest():
    arrives = np.array([0, 0, 7, 0, 0])
    manager = TriageStateManager(faithful())
    state = manager.init(0, [1, 1, 1, 1, 0], [1, 0, 1, 1, 1], np.zeros(D), arrives)
    np.testing.assert_array_equal(can_draw(state), [1, 0, 0, 1, 0])  # a weight of 0 is never drawn
    failed = update(state, stats(tried=[1, 0, 0, 0, 0]))
    np.testing.assert_array_equal(can_draw(failed), [0, 0, 0, 1, 0])
    all_failed = update(state, stats(tried=[1, 0, 0, 1, 0]))
    np.testing.assert_array_equal(can_draw(all_failed), [1, 0, 0, 1, 0])  # all rest: none does
    np.testing.assert_array_equal(can_draw(state._replace(step=jnp.int32(7))), [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(steps_waited(state._replace(step=jnp.int32(9))), [9, 9, 2, 9, 9])


def test_init_leaves():
    state = fresh()
    np.testing.assert_array_equal(state.acc_ema, [0.5] * D)
    np.testing.assert_array_equal(state.grade_uncertainty, [0.5625] * D)
    assert state.key_data.shape == (2,) and state.key_data.dtype == jnp.uint32
    assert all(leaf.weak_type is False for leaf in state)  # a resumed run must not compile again
    for value in (state, update(state, stats())):
        assert [leaf.dtype for leaf in value] == [leaf.dtype for leaf in state]


def test_keys_are_none_of_a_trainers_with_the_same_seed():
    """A trainer folds step and stream into key(seed); splitting a key is folding 0, 1, ... into it."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    steps = fold(jax.random.key(0), jnp.arange(16))
    streams = jax.vmap(fold, (0, None))(steps, jnp.arange(16)).ravel()
    root = jax.random.wrap_key_data(fresh().key_data)
    ours = jnp.concatenate([root[None], fold(root, jnp.arange(16))])
    theirs = jnp.concatenate([jax.random.key(0)[None], steps, streams])
    assert not set(map(tuple, key_words(ours))) & set(map(tuple, key_words(theirs)))


def key_words(keys):
    return np.asarray(jax.random.key_data(keys)).tolist()


def test_metrics_are_finite_arrays_a_domain():
    manager = TriageStateManager(faithful())
    metrics = manager.metrics(fresh(step=jnp.int32(3)), jnp.full(D, 1 / D))
    np.testing.assert_allclose(metrics["uncertainty"], [0.25] * D)
    np.testing.assert_array_equal(metrics["staleness"], [3] * D)
    assert set(metrics) == {"acc_ema", "share", "band", "staleness", "uncertainty", "zvf_ema", "adv_ema"}
    assert all(value.shape == (D,) and np.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("beta", 0.0, "above 0 and at most 1"),
        ("beta", 1.5, "above 0 and at most 1"),
        ("beta", NAN, "above 0 and at most 1"),
        ("low", 0.8, "below curriculum.high=0.8"),
        ("high", 1.1, "at most 1"),
        ("acc_start", -0.1, "0 to 1"),
        ("grade_mean_start", 5.0, "1 to 4"),
        ("grade_variance_start", 3.0, "0 to 2.25"),
        ("backoff_cap", -1, "at least 0"),
        ("capacity", (0.6, 0.4), "three numbers"),
        ("capacity", (0.6, 0.4, 0.0), "above 0"),
        ("eta", 2.0, "0 to 1"),
        ("staleness_weight", -1.0, "at least 0"),
        ("staleness_steps", 0.0, "above 0"),
        ("uncertainty_weight", math.inf, "at least 0"),
        ("temperature", 0.0, "above 0"),
        ("epsilon", 1.0, "below 1"),
        ("single_every", -10, "at least 0"),
    ],
)
def test_impossible_numbers_name_key_value_and_remedy(key, value, remedy):
    with pytest.raises(ValueError) as raised:
        dataclasses.replace(faithful(), **{key: value})
    line = str(raised.value)
    assert line.startswith(f"curriculum.{key}={value}: ") and remedy in line and "\n" not in line
