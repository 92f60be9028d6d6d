"""Drift: a one-sided CUSUM per domain that notices a falling pass rate (Page 1954).

A visit is a step in which the domain was graded; m is the mean pass rate of its n groups there.

    z   = clip((ref - m) / sqrt(max(var, .01) / n), -4, 4)       the shortfall, in standard errors
    S   = max(0, S + z - 1/2)
    alarm where S > threshold, from the 21st visit on; then S = 0 and ref = acc_ema
    ref += rho (m - ref),   rho = 1 / (t + 1) in the first 20 visits, then .02, but .002 while S > threshold / 2

so that a real fall is not taken into the reference while it is being noticed. var is a moving average (weight .02, in
the first visits 1 / (t + 1)) of the mean squared distance of group pass rates to the reference, which exists for a
single group too; the floor of .01 is that of a group of eight at a pass rate of .91.

An alarm raises a flag, which stands until acc_ema is back within `margin` of the reference before the fall, or for
`patience` visits. The detector runs under every policy and changes no band; what a flag does is the policy's affair
(`drift.boost`) and the learning rate's (`drift.lr_scale`).
Rates of alarm, true and false: docs/results/drift.md.

Left out: tests on the largest pass rate so far (the maximum of a noisy average keeps rising, so they alarm without
cause) and a learning rate lowered by a domain's KL (the trainer reports no KL by domain).
"""

import jax
import jax.numpy as jnp

from curriculum.config import DriftConfig
from curriculum.triage import TriageState

SLACK = 0.5  # standard errors a visit that are no drift
CLIP = 4.0  # standard errors that one visit may count at most
WARMUP = 20  # visits before the first alarm
RATE, RATE_SUSPECT = 0.02, 0.002  # weights of a visit in the reference
LEAST_VARIANCE = 0.01


def update(
    config: DriftConfig, state: TriageState, seen_D: jax.Array, rate_D: jax.Array, square_D: jax.Array, n_D: jax.Array
) -> TriageState:
    """The detector's leaves after a visit of the domains in seen_D; the others' stay bit for bit.

    Args:
      state: with acc_ema already moved on. rate_D: f32[D], mean pass rate of the visit's groups.
      square_D: f32[D], mean of the squared pass rates. n_D: f32[D], groups, at least 1.
    """
    error_D = jnp.sqrt(jnp.maximum(state.ref_variance, LEAST_VARIANCE) / n_D)
    z_D = jnp.clip((state.ref_mean - rate_D) / error_D, -CLIP, CLIP)
    first_D = state.ref_visits == 0  # there is no reference to fall short of
    sum_D = jnp.where(first_D, 0.0, jnp.maximum(state.cusum + z_D - SLACK, 0.0))
    alarm_D = (sum_D > config.threshold) & (state.ref_visits >= WARMUP)

    early_D = 1.0 / (state.ref_visits + 1)
    late_D = jnp.where(sum_D > config.threshold / 2, RATE_SUSPECT, RATE)
    ref_D = state.ref_mean + jnp.where(state.ref_visits < WARMUP, early_D, late_D) * (rate_D - state.ref_mean)
    spread_D = jnp.maximum(square_D - 2 * ref_D * rate_D + ref_D**2, 0.0)
    variance_D = state.ref_variance + jnp.maximum(early_D, RATE) * (spread_D - state.ref_variance)

    goal_D = jnp.where(alarm_D & (state.drift_left == 0), state.ref_mean, state.drift_goal)
    back_D = state.acc_ema >= goal_D - config.margin
    left_D = jnp.where(back_D, 0, jnp.maximum(state.drift_left - 1, 0))
    moved = dict(
        ref_mean=jnp.where(alarm_D, state.acc_ema, ref_D),
        ref_variance=variance_D,
        ref_visits=state.ref_visits + 1,
        cusum=jnp.where(alarm_D, 0.0, sum_D),
        drift_left=jnp.where(alarm_D, config.patience, left_D),
        drift_goal=goal_D,
    )
    return state._replace(**{name: jnp.where(seen_D, new_D, getattr(state, name)) for name, new_D in moved.items()})


def restart(state: TriageState, where_D: jax.Array) -> TriageState:
    """The detector without a past in the domains where_D: their task has changed, or the model was set back."""
    blank = dict(ref_visits=0, cusum=0.0, drift_left=0)
    return state._replace(**{name: jnp.where(where_D, value, getattr(state, name)) for name, value in blank.items()})
