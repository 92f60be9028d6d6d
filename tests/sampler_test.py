import functools
import importlib.resources
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from curriculum.sampler import TriageSampler, floor_project, place, systematic
from curriculum.triage import DomainStats, TriageConfig, TriageState, TriageStateManager

D, P = 7, 16
SETTINGS = settings(deadline=None, max_examples=60)


@functools.cache
def config(**changes) -> TriageConfig:
    numbers = OmegaConf.to_container(OmegaConf.load(importlib.resources.files("configs") / "curriculum/faithful.yaml"))
    del numbers["policy"]
    return TriageConfig(**numbers | {"capacity": tuple(numbers["capacity"])} | changes)


@functools.cache
def shares(**changes):
    return jax.jit(TriageSampler(config(**changes)).probabilities)


@functools.cache
def drawing(num_prompts=P, **changes):
    sampler = TriageSampler(config(**changes))
    return jax.jit(lambda state: sampler.draw(state, num_prompts))


FAITHFUL = TriageSampler(config())
manager = TriageStateManager(config())
update = jax.jit(manager.update)


init = jax.jit(manager.init)


def fresh(num_domains=D, seed=0, **leaves) -> TriageState:
    """The state before step 0 with some leaves set; lists shorter than D leave the last domains inactive."""
    ones, zeros = np.ones(num_domains, np.float32), np.zeros(num_domains, np.int32)
    state = jax.device_get(init(seed, ones, ones > 0, ones < 0, zeros))
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


def shares_by_loop(c: TriageConfig, state) -> np.ndarray:
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
        z[i] = np.log(c.capacity[state.performance_band[i]] / claim**c.eta) + h[i] + np.log(w[i]) + state.boost[i]
    q = np.exp(z[can] / c.temperature)
    p = np.zeros(D)
    p[can] = floored(q / q.sum(), np.full(can.sum(), c.epsilon / can.sum()))
    return p


VARIANTS = [{}, {"strict": True}, {"eta": 0.5, "temperature": 2.0, "uncertainty_weight": 3.0}, {"epsilon": 0.5}]


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


def test_the_terms_add_up_to_the_priority():
    state = fresh(performance_band=[0, 0, 1, 1, 1, 2, 2], boost=[0, 1, 0, 0, 0, 0, 0], base_log_w=np.arange(D) / 4)
    terms = jax.jit(FAITHFUL.priorities)(state)
    np.testing.assert_allclose(terms.total_D, sum(terms[1:]), atol=1e-6)
    np.testing.assert_allclose(terms.staleness_D, [1] * D)
    np.testing.assert_allclose(terms.uncertainty_D, [0.25] * D)
    np.testing.assert_allclose(terms.base_D, np.arange(D) / 4 + np.eye(D)[1])
    np.testing.assert_allclose(terms.band_D[0], np.log(0.6 / (1 + np.exp(0.25))), atol=1e-6)


project = jax.jit(floor_project)


def test_floor_by_hand():
    q = np.array([0.6, 0.39, 0.01, 0], np.float32)
    floor = np.array([1, 1, 1, 0], np.float32)
    np.testing.assert_allclose(project(q, 0.1 * floor), [0.6 / 1.1, 0.39 / 1.1, 0.1, 0], atol=1e-6)
    np.testing.assert_array_equal(project(q, 0.01 * floor), q)  # no floor binds: not a bit changes
    np.testing.assert_allclose(project(np.eye(4, dtype=np.float32)[0], 0.2 * floor), [0.6, 0.2, 0.2, 0], atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 3), st.floats(0, 0.99))
@SETTINGS
def test_floor_projection_solves_its_equation(seed, concentration, total):
    """Compared with a search over the sizes of the set above the floor; keeps the order for an even floor."""
    rng = np.random.default_rng(seed)
    q = np.maximum(rng.dirichlet(np.full(50, concentration)), 1e-12).astype(np.float32)
    floor = np.full(50, total / 50, np.float32) + np.float32(1e-9)
    p = np.asarray(project(q, floor))
    np.testing.assert_allclose(p, floored(np.float64(q), np.float64(floor)), atol=3e-6)
    assert np.all(np.diff(p[np.argsort(q)]) >= 0) and np.all(p >= floor)


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


@pytest.mark.parametrize("num_prompts", [1, 4, 9])
def test_over_all_starts_every_domain_gets_exactly_its_part(num_prompts):
    units = np.array([0, 5, 1, 0, 7, 10, 0], np.int32)
    total = units.sum()
    starts = jnp.arange(total + 1)
    found = np.asarray(jax.jit(jax.vmap(lambda start: place(units, start, num_prompts)))(starts))
    np.testing.assert_array_equal(np.bincount(found[:total].ravel(), minlength=D), num_prompts * units)
    for batch in found:
        counts = np.bincount(batch, minlength=D)
        assert np.all(np.abs(counts - num_prompts * units / total) < 1) and np.all(counts[units == 0] == 0)


