"""The toy learners against hand-written numpy, and the directions that the laboratory is there to show."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from infinite_jax.ablate import compose_arm
from infinite_jax.statistics import t_interval
from infinite_jax.worlds import simulated
from infinite_jax.worlds.regimes import DEFAULT, GRIDS, HELDOUT, NEVER, PLAIN, Regime, make_world
from infinite_jax.worlds.simulated import Settings
from infinite_jax.worlds.table import differences, rows_of, values

SEEDS = 6


def expected(function, skill):
    """E function(sigmoid(skill + N(0, 1))) by adaptive quadrature."""
    return quad(lambda z: function(expit(skill + z)) * norm.pdf(z), -9, 9)[0]


def world_of(regime: Regime = PLAIN, seed: int = 0, steps: int = 100, name: str = "x", width: int = 20):
    return make_world(name, regime, seed, steps, width)


def test_worlds_are_functions_of_name_and_seed():
    first, again, other = world_of(), world_of(), world_of(seed=1)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(first.start, other.start)
    assert not np.allclose(first.start, world_of(name="y").start)


def test_worlds_hold_what_their_regime_says():
    w = world_of(Regime(trained=10, dead=2, noisy=1, zipf=True, phases=5, shocks=1.0), steps=1000)
    assert w.trained.sum() == 10 and w.dead.sum() == 2 and w.noisy.sum() == 1 and not (w.dead & w.noisy).any()
    assert w.measured.sum() == 12 - 3 and not w.measured[w.dead | w.noisy].any() and not w.measured[12:].any()
    assert (w.rate[w.dead | w.noisy] == 0).all() and (w.rate[:12][w.measured[:12]] > 0).all()
    np.testing.assert_array_equal(np.unique(w.arrives[:10]), [0, 200, 400, 600, 800])
    np.testing.assert_allclose(np.sort(w.size[:10])[::-1], 4000 / np.arange(1, 11), rtol=1e-6)
    shocked = w.shock_step < NEVER
    assert shocked.sum() == 7 and (w.shock_step[shocked] >= 300).all() and (w.shock_step[shocked] <= 800).all()


def test_heldout_worlds_are_none_of_those_tuned_on():
    assert not {r for r in HELDOUT.values()} & {r for r in DEFAULT.values()}
    assert (
        Settings("tuning", (), 100, 10).first_seed > max(range(24)) and Settings("heldout", (), 100, 10).first_seed == 0
    )


def test_pass_rates_are_exact():
    skill = np.array([-4.0, -1.5, 0.0, 2.5], np.float32)
    found = simulated.pass_rate(jax.numpy.asarray(skill))
    np.testing.assert_allclose(found, [expected(lambda p: p, s) for s in skill], atol=2e-5)


def test_grades_follow_the_proportional_odds_model():
    world = world_of()._replace(dead=np.arange(20) == 2, noisy=np.arange(20) == 3)
    skill_D = np.zeros(20, np.float32)
    skill_D[1] = -1.0
    domain_P = np.repeat(np.arange(4), 16).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 400)
    grade = np.asarray(jax.vmap(lambda key: simulated.grades(key, world, skill_D, domain_P))(keys))
    grade = grade.reshape(400, 4, -1)
    assert set(np.unique(grade)) == {1.0, 2.0, 3.0, 4.0}
    cut = simulated.CUT
    for domain, skill in ((0, 0.0), (1, -1.0)):
        at_least = [expected(lambda p: p, skill - threshold) for threshold in (-cut, 0.0, cut)]
        found = [(grade[:, domain] >= k).mean() for k in (2, 3, 4)]
        np.testing.assert_allclose(found, at_least, atol=0.012)  # 51,200 rollouts of 6,400 prompts
    assert (grade[:, 2] == 1).all()  # dead
    group_rate = (grade[:, 3] >= 3).reshape(-1, 8).mean(axis=1)
    np.testing.assert_allclose(group_rate.var(), 0.25 / 8, atol=0.003)  # a coin: no prompt is easier than another


def test_one_step_of_learning_is_the_formula():
    world = world_of(Regime(trained=4, alpha=0.7), width=6)
    skill_D = world.start + np.linspace(0, 1, 6, dtype=np.float32)
    counts_D = np.array([32, 16, 16, 0, 0, 0])
    found, waiting_D = simulated.learn(False, world, 64, skill_D, np.zeros(6), counts_D, np.zeros(6))
    share_D = counts_D / 64
    signal_D = np.array([expected(lambda p: 4 * p * (1 - p), s) for s in skill_D])
    want = skill_D.astype(float)
    for i in range(6):
        want[i] += world.rate[i] * sum(world.transfer[j, i] * share_D[j] ** 0.7 * signal_D[j] for j in range(6))
        want[i] -= world.decay[i] * (1 - share_D[i]) * (skill_D[i] - world.start[i])
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert (waiting_D == 0).all()


def test_dynamic_sampling_waits_for_a_full_batch_and_wins_no_signal():
    world = world_of(Regime(trained=2, decay=0.0), width=4)._replace(transfer=np.eye(4, dtype=np.float32))
    skill_D = np.zeros(4, np.float32)
    useful = 1 - expected(lambda p: p**8 + (1 - p) ** 8, 0.0)
    counts_D, useful_D = np.array([32, 32, 0, 0]), np.array([32, 32, 0, 0]) * useful  # expected numbers of groups
    waiting_D, moved = np.zeros(4), []
    for _ in range(40):
        after, waiting_D = simulated.learn(True, world, 64, skill_D, waiting_D, counts_D, useful_D)
        moved.append(np.asarray(after - skill_D))
    assert (moved[0] == 0).all() and sum(bool(m.any()) for m in moved) == int(40 * useful)
    plain, _ = simulated.learn(False, world, 64, skill_D, np.zeros(4), counts_D, useful_D)
    np.testing.assert_allclose(np.sum(moved, axis=0)[:2], 40 * (plain - skill_D)[:2], rtol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grid="defualt"), "sim.grid=defualt: did you mean default?"),
        (dict(regimes=("plane",)), "sim.regimes: no world plane in sim.grid=default; did you mean plain?"),
        (dict(steps=105), "sim.steps=105: must be at least 10 and a multiple of sim.eval_every"),
        (dict(eval_every=0), "sim.eval_every=0: must be at least 1 step"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError) as raised:
        dataclasses.replace(Settings("default", (), 100, 10), **change)
    assert str(raised.value) == message


def test_every_regime_of_every_grid_can_be_made():
    for grid in GRIDS.values():
        for name, regime in grid.items():
            world = make_world(name, regime, 0, 1000, max(20, regime.trained + 2))
            assert all(np.isfinite(leaf).all() for leaf in world) and world.trained.sum() == regime.trained


@pytest.fixture(scope="module")
def found():
    """Three arms in three worlds, shortened."""
    arms = [compose_arm(name, "config", None, []) for name in ("uniform", "faithful", "recommended")]
    settings = Settings("default", ("plain", "arrivals", "dead"), 400, 10)
    runs = list(simulated.run(settings, arms, lambda regime, arm: list(range(SEEDS))))
    return runs, values([row for each in runs for row in rows_of("simulated", each)], "simulated")


def gain(found, regime, arm, baseline, metric):
    estimate = t_interval(differences(found[1], [regime], arm, baseline, metric))
    return estimate.low, estimate.high


def test_a_run_is_one_curve_a_seed(found):
    runs, _ = found
    assert [(each.world, each.arm) for each in runs][:3] == [
        ("plain", "uniform"),
        ("arrivals", "uniform"),
        ("dead", "uniform"),
    ]
    for each in runs:
        assert each.cost == {"rollouts": 400 * 64 * 8} and len(each.evaluations) == SEEDS
        for evaluations in each.evaluations:
            assert evaluations.rate_KD.shape == (41, 19 if each.world == "dead" else 20)
            assert ((evaluations.rate_KD > 0) & (evaluations.rate_KD < 1)).all() and not evaluations.trained_D[
                -2:
            ].any()


def test_seeds_are_paired(found):
    runs, _ = found
    first = {each.world: each for each in runs if each.arm == "uniform"}
    for each in runs:
        for ours, theirs in zip(each.evaluations, first[each.world].evaluations):
            np.testing.assert_array_equal(ours.rate_KD[0], theirs.rate_KD[0])


def test_bands_help_where_domains_arrive_and_lift_the_worst(found):
    assert gain(found, "arrivals", "faithful", "uniform", "aurc")[0] > 3
    assert gain(found, "plain", "faithful", "uniform", "worst")[0] > 0.02


def test_bands_lose_to_a_dead_domain_and_the_guard_repairs_it(found):
    assert gain(found, "dead", "faithful", "uniform", "aurc")[1] < 0
    assert gain(found, "dead", "recommended", "faithful", "aurc")[0] > 2
    assert gain(found, "dead", "recommended", "uniform", "aurc")[0] > 0


def test_uniform_keeps_best(found):
    assert gain(found, "arrivals", "faithful", "uniform", "bwt")[1] < 0
    assert gain(found, "plain", "faithful", "uniform", "ret")[1] < 0
