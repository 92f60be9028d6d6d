"""What holds for every policy, and for the capacity of each band in prompts, tokens and seconds."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from configs.cli import compose_config
from curriculum import feedback
from curriculum.config import CurriculumConfig
from curriculum.policies import NAMES, Policy, build
from curriculum.triage import DomainStats, TriageState, roster, statistics

D, P = 6, 12
SETTINGS = settings(deadline=None, max_examples=15)
DISTINCT = tuple(name for name in NAMES if name not in ("a2", "a3", "full"))  # those are faithful with other numbers
FREE = tuple(name for name in NAMES if name != "sequential")  # where several domains may be drawn


@functools.cache
def config(name: str, **changes) -> CurriculumConfig:
    """The policy's file, its shares counted in prompts unless asked otherwise: so that they are those of the draw."""
    chosen = compose_config("config", None, [f"curriculum={name}"]).curriculum
    return dataclasses.replace(chosen, **{"capacity": "prompts"} | changes)


@functools.cache
def compiled(name: str, **changes) -> Policy:
    policy = build(config(name, **changes))
    jitted = {field: jax.jit(getattr(policy, field)) for field in ("update", "probabilities")}
    return policy._replace(draw=jax.jit(policy.draw, static_argnums=1), **jitted)


@functools.cache
def observed(name: str):
    """Jitted state -> (shares, metrics, draw of P prompts), compiled once a policy."""
    policy = build(config(name))
    return jax.jit(lambda state: ((p := policy.probabilities(state)), policy.metrics(state, p), policy.draw(state, P)))


BLANK = jax.device_get(build(config("faithful")).init(0, roster(D)))


