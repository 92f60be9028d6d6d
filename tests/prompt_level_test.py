"""Shares and draws of single prompts against numpy by hand, and the promises of the draw."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum import prompt_level
from curriculum.config import PromptConfig
from curriculum.prompt_level import PromptState

CONFIG = PromptConfig(beta=0.3, low_weight=0.5, uncertainty_weight=2.0, staleness_weight=1.0, unseen=0.5)
SIZES = (30, 0, 7, 90)
WHERE = prompt_level.layout(SIZES)
N, S, P = sum(SIZES), len(SIZES), 16
ENDS = np.cumsum(SIZES)

probabilities = jax.jit(functools.partial(prompt_level.probabilities, CONFIG, WHERE))
draw = jax.jit(functools.partial(prompt_level.draw, CONFIG, WHERE))
update = jax.jit(functools.partial(prompt_level.update, CONFIG))


def state_of(seed: int, never: float = 0.3) -> PromptState:
    """A state as it could be after a while; `never` is the part of the prompts not drawn yet."""
    rng = np.random.default_rng(seed)
    seen = rng.random(N) >= never
    drawn = rng.integers(100, 200, S)
    return PromptState(
        draws=jnp.int32(seed),
        acc_ema=jnp.asarray(np.where(seen, rng.random(N), 0.5), jnp.float32),
        visits=jnp.asarray(np.where(seen, rng.integers(1, 9, N), 0), jnp.int32),
        last_seen=jnp.asarray(np.where(seen, rng.integers(0, 100, N), -1), jnp.int32),
        drawn_S=jnp.asarray(drawn, jnp.int32),
    )


def shares_by_hand(config: PromptConfig, state: PromptState, counts: np.ndarray) -> np.ndarray:
    """The module's formula in float64, stream by stream."""
    p = []
    for s, size in enumerate(SIZES):
        part = slice(ENDS[s] - size, ENDS[s])
        a, never = np.asarray(state.acc_ema[part], np.float64), np.asarray(state.visits[part]) == 0
        epochs = (int(state.drawn_S[s]) - np.asarray(state.last_seen[part])) / max(size, 1)
        stale = np.where(never, 1, 1 - np.exp(-epochs))
        z = config.low_weight * (1 - a) + config.uncertainty_weight * 4 * a * (1 - a) + config.staleness_weight * stale
        q = np.exp(z) / np.exp(z).sum()
        f = min(config.unseen, never.sum() / max(counts[s], 1))
        p.append((1 - f) * q + (f * never / never.sum() if never.any() else 0))
    return np.concatenate(p)


@pytest.mark.parametrize("never", [0.0, 0.3, 1.0])
def test_shares_are_those_of_the_formula(never):
    state, counts = state_of(1, never), np.array([3, 0, 5, 8])
    expected = shares_by_hand(CONFIG, state, counts)
    np.testing.assert_allclose(probabilities(state, counts), expected, rtol=2e-5)
    for end, size in zip(ENDS, SIZES):
        np.testing.assert_allclose(expected[end - size : end].sum(), size > 0, rtol=1e-12)


def test_a_worked_share():
    """Two prompts, both just drawn: always passed, z = 0; half of the time, z = .5/2 + 2. Shares 1 : e^2.25."""
    where = prompt_level.layout([2])
    state = prompt_level.init(where)._replace(
        acc_ema=jnp.array([1.0, 0.5]), visits=jnp.array([1, 1]), last_seen=jnp.array([4, 4]), drawn_S=jnp.array([4])
    )
    p = prompt_level.probabilities(CONFIG, where, state, jnp.array([1]))
    np.testing.assert_allclose(p, [1 / (1 + np.exp(2.25)), 1 / (1 + np.exp(-2.25))], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.lists(st.sampled_from([0, 2, 3]), min_size=P, max_size=P),
)
def test_every_slot_gets_a_prompt_of_its_stream_and_counts_are_within_one_of_the_shares(seed, never, streams):
    state, stream = state_of(seed % 1000, never), np.array(streams)
    index, after = draw(state, jax.random.key(seed), jnp.asarray(streams))
    np.testing.assert_array_equal(WHERE.stream_N[index], stream)  # so that each stream's sum is exact
    counts = np.bincount(stream, minlength=S)
    n = np.bincount(index, minlength=N)
    expected = counts[WHERE.stream_N] * shares_by_hand(CONFIG, state, counts)
    assert np.abs(n - expected).max() < 1 + 1e-3
    np.testing.assert_array_equal(after.visits - state.visits, n)
    np.testing.assert_array_equal(after.drawn_S - state.drawn_S, counts)
    seen = np.where(n > 0, np.asarray(after.drawn_S)[WHERE.stream_N], state.last_seen)
    np.testing.assert_array_equal(after.last_seen, seen)
    assert after.draws == state.draws + 1


