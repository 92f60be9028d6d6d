"""Monitor: whether a model that learns new domains loses those it had, and what is done about it.

M0 is the model before the upgrade, frozen. At every evaluation each of the D' prior domains is tested against M0:

    violation: drop > delta and z > z_a, z_a = Phi^-1(1 - alpha / D')        hard: a violation, drop - z_a se > hard

(alpha / D' is Bonferroni's). `patience` violations of one domain in a row, or a hard one, raise the tier by one;
`recovery` evaluations in a row without any lower it by one. What a tier does is added to what those below it do:

    1  the domains that violate get a boost, and the prior domains together a larger share. Inside a softmax the boost
       of all, or of the only, prior domain cancels: there the share alone acts
    2  the KL coefficient is multiplied
    3  the new domains' share is multiplied; violating evaluations are counted while this tier lasts
    4  after `fails` of these: halt and back to the last good checkpoint. Only a person leads out of it (`approve`)

A hard violation at tier 2 or 3 also sends the run back to the last good checkpoint without halting, at most once in
`fails` evaluations. This state is not set back with it: the tier stays, and `attempt` counts up for the random stream.

The tests, two proportions or McNemar's on the same prompts, and what they can see lie in curriculum/drops.py. Rates of
alarm, true and false: docs/results/monitor.md.

Left out: a correction for the number of evaluations (`patience` plays that part, and a correction would need to know
how many there will be), and sequential tests with an alpha spent over time.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from curriculum import drops
from curriculum.config import OFF_AT_ZERO, choice, finite, require

BOOST, KL, SHARE, HALT = 1, 2, 3, 4  # the tiers


@dataclass(frozen=True)
class MonitorConfig:
    """When the monitor acts and how much. Raises ValueError naming upgrade.monitor.<key> on an impossible value."""

    test: str  # unpaired | exact | midp: two proportions, or McNemar's test on the same prompts
    alpha: float  # violations to expect at one evaluation, over all prior domains, if nothing changed
    delta: float  # a drop of the pass rate up to this is none
    hard: float  # a drop surely beyond this raises the tier at once
    patience: int  # K: violations of one domain in a row that raise the tier
    recovery: int  # R: evaluations in a row without a violation that lower it
    fails: int  # H: violating evaluations at tier 3 until the halt; and evaluations between two rollbacks
    boost: float  # added to a violating domain's priority at every violation, log units
    boost_cap: float  # log units
    kl_scale: float  # factor on the KL coefficient from tier 2 on,
    kl_per_domain: bool  # only for the domains with a boost (of no use to those without prompts), or for all
    prior_share: float  # of a batch, as curriculum.capacity counts it, for the prior domains together,
    prior_share_raised: float  # the same from tier 1 on
    new_scale: float  # factor on the new domains' share from tier 3 on

    def __post_init__(self):
        share = "must be a share of the batch, at least 0 and below 1"
        checks = (
            choice(self, "test", "unpaired", "exact", "midp"),
            ("alpha", 0 < self.alpha < math.inf, "must be a number above 0, such as 0.05"),
            ("delta", 0 <= self.delta < 1, "must be a difference of pass rates, 0 to 1, such as 0.01"),
            ("hard", self.delta <= self.hard < 1, f"must be at least delta={self.delta} and below 1, such as 0.05"),
            ("patience", self.patience >= 1, "must be at least 1 violation"),
            ("recovery", self.recovery >= 1, "must be at least 1 evaluation"),
            ("fails", self.fails >= 1, "must be at least 1 evaluation"),
            ("boost", finite(self.boost), OFF_AT_ZERO),
            ("boost_cap", finite(self.boost_cap, self.boost), f"must be at least boost={self.boost}"),
            ("kl_scale", finite(self.kl_scale, 1.0), "must be at least 1 (1 = off)"),
            ("prior_share", 0 <= self.prior_share < 1, share),
            ("prior_share_raised", self.prior_share <= self.prior_share_raised < 1, share + ", not below prior_share"),
            ("new_scale", 0 <= self.new_scale <= 1, "must be 0 to 1 (1 = off)"),
        )
        require(self, "upgrade.monitor", checks)


class MonitorState(NamedTuple):
    """What the monitor remembers; plain arrays, in the checkpoint with the rest, but not set back by a rollback."""

    tier: jax.Array  # i32[], 0 to 4
    bad: jax.Array  # i32[D], violations in a row, since the tier last rose
    good: jax.Array  # i32[], evaluations in a row without a violation, since the tier last fell
    fails: jax.Array  # i32[], violating evaluations at tier 3
    halted: jax.Array  # bool[]
    boost: jax.Array  # f32[D], log units; 0 at tier 0
    last_good_step: jax.Array  # i32[], step of the last evaluation without a violation
    since_rollback: jax.Array  # i32[], evaluations since the last rollback, at most `fails`
    attempt: jax.Array  # i32[], rollbacks so far; part of the random stream, so that the next attempt draws anew


class Transition(NamedTuple):
    """What one evaluation did, with the numbers that caused it."""

    drop: jax.Array  # f32[D], M0's pass rate minus the model's; 0 where either was not evaluated
    error: jax.Array  # f32[D], its standard error
    z: jax.Array  # f32[D], drop / error, or the normal quantile of McNemar's p
    threshold: jax.Array  # f32[], what z has to exceed
    violation: jax.Array  # bool[D], prior domains only
    hard: jax.Array  # bool[D], a violation that is surely beyond `hard`
    tier_before: jax.Array  # i32[]
    tier: jax.Array  # i32[], at most one apart
    rollback: jax.Array  # bool[], restore the checkpoint of last_good_step,
    halt: jax.Array  # bool[], and then stop


class Effects(NamedTuple):
    """What the trainer is to do until the next evaluation."""

    boost: jax.Array  # f32[D], TriageState.boost
    kl_scale: jax.Array  # f32[D], factor on each domain's KL coefficient
    new_share: jax.Array  # f32[], of a batch, for the new domains together
    prior_share: jax.Array  # f32[], for the prior ones; the two make 1


def init(config: MonitorConfig, num_domains: int, step=0) -> MonitorState:
    """The state before the first evaluation; M0 itself, at `step`, is the last good model."""
    return MonitorState(  # every leaf an array of its own, since a donated state may not hold one buffer twice
        tier=jnp.zeros((), jnp.int32),
        bad=jnp.zeros(num_domains, jnp.int32),
        good=jnp.zeros((), jnp.int32),
        fails=jnp.zeros((), jnp.int32),
        halted=jnp.zeros((), bool),
        boost=jnp.zeros(num_domains, jnp.float32),
        last_good_step=jnp.array(step, jnp.int32),
        since_rollback=jnp.array(config.fails, jnp.int32),  # the first may come at once
        attempt=jnp.zeros((), jnp.int32),
    )


def update(
    config: MonitorConfig,
    state: MonitorState,
    K_D: jax.Array,
    N_D: jax.Array,
    k_D: jax.Array,
    n_D: jax.Array,
    prior_D: jax.Array,
    step,
    lost_D: jax.Array | None = None,
    gained_D: jax.Array | None = None,
) -> tuple[MonitorState, Transition]:
    """The state after an evaluation, and what happened. `config` is static under jit; a halted state stays as it is.

    A domain of which M0 has no prompt (N = 0) is not watched. Where n is 0, the domain says nothing: its `bad` stays,
    and the evaluation counts as clean for none.

    Args:
      K_D, N_D: [D], passes and prompts of M0. k_D, n_D: [D], the same of the model. Prompts are what is independent:
        of several samples a prompt, give the mean as its pass (whole numbers are not asked for).
      prior_D: bool[D], the domains that M0 had; the others are not watched.
      step: i32[], of the evaluation.
      lost_D, gained_D: [D], prompts that only M0, and only the model passed (drops.disagreements), for McNemar's test.
        There n is the number of prompts with a verdict on both sides.

    Raises ValueError where the test is McNemar's and they are missing.
    """
    chex.assert_equal_shape([state.bad, K_D, N_D, k_D, n_D, prior_D])
    K_D, N_D, k_D, n_D = (jnp.asarray(x_D, jnp.float32) for x_D in (K_D, N_D, k_D, n_D))
    known_D = prior_D & (N_D > 0) & (n_D > 0)
    threshold = drops.threshold(config.alpha, prior_D.sum())
    drop_D, error_D, z_D = _compared(config.test, K_D, N_D, k_D, n_D, lost_D, gained_D)
    violation_D = known_D & (drop_D > config.delta) & (z_D > threshold)
    hard_D = violation_D & (drop_D - threshold * error_D > config.hard)
    complete = jnp.all(known_D == (prior_D & (N_D > 0)))
    moved, rollback = _move(config, state, violation_D, hard_D, known_D, complete, step)
    moved = jax.tree.map(lambda old, new: jnp.where(state.halted, old, new), state, moved)
    return moved, Transition(
        drop=drop_D,
        error=error_D,
        z=z_D,
        threshold=threshold,
        violation=violation_D,
        hard=hard_D,
        tier_before=state.tier,
        tier=moved.tier,
        rollback=rollback & ~state.halted,
        halt=moved.halted & ~state.halted,
    )


def _compared(test, K_D, N_D, k_D, n_D, lost_D, gained_D) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(drop_D, error_D, z_D) of the test, 0 where either side has no prompt."""
    if test == "unpaired":
        found = drops.two_proportions(K_D, N_D, k_D, n_D)
    elif lost_D is None or gained_D is None:
        raise ValueError(f"upgrade.monitor.test={test}: needs lost_D and gained_D; or set it to unpaired")
    else:
        found = drops.paired(lost_D, gained_D, n_D, test == "midp")
    return tuple(jnp.where((N_D > 0) & (n_D > 0), x_D, 0.0) for x_D in found)


