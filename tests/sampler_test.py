import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cli import compose_config
from curriculum import policies, triage
from curriculum.config import ReservedConfig
from curriculum.sampler import floor_project, place, reserve, systematic
from curriculum.triage import DomainStats, TriageState, roster

D, P = 7, 16
SETTINGS = settings(deadline=None, max_examples=60)
CONFIG = compose_config("config", None, ["curriculum=faithful"]).curriculum
init = jax.jit(functools.partial(triage.init, CONFIG))


@functools.cache
def policy(**changes) -> policies.Policy:
    return policies.build(dataclasses.replace(CONFIG, **changes))


@functools.cache
def drawing(num_prompts=P, **changes):
    return jax.jit(functools.partial(policy(**changes).draw, num_prompts=num_prompts))


update = jax.jit(policy().update)


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


def floored(q, floor) -> np.ndarray:
    """max(floor, lambda q) by trying every size of the set above the floor, largest ratio first."""
    order = np.argsort(-q / floor)
    for size in range(len(q), 0, -1):
        top, rest = order[:size], order[size:]
        scale = (1 - floor[rest].sum()) / q[top].sum()
        if np.all(scale * q[top] >= floor[top] * (1 - 1e-12)):
            return np.maximum(floor, scale * q)


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


def simulate(state, down=0, num_prompts=P, **changes) -> Log:
    """260 steps of draw and update in one scan; pass rates stay, domain 0 is graded from step `down` on only."""
    return jax.device_get(_simulate(state, down, policy(**changes), num_prompts))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _simulate(state, down, chosen, num_prompts):

    def one(state, _):
        draw = chosen.draw(state, num_prompts)
        tried = draw.counts_D.astype(jnp.float32)
        n = tried * ~((jnp.arange(tried.size) == 0) & (state.step < down))
        rows = (n, n * state.acc_ema, 5 * n, 14.5 * n, 2 * n, 0 * n, n / 2, tried, n * state.acc_ema**2, tried, n)
        after = chosen.update(state, DomainStats(*rows))
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
    log = simulate(state, 200, backoff_cap=cap)
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
    rows = (
        n,
        n * share,
        4 * n * grade,
        4 * n * (grade**2 + 0.2),
        4 * n,
        n * 0.1,
        n * 0.3,
        n,
        n * share**2,
        9 * n,
        n * 0.8,
    )
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
        n = policy().draw(state, P).counts_D.astype(jnp.float32)
        return policy().update(state, DomainStats(n, n, 4 * n, 16 * n, n, n, n, n, n, n, n))

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


RESERVED = ReservedConfig(share=0.25, rounds=4.0, steps=50.0)


def reserved(num_prompts, state, p):
    return np.asarray(reserve(RESERVED, state, np.float32(p), state.active, num_prompts))


def test_slots_are_reserved_for_the_longest_waiting():
    """D = 7 and P = 16: a gap of over 4 x 7/16 + 50 = 51.75 steps is too long; 4 slots."""
    p = np.array([0.9, 0.04, 0.02, 0.01, 0.01, 0.01, 0.01])
    step = 1000
    tried = step - 1 - np.array([0, 51, 52, 60, 80, 70, 90])  # waited so many whole steps
    state = fresh(step=step, last_seen_step=tried, last_tried_step=tried)
    got = reserved(16, state, p)
    np.testing.assert_allclose(got[3:], 1 / 16, rtol=1e-4)  # the four longest of five
    np.testing.assert_allclose(got[:3], p[:3] * 0.75 / 0.96, rtol=1e-4)
    new = state._replace(last_seen_step=np.r_[tried[:2], -1, tried[3:]].astype(np.int32))
    new = new._replace(last_tried_step=new.last_seen_step)
    assert reserved(16, new, p)[2] > 1 / 16 > reserved(16, new, p)[3]  # never tried comes before any wait
    np.testing.assert_array_equal(reserved(16, fresh(step=1, last_tried_step=[0] * 7), np.float32(p)), np.float32(p))


def test_before_any_try_the_whole_batch_is_reserved_and_a_reserved_slot_is_a_prompt_for_certain():
    p = np.array([0.97, 0.005, 0.005, 0.005, 0.005, 0.005, 0.005])
    draw = jax.jit(lambda key, p: systematic(key, p, 16))
    for state, least in ((fresh(), 7), (fresh(step=1, last_tried_step=[0] + [-1] * 6), 5)):
        shares = reserved(16, state, p)
        np.testing.assert_allclose(shares.sum(), 1, atol=1e-5)
        for seed in range(50):
            counts = np.bincount(draw(jax.random.key(seed), shares), minlength=D)
            assert np.all(counts[shares >= 1 / 16] >= 1) and np.sum(counts > 0) >= least
    assert reserved(4, fresh(), p)[1:].max() > 0.25  # fewer slots than domains: one prompt stays free
    assert np.sum(reserved(4, fresh(), p) > 0.25) == 3


def test_with_reserved_slots_no_gap_exceeds_the_bound_by_much():
    """Seven domains, two prompts a step, six of share about 0.3 %: the floor alone leaves gaps of hundreds of steps."""
    leaves = dict(performance_band=[0] + [2] * 6, acc_ema=[0.1] + [0.9] * 6, base_log_w=[0] + [-3.0] * 6)
    changes = dict(single_every=0, staleness_weight=0.0, eta=0.0)
    gaps = {}
    for share in (0.0, 0.5):
        log = simulate(fresh(**leaves), num_prompts=2, **changes, reserved=dataclasses.replace(RESERVED, share=share))
        drawn = log.counts_D[:, 1:] > 0
        gaps[share] = max(np.diff(np.flatnonzero(column), prepend=-1, append=260).max() for column in drawn.T)
    assert gaps[0.5] <= 4 * 7 / 2 + 50 + 1 + 6 < gaps[0.0]  # six may come due together and take turns


def test_the_single_domain_may_be_drawn_by_share():
    band = [1, 0, 1, 2, 2, 2, 2]
    draws = [drawing(single_rule="sampled")(fresh(step=9, seed=seed, performance_band=band)) for seed in range(80)]
    assert all(draw.counts_D.max() == P and draw.single for draw in draws)
    chosen = np.bincount([int(draw.domain_P[0]) for draw in draws], minlength=D) / 80
    np.testing.assert_allclose(chosen, draws[0].p_D, atol=0.2)
    assert 0 < chosen[1] < 1
