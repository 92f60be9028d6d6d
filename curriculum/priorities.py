"""The triage rule: priorities of the domains from their bands, waiting, uncertainty and weight.

    priority  z_i = [log c_b - eta log N_b] + [kappa_s S_i] + [kappa_u U_i] + [log w_i + boost_i]        b = band(i)
                     band                      staleness      uncertainty      base

with S_i = 1 - exp(-waited_i / tau_s) (1 if never tried), U_i = grade variance / 2.25, or with uncertainty_of=passes the
variance of pass or fail over its largest, 4 acc_i (1 - acc_i), and N_b = sum of w over band b (of
w e^(kappa_s S + kappa_u U) if `strict`). Shares are softmax(z / T) over the drawable domains, with a floor.

The method states two things that the plain sum of its terms inside a softmax cannot both keep: priority = band +
staleness + uncertainty + base, and 60 / 30 / 10 % of training for the bands. In log units they agree: where the
staleness and uncertainty terms are equal (or `strict`), eta = T = 1 and no floor binds, sum_{i in b} p_i = c_b / sum of
c over non-empty bands, exactly, however many domains a band has. The method's `softmax(priorities + epsilon)` adds a
constant that a softmax cancels; the floor is what the constant was for. `literal` is the plain sum all the same.

Two options, off in `faithful`, are added to the base: kappa_g log(1 - zvf_i) and kappa_a log(1 - acc_i), neither below
log(1 / 50). The first is what U_i stands for, without its scale: a group without any difference in reward gives no
gradient, so 1 - zvf_i is the part of a domain's prompts that teaches. The variance of grades says the same where all
domains are graded alike, but a grader of 1 or 4 has several times that of a finer one at the same pass rate, and a coin
has the most of all. The second goes by what is left to learn, inside a band as well.

tau_s is `staleness_steps`, but at least `staleness_rounds` times D / P, the steps of one round over the drawable
domains: with many domains waiting a while is no sign of neglect. The guards are those of curriculum/guards.py; with
them w_i becomes w_i g_i. A domain flagged by the drift detector has `drift.boost` added.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curriculum import guards
from curriculum.config import BANDS, CurriculumConfig
from curriculum.triage import MAX_VARIANCE, TriageState, never_tried, steps_waited

LEAST = 0.02  # of a share whose logarithm is taken: a domain that is dead or solved is still probed


class Priorities(NamedTuple):
    """The terms of the priority, f32[D] in log units; those of a domain that is not drawable mean nothing."""

    total_D: jax.Array  # the sum of the four
    band_D: jax.Array
    staleness_D: jax.Array
    uncertainty_D: jax.Array
    base_D: jax.Array


def summed(band_D, staleness_D, uncertainty_D, base_D) -> Priorities:
    return Priorities(band_D + staleness_D + uncertainty_D + base_D, band_D, staleness_D, uncertainty_D, base_D)


def needs(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(kappa_s S_D, kappa_u U_D)"""
    round_steps = jnp.where(state.num_prompts > 0, can_D.sum() / jnp.maximum(state.num_prompts, 1), 0.0)
    tau = jnp.maximum(config.staleness_steps, config.staleness_rounds * round_steps)
    stale_D = jnp.where(never_tried(state), 1.0, -jnp.expm1(-steps_waited(state) / tau))
    return config.staleness_weight * stale_D, config.uncertainty_weight * uncertainty(config, state)


def uncertainty(config: CurriculumConfig, state: TriageState) -> jax.Array:
    """U, f32[D] in [0, 1]."""
    if config.uncertainty_of == "passes":
        return 4 * state.acc_ema * (1 - state.acc_ema)
    return state.grade_uncertainty / MAX_VARIANCE


def triage(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    """The module's formula. can_D: bool[D], who may be drawn and so counts in N_b."""
    staleness_D, uncertainty_D = needs(config, state, can_D)
    log_w_D, capacity_3 = state.base_log_w, jnp.asarray(config.band_capacity)
    member_3D = (jnp.arange(len(BANDS))[:, None] == state.performance_band) & can_D
    if config.guard:
        g_D = guards.learnability(state)
        log_w_D = log_w_D + jnp.log(g_D)
        capacity_3 = capacity_3 * jnp.max(jnp.where(member_3D, g_D, 0.0), axis=1)
    claim_D = jnp.exp(log_w_D + (staleness_D + uncertainty_D if config.strict else 0.0))
    claim_3 = jnp.sum(jnp.where(member_3D, claim_D, 0.0), axis=1)
    filled_3 = claim_3 > 0  # an empty band's term is read by nobody
    log_ratio_3 = jnp.log(jnp.where(filled_3, capacity_3, 1.0)) - config.eta * jnp.log(
        jnp.where(filled_3, claim_3, 1.0)
    )
    if config.monotone:
        ratio_3 = guards.monotone(jnp.where(filled_3, jnp.exp(log_ratio_3), 0.0), claim_3)
        log_ratio_3 = jnp.log(jnp.where(filled_3, ratio_3, 1.0))
    base_D = log_w_D + state.boost + config.drift.boost * state.drift_flag
    if config.signal_weight > 0:
        base_D = base_D + config.signal_weight * jnp.log(jnp.maximum(1 - state.zvf_ema, LEAST))
    if config.gap_weight > 0:
        base_D = base_D + config.gap_weight * jnp.log(jnp.maximum(1 - state.acc_ema, LEAST))
    return summed(log_ratio_3[state.performance_band], staleness_D, uncertainty_D, base_D)


def literal(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    """The author's sum as it stands: capacity of the band + staleness + uncertainty + weight + epsilon.

    Inside the softmax one domain a band gets .426 / .316 / .258 rather than .6 / .3 / .1, and epsilon cancels.
    """
    staleness_D, uncertainty_D = needs(config, state, can_D)
    band_D = jnp.asarray(config.band_capacity)[state.performance_band]
    return summed(band_D, staleness_D, uncertainty_D, jnp.exp(state.base_log_w) + config.epsilon)
