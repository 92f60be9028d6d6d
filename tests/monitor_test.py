"""The monitor's transitions by hand and against a plain copy of its rules on random histories, and its invariants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from benchmarks.monitor import CONFIG
from curriculum import monitor

D, PRIOR = 4, np.array([True, True, True, False])  # z_a = norm.isf(.05 / 3) = 2.128
N, K, n = 4000.0, 2800.0, 1000.0
FINE, BELOW, GONE = 0.70, 0.66, 0.50  # z 2.46 and a drop surely above 0; surely above .05


@functools.cache
def updating(**changes):
    return jax.jit(functools.partial(monitor.update, dataclasses.replace(CONFIG, **changes)))


def evaluate(state, rates, step=0, counts=None, prior=PRIOR, **changes):
    k_D = np.float32(np.array(rates) * n)
    n_D = np.full(D, n, np.float32) if counts is None else np.float32(counts)
    return updating(**changes)(state, np.full(D, K, "f"), np.full(D, N, "f"), k_D, n_D, prior, step)


def follow(*history, **changes):
    """(states, transitions) over evaluations at steps 10, 20, ...; each a pass rate of domain 0, or of all four."""
    state, states, changed = monitor.init(CONFIG, D), [], []
    for i, rates in enumerate(history):
        rates = [rates, FINE, FINE, FINE] if np.ndim(rates) == 0 else rates
        state, change = evaluate(state, rates, 10 * (i + 1), **changes)
        states.append(state), changed.append(change)
    return states, changed


def tiers(states):
    return [int(state.tier) for state in states]


def test_the_numbers_of_one_evaluation():
    _, change = evaluate(monitor.init(CONFIG, D), [BELOW, GONE, 0.72, GONE])
    p = (2800 + 660) / 5000
    error = (p * (1 - p) * (1 / 4000 + 1 / 1000)) ** 0.5
    np.testing.assert_allclose(change.drop, [0.04, 0.2, -0.02, 0.2], atol=1e-6)
    np.testing.assert_allclose([change.error[0], change.z[0]], [error, 0.04 / error], rtol=1e-4)
    np.testing.assert_allclose(change.threshold, norm.isf(0.05 / 3), rtol=1e-5)
    np.testing.assert_array_equal(change.violation, [True, True, False, False])  # the fourth is new
    np.testing.assert_array_equal(change.hard, [False, True, False, False])
    assert (change.tier_before, change.tier, change.rollback, change.halt) == (0, 1, False, False)


def test_a_drop_within_delta_is_none_and_a_large_one_is_hard_only_when_sure():
    """A million prompts: .008 is ten errors and no violation. A thousand: .07 is above .05, .07 - 2.13 se is not."""
    million = np.full(D, 1e6, "f")
    change = updating()(monitor.init(CONFIG, D), 0.7 * million, million, 0.692 * million, million, PRIOR, 0)[1]
    assert change.z[0] > 10 and not change.violation.any()
    _, change = evaluate(monitor.init(CONFIG, D), [0.63, FINE, FINE, FINE])
    assert change.violation[0] and change.drop[0] > CONFIG.hard and not change.hard.any() and change.tier == 0


def test_two_violations_in_a_row_raise_the_tier_and_one_does_not():
    states, _ = follow(BELOW, FINE, BELOW, BELOW, BELOW, BELOW)
    assert tiers(states) == [0, 0, 0, 1, 1, 2]
    assert [int(state.bad[0]) for state in states] == [1, 0, 1, 0, 1, 0]
    assert [float(state.boost[0]) for state in states] == [0, 0, 0, 0.5, 1.0, 1.5]
    assert float(follow(*[BELOW] * 7)[0][-1].boost[0]) == 1.5  # the cap
    states, _ = follow([BELOW, FINE, FINE, FINE], [FINE, BELOW, FINE, FINE], [BELOW, FINE, FINE, FINE])
    assert tiers(states) == [0, 0, 0]  # never the same domain twice in a row


def test_a_collapse_halts_at_the_sixth_evaluation_after_one_rollback():
    states, changes = follow(FINE, *[GONE] * 6)
    assert tiers(states) == [0, 1, 2, 3, 3, 3, 4]
    assert [int(state.fails) for state in states] == [0, 0, 0, 0, 1, 2, 3]
    assert [bool(change.rollback) for change in changes] == [False, False, False, True, False, False, True]
    assert [bool(change.halt) for change in changes] == [False] * 6 + [True]
    assert states[-1].halted and int(states[-1].last_good_step) == 10 and int(states[-1].attempt) == 2


def test_rollbacks_keep_their_distance_and_the_tier():
    """At tier 3 with many fails allowed: a hard violation sends the run back at the third, the 8th, 13th evaluation."""
    states, changes = follow(*[GONE] * 14, fails=5, recovery=9)
    back = [i + 1 for i, change in enumerate(changes) if change.rollback]
    assert back == [3, 8] and changes[7].halt and tiers(states)[7:] == [4] * 7
    config, state, back = dataclasses.replace(CONFIG, fails=5), monitor.init(CONFIG, D), []
    state = state._replace(tier=jnp.int32(3), since_rollback=jnp.int32(config.fails))
    for i in range(12):  # the fails are taken back by hand, so that only the distance speaks
        state, change = evaluate(state._replace(fails=jnp.int32(0)), [GONE, FINE, FINE, FINE], fails=5)
        assert state.tier == 3
        back += [i] * bool(change.rollback)
    assert back == [0, 5, 10] and int(state.attempt) == 3
    assert not any(change.rollback for change in follow(*[BELOW] * 7)[1])  # not hard


def test_three_clean_evaluations_lower_the_tier_by_one():
    states, _ = follow(GONE, GONE, *[FINE] * 2, BELOW, *[FINE] * 7)
    assert tiers(states) == [1, 2, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0]
    assert float(states[7].boost[0]) == 1.5 and float(states[10].boost[0]) == 0
    states, _ = follow(GONE, GONE, GONE, BELOW, *[FINE] * 3, GONE)
    assert tiers(states) == [1, 2, 3, 3, 3, 3, 2, 3] and int(states[-1].fails) == 0  # counted anew at tier 3
    assert [int(state.last_good_step) for state in states] == [0, 0, 0, 0, 50, 60, 70, 70]


def test_a_domain_not_evaluated_says_nothing():
    counts = [0, n, n, n]
    state, change = evaluate(monitor.init(CONFIG, D), [BELOW, FINE, FINE, FINE], 10)
    state, change = evaluate(state, [0, FINE, FINE, FINE], 20, counts)
    assert state.bad[0] == 1 and state.good == 0 and state.last_good_step == 0 and change.drop[0] == change.z[0] == 0
    state, _ = evaluate(state, [BELOW, FINE, FINE, FINE], 30)
    assert state.tier == 1
    state, _ = evaluate(state, [FINE, FINE, FINE, 0], 40, [n, n, n, 0])
    assert state.last_good_step == 40  # the new domain is not watched
    nothing = np.zeros(D, bool)
    assert all(evaluate(monitor.init(CONFIG, D), [GONE] * D, prior=nothing)[0].tier == 0 for _ in range(3))


def test_effects_add_up_and_recompile_nothing():
    effects = jax.jit(functools.partial(monitor.effects, CONFIG))
    new, prior, kl = [], [], []
    for tier in range(5):
        state = monitor.init(CONFIG, D)._replace(tier=jnp.int32(tier), boost=jnp.array([0.5, 0, 0, 0]))
        done = effects(state)
        np.testing.assert_array_equal(done.boost, state.boost)
        new.append(float(done.new_share)), prior.append(float(done.prior_share)), kl.append(done.kl_scale.tolist())
    np.testing.assert_allclose(new, [0.7, 0.6, 0.6, 0.3, 0.3], atol=1e-6)
    np.testing.assert_allclose(np.add(new, prior), 1, atol=1e-6)
    assert kl == [[1] * D] * 2 + [[2] * D] * 3
    single = monitor.effects(dataclasses.replace(CONFIG, kl_per_domain=True), state)
    assert single.kl_scale.tolist() == [2, 1, 1, 1]
    assert effects._cache_size() == 1


@pytest.mark.parametrize("prior", [[1, 0, 0, 0], [1, 1, 1, 0]])
def test_one_prior_and_all_priors_gain_share_where_their_boost_cancels(prior):
    """Softmax over the prior bucket, by numpy: the boost alone changes nothing, the bucket's share does."""
    prior = np.array(prior, bool)
    rates = np.where(prior, GONE, FINE)
    state, _ = evaluate(monitor.init(CONFIG, D), rates, prior=prior)
    done, before = monitor.effects(CONFIG, state), monitor.effects(CONFIG, monitor.init(CONFIG, D))

    def shares(effect):
        weight = np.exp(np.asarray(effect.boost))[prior]
        return float(effect.prior_share) * weight / weight.sum()

    np.testing.assert_allclose(shares(before), 0.3 / prior.sum(), rtol=1e-5)
    np.testing.assert_allclose(shares(done), 0.4 / prior.sum(), rtol=1e-5)


