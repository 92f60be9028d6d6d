"""Upgrade: new domains for a model M0 that has others already, whose data may be gone.

M0 is the KL anchor. New and prior domains have a share of every mixed batch each, and within its share each kind has a
queue and a floor of its own (curriculum/policies.py). A new domain starts with a small learning rate,

    ramp = min(1, start + (1 - start) t / T)        t steps after its arrival

What a drop of a prior domain does, the monitor says (curriculum/monitor.py).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from curriculum import monitor
from curriculum.config import finite, require
from curriculum.monitor import Effects, MonitorConfig, MonitorState
from curriculum.triage import TriageState


@dataclass(frozen=True)
class UpgradeConfig:
    """How a model is upgraded. Raises ValueError naming upgrade.<key> on an impossible value."""

    active: bool  # whether this run is an upgrade: `python -m infinite_jax.upgrade` sets it
    baseline: int  # M0 is tried on so many times the prompts of an evaluation (eval.prompts), where the tests have them
    least_kl: float  # algorithm.kl_coef, times a domain's `kl`, may not be less
    split: bool  # new and prior domains have shares of their own (monitor.prior_share); false: one queue for all
    new_floor: float  # part of the new domains' share spread evenly over them
    prior_floor: float  # part of the prior domains' share spread evenly over those with prompts
    ramp_start: float  # learning rate of a new domain at its first step, relative to the others'
    ramp_steps: int  # until it is theirs; 0 = at once
    watch: bool  # act on the monitor; false: its readings are logged only
    monitor: MonitorConfig

    def __post_init__(self):
        part = "must be at least 0 and below 1"
        checks = (
            ("baseline", self.baseline >= 1, "must be at least 1 (4: M0's error is then half of an evaluation's)"),
            ("least_kl", finite(self.least_kl), "must be at least 0 (0 = any)"),
            ("new_floor", 0 <= self.new_floor < 1, part),
            ("prior_floor", 0 <= self.prior_floor < 1, part),
            ("ramp_start", 0 < self.ramp_start <= 1, "must be above 0 and at most 1 (1 = no ramp)"),
            ("ramp_steps", self.ramp_steps >= 0, "must be at least 0 steps"),
        )
        require(self, "upgrade", checks)


def ramp(config: UpgradeConfig, state: TriageState) -> jax.Array:
    """f32[D], of a domain's learning rate at state.step; 1 for prior domains."""
    since_D = jnp.maximum(state.step - state.arrives, 0)
    part_D = since_D / config.ramp_steps if config.ramp_steps else jnp.inf
    risen_D = jnp.minimum(1.0, config.ramp_start + (1 - config.ramp_start) * part_D)
    return jnp.where(state.is_new, risen_D, 1.0)


def effects(config: UpgradeConfig, state: MonitorState) -> Effects:
    """What the trainer is to do until the next evaluation; that of tier 0 where the monitor is only logged."""
    if not config.watch:
        state = monitor.init(config.monitor, state.boost.shape[0])
    return monitor.effects(config.monitor, state)