@st.composite
def states(draw) -> TriageState:
    """Any state, all leaves that some policy reads at random; at least one domain active."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    step = draw(st.integers(0, 300))
    seen = np.minimum(rng.integers(-1, 300, D), step - 1)
    acc = rng.choice([0.0, 0.5, 1.0, rng.random()], D)
    leaves = dict(
        step=step,
        num_prompts=P * (step > 0),
        key_data=rng.integers(0, 2**32, 2),
        acc_ema=acc,
        performance_band=rng.integers(0, 3, D),
        last_seen_step=seen,
        last_tried_step=np.maximum(seen, np.minimum(rng.integers(-1, 300, D), step - 1)),
        failures=rng.choice([0, 0, 0, 1, 9], D),
        grade_uncertainty=rng.uniform(0, 2.25, D),
        zvf_ema=rng.choice([0, 1, rng.random()], D),
        n_samples=rng.choice([0, 1, 1000], D),
        fast_acc=np.clip(acc + rng.choice([0, 0.2, -0.2], D), 0, 1),
        norm_adv=rng.random(D),
        value=rng.random(D),
        half_life=rng.uniform(1, 200, D),
        cost_ema=rng.choice([0, 1, 100 * rng.random()], D),
        drift_left=rng.choice([0, 0, 30], D),
        base_log_w=rng.uniform(-3, 3, D),
        size=rng.integers(0, 1000, D),
        active=rng.random(D) < 0.8,
        arrives=rng.choice([0, 0, 50, 400], D),
        retires=rng.choice([2**31 - 1, 200], D),
    )
    leaves["active"][rng.integers(D)] = True
    return BLANK._replace(**{name: np.asarray(value, getattr(BLANK, name).dtype) for name, value in leaves.items()})


def can_draw(state) -> np.ndarray:
    """Who may get prompts, written once more in numpy."""
    here = state.active & (state.arrives <= state.step) & (state.step < state.retires)
    rest = np.minimum(2 ** np.int64(state.failures) - 1, 32)
    ready = here & (state.step - 1 - state.last_tried_step >= rest)
    return ready if ready.any() else here if here.any() else state.active


def test_every_policy_has_a_file_and_every_file_a_policy():
    folder = Path(configs.__file__).parent / "curriculum"
    assert sorted(NAMES) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert all(config(name).policy == name for name in NAMES)
    assert hash(config("recommended")) == hash(dataclasses.replace(config("recommended")))  # static under jit


def test_the_ladder_differs_in_its_terms_alone():
    ladder = {name: dataclasses.asdict(config(name)) for name in ("a1", "a2", "a3", "full", "faithful")}
    for lower, upper, keys in (
        ("a1", "a2", {"staleness_weight"}),
        ("a2", "a3", {"uncertainty_weight"}),
        ("a3", "full", {"single_every"}),
        ("full", "faithful", set()),
    ):
        assert {k for k, v in ladder[lower].items() if v != ladder[upper][k]} == keys | {"policy"}


@pytest.mark.parametrize("name", DISTINCT)
@given(state=states(), order=st.permutations(range(D)))
@SETTINGS
def test_shares_of_every_policy(name, state, order):
    """Sum 1, 0 where not drawable, the floor, finite metrics, and no dependence on the order of the domains."""
    c, can = config(name), can_draw(state)
    p, shown, _ = jax.device_get(observed(name)(state))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    assert np.all(p[~can] == 0) and np.all(p >= 0)
    if name in FREE and name != "literal":
        assert np.all(p[can] >= np.float32(c.epsilon / can.sum()) * (1 - 1e-5))
    assert all(value.shape == (D,) and np.isfinite(value).all() for value in shown.values())
    if name in FREE:
        order = np.array(order)
        moved = state._replace(**{k: v[order] for k, v in state._asdict().items() if v.shape == (D,)})
        np.testing.assert_allclose(observed(name)(moved)[0], p[order], atol=1e-5)


@pytest.mark.parametrize("name", DISTINCT)
@given(state=states())
@SETTINGS
def test_counts_of_every_policy(name, state):
    draw = jax.device_get(observed(name)(state)[2])
    np.testing.assert_array_equal(np.bincount(draw.domain_P, minlength=D), draw.counts_D)
    assert draw.counts_D.sum() == P and np.all(draw.counts_D[~can_draw(state)] == 0)
    if not draw.single:
        assert np.all(np.abs(draw.counts_D - P * np.float64(draw.p_D)) < 1 + 1e-3)


statistics_jit = jax.jit(statistics, static_argnums=5)


@pytest.mark.parametrize("name", NAMES)
def test_policies_run_through_one_shape(name):
    policy = build(config(name))
    assert policy.update.func is feedback.update  # of one function, one compilation serves all but one
    update = compiled("recommended" if name == "recommended" else "faithful").update
    members = roster(D, arrives=[0, 0, 3, 0, 0, 0], retires=[99, 6, 99, 99, 99, 99], active=np.arange(D) != 4)
    state, single = policy.init(0, members), []
    for step in range(10):
        p, _, draw = jax.device_get(observed(name)(state))
        if name != "recommended":  # its draw may raise shares to reserved slots
            np.testing.assert_allclose(draw.p_D, p, atol=1e-6)
        assert draw.counts_D[4] == 0 and (step >= 3 or draw.counts_D[2] == 0) and (step < 6 or draw.counts_D[1] == 0)
        single.append(bool(draw.single))
        grade_PG = np.random.default_rng(step).integers(1, 5, (P, 4)).astype(np.float32)
        graded = (grade_PG, (grade_PG - 1) / 3, np.ones((P, 4), bool), np.full(P, 9.0))
        state = update(state, statistics_jit(draw.domain_P, *graded, D))
    alternates = name in ("faithful", "full", "literal", "recommended")
    assert single == [False] * 9 + [alternates] and state.visits[4] == 0
    assert [leaf.dtype for leaf in state] == [leaf.dtype for leaf in BLANK] and (state.cost_ema[0] == 9)
    assert policy.resample == (name == "dynamic") and (policy.lr_scale(state) == 1).all()


def test_full_draws_as_faithful_and_faithful_as_its_first_recorded_run():
    """Recorded before the policies shared one file; a change of any draw shows here."""
    for name in ("full", "faithful"):
        policy, taken = build(config(name)), []
        state = policy.init(3, roster(D, active=np.arange(D) != 5, arrives=[0, 0, 0, 5, 5, 0]))
        for _ in RECORDED:
            draw = jax.device_get(observed(name)(state)[2])
            taken.append("".join(map(str, draw.domain_P)))
            rate = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 0.5])[draw.domain_P]
            grade_PG = np.where(np.arange(4) < 4 * rate[:, None], 4, 1).astype(np.float32)
            graded = (grade_PG, grade_PG, np.ones((P, 4), bool), np.ones(P))
            state = compiled("faithful").update(state, statistics_jit(draw.domain_P, *graded, D))
        assert taken == RECORDED


RECORDED = [
    "121100210202",
    "222012100211",
    "002010020100",
    "202112001102",
    "011212020212",
    "133404321110",
    "043101012132",
    "031112440101",
    "110431210003",
    "111111111111",
    "204431301211",
    "102301211041",
]


@pytest.mark.parametrize("name", ["a1", "recommended"])
@given(state=states(), unit=st.sampled_from(["tokens", "seconds"]))
@SETTINGS
def test_bands_get_exactly_their_capacity_of_the_cost(name, state, unit):
    """All waits and variances equal, no floor: 60 / 30 / 10 % of sum p cost, whatever a prompt of each domain costs."""
    never = np.full(D, -1, np.int32)
    state = state._replace(grade_uncertainty=np.ones(D, np.float32), last_seen_step=never, last_tried_step=never)
    state = state._replace(failures=np.zeros(D, np.int32), drift_left=np.zeros(D, np.int32))
    state = state._replace(cost_ema=np.maximum(state.cost_ema, 0.5))
    can = can_draw(state)
    own = dict(guard=False, monotone=False, signal_weight=0.0, gap_weight=0.0)  # what moves shares between bands
    off = own if name == "recommended" else {}
    paid = np.asarray(compiled(name, capacity=unit, epsilon=0.0, **off).probabilities(state)) * state.cost_ema
    capacity = np.array([0.6, 0.3, 0.1])
    filled = np.array([np.any(can & (state.performance_band == band)) for band in range(3)])
    for band in range(3):
        part = paid[state.performance_band == band].sum() / paid.sum()
        np.testing.assert_allclose(part, filled[band] * capacity[band] / capacity[filled].sum(), atol=1e-5)


def test_capacity_by_hand():
    """Low, medium, high at 100, 10 and 1 tokens a prompt: prompts are as .6/100, .3/10, .1/1."""
    leaves = dict(performance_band=np.array([0, 1, 2, 0, 0, 0], np.int32), active=np.arange(D) < 3)
    leaves |= dict(cost_ema=np.array([100, 10, 1, 0, 0, 0], np.float32))
    p = np.array([0.006, 0.03, 0.1])
    state = BLANK._replace(**leaves)
    tokens, prompts = compiled("a1", capacity="tokens"), compiled("a1")
    np.testing.assert_allclose(tokens.probabilities(state)[:3], p / p.sum(), rtol=1e-5)
    np.testing.assert_allclose(prompts.probabilities(state)[:3], [0.6, 0.3, 0.1], rtol=1e-5)
    unknown = state._replace(cost_ema=np.array([100, 0, 1, 0, 0, 0], np.float32))  # counts as the mean of the known
    p = np.array([0.6 / 100, 0.3 / 50.5, 0.1])
    np.testing.assert_allclose(tokens.probabilities(unknown)[:3], p / p.sum(), rtol=1e-5)
    none = state._replace(cost_ema=np.zeros(D, np.float32))
    np.testing.assert_allclose(tokens.probabilities(none)[:3], [0.6, 0.3, 0.1], rtol=1e-5)


def test_in_tokens_the_floor_is_one_of_the_tokens():
    """Two high domains beside a low one, epsilon .6: a third of it each is .2 of the tokens, few of the prompts."""
    leaves = dict(performance_band=np.array([0, 2, 2, 0, 0, 0], np.int32), active=np.arange(D) < 3)
    state = BLANK._replace(**leaves, cost_ema=np.array([1, 100, 1, 0, 0, 0], np.float32))
    p = np.asarray(compiled("a1", capacity="tokens", epsilon=0.6).probabilities(state))
    paid = p * state.cost_ema
    np.testing.assert_allclose(paid[:3] / paid.sum(), [0.6, 0.2, 0.2], rtol=1e-5)
    assert p[1] < 0.01


def test_guards_that_are_off_leave_faithful_as_it_is():
    """`recommended` with every guard off and faithful's numbers is faithful, bit for bit."""
    faithful = config("faithful")
    weights = ("staleness_rounds", "uncertainty_weight", "signal_weight", "gap_weight")
    same = {f: getattr(faithful, f) for f in ("guard", "monotone", "drift", *weights)}
    other = compiled("recommended", **same, reserved=faithful.reserved)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        state = BLANK._replace(performance_band=rng.integers(0, 3, D).astype(np.int32), step=np.int32(seed))
        jax.tree.map(np.testing.assert_array_equal, other.draw(state, P), compiled("faithful").draw(state, P))