def test_only_a_review_leads_out_of_a_halt():
    states, _ = follow(*[GONE] * 6)
    halted = states[-1]
    for rates in (FINE, BELOW, GONE):
        state, change = evaluate(halted, [rates] * D, 999)
        jax.tree.map(np.testing.assert_array_equal, state, halted)
        assert not change.rollback and not change.halt and change.tier == change.tier_before == 4
    state = monitor.approve(halted)
    assert (state.tier, state.halted, state.fails, state.since_rollback) == (3, False, 0, 0)
    assert state.attempt == halted.attempt and state.last_good_step == halted.last_good_step
    jax.tree.map(np.testing.assert_array_equal, monitor.approve(states[2]), states[2])  # not halted: as it was
    for leaf, old in zip(jax.tree.leaves(state), jax.tree.leaves(halted)):
        assert leaf.dtype == old.dtype
    for expected in (3, 3, 4):
        state, _ = evaluate(state, [GONE] * D)
        assert state.tier == expected


@pytest.mark.parametrize("test", ["exact", "midp"])
def test_the_paired_test_decides_by_mcnemar(test):
    """Domain 0 lost 60 and gained 30 of 1000; domain 1 lost 40, gained 25; domain 2 none. McNemar's p by scipy."""
    lost_D, gained_D = np.array([60, 40, 0, 90]), np.array([30, 25, 0, 0])
    n_D, k_D = np.full(D, n, "f"), np.full(D, 700, "f")
    state = monitor.init(CONFIG, D)
    state, change = updating(test=test)(state, k_D, n_D, k_D - lost_D + gained_D, n_D, PRIOR, 0, lost_D, gained_D)
    p = np.array([binomtest(a, a + b, alternative="greater").pvalue for a, b in [(60, 30), (40, 25)]])
    if test == "midp":
        p -= [0.5 * binomtest_point(60, 90), 0.5 * binomtest_point(40, 65)]
    np.testing.assert_allclose(change.z[:2], norm.isf(p), rtol=1e-3)
    np.testing.assert_array_equal(change.violation, [*(p < 0.05 / 3), False, False])
    assert change.violation[0] and not change.violation[1]
    with pytest.raises(ValueError, match="needs lost_D and gained_D"):
        monitor.update(dataclasses.replace(CONFIG, test=test), state, k_D, n_D, k_D, n_D, PRIOR, 0)


