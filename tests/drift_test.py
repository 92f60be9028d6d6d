"""The detector against its recursion written out in numpy, its alarms, and what a flag does to shares and rates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs.cli import compose_config
from curriculum import drift, policies
from curriculum.triage import DomainStats, roster

CONFIG = compose_config("config", None, ["curriculum=recommended"]).curriculum
POLICY = policies.build(CONFIG)
update = jax.jit(POLICY.update)


def step(state, rate_DN, drawn_D, advance=update):
    """One step: domain d had drawn_D[d] groups of eight, of the pass rates rate_DN[d, :drawn_D[d]]; grades 1 and 4."""
    here_DN = np.arange(rate_DN.shape[1]) < drawn_D[:, None]
    sums, squares = (rate_DN * here_DN).sum(1), (rate_DN**2 * here_DN).sum(1)
    grades = dict(n_grades=8 * drawn_D, grade_sum=8 * (drawn_D + 3 * sums), grade_sq_sum=8 * (drawn_D + 15 * sums))
    equal = (here_DN & ((rate_DN == 0) | (rate_DN == 1))).sum(1)
    given = dict(n_groups=drawn_D, tried=drawn_D, pass_sum=sums, pass_sq_sum=squares, zero_var_sum=equal) | grades
    zero = dict.fromkeys(DomainStats._fields, np.zeros(len(drawn_D)))
    return advance(state, DomainStats(**{k: np.asarray(v, np.float32) for k, v in (zero | given).items()}))


def recursion(rates, ns, acc):
    """The page's formulas, a visit at a time, for one domain; acc is the average of pass rates after each visit."""
    ref, variance, s, alarms, history = 0.5, 0.0, 0.0, [], []
    for t, (groups, n) in enumerate(zip(rates, ns)):
        m = groups[:n].mean()
        z = np.clip((ref - m) / np.sqrt(max(variance, 0.01) / n), -4, 4)
        s = 0.0 if t == 0 else max(0.0, s + z - 0.5)
        alarm = s > 8 and t >= 20
        ref += (1 / (t + 1) if t < 20 else 0.002 if s > 4 else 0.02) * (m - ref)
        variance += max(1 / (t + 1), 0.02) * (((groups[:n] - ref) ** 2).mean() - variance)
        if alarm:
            s, ref = 0.0, acc[t]
            alarms.append(t)
        history.append((ref, variance, s))
    return np.array(history), alarms


def test_the_detector_is_the_recursion_and_unseen_domains_keep_every_bit():
    """Three domains: at rest, falling at visit 60, and one visited every other step."""
    rng, state = np.random.default_rng(0), POLICY.init(0, roster(3))
    log, rates, ns = [], [[] for _ in range(3)], [[] for _ in range(3)]
    for t in range(120):
        p = np.array([0.5, 0.9 if t < 60 else 0.5, 0.7])
        rate_DN = rng.binomial(8, p[:, None], (3, 5)) / 8
        drawn_D = rng.integers(1, 6, 3) * [1, 1, t % 2]
        before, state = state, step(state, rate_DN, drawn_D)
        log.append(jax.device_get(state))
        for d in np.flatnonzero(drawn_D):
            rates[d].append(rate_DN[d]), ns[d].append(drawn_D[d])
        if t % 2 == 0:
            for leaf in ("ref_mean", "ref_variance", "ref_visits", "cusum", "drift_left", "drift_goal"):
                assert getattr(before, leaf)[2] == getattr(state, leaf)[2]
    for d in range(3):
        steps = np.arange(1 if d == 2 else 0, 120, 2 if d == 2 else 1)
        acc = [log[t].acc_ema[d] for t in steps]
        history, alarms = recursion(rates[d], ns[d], acc)
        got = np.array([[log[t].ref_mean[d], log[t].ref_variance[d], log[t].cusum[d]] for t in steps])
        np.testing.assert_allclose(got, history, atol=2e-4)
        flagged = [log[t].drift_left[d] == CONFIG.drift.patience for t in steps]
        assert list(np.flatnonzero(flagged)) == alarms and bool(alarms) == (d == 1)
    assert 60 <= alarms_of(log, 1)[0] <= 64