def _move(config, state, violation_D, hard_D, known_D, complete, step) -> tuple[MonitorState, jax.Array]:
    """(state, rollback) of a run that is not halted; `complete`: every domain that is watched was evaluated."""
    violated, hard = jnp.any(violation_D), jnp.any(hard_D)
    clean = complete & ~violated
    bad_D = jnp.where(violation_D, state.bad + 1, jnp.where(known_D, 0, state.bad))
    good = jnp.where(violated, 0, state.good + clean)
    escalate = jnp.any(bad_D >= config.patience) | hard
    recover = good >= config.recovery
    fails = state.fails + ((state.tier == SHARE) & violated)
    halt = fails >= config.fails
    up = (escalate & (state.tier < SHARE)) | halt
    tier = state.tier + up - (recover & (state.tier > 0))
    since = jnp.minimum(state.since_rollback + 1, config.fails)
    rollback = halt | (hard & (state.tier >= KL) & (since >= config.fails))
    boost_D = jnp.minimum(state.boost + config.boost * violation_D, config.boost_cap)
    moved = MonitorState(
        tier=tier,
        bad=jnp.where(escalate, 0, bad_D),
        good=jnp.where(recover, 0, good),
        fails=jnp.where(tier < SHARE, 0, fails),
        halted=halt,
        boost=jnp.where(tier >= BOOST, boost_D, 0.0),
        last_good_step=jnp.where(clean, step, state.last_good_step),
        since_rollback=jnp.where(rollback, 0, since),
        attempt=state.attempt + rollback,
    )
    return moved, rollback


def approve(state: MonitorState) -> MonitorState:
    """A halted state after a person's review: tier 3 with its counts at 0, so that the protection outlives the halt."""
    cleared = dict(tier=SHARE, bad=0, good=0, fails=0, halted=False, since_rollback=0)
    return state._replace(
        **{name: jnp.where(state.halted, value, getattr(state, name)) for name, value in cleared.items()}
    )


def effects(config: MonitorConfig, state: MonitorState) -> Effects:
    """What the tier asks of the trainer; at a halt the same as at tier 3."""
    multiplied_D = (state.tier >= KL) & ((state.boost > 0) | (not config.kl_per_domain))
    new_share = 1.0 - jnp.where(state.tier >= BOOST, config.prior_share_raised, config.prior_share)
    new_share = new_share * jnp.where(state.tier >= SHARE, config.new_scale, 1.0)
    return Effects(
        boost=state.boost,
        kl_scale=jnp.where(multiplied_D, config.kl_scale, 1.0).astype(jnp.float32),
        new_share=new_share.astype(jnp.float32),
        prior_share=(1.0 - new_share).astype(jnp.float32),
    )