def binomtest_point(k, m):
    return binomtest(k, m, alternative="greater").pvalue - binomtest(k + 1, m, alternative="greater").pvalue


class Plain:
    """The rules once more, an evaluation at a time with Python's numbers."""

    def __init__(self):
        self.tier = self.good = self.fails = self.attempt = 0
        self.bad, self.since, self.halted = [0] * D, 3, False

    def step(self, rates):
        if self.halted:
            return False
        violating, hard = [], False
        for d, rate in enumerate(rates):
            p = (K + rate * n) / (N + n)
            error = (p * (1 - p) * (1 / N + 1 / n)) ** 0.5
            drop, z = K / N - rate, norm.isf(0.05 / 3)
            if PRIOR[d] and drop > 0.01 and drop > z * error:
                violating.append(d)
                hard |= drop - z * error > 0.05
        self.bad = [self.bad[d] + 1 if d in violating else 0 for d in range(D)]
        self.good = 0 if violating else self.good + 1
        self.since += 1
        before, back = self.tier, hard and self.tier >= 2 and self.since >= 3
        if before == 3:
            self.fails += bool(violating)
        if max(self.bad) >= 2 or hard:
            self.bad = [0] * D
            self.tier = min(before + 1, 3)
        elif self.good == 3:
            self.tier, self.good = max(before - 1, 0), 0
        if self.fails == 3:
            self.tier, self.halted, back = 4, True, True
        if self.tier < 3:
            self.fails = 0
        if back:
            self.since, self.attempt = 0, self.attempt + 1
        return back


