import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.cli import compose_config
from curriculum import feedback, triage
from curriculum.triage import NEVER, SHARED, DomainStats, drawable, grow, measured, roster, statistics, steps_waited

D = 5
CONFIG = compose_config("config", None, ["curriculum=faithful"]).curriculum
NAN = math.nan

init = jax.jit(lambda seed, members: triage.init(CONFIG, seed, members))
update = jax.jit(lambda state, stats: feedback.update(CONFIG, state, stats))
can_draw = jax.jit(lambda state: drawable(CONFIG, state))
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


GRADE = np.array([[4, 3, 1], [2, 2, 2], [4, NAN, NAN], [3, 3, 3], [4, 4, 4], [4, 4, 4]], np.float32)
VALID = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
DOMAIN = np.array([0, 2, 2, 1, -1, 3], np.int32)  # the last two are padding


@pytest.mark.parametrize("wrap", [lambda f, **_: f, jax.jit], ids=["eager", "jit"])
def test_statistics_by_hand(wrap):
    cost = np.array([3, 5, 7, 40, 100, 100], np.float32)
    got = wrap(statistics, static_argnames="num_domains")(DOMAIN, GRADE, (GRADE - 1) / 3, VALID, cost, num_domains=3)
    expected = DomainStats(
        n_groups=[1, 0, 2],
        pass_sum=[2 / 3, 0, 0 + 1],
        grade_sum=[8, 0, 6 + 4],
        grade_sq_sum=[26, 0, 12 + 16],
        n_grades=[3, 0, 3 + 1],
        zero_var_sum=[0, 0, 1 + 1],  # all alike; a single row
        abs_adv_sum=[10 / 27, 0, 0],  # rewards 1, 2/3, 0 around 5/9
        tried=[1, 1, 2],
        pass_sq_sum=[4 / 9, 0, 0 + 1],
        cost_sum=[3, 40, 5 + 7],
        norm_adv_sum=[(10 / 27) / (14 / 81) ** 0.5, 0, 0],  # squares 16, 1, 25 of 81, their mean 14/81
    )
    for field, value, hand in zip(DomainStats._fields, got, expected):
        np.testing.assert_allclose(value, hand, atol=1e-6, err_msg=field)


def test_statistics_count_no_row_that_is_not_finite():
    valid_PG = np.ones_like(VALID)
    got = statistics_jit(DOMAIN, GRADE, (GRADE - 1) / 3, valid_PG, np.ones(6, np.float32), 3)
    assert got.n_grades[2] == 4
    reward_PG = np.where(GRADE == 4, np.inf, 0.0).astype(np.float32)
    assert statistics_jit(DOMAIN, np.ones_like(GRADE), reward_PG, valid_PG, np.ones(6, np.float32), 3).n_grades[0] == 2


def test_statistics_of_eight_shards_add_to_those_of_one_host():
    rng = np.random.default_rng(0)
    grade_PG = rng.integers(1, 5, (32, 4)).astype(np.float32)
    valid_PG = rng.random((32, 4)) < rng.choice([0.0, 0.5, 1.0], (32, 1))
    domain_P, *rows = (rng.integers(0, D, 32), grade_PG, (grade_PG - 1) / 3, valid_PG, rng.random(32))
    whole = statistics_jit(domain_P, *rows, D)
    shards = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), (domain_P, *rows))
    psum = jax.vmap(lambda *shard: jax.lax.psum(statistics(*shard, D), "data"), axis_name="data")
    first = jax.tree.map(lambda x: x[0], jax.jit(psum)(*shards))
    for one, other in zip(whole, first):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert whole.n_groups.sum() < 32 == whole.tried.sum()
    for one, other in zip(update(fresh(), whole), update(fresh(), first)):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_roster_fills_in_what_is_not_given():
    members = roster(3, weight=[1, 2, 0], arrives=[0, 5, 0])
    np.testing.assert_array_equal(members.weight, [1, 2, 0])
    np.testing.assert_array_equal(members.retires, [NEVER] * 3)
    assert members.arrives.dtype == jnp.int32 and members.active.all() and not members.is_new.any()
    with pytest.raises(ValueError, match=r"roster\(wait=...\): known are weight, size"):
        roster(3, wait=1)