slots = {n: jax.jit(functools.partial(systematic, num_prompts=n)) for n in (1, 16, 512)}


@pytest.mark.parametrize("n", slots)
@given(seed=st.integers(0, 2**31 - 1), concentration=st.floats(0.01, 3), closed=st.integers(0, 39))
@settings(deadline=None, max_examples=40)
def test_counts_stay_within_one_of_their_mean(n, seed, concentration, closed):
    rng = np.random.default_rng(seed)
    p = np.zeros(40)
    p[: 40 - closed] = rng.dirichlet(np.full(40 - closed, concentration))
    p = rng.permutation(p).astype(np.float32)
    domain = np.asarray(slots[n](jax.random.key(seed), p))
    counts = np.bincount(domain, minlength=40)
    assert domain.shape == (n,) and counts.sum() == n and counts.size == 40
    assert np.all(np.abs(counts - n * np.float64(p)) < 1 + 1e-3) and np.all(counts[p == 0] == 0)


@functools.partial(jax.jit, static_argnums=2)
def over_keys(seed, p, num_keys=4000):
    """Domains of a batch of two for each of many keys, [num_keys, 2]."""
    return jax.vmap(lambda key: systematic(key, p, 2))(jax.random.split(jax.random.key(seed), num_keys))


def test_counts_are_unbiased_over_keys_and_slots():
    p = jnp.array([0.41, 0.3, 0.17, 0.06, 0.04, 0.02, 0.0])
    for slot in np.asarray(over_keys(1, p)).T:
        np.testing.assert_allclose(np.bincount(slot, minlength=D) / 4000, p, atol=0.04)  # 5 standard errors


def test_neighbours_too_come_together():
    halves = np.asarray(slots[16](jax.random.key(0), np.eye(40, dtype=np.float32)[:2].sum(0) / 2))
    assert np.sum(halves[:8]) not in (0, 8)  # nor does a part of the batch belong to one domain
    pairs = np.sort(over_keys(2, jnp.array([0.25, 0.25, 0.25, 0.25, 0, 0, 0])), axis=1)
    assert len(np.unique(pairs, axis=0)) == 6


def test_more_prompts_than_integers_hold_are_refused():
    with pytest.raises(ValueError, match=r"num_prompts=40000: .* set algorithm\.prompts"):
        systematic(jax.random.key(0), jnp.ones(3) / 3, 40_000)


def test_many_domains_and_the_largest_batch_stay_exact():
    p = np.random.default_rng(0).dirichlet(np.ones(5000)).astype(np.float32)
    counts = np.bincount(jax.jit(systematic, static_argnums=2)(jax.random.key(0), p, 1 << 14), minlength=5000)
    assert counts.sum() == 1 << 14 and np.all(np.abs(counts - 16384 * np.float64(p)) < 1.05)  # shares rounded to 2^-30


class Log(NamedTuple):
    counts_D: jax.Array
    single: jax.Array
    p_D: jax.Array
    state: TriageState


def simulate(state, down=0, sampler=FAITHFUL, num_prompts=P) -> Log:
    """260 steps of draw and update in one scan; pass rates stay, domain 0 is graded from step `down` on only."""
    return jax.device_get(_simulate(state, down, sampler, num_prompts))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _simulate(state, down, sampler, num_prompts):

    def one(state, _):
        draw = sampler.draw(state, num_prompts)
        tried = draw.counts_D.astype(jnp.float32)
        n = tried * ~((jnp.arange(tried.size) == 0) & (state.step < down))
        after = manager.update(state, DomainStats(n, n * state.acc_ema, 5 * n, 14.5 * n, 2 * n, 0 * n, n / 2, tried))
        return after, Log(draw.counts_D, draw.single, draw.p_D, after)

    return jax.lax.scan(one, state, None, length=260)[1]


def test_every_tenth_step_is_one_domain():
    log = simulate(fresh())
    np.testing.assert_array_equal(np.flatnonzero(log.single), np.arange(9, 260, 10))
    most = np.asarray(log.counts_D).max(1)
    assert np.all((most == P) == log.single) and np.all(log.counts_D.sum(1) == P)
    assert not drawing(single_every=0)(fresh(step=9)).single


def test_the_single_domain_has_the_largest_share_and_no_failing_grader():
    band = [1, 0, 1, 2, 2, 2, 2]
    draw = drawing()
    assert draw(fresh(step=9, performance_band=band)).counts_D[1] == P
    failing = fresh(step=9, performance_band=band, failures=[0, 1, 0, 0, 0, 0, 0], last_tried_step=[5] * D)
    assert draw(failing).p_D[1] > 0.5 and draw(failing).counts_D[1] == 0
    chosen = {int(draw(fresh(step=9, seed=seed)).domain_P[0]) for seed in range(60)}
    assert chosen == set(range(D))  # ties are broken by the key