RATES = st.lists(st.sampled_from([FINE, FINE, FINE, 0.75, BELOW, GONE]), min_size=D, max_size=D)


@given(st.lists(RATES, min_size=1, max_size=25))
@settings(deadline=None, max_examples=150)
def test_any_history_keeps_the_invariants_and_the_plain_rules(history):
    """P12: no violation, no higher tier; one tier an evaluation; a halt stays, and comes of H fails only."""
    state, plain = monitor.init(CONFIG, D, 5), Plain()
    for i, rates in enumerate(history):
        before, (state, change) = state, evaluate(state, rates, 10 * i)
        state = jax.device_get(state)
        back = plain.step(rates)
        assert state.tier == plain.tier and state.bad.tolist() == plain.bad and state.fails == plain.fails
        assert bool(change.rollback) == back and state.attempt == plain.attempt and state.halted == plain.halted
        violated = np.any(change.violation)
        assert abs(int(state.tier) - int(before.tier)) <= 1
        assert violated or state.tier <= before.tier
        assert not violated or state.tier >= before.tier
        assert (state.tier == monitor.HALT) == state.halted and (not before.halted or state.halted)
        assert not change.halt or (before.tier == 3 and before.fails == CONFIG.fails - 1 and change.rollback)
        assert violated or before.halted or state.last_good_step == 10 * i
        assert np.all(state.boost >= 0) and np.all(state.boost <= 1.5) and (state.tier > 0 or not state.boost.any())


def test_one_trace_serves_every_evaluation_and_scan_carries_the_state():
    traces = []

    @jax.jit
    def step(state, k_D, at):
        traces.append(at)
        return monitor.update(CONFIG, state, np.full(D, K, "f"), np.full(D, N, "f"), k_D, np.full(D, n, "f"), PRIOR, at)

    state, rates = monitor.init(CONFIG, D), np.array([BELOW, BELOW, GONE, FINE, GONE, GONE])
    k_TD = np.float32(n * np.broadcast_to(rates[:, None], (6, D)))
    for i, k_D in enumerate(k_TD):
        state, _ = step(state, k_D, i)
    assert len(traces) == 1
    scanned, _ = jax.lax.scan(lambda s, x: step(s, *x), monitor.init(CONFIG, D), (k_TD, np.arange(6, dtype=np.int32)))
    jax.tree.map(np.testing.assert_array_equal, scanned, state)
    buffers = {leaf.unsafe_buffer_pointer() for leaf in monitor.init(CONFIG, D)}
    assert len(buffers) == len(state)  # a donated state may not hold one buffer twice


def test_impossible_numbers_are_named():
    for key, value in dict(alpha=0.0, hard=0.001, patience=0, boost_cap=0.1, kl_scale=0.5, new_scale=2.0).items():
        with pytest.raises(ValueError, match=rf"^upgrade.monitor.{key}={value}: [^\n]+$"):
            dataclasses.replace(CONFIG, **{key: value})
    with pytest.raises(ValueError, match=r"test=paired: expected one of unpaired, exact, midp"):
        dataclasses.replace(CONFIG, test="paired")
