"""Every baseline's shares against its paper's formula in numpy, and what its leaves remember."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.cli import compose_config
from curriculum import policies
from curriculum.triage import DomainStats, roster

D = 4
MEMBERS = roster(D, weight=[1, 1, 2, 1], size=[10, 30, 40, 20])


@functools.cache
def policy(name, *overrides):
    changes = [f"curriculum.{override}" for override in overrides]
    return policies.build(compose_config("config", None, [f"curriculum={name}", *changes]).curriculum)


@functools.cache
def shares(name, *overrides):
    return jax.jit(policy(name, *overrides).probabilities)


def state(members=MEMBERS, **leaves):
    start = policy("faithful").init(0, members)
    return start._replace(**{k: jnp.asarray(v, getattr(start, k).dtype) for k, v in leaves.items()})


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def check(name, expected, *overrides, **leaves):
    np.testing.assert_allclose(shares(name, *overrides)(state(**leaves)), expected, atol=1e-5)


W = np.array([1, 1, 2, 1])


def test_shares_by_formula():
    acc = np.array([0.1, 0.5, 0.8, 1.0])
    value = np.array([0.0, 0.9, 0.5, 0.2])
    check("uniform", W / 5)
    check("dynamic", W / 5)
    check("size_proportional", W * [10, 30, 40, 20] / 140)
    q = W * np.exp(3 * (1 - acc))
    check("single_signal", 0.999 * q / q.sum() + 0.001 / 4, acc_ema=acc)
    check("p1p", floored(W * acc * (1 - acc), 0.02 / 4), acc_ema=acc)
    check("sec", softmax(value / 0.2 + np.log(W)), value=value)
    n = np.array([0, 8, 80, 800])
    bonus = np.sqrt(2 * np.log(888 + 1) / (n + 1))
    check("dump", softmax((value + bonus) / 0.1 + np.log(W)), norm_adv=value, n_samples=n)
    fast = acc + np.array([0.3, -0.1, 0, 0])
    check("progress", floored(W * [0.3, 0.1, 0, 0], 0.1 / 4), acc_ema=acc, fast_acc=fast)


def floored(claim, floor):
    """Shares of at least `floor`, the others in proportion."""
    share, low = claim / claim.sum(), np.zeros(len(claim), bool)
    while np.any(share[~low] < floor):
        low |= share < floor
        share = np.where(low, floor, claim * (1 - floor * low.sum()) / claim[~low].sum())
    return share


def test_spaced_shares_follow_what_is_expected_to_be_forgotten():
    """Recall 2^(-gap / half-life): gaps 1, 8, 8 of half-lives 1, 8, 64; the last never seen, so all forgotten."""
    seen = [99, 92, 92, -1]
    forgotten = W * np.array([0.5, 0.5, 1 - 2 ** (-1 / 8), 1.0])
    expected = forgotten / forgotten.sum()
    check("spaced", expected, step=100, last_seen_step=seen, last_tried_step=seen, half_life=[1, 8, 64, 1])


def test_sequential_takes_domains_in_order_of_arrival_for_equal_phases():
    members = roster(D, arrives=[0, 30, 0, 10], active=[1, 1, 1, 1])  # order 0, 2, 3, 1
    p = shares("sequential", "phase_steps=10")
    trained = [int(np.argmax(p(state(members, step=step)))) for step in (0, 9, 10, 19, 20, 29, 30, 39, 40, 99)]
    assert trained == [0, 0, 2, 2, 3, 3, 1, 1, 1, 1]
    assert all(p(state(members, step=step)).max() == 1 for step in (0, 15, 35))
    late = roster(D, arrives=[0, 50, 0, 50])
    assert int(np.argmax(p(state(late, step=25)))) == 2  # the next has not arrived: the one before goes on
    resting = state(members, step=12, failures=[0, 0, 2, 0], last_tried_step=[-1, -1, 11, -1])
    assert int(np.argmax(p(resting))) in (0, 3)
    gone = roster(D, arrives=[0, 30, 0, 10], retires=[99, 99, 5, 99])
    assert int(np.argmax(p(state(gone, step=12)))) in (0, 3)
    watched = roster(D, active=[0, 1, 1, 1])  # evaluated only: it has no phase
    assert int(np.argmax(p(state(watched, step=5)))) == 1


def test_sequential_by_arrival_trains_the_latest():
    members = roster(D, arrives=[0, 30, 0, 10])
    for step, expected in ((0, [0.5, 0, 0.5, 0]), (10, [0, 0, 0, 1]), (30, [0, 1, 0, 0])):
        np.testing.assert_allclose(shares("sequential", "phase_steps=0")(state(members, step=step)), expected)


def test_reserved_slots_are_not_for_those_whose_turn_it_is_not():
    draw = policy("sequential", "phase_steps=10", "reserved.share=0.5").draw
    np.testing.assert_array_equal(draw(state(step=12), 8).counts_D, [0, 8, 0, 0])


@pytest.mark.parametrize("name", ["sec", "dump"])
def test_bandits_leave_dead_and_solved_domains_and_are_trapped_by_a_coin(name):
    """Group outcomes 0/8, 4/8, 8/8: |A| / deviation is 0, 1, 0; after some steps the coin has most of the batch."""
    one = policy(name)
    members = roster(D, active=[1, 1, 1, 0])
    now, draw, update = one.init(0, members), jax.jit(one.draw, static_argnums=1), jax.jit(one.update)
    rate = np.array([0, 0.5, 1, 0])
    for _ in range(40):
        n = np.asarray(draw(now, 16).counts_D, np.float32)
        sums = dict(n_groups=n, pass_sum=n * rate, n_grades=8 * n, grade_sum=20 * n, grade_sq_sum=50 * n, tried=n)
        zero = dict.fromkeys(DomainStats._fields, np.zeros(D, np.float32))
        now = update(now, DomainStats(**zero | sums | dict(norm_adv_sum=2 * n * np.sqrt(rate * (1 - rate)))))
    p = np.asarray(one.probabilities(now))
    assert p[1] > 0.8 and p[0] < 0.1 and p[2] < 0.1
