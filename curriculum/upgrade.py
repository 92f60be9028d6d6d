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

REHEARSALS = ("none", "self")
REWARDS = ("agreement", "none")


@dataclass(frozen=True)
class RehearsalConfig:
    """How M0 writes prompts of prior domains that have none. Raises ValueError naming upgrade.writing.<key>."""

    prompts: int  # wanted of each domain, and written at each attempt from each source
    attempts: int  # at most, until as many are kept
    least: int  # a domain of which fewer are kept stays evaluation only
    tokens: int  # of a prompt that M0 writes, at most
    temperature: float  # of writing; replies are sampled at 1
    likeness: float  # cosine that a prompt written from no hint must have to the description of its domain
    samples: int  # replies to each prompt
    agreement: float  # share of them that must say the same
    reward: str  # agreement: saying what they agree on | none: nothing, KL to M0 alone acts; neither sampled nor graded

    def __post_init__(self):
        checks = (
            ("prompts", self.prompts >= 1, "must be at least 1"),
            ("attempts", self.attempts >= 1, "must be at least 1"),
            ("least", 1 <= self.least <= self.prompts, f"must be from 1 to prompts={self.prompts}"),
            ("tokens", self.tokens >= 1, "must be at least 1"),
            ("temperature", 0 < self.temperature and finite(self.temperature), "must be above 0"),
            ("likeness", 0 <= self.likeness <= 1, "must be a cosine from 0 to 1"),
            ("samples", self.samples >= 2, "must be at least 2: one reply agrees with itself"),
            ("agreement", 0 < self.agreement <= 1, "must be above 0 and at most 1"),
        )
        require(self, "upgrade.writing", checks)
        if self.reward not in REWARDS:
            raise ValueError(f"upgrade.writing.reward={self.reward!r}: expected one of {', '.join(REWARDS)}")


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
    rehearsal: str  # none | self: prior domains without training rows get some that M0 writes and answers itself
    writing: RehearsalConfig
    watch: bool  # act on the monitor; false: its readings are logged only
    monitor: MonitorConfig

    def __post_init__(self):
        part = "must be at least 0 and below 1"
        checks = (
            ("baseline", self.baseline >= 1, "must be at least 1 (4: M0's error is then half of an evaluation's)"),
            ("least_kl", finite(self.least_kl), "must be at least 0 (0 = any)"),
            ("rehearsal", self.rehearsal in REHEARSALS, f"expected one of {', '.join(REHEARSALS)}"),
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
