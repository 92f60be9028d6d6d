"""The two queues of an upgrade, under every rule, and the ramp of the new domains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cli import compose_config
from curriculum import monitor, policies, upgrade
from curriculum.config import CurriculumConfig
from curriculum.triage import TriageState, roster
from curriculum.upgrade import UpgradeConfig

D, P = 6, 20
SETTINGS = settings(deadline=None, max_examples=15)
RULES = ("recommended", "uniform", "literal", "sequential", "dump")
UPGRADE = compose_config("config", None, []).upgrade  # new floor .02, prior floor .05, ramp from .1 over 100 steps


@functools.cache
def config(name: str, **changes) -> CurriculumConfig:
    return dataclasses.replace(compose_config("config", None, [f"curriculum={name}"]).curriculum, **changes)


@functools.cache
def shares(name: str, upgraded: UpgradeConfig | None = UPGRADE, **changes):
    return jax.jit(policies.build(config(name, **changes), upgraded).probabilities)


BLANK = jax.device_get(policies.build(config("faithful"), UPGRADE).init(0, roster(D)))


def state_of(**leaves) -> TriageState:
    return BLANK._replace(**{name: np.asarray(value, getattr(BLANK, name).dtype) for name, value in leaves.items()})


@st.composite
def states(draw) -> TriageState:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    step = draw(st.integers(0, 300))
    seen = np.minimum(rng.integers(-1, 300, D), step - 1)
    return state_of(
        step=step,
        num_prompts=P * (step > 0),
        new_share=draw(st.sampled_from([0.35, 0.6, 0.7, 1.0])),
        performance_band=rng.integers(0, 3, D),
        acc_ema=rng.random(D),
        last_seen_step=seen,
        last_tried_step=seen,
        grade_uncertainty=rng.uniform(0, 2.25, D),
        zvf_ema=rng.random(D),
        norm_adv=rng.random(D),
        base_log_w=rng.uniform(-2, 2, D),
        boost=rng.choice([0, 0.5, 1.5], D),
        active=rng.random(D) < 0.8,
        is_new=rng.random(D) < draw(st.sampled_from([0, 0.4, 1])),
        arrives=rng.choice([0, 0, 50], D),
        retires=rng.choice([2**31 - 1, 200], D),
    )


def drawable(state: TriageState) -> np.ndarray:
    """No grader fails in these states."""
    here = state.active & (state.arrives <= state.step) & (state.step < state.retires)
    return here if here.any() else state.active


@pytest.mark.parametrize("name", RULES)
@given(state=states(), order=st.permutations(range(D)))
@SETTINGS
def test_each_queue_gets_its_share_and_its_floor_under_every_rule(name, state, order):
    can = drawable(state)
    if not can.any():
        return
    p = np.asarray(shares(name)(state))
    new, prior = can & state.is_new, can & ~state.is_new
    share = float(state.new_share) if new.any() and prior.any() else float(new.any())
    assert np.isfinite(p).all() and np.all(p[~can] == 0) and np.all(p >= 0)
    np.testing.assert_allclose([p.sum(), p[new].sum(), p[prior].sum()], [1, share, 1 - share], atol=2e-6)
    if name not in ("literal", "sequential"):  # literal has no floor, sequential one domain of each queue
        assert np.all(p[new] >= share * 0.02 / max(new.sum(), 1) * (1 - 1e-5))
        assert np.all(p[prior] >= (1 - share) * 0.05 / max(prior.sum(), 1) * (1 - 1e-5))
        order = np.array(order)
        moved = state._replace(**{k: v[order] for k, v in state._asdict().items() if v.shape == (D,)})
        np.testing.assert_allclose(shares(name)(moved), p[order], atol=2e-6)


@pytest.mark.parametrize("name", ["recommended", "dump"])
@given(state=states())
@SETTINGS
def test_a_queue_is_the_rule_as_if_the_others_did_not_exist(name, state):
    """N_b, guards, staleness of a round: all of the queue's domains alone."""
    can, p = drawable(state), np.asarray(shares(name)(state))
    for kind, floor in ((state.is_new, UPGRADE.new_floor), (~state.is_new, UPGRADE.prior_floor)):
        alone = state._replace(active=can & kind)
        if p[alone.active].sum() > 0:
            expected = shares(name, None, epsilon=floor)(alone)
            np.testing.assert_allclose(p * kind / (p * kind).sum(), expected, atol=1e-5)


def test_queues_by_hand():
    """a1: new low and high, .7 x (6/7, 1/7); prior medium, medium, high, .3 x (.375, .375, .25); one only evaluated."""
    state = state_of(
        performance_band=[0, 2, 1, 1, 2, 0], is_new=np.arange(D) < 2, active=np.arange(D) < 5, new_share=0.7
    )
    no_floor = dataclasses.replace(UPGRADE, new_floor=0.0, prior_floor=0.0)
    by_hand = np.array([0.6, 0.1, 0.1125, 0.1125, 0.075, 0])
    np.testing.assert_allclose(shares("a1", no_floor)(state), by_hand, rtol=1e-5)
    floors = dataclasses.replace(no_floor, new_floor=0.5)  # a quarter of .7 each, at least
    by_hand[:2] = [0.7 * 0.75, 0.7 * 0.25]
    np.testing.assert_allclose(shares("a1", floors)(state), by_hand, rtol=1e-5)
    none_new = state._replace(is_new=np.zeros(D, bool))
    np.testing.assert_allclose(shares("a1", no_floor)(none_new), [0.6, 0.05, 0.15, 0.15, 0.05, 0], rtol=1e-5)
    sequential = np.asarray(shares("sequential")(state))  # in turn within each queue
    np.testing.assert_allclose(np.sort(sequential)[-2:], [0.3, 0.7], rtol=1e-5)