def alarms_of(log, d):
    return [t for t, state in enumerate(log) if state.drift_left[d] == CONFIG.drift.patience]


def test_a_flag_falls_when_the_pass_rate_is_back_or_patience_ends():
    config = CONFIG.drift
    state = POLICY.init(0, roster(4))._replace(
        drift_left=jnp.array([9, 9, 9, 1], jnp.int32),
        drift_goal=jnp.full(4, 0.9),
        ref_visits=jnp.full(4, 50, jnp.int32),
        ref_mean=jnp.full(4, 0.6),
    )
    state = state._replace(acc_ema=jnp.array([0.871, 0.869, 0.5, 0.5]))
    seen = jnp.array([True, True, False, True])
    got = drift.update(config, state, seen, jnp.full(4, 0.6), jnp.full(4, 0.36), jnp.ones(4))
    np.testing.assert_array_equal(got.drift_left, [0, 8, 9, 0])
    np.testing.assert_array_equal(got.drift_flag, [False, True, True, False])
    again = drift.restart(got, jnp.array([False, True, True, False]))
    np.testing.assert_array_equal(again.drift_left, [0, 0, 0, 0])
    np.testing.assert_array_equal(again.ref_visits, [51, 0, 0, 51])


@functools.cache
def fall(preset, *overrides, steps=160, prompts=16):
    """Six domains passed at .98, .9, .6, .5, .3, .2; the first falls to .85 after 100 steps. Shares and states."""
    changes = [f"curriculum.{override}" for override in overrides]
    policy = policies.build(compose_config("config", None, [f"curriculum={preset}", *changes]).curriculum)
    draw, advance = jax.jit(policy.draw, static_argnums=1), jax.jit(policy.update)
    rng, state, log = np.random.default_rng(1), policy.init(0, roster(6)), []
    for t in range(steps):
        drawn = draw(state, prompts)
        p = np.array([0.98 if t < 100 else 0.85, 0.9, 0.6, 0.5, 0.3, 0.2])
        state = step(state, rng.binomial(8, p[:, None], (6, prompts)) / 8, np.asarray(drawn.counts_D), advance)
        log.append(jax.device_get((drawn.p_D, state, drawn.counts_D)))
    return policy, log


def test_a_fall_from_98_to_85_doubles_the_share_within_five_visits_of_the_flag():
    policy, log = fall("recommended", "drift.lr_scale=0.3")
    assert not any(state.drift_flag.any() for _, state, _ in log[:100])
    flagged = next(t for t in range(100, 160) if log[t][1].drift_flag[0])
    visits = [t for t in range(flagged + 1, 160) if log[t][2][0] > 0][:5]
    before = np.mean([p_D[0] for p_D, _, _ in log[60:100]])
    assert max(log[t][0][0] for t in visits) >= 2 * before
    assert sum(p_D[0] for p_D, _, _ in log[flagged + 1 : visits[-1] + 1]) / (visits[-1] - flagged) >= 2 * before
    np.testing.assert_allclose(policy.lr_scale(log[flagged][1]), [0.3, 1, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(policy.lr_scale(log[99][1]), [1] * 6)
    shown = policy.metrics(log[flagged][1], log[flagged][0])
    np.testing.assert_array_equal(shown["drift/flag"], [1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(shown["triage/lr_scale"], [0.3, 1, 1, 1, 1, 1], rtol=1e-6)


def test_every_policy_tracks_drift_and_only_a_boost_acts_on_it():
    policy, log = fall("faithful")
    flagged = [t for t, (_, state, _) in enumerate(log) if state.drift_flag[0]]
    assert flagged and flagged[0] >= 100
    state = log[flagged[0]][1]
    calm = state._replace(drift_left=np.zeros(6, np.int32))
    np.testing.assert_array_equal(policy.probabilities(state), policy.probabilities(calm))
    assert (policy.lr_scale(state) == 1).all()


def test_a_rising_pass_rate_raises_no_flag():
    rng, state = np.random.default_rng(2), POLICY.init(0, roster(50))
    for t in range(150):
        rate_DN = rng.binomial(8, 0.1 + 0.8 * t / 150, (50, 2)) / 8
        state = step(state, rate_DN, np.full(50, 2))
        assert not state.drift_flag.any()
