"""A domain's averages moved to its grader's new scale, by hand; the others bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

from configs.cli import compose_config
from curriculum import policies
from curriculum.rebase import rebase
from curriculum.triage import DomainStats, roster

CONFIG = compose_config("config", None, ["curriculum=recommended"]).curriculum
POLICY = policies.build(CONFIG)
update, rebase_jitted = jax.jit(POLICY.update), jax.jit(rebase, static_argnums=0)
D = 4


def given(**leaves):
    return POLICY.init(0, roster(D))._replace(**{name: jnp.asarray(leaf) for name, leaf in leaves.items()})


def moved(state, drifted, shift, grade_shift, groups):
    arrays = (np.array(drifted), *(np.array(x, np.float32) for x in (shift, grade_shift, groups)))
    return rebase_jitted(CONFIG, state, *arrays)


def test_averages_move_by_what_is_still_on_the_old_scale():
    f32 = np.float32
    state = given(
        acc_ema=f32([0.9, 0.9, 0.1, 0.9]),
        fast_acc=f32([0.9, 0.9, 0.1, 0.9]),
        grade_mean=f32([3.5, 3.5, 1.5, 3.5]),
        grade_uncertainty=f32([0.5, 0.5, 0.7, 0.5]),
        performance_band=np.int32([2, 2, 0, 2]),
        cusum=f32([5.0, 5.0, 5.0, 5.0]),
        drift_left=np.int32([7, 7, 7, 7]),
        ref_visits=np.int32([50, 50, 50, 50]),
    )
    out = moved(state, [True, True, True, False], [-0.4, -0.4, -0.4, 0.0], [-1.0, -1.0, -1.0, 0.0], [0, 20, 0, 0])
    part = (1 - CONFIG.beta) ** 10
    np.testing.assert_allclose(out.acc_ema, [0.5, 0.9 - 0.4 * part, 0.0, 0.9], rtol=1e-5)
    fast = (1 - CONFIG.fast_beta) ** 10
    np.testing.assert_allclose(out.fast_acc, [0.5, 0.9 - 0.4 * fast, 0.0, 0.9], rtol=1e-5)
    np.testing.assert_allclose(out.grade_mean, [2.5, 3.5 - part, 1.0, 3.5], rtol=1e-5)
    np.testing.assert_allclose(out.grade_uncertainty, [0.5, 0.5, 0.0, 0.5])  # at a mean of 1 all grades are 1
    assert out.performance_band.tolist() == [1, 1, 0, 2]
    np.testing.assert_array_equal(out.ref_mean[:3], out.acc_ema[:3])
    assert out.cusum.tolist() == [0, 0, 0, 5] and out.drift_left.tolist() == [0, 0, 0, 7]
    assert out.ref_visits.tolist() == [0, 0, 0, 50]


def test_other_domains_and_other_leaves_keep_every_bit():
    rng = np.random.default_rng(0)
    state = given(acc_ema=rng.random(D, np.float32), grade_mean=1 + 3 * rng.random(D, np.float32))
    out = moved(state, [False, True, False, False], [0.3, 0.3, 0.3, 0.3], [1.0] * D, [3] * D)
    for name, old, new in zip(state._fields, state, out):
        same = np.asarray(old) == np.asarray(new)
        assert same.all() if not np.ndim(old) or np.shape(old) != (D,) else same[[0, 2, 3]].all(), name
    for name in ("half_life", "cost_ema", "zvf_ema", "adv_ema", "visits", "last_seen_step", "boost"):
        np.testing.assert_array_equal(getattr(state, name), getattr(out, name))


def visit(state, rate):
    """A step in which each domain had 4 groups of 8 with this pass rate; grades 1 and 4."""
    n, ones = 4, np.ones(D, np.float32)
    sums = dict(n_groups=n, tried=n, pass_sum=n * rate, pass_sq_sum=n * rate**2, n_grades=8 * n, cost_sum=n)
    sums |= dict(grade_sum=8 * n * (1 + 3 * rate), grade_sq_sum=8 * n * (1 + 15 * rate))
    zero = dict.fromkeys(DomainStats._fields, 0.0)
    return update(state, DomainStats(**{key: np.float32(value) * ones for key, value in (zero | sums).items()}))


def test_a_stricter_grader_raises_no_flag_once_rebased_and_does_without():
    state = given()
    for _ in range(60):
        state = visit(state, 0.9)
    left, told = state, moved(state, [True] * D, [-0.4] * D, [-1.2] * D, [0] * D)
    flags = np.zeros((2, D), bool)
    for _ in range(30):
        left, told = visit(left, 0.5), visit(told, 0.5)
        flags |= np.array([left.drift_flag, told.drift_flag])
    assert flags[0].all() and not flags[1].any()
    np.testing.assert_allclose(told.acc_ema, 0.5, atol=1e-3)
    fallen = told
    for _ in range(60):
        fallen = visit(fallen, 0.1)
        flags[1] |= np.asarray(fallen.drift_flag)
    assert flags[1].all()  # what is a fall on the new scale is seen again
