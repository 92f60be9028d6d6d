import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cli import compose_config
from curriculum import policies, priorities, triage
from curriculum.config import CurriculumConfig
from curriculum.triage import TriageState, roster

D, P = 7, 16
SETTINGS = settings(deadline=None, max_examples=60)
CONFIG = compose_config("config", None, ["curriculum=faithful"]).curriculum
init = jax.jit(functools.partial(triage.init, CONFIG))


@functools.cache
def config(**changes) -> CurriculumConfig:
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def shares(**changes):
    return jax.jit(policies.build(config(**changes)).probabilities)


def fresh(num_domains=D, seed=0, **leaves) -> TriageState:
    """The state before step 0 with some leaves set; lists shorter than D leave the last domains inactive."""
    state = jax.device_get(init(seed, roster(num_domains)))
    for name, value in leaves.items():
        value = np.asarray(value, getattr(state, name).dtype)
        if 0 < value.ndim and len(value) < num_domains and name != "key_data":
            state = state._replace(active=np.arange(num_domains) < len(value))
            value = np.pad(value, (0, num_domains - len(value)))
        state = state._replace(**{name: value})
    return state


BLANK = fresh()


@st.composite
def states(draw) -> TriageState:
    """Any state: bands, ages, variances, weights spanning e^6, arrivals, rests, closed domains."""

    def each(values):
        return np.array(draw(st.lists(values, min_size=D, max_size=D)))

    step = draw(st.integers(0, 300))
    tried = np.minimum(each(st.integers(-1, 299)), step - 1)
    leaves = dict(
        step=step,
        key_data=draw(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2)),
        performance_band=each(st.integers(0, 2)),
        last_seen_step=np.minimum(tried, each(st.integers(-1, 299))),
        last_tried_step=tried,
        failures=each(st.sampled_from([0, 0, 0, 1, 2, 9])),
        grade_uncertainty=each(st.floats(0, 2.25)),
        base_log_w=each(st.floats(-3, 3)),
        boost=each(st.floats(0, 1.5)),
        active=each(st.sampled_from([True, True, True, False])),
        arrives=each(st.sampled_from([0, 0, 0, 50, 400])),
    )
    leaves["active"][draw(st.integers(0, D - 1))] = True
    return BLANK._replace(**{name: np.asarray(value, getattr(BLANK, name).dtype) for name, value in leaves.items()})


def can_draw(state) -> np.ndarray:
    """The rule for who may get prompts, written once more in numpy."""
    here = state.active & (state.arrives <= state.step)
    rested = [
        state.step - 1 - tried >= min(2 ** int(f) - 1, 32) for tried, f in zip(state.last_tried_step, state.failures)
    ]
    ready = here & np.array(rested)
    return ready if ready.any() else here if here.any() else state.active


def floored(q, floor) -> np.ndarray:
    """max(floor, lambda q) by trying every size of the set above the floor, largest ratio first."""
    order = np.argsort(-q / floor)
    for size in range(len(q), 0, -1):
        top, rest = order[:size], order[size:]
        scale = (1 - floor[rest].sum()) / q[top].sum()
        if np.all(scale * q[top] >= floor[top] * (1 - 1e-12)):
            return np.maximum(floor, scale * q)


def shares_by_loop(c: CurriculumConfig, state) -> np.ndarray:
    """The module's formula in float64, a domain at a time."""
    can = can_draw(state)
    h, w = np.zeros(D), np.exp(np.float64(state.base_log_w))
    for i in range(D):
        last = max(state.last_seen_step[i], state.last_tried_step[i])
        waited = max(state.step - max(last, state.arrives[i] - 1) - 1, 0)
        stale = 1 if last < 0 else 1 - np.exp(-waited / c.staleness_steps)
        h[i] = c.staleness_weight * stale + c.uncertainty_weight * np.float64(state.grade_uncertainty[i]) / 2.25
    z = np.zeros(D)
    for i in range(D):
        band = [j for j in range(D) if can[j] and state.performance_band[j] == state.performance_band[i]]
        claim = sum(w[j] * (np.exp(h[j]) if c.strict else 1) for j in band) or 1
        z[i] = np.log(c.band_capacity[state.performance_band[i]] / claim**c.eta) + h[i] + np.log(w[i]) + state.boost[i]
        z[i] += c.signal_weight * np.log(max(1 - np.float64(state.zvf_ema[i]), 0.02))
        z[i] += c.gap_weight * np.log(max(1 - np.float64(state.acc_ema[i]), 0.02))
    q = np.exp(z[can] / c.temperature)
    p = np.zeros(D)
    p[can] = floored(q / q.sum(), np.full(can.sum(), c.epsilon / can.sum()))
    return p