def test_draws_are_unbiased():
    """Mean counts over 20,000 keys against n p, in standard errors of the two values next to n p."""
    state, streams, keys = state_of(3), np.array([0] * 3 + [2] * 4 + [3] * 9), 20_000
    index = jax.jit(jax.vmap(lambda key: draw(state, key, jnp.asarray(streams))[0]))(
        jax.random.split(jax.random.key(5), keys)
    )
    counts = np.bincount(streams, minlength=S)
    expected = counts[WHERE.stream_N] * shares_by_hand(CONFIG, state, counts)
    found = np.bincount(np.asarray(index).ravel(), minlength=N) / keys
    part = expected % 1
    assert (np.abs(found - expected) < 4.5 * np.sqrt(part * (1 - part) / keys) + 1e-4).all()


def test_the_draw_is_a_function_of_state_and_key():
    state, streams = state_of(4), jnp.array([3] * 12 + [0] * 4)
    first, again, other = (draw(state, jax.random.key(k), streams)[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def drawn_in_turn(config: PromptConfig, sizes: list[int], streams: list[int], steps: int) -> list[np.ndarray]:
    """Prompts of `steps` draws in a row; odd ones are always passed, even ones half of the time."""
    where = prompt_level.layout(sizes)
    step = jax.jit(functools.partial(prompt_level.draw, config, where))
    state, found = prompt_level.init(where), []
    for k in range(steps):
        index, state = step(state, jax.random.key(k), jnp.asarray(streams))
        passed = jnp.where(index % 2 == 1, 1.0, 0.5)
        state = update(state, index, passed, jnp.ones(index.shape, bool))
        found.append(np.asarray(index))
    return found


def test_all_for_the_unseen_is_a_plain_first_epoch():
    """56 of 56 prompts in 7 draws of 8, none twice, whatever was learnt of them."""
    found = drawn_in_turn(dataclasses.replace(CONFIG, unseen=1.0), [56], [0] * 8, 7)
    assert sorted(np.concatenate(found)) == list(range(56))


def test_half_for_the_unseen_covers_an_epoch_within_two_and_priorities_rule_the_rest():
    found = drawn_in_turn(CONFIG, [60, 61], [0] * 4 + [1] * 4, 75)  # 300 of each: 5 epochs
    epoch = np.concatenate(found[: 2 * 15 + 1])  # two of 60 at 4 a step
    assert set(epoch) == set(range(121))
    later = np.bincount(np.concatenate(found[31:]), minlength=121)
    assert later[0:60:2].mean() > 2 * later[1:60:2].mean() and later.min() >= 0


def test_no_unseen_floor_still_leaves_nobody_out():
    """Shares are bounded below, and an undrawn prompt has the largest staleness."""
    found = drawn_in_turn(dataclasses.replace(CONFIG, unseen=0.0), [40], [0] * 8, 60)
    assert set(np.concatenate(found)) == set(range(40))


def test_pass_rates_are_a_running_mean_and_then_a_moving_average():
    where = prompt_level.layout([3])
    state = prompt_level.init(where)
    expected, rates = [0.5], [0.0, 1.0, 0.25, 0.5, 1.0]
    for k, m in enumerate(rates):
        state = state._replace(visits=state.visits.at[1].add(1))
        state = prompt_level.update(CONFIG, state, jnp.array([1]), jnp.array([m]), jnp.array([True]))
        w = max(0.3, 1 / (k + 2))  # (1/2 + 0) / 2, (1/2 + 0 + 1) / 3, and .3 from then on
        expected.append(expected[-1] + w * (m - expected[-1]))
        np.testing.assert_allclose(state.acc_ema[1], expected[-1], rtol=1e-6)
    np.testing.assert_allclose(expected[1:4], [0.25, 0.5, 0.425])
    assert state.acc_ema[0] == state.acc_ema[2] == 0.5


def test_copies_of_a_prompt_count_together_and_invalid_groups_not_at_all():
    where = prompt_level.layout([4])
    state = prompt_level.init(where)._replace(visits=jnp.array([20, 2, 1, 0], jnp.int32))
    index, passed = jnp.array([0, 1, 0, 1, 2]), jnp.array([1.0, 0.5, 0.5, 1.0, jnp.nan])
    after = prompt_level.update(CONFIG, state, index, passed, jnp.array([True, True, True, True, True]))
    # prompt 0: w = 1 - .7^2 = .51 towards .75; prompt 1: two of its two visits, w = 2/3; prompt 2: nothing to go by
    np.testing.assert_allclose(after.acc_ema, [0.5 + 0.51 * 0.25, 0.5 + 0.25 * 2 / 3, 0.5, 0.5], rtol=1e-6)
    same = prompt_level.update(CONFIG, state, index, passed, jnp.zeros(5, bool))
    np.testing.assert_array_equal(same.acc_ema, state.acc_ema)
    newest = prompt_level.update(dataclasses.replace(CONFIG, beta=1.0), state, index, passed, jnp.ones(5, bool))
    np.testing.assert_allclose(newest.acc_ema, [0.75, 0.75, 0.5, 0.5])  # a prompt not graded stays a number


def test_growth_leaves_every_other_prompt_bit_identical():
    state = state_of(7)
    longer = prompt_level.grow(state, prompt_level.layout([*SIZES, 5]))
    fresh = prompt_level.init(prompt_level.layout([5]))
    for name, old, new, added in zip(state._fields, state, longer, fresh):
        np.testing.assert_array_equal(new if old.ndim == 0 else new[: len(old)], old, err_msg=name)
        if old.ndim:
            np.testing.assert_array_equal(new[len(old) :], added, err_msg=name)
    assert len(longer.acc_ema) == N + 5 and len(longer.drawn_S) == S + 1


def test_metrics_say_how_far_a_stream_is():
    state = prompt_level.init(prompt_level.layout([2, 0]))._replace(
        visits=jnp.array([3, 0]), acc_ema=jnp.array([1.0, 0.5])
    )
    shown = prompt_level.metrics(prompt_level.layout([2, 0]), state)
    np.testing.assert_allclose(shown["covered"], [0.5, np.nan])
    np.testing.assert_allclose(shown["uncertainty"], [0.5, np.nan])


def test_one_trace_serves_every_state():
    count = draw._cache_size()
    draw(state_of(8), jax.random.key(0), jnp.asarray([0] * P))
    draw(state_of(9), jax.random.key(1), jnp.asarray([3] * P))
    assert draw._cache_size() <= count + 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("beta", 0.0),
        ("low_weight", -1.0),
        ("uncertainty_weight", float("inf")),
        ("staleness_weight", -1.0),
        ("unseen", 1.5),
    ],
)
def test_impossible_numbers_name_their_key(key, value):
    with pytest.raises(ValueError, match=rf"curriculum\.prompt\.{key}={value}: must be"):
        dataclasses.replace(CONFIG, **{key: value})


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match=r"a draw takes 1 to 16384; set algorithm\.prompts"):
        prompt_level.draw(CONFIG, WHERE, state_of(0), jax.random.key(0), jnp.zeros(16_385, jnp.int32))