def test_a_domain_of_tiny_share_is_drawn_in_the_end():
    """The last of six high domains beside a low one; rounding P p to the nearest count would never draw it."""
    acc, weights = [0.1] + [0.9] * 6, [0.0] * 6 + [-3.0]
    log = simulate(fresh(performance_band=[0] + [2] * 6, acc_ema=acc, base_log_w=weights))
    assert np.all(P * log.p_D[:, -1] < 0.5) and log.state.visits[-1, -1] >= 3


@pytest.mark.parametrize(("cap", "least", "most"), [(32, 0.001, 0.04), (0, 0.15, 1.0)])
def test_a_grader_that_is_down_does_not_hold_the_batch(cap, least, most):
    """Five domains, the first the only low one; its grader fails for 200 steps, then answers again."""
    state = fresh(performance_band=[0, 1, 1, 1, 1], acc_ema=[0.1, 0.5, 0.5, 0.5, 0.5])
    log = simulate(state, 200, TriageSampler(config(backoff_cap=cap)))
    assert least < log.counts_D[:200, 0].sum() / (200 * P) < most
    back = int(np.flatnonzero(log.state.visits[:, 0])[0])
    assert back <= 200 + 32  # the longest rest
    assert log.counts_D[back : back + 10, 0].sum() > 0.2 * 10 * P
    assert log.state.failures[-1, 0] == 0


def advance(state, draw):
    """A step whose grades depend on the draw, so that a wrong draw shows ever after."""
    n = np.asarray(draw.counts_D, np.float32)
    share = 0.5 + 0.4 * np.sin(np.arange(D) + np.asarray(draw.domain_P)[0])
    grade = 1 + 3 * share
    rows = (n, n * share, 4 * n * grade, 4 * n * (grade**2 + 0.2), 4 * n, n * 0.1, n * 0.3, n)
    return update(state, DomainStats(*(np.asarray(row, np.float32) for row in rows)))


def test_a_restored_state_draws_the_same(tmp_path):
    state = fresh(seed=7)
    for _ in range(37):
        state = advance(state, drawing()(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", jax.tree.map(jnp.asarray, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(np.zeros_like, fresh()))
    assert isinstance(restored, TriageState) and restored.step == 37
    restored = jax.tree.map(jnp.asarray, restored)
    for _ in range(100):
        one, other = drawing()(state), drawing()(restored)
        jax.tree.map(np.testing.assert_array_equal, one, other)
        state, restored = advance(state, one), advance(restored, other)
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_the_draw_depends_on_seed_and_step():
    draws = [drawing()(fresh(seed=seed, step=step)).domain_P for seed, step in [(0, 0), (0, 0), (0, 1), (1, 0)]]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2]) and not np.array_equal(draws[0], draws[3])


def test_changing_values_compile_once():
    traces = []

    def step(state):
        traces.append(None)
        draw = FAITHFUL.draw(state, P)
        n = draw.counts_D.astype(jnp.float32)
        return manager.update(state, DomainStats(n, n, 4 * n, 16 * n, n, n, n, n))

    step_jit, state = jax.jit(step), jax.tree.map(jnp.asarray, fresh())
    changes = {"boost": np.ones(D), "base_log_w": np.arange(D), "active": np.arange(D) != 2, "key_data": [1, 2]}
    for name, value in changes.items():
        state = step_jit(state._replace(**{name: jnp.asarray(value, getattr(state, name).dtype)}))
    assert len(traces) == 1 and state.step == 4


EDGES = {
    "one domain": (1, 16, {}),
    "one prompt": (D, 1, {}),
    "all low": (D, P, {"performance_band": [0] * D}),
    "all dead": (
        D,
        P,
        {"performance_band": [0] * D, "zvf_ema": [1] * D, "grade_uncertainty": [0] * D, "adv_ema": [0] * D},
    ),
    "all new": (D, P, {"is_new": [True] * D}),
    "one active": (D, P, {"active": np.eye(D)[3]}),
    "one arrived": (D, P, {"arrives": 1000 * (1 - np.eye(D)[3])}),
    "all failing": (D, P, {"failures": [40] * D}),
    "tiny weights": (D, P, {"base_log_w": [-60] * D}),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_stay_finite(name):
    num_domains, num_prompts, leaves = EDGES[name]
    log = simulate(fresh(num_domains, **leaves), num_prompts=num_prompts)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(log))
    assert np.all(log.counts_D.sum(1) == num_prompts)
    if name.startswith("one a"):
        assert log.counts_D[:, 3].sum() == 260 * num_prompts