VARIANTS = [
    {},
    {"strict": True},
    {"eta": 0.5, "temperature": 2.0, "uncertainty_weight": 3.0},
    {"epsilon": 0.5},
    {"signal_weight": 1.0, "gap_weight": 0.5},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@given(state=states())
@SETTINGS
def test_shares_follow_the_formula_and_the_floor(changes, state):
    c, p, can = config(**changes), np.asarray(shares(**changes)(state)), can_draw(state)
    np.testing.assert_allclose(p, shares_by_loop(c, state), atol=1e-5)
    np.testing.assert_allclose(p.sum(), 1, atol=1e-6)
    assert np.all(p[can] >= np.float32(c.epsilon / can.sum()) * (1 - 1e-6)) and np.all(p[~can] == 0)


@pytest.mark.parametrize("strict", [False, True])
@given(state=states(), level=st.floats(0, 2.25))
@SETTINGS
def test_bands_get_exactly_their_capacity(strict, state, level):
    """Claim 1: for equal staleness and uncertainty, or for any if strict; any weights, any number of members."""
    can = can_draw(state)
    if not strict:
        state = state._replace(last_seen_step=np.full(D, -1, np.int32), last_tried_step=np.full(D, -1, np.int32))
        state = state._replace(grade_uncertainty=np.full(D, level, np.float32), failures=np.zeros(D, np.int32))
        can = can_draw(state)
    state = state._replace(boost=np.zeros(D, np.float32))
    p = np.asarray(shares(strict=strict, epsilon=0.0)(state), np.float64)
    capacity = np.array([0.6, 0.3, 0.1])
    filled = np.array([np.any(can & (state.performance_band == band)) for band in range(3)])
    for band in range(3):
        expected = filled[band] * capacity[band] / capacity[filled].sum()
        np.testing.assert_allclose(p[state.performance_band == band].sum(), expected, atol=1e-5)


def test_shares_worked_by_hand():
    p = shares()

    def check(expected, atol=1e-6, **leaves):
        np.testing.assert_allclose(p(fresh(**leaves)), np.pad(expected, (0, D - len(expected))), atol=atol)

    check([0.6, 0.15, 0.15, 1 / 30, 1 / 30, 1 / 30], performance_band=[0, 1, 1, 2, 2, 2])
    check([2 / 7, 2 / 7, 2 / 7, 1 / 14, 1 / 14], performance_band=[0, 0, 0, 2, 2])  # no medium domain
    check([6 / 7] + [1 / 42] * 6, performance_band=[0] + [2] * 6)
    check([0.75, 0.25], base_log_w=np.log([3.0, 1.0]))
    # one of two waited 20 steps: 1 / (1 + e^-(1 - 1/e)); was never tried: e / (1 + e)
    check([0.652970, 0.347030], 1e-5, step=50, last_seen_step=[29, 49], last_tried_step=[29, 49])
    check([0.731059, 0.268941], 1e-5, step=50, last_seen_step=[-1, 49], last_tried_step=[-1, 49])
    check([0.731059, 0.268941], 1e-5, grade_uncertainty=[2.25, 0])


def test_uncertainty_without_a_rubric_is_that_of_pass_or_fail():
    """The variance of a coin of probability .5, .8 and 1 over the largest there is: 1, .64 and 0."""
    config = dataclasses.replace(CONFIG, uncertainty_of="passes")
    state = fresh(acc_ema=[0.5, 0.8, 1.0] + [0.0] * (D - 3), grade_uncertainty=[0, 2.25, 1] + [2.25] * (D - 3))
    found = jax.jit(functools.partial(priorities.triage, config))(state, state.active).uncertainty_D
    np.testing.assert_allclose(found, [1, 0.64, 0] + [0] * (D - 3), atol=1e-6)


def test_the_terms_add_up_to_the_priority():
    state = fresh(performance_band=[0, 0, 1, 1, 1, 2, 2], boost=[0, 1, 0, 0, 0, 0, 0], base_log_w=np.arange(D) / 4)
    terms = jax.jit(functools.partial(priorities.triage, CONFIG))(state, state.active)
    np.testing.assert_allclose(terms.total_D, sum(terms[1:]), atol=1e-6)
    np.testing.assert_allclose(terms.staleness_D, [1] * D)
    np.testing.assert_allclose(terms.uncertainty_D, [0.25] * D)
    np.testing.assert_allclose(terms.base_D, np.arange(D) / 4 + np.eye(D)[1])
    np.testing.assert_allclose(terms.band_D[0], np.log(0.6 / (1 + np.exp(0.25))), atol=1e-6)


@given(states(), st.permutations(range(D)))
@SETTINGS
def test_shares_do_not_depend_on_the_order_of_domains(state, order):
    order = np.array(order)
    moved = state._replace(**{k: v[order] for k, v in state._asdict().items() if v.shape == (D,)})
    np.testing.assert_allclose(shares()(moved), np.asarray(shares()(state))[order], atol=2e-6)


@given(states(), st.integers(0, D - 1), st.floats(0, 2.25))
@SETTINGS
def test_waiting_and_uncertainty_never_cost_share(state, i, more):
    before = np.asarray(shares()(state))[i]
    earlier = np.minimum(state.last_tried_step, np.where(np.arange(D) == i, state.step - 40, state.step))
    waited = state._replace(last_tried_step=earlier, last_seen_step=np.minimum(state.last_seen_step, earlier))
    if state.failures[i] == 0:  # else the wait also ends the rest
        assert np.asarray(shares()(waited))[i] >= before - 1e-6
    variance = np.array(state.grade_uncertainty)
    variance[i] = max(variance[i], more)
    assert np.asarray(shares()(state._replace(grade_uncertainty=variance)))[i] >= before - 1e-6


@given(states(), st.floats(-20, 20))
@SETTINGS
def test_a_constant_on_all_priorities_changes_nothing(state, constant):
    shifted = state._replace(boost=state.boost + np.float32(constant))
    np.testing.assert_allclose(shares()(shifted), shares()(state), atol=1e-5)


def test_the_literal_formula_by_hand():
    """softmax(.6, .3, .1), and e^1 of the largest share for what was never tried: no capacity, no floor."""
    p = jax.jit(policies.build(compose_config("config", None, ["curriculum=literal"]).curriculum).probabilities)
    seen = dict(step=50, last_seen_step=[49] * 3, last_tried_step=[49] * 3, grade_uncertainty=[0] * 3)
    state = fresh(**seen, performance_band=[0, 1, 2])
    np.testing.assert_allclose(p(state)[:3], [0.426, 0.316, 0.258], atol=1e-3)
    state = state._replace(last_tried_step=np.array([-1] * D, np.int32), last_seen_step=np.array([-1] * D, np.int32))
    state = state._replace(grade_uncertainty=np.eye(D, dtype=np.float32)[2] * 2.25)
    state = state._replace(base_log_w=np.log(np.array([1, 2, 1, 1, 1, 1, 1], np.float32)))
    z = np.array([0.6 + 1 + 1, 0.3 + 1 + 2, 0.1 + 1 + 1 + 1])
    np.testing.assert_allclose(p(state)[:3], np.exp(z) / np.exp(z).sum(), atol=1e-6)


def test_waiting_is_measured_in_rounds_where_domains_are_many():
    """Two rounds of 7 domains at 1 prompt a step are 14 steps, below 20; at half a prompt's share of D / P = 14, 28."""
    p = shares(staleness_rounds=4.0, epsilon=0.0)
    state = fresh(step=50, num_prompts=1, last_seen_step=[21] + [49] * 6, last_tried_step=[21] + [49] * 6)
    expected = np.exp(1 - np.exp(-28 / 28))  # waited 28 steps, tau = 4 x 7
    np.testing.assert_allclose(p(state)[0], expected / (expected + 6), rtol=1e-5)
    np.testing.assert_allclose(shares(epsilon=0.0)(state)[0], (e := np.exp(1 - np.exp(-28 / 20))) / (e + 6), rtol=1e-5)


def test_a_flag_multiplies_a_share_by_e_to_the_boost():
    drift = dataclasses.replace(CONFIG.drift, boost=1.5)
    state = fresh(drift_left=[0, 3, 0, 0, 0, 0, 0])
    p, plain = shares(drift=drift, epsilon=0.0)(state), shares(epsilon=0.0)(state)
    np.testing.assert_allclose(p[1] / p[0], np.exp(1.5) * plain[1] / plain[0], rtol=1e-5)