def test_init_leaves():
    state = fresh()
    np.testing.assert_array_equal(state.acc_ema, [0.5] * D)
    np.testing.assert_array_equal(state.grade_uncertainty, [0.5625] * D)
    assert state.key_data.shape == (2,) and state.key_data.dtype == jnp.uint32
    assert state.band_names == ("medium",) * D and not state.drift_flag.any()
    assert all(leaf.weak_type is False for leaf in state)  # a resumed run must not compile again
    for value in (state, update(state, stats())):
        assert [leaf.dtype for leaf in value] == [leaf.dtype for leaf in state]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in triage.init(CONFIG, 0, roster(D))]
    assert len(set(pointers)) == len(pointers)  # a donated state may not hold one buffer twice


def test_levels_start_within_their_bounds():
    state = init(0, roster(D, level=[0, 1, 2, 3, 4], level_min=1, level_max=3))
    np.testing.assert_array_equal(state.level, [1, 1, 2, 3, 3])


def test_grown_domains_leave_every_other_leaf_bit_for_bit():
    n = np.array([3, 0, 2, 1, 4])
    sums = dict(n_groups=n, n_grades=4 * n, pass_sum=n / 3, grade_sum=9 * n, grade_sq_sum=25 * n, cost_sum=7 * n)
    state = update(update(fresh(), stats(**sums)), stats(**sums))
    grown = grow(state, CONFIG, roster(2, weight=[2, 1], size=[30, 40], is_new=True, arrives=7, retires=[9, NEVER]))
    for name, before, after in zip(state._fields, state, grown):
        if name in SHARED:
            identical(before, after)
        else:
            assert after.shape == (D + 2,) and after.dtype == before.dtype
            identical(before, after[:D])
    np.testing.assert_allclose(grown.base_log_w[D:], [math.log(2), 0])
    np.testing.assert_array_equal(grown.last_seen_step[D:], [-1, -1])
    for step, expected in ((6, [0, 0]), (7, [1, 1]), (8, [1, 1]), (9, [0, 1])):
        np.testing.assert_array_equal(drawable(CONFIG, grown._replace(step=jnp.int32(step)))[D:], expected)


def test_drawable_by_arrival_retirement_activity_and_rest():
    state = init(0, roster(D, weight=[1, 1, 1, 1, 0], active=[1, 0, 1, 1, 1], arrives=[0, 0, 7, 0, 0]))
    np.testing.assert_array_equal(can_draw(state), [1, 0, 0, 1, 0])  # a weight of 0 is never drawn
    failed = update(state, stats(tried=[1, 0, 0, 0, 0]))
    np.testing.assert_array_equal(can_draw(failed), [0, 0, 0, 1, 0])
    all_failed = update(state, stats(tried=[1, 0, 0, 1, 0]))
    np.testing.assert_array_equal(can_draw(all_failed), [1, 0, 0, 1, 0])  # all rest: none does
    np.testing.assert_array_equal(can_draw(state._replace(step=jnp.int32(7))), [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(steps_waited(state._replace(step=jnp.int32(9))), [9, 9, 2, 9, 9])
    retired = state._replace(step=jnp.int32(7), retires=jnp.array([7, NEVER, 8, 3, NEVER], jnp.int32))
    np.testing.assert_array_equal(can_draw(retired), [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(can_draw(retired._replace(step=jnp.int32(8))), [1, 0, 1, 1, 0])  # all gone: none is


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


def test_pass_rates_measured_before_a_run_replace_the_assumed_one():
    """Rates .2, .9, none, .5 of a prior, a prior, a prior and a new domain; the new one is still to be tried."""
    state = init(0, roster(4, is_new=[False, False, False, True]))
    told = measured(CONFIG, state, np.array([0.2, 0.9, np.nan, 0.5], np.float32))
    for leaf in (told.acc_ema, told.fast_acc, told.ref_mean, told.drift_goal):
        np.testing.assert_allclose(leaf, [0.2, 0.9, CONFIG.acc_start, 0.5], rtol=1e-6)
    assert told.performance_band.tolist() == [0, 2, 1, 1] and told.last_seen_step.tolist() == [0, 0, -1, -1]
    kept = [name for name, old, new in zip(state._fields, state, told) if new is old]
    assert len(kept) == len(state) - 6 and drawable(CONFIG, told).all()