def test_counts_follow_the_queues_and_a_share_of_zero_takes_no_reserved_slot():
    policy = policies.build(config("recommended"), UPGRADE)
    draw = jax.jit(policy.draw, static_argnums=1)
    seen = dict(last_seen_step=[3] * D, last_tried_step=[3] * D, is_new=np.arange(D) < 2)
    for step in range(4, 9):
        counts = draw(state_of(step=step, num_prompts=P, new_share=0.7, **seen), P).counts_D
        assert counts[:2].sum() == 14 and counts.sum() == P
    never = seen | dict(last_seen_step=[-1, -1, 3, 3, 3, 3], last_tried_step=[-1, -1, 3, 3, 3, 3])
    assert draw(state_of(step=4, num_prompts=P, new_share=0.0, **never), P).counts_D[:2].sum() == 0
    assert draw(state_of(step=4, num_prompts=P, new_share=0.05, **never), P).counts_D[:2].tolist() == [1, 1]


def test_without_the_split_draws_are_those_of_a_run_that_is_no_upgrade():
    one_queue = dataclasses.replace(UPGRADE, split=False)
    plain, unsplit = (jax.jit(policies.build(config("faithful"), u).draw, static_argnums=1) for u in (None, one_queue))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        leaves = dict(performance_band=rng.integers(0, 3, D), is_new=rng.random(D) < 0.5, step=seed, new_share=0.7)
        jax.tree.map(np.testing.assert_array_equal, plain(state_of(**leaves), P), unsplit(state_of(**leaves), P))
    assert policies.build(config("faithful")).init(0, roster(D)).new_share == 0
    np.testing.assert_allclose(BLANK.new_share, 0.7, rtol=1e-6)


def test_a_boost_acts_under_rules_of_equal_shares_too():
    state = state_of(is_new=np.arange(D) < 3, boost=[0, 0, 0, np.log(2), 0, 0], new_share=0.6)
    np.testing.assert_allclose(shares("uniform")(state), [0.2, 0.2, 0.2, 0.2, 0.1, 0.1], rtol=1e-5)


def test_what_the_monitor_moves_compiles_nothing():
    policy, traces = policies.build(config("recommended"), UPGRADE), []

    def step(state):
        traces.append(None)
        return policy.draw(state, P), policy.lr_scale(state), policy.metrics(state, policy.probabilities(state))

    step_jit = jax.jit(step)
    for share in (0.7, 0.6, 0.3, 0.0):
        _, _, shown = step_jit(state_of(new_share=share, boost=[share] * D, is_new=np.arange(D) < 2 + (share > 0.5)))
        assert all(np.isfinite(value).all() for value in shown.values())
    assert len(traces) == 1


def test_the_ramp_of_new_domains_by_hand():
    """.1 + .9 t / 100, t from the arrival at 0, 30, 400; prior domains at once."""
    state = state_of(step=80, is_new=[1, 1, 1, 0, 0, 1], arrives=[0, 30, 400, 0, 30, 0])
    np.testing.assert_allclose(upgrade.ramp(UPGRADE, state), [0.82, 0.55, 0.1, 1, 1, 0.82], rtol=1e-6)
    np.testing.assert_array_equal(upgrade.ramp(UPGRADE, state._replace(step=np.int32(500))), np.ones(D))
    assert (upgrade.ramp(dataclasses.replace(UPGRADE, ramp_steps=0), state) == 1).all()
    drift = dataclasses.replace(config("faithful").drift, lr_scale=0.5)
    flagged = state._replace(drift_left=np.array([3, 0, 0, 3, 0, 0], np.int32))
    scale_D = policies.build(config("faithful", drift=drift), UPGRADE).lr_scale(flagged)
    np.testing.assert_allclose(scale_D, [0.41, 0.55, 0.1, 0.5, 1, 0.82], rtol=1e-6)


def test_a_monitor_that_only_watches_has_the_effects_of_tier_0():
    raised = monitor.init(UPGRADE.monitor, D)._replace(tier=jnp.array(3), boost=jnp.full(D, 0.5))
    acted = upgrade.effects(UPGRADE, raised)
    np.testing.assert_allclose(acted.new_share, 0.3, rtol=1e-6)  # (1 - .4) x .5
    assert acted.kl_scale[0] == 2 and acted.boost[0] == 0.5
    watched = upgrade.effects(dataclasses.replace(UPGRADE, watch=False), raised)
    np.testing.assert_allclose(watched.new_share, 0.7, rtol=1e-6)
    assert watched.kl_scale[0] == 1 and watched.boost[0] == 0
