"""Scheduling policies behind one shape: four pure functions over one state, chosen by `curriculum.policy`.

    faithful  the triage scheduler: band capacities, staleness, uncertainty (curriculum/sampler.py)
    uniform   the baseline: every domain the same share, scaled by its configured weight; nothing adapts

Both keep the same TriageState, so both log the same curves, resume the same way, and rest a domain whose grader is
down.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curriculum.sampler import Draw, TriageSampler, draw_domains
from curriculum.triage import DomainStats, TriageConfig, TriageState, TriageStateManager, drawable


@dataclass(frozen=True)
class UniformSampler:
    """Shares by configured weight alone, so equal ones where no weight was given; no floor, for none is starved."""

    config: TriageConfig

    def probabilities(self, state: TriageState) -> jax.Array:
        """Shares p_D, f32[D]: sum 1, proportional to the weight, 0 where not drawable."""
        claim_D = jnp.where(drawable(self.config, state), jnp.exp(state.base_log_w), 0.0)
        return claim_D / jnp.maximum(claim_D.sum(), jnp.finfo(jnp.float32).tiny)

    def draw(self, state: TriageState, num_prompts: int) -> Draw:
        """The batch of state.step; `num_prompts` is static."""
        return draw_domains(self.config, state, self.probabilities(state), num_prompts)


SAMPLERS = {"faithful": TriageSampler, "uniform": UniformSampler}


@dataclass(frozen=True)
class CurriculumConfig(TriageConfig):
    """The configuration group `curriculum`. Raises ValueError as TriageConfig does, and on an unknown policy."""

    policy: str  # faithful | uniform

    def __post_init__(self):
        super().__post_init__()
        if self.policy not in SAMPLERS:
            close = difflib.get_close_matches(str(self.policy), SAMPLERS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(SAMPLERS)}"
            raise ValueError(f"curriculum.policy={self.policy}: {remedy}")


class Policy(NamedTuple):
    """What a trainer calls; every function is pure and may be jitted, `num_prompts` being static."""

    init: Callable[..., TriageState]  # (seed, weights_D, active_D, is_new_D, arrives_D) -> state
    update: Callable[[TriageState, DomainStats], TriageState]
    probabilities: Callable[[TriageState], jax.Array]  # f32[D]
    draw: Callable[[TriageState, int], Draw]  # (state, num_prompts)
    metrics: Callable[[TriageState, jax.Array], dict[str, jax.Array]]  # (state, p_D) -> arrays [D]


def build(config: CurriculumConfig) -> Policy:
    """The policy that `config.policy` names."""
    manager, sampler = TriageStateManager(config), SAMPLERS[config.policy](config)
    return Policy(manager.init, manager.update, sampler.probabilities, sampler.draw, manager.metrics)