@pytest.mark.parametrize("name", ["recommended", "dump"])
def test_dynamic_values_do_not_retrace(name):
    policy, traces = build(config(name, capacity="tokens", difficulty="adaptive")), []

    def step(state):
        traces.append(None)
        n = policy.draw(state, P).counts_D.astype(jnp.float32)
        return policy.update(state, DomainStats(n, n, 4 * n, 16 * n, n, n, n, n, n, 7 * n, n))

    step_jit = jax.jit(step)
    state = policy.init(0, roster(D))
    for seed in range(4):
        other = policy.init(seed, roster(D, weight=np.arange(1, D + 1), arrives=seed, retires=90, level_max=5 + seed))
        for leaf in ("base_log_w", "arrives", "retires", "level_max", "key_data"):
            state = state._replace(**{leaf: getattr(other, leaf)})
        state = step_jit(state._replace(boost=jnp.full(D, seed / 2), active=jnp.arange(D) != seed))
    assert len(traces) == 1 and state.step == 4


EDGES = {
    "all low": dict(performance_band=[0] * D, acc_ema=[0.0] * D),
    "all dead": dict(performance_band=[0] * D, acc_ema=[0.0] * D, zvf_ema=[1] * D, grade_uncertainty=[0] * D),
    "all solved": dict(performance_band=[2] * D, acc_ema=[1.0] * D, zvf_ema=[1] * D, grade_uncertainty=[0] * D),
    "all new": dict(is_new=[True] * D),
    "one active": dict(active=np.eye(D)[3]),
    "all flagged": dict(drift_left=[5] * D),
    "far away": dict(step=2_000_000, last_seen_step=[0] * D, last_tried_step=[0] * D, n_samples=[2**31 - 1] * D),
}


@pytest.mark.parametrize("name", DISTINCT)
def test_edges_stay_finite(name):
    for edge, leaves in EDGES.items():
        state = BLANK._replace(**{k: np.asarray(v, getattr(BLANK, k).dtype) for k, v in leaves.items()})
        p, shown, _ = jax.device_get(observed(name)(state))
        assert np.isfinite(p).all() and abs(p.sum() - 1) < 1e-5, edge
        assert all(np.isfinite(value).all() for value in shown.values()), edge


@pytest.mark.parametrize("name", ["recommended", "sequential", "dump"])
def test_one_domain_and_fewer_prompts_than_domains(name):
    assert compiled(name).draw(BLANK, 1).counts_D.sum() == 1
    assert compiled(name).draw(compiled(name).init(0, roster(1)), P).counts_D[0] == P


def test_costs_far_apart_stay_finite():
    state = BLANK._replace(cost_ema=np.array([1e-6, 1e9, 1, 1, 0, 0], np.float32))
    p = np.asarray(compiled("a1", capacity="tokens").probabilities(state))
    assert np.isfinite(p).all() and abs(p.sum() - 1) < 1e-5
