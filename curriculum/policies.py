"""Scheduling policies behind one shape: pure functions over one state, chosen by curriculum=<name>.

    faithful     the triage rule as its author states it, in log units        curriculum/priorities.py
    recommended  the same with the guards, hysteresis, reserved slots, drift  curriculum/guards.py, sampler.py, drift.py
    literal      the author's two formulas to the letter
    a1, a2, a3   bands only; + staleness; + uncertainty. full: + every 10th step a single domain, which is faithful
    the others   curriculum/baselines.py

A rule gives priorities z_D; the rest is the same for all:

    s = softmax(z / T) over the drawable domains, then the floor;   p_i = (s_i / cost_i) / sum

s are shares of the capacity, p of prompts. They are the same where `capacity` is prompts. In tokens or seconds s is
the share of what training costs, so that 60 / 30 / 10 % hold of the cost exactly, and the floor epsilon too is one of
the cost: a domain of long answers may get fewer prompts than that. A domain whose cost is not known counts as the mean
of those known.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curriculum import baselines, feedback, priorities, triage
from curriculum.config import NAMES, CurriculumConfig
from curriculum.priorities import Priorities
from curriculum.sampler import Draw, draw_domains, floor_project
from curriculum.triage import DomainStats, Roster, TriageState, drawable, steps_waited

__all__ = ["NAMES", "CurriculumConfig", "Policy", "build"]

Function = Callable[[CurriculumConfig, TriageState, jax.Array], Priorities]


class Rule(NamedTuple):
    priorities: Function
    eligible: Callable[[CurriculumConfig, TriageState, jax.Array], jax.Array] | None = None  # narrows who may be drawn
    floor: bool = True
    resample: bool = False


RULES = {name: Rule(priorities.triage) for name in ("faithful", "recommended", "a1", "a2", "a3", "full")} | {
    "literal": Rule(priorities.literal, floor=False),
    "spaced": Rule(baselines.spaced),
    "progress": Rule(baselines.progress),
    "uniform": Rule(baselines.uniform),
    "size_proportional": Rule(baselines.size_proportional),
    "sequential": Rule(baselines.uniform, eligible=baselines.in_turn),
    "single_signal": Rule(baselines.single_signal),
    "sec": Rule(baselines.sec),
    "dump": Rule(baselines.dump),
    "p1p": Rule(baselines.p1p),
    "dynamic": Rule(baselines.uniform, resample=True),
}


class Policy(NamedTuple):
    """What a trainer calls; every function is pure and may be jitted, `num_prompts` being static."""

    init: Callable[[int, Roster], TriageState]  # (seed, roster)
    update: Callable[[TriageState, DomainStats], TriageState]
    probabilities: Callable[[TriageState], jax.Array]  # f32[D], shares of prompts, before any reserved slots
    draw: Callable[[TriageState, int], Draw]  # (state, num_prompts)
    metrics: Callable[[TriageState, jax.Array], dict[str, jax.Array]]  # (state, p_D) -> arrays [D]
    lr_scale: Callable[
        [TriageState], jax.Array
    ]  # f32[D], of a domain's learning rate; 1 unless curriculum.drift says so
    resample: bool  # groups without a difference are to be drawn again, and what is thrown away is charged


@lru_cache
def build(config: CurriculumConfig) -> Policy:
    """The policy that `config.policy` names; the same functions for an equal config, so that jit knows them again."""
    rule = RULES[config.policy]

    def draw(state: TriageState, num_prompts: int) -> Draw:
        p_D, can_D = probabilities(config, rule, state), eligible(config, rule, state)
        return draw_domains(config, state, p_D, can_D, num_prompts)

    return Policy(
        init=partial(triage.init, config),
        update=partial(feedback.update, config),
        probabilities=partial(probabilities, config, rule),
        draw=draw,
        metrics=partial(metrics, config, rule),
        lr_scale=partial(lr_scale, config),
        resample=rule.resample,
    )


def eligible(config: CurriculumConfig, rule: Rule, state: TriageState) -> jax.Array:
    """bool[D], who may be drawn under this rule."""
    can_D = drawable(config, state)
    return can_D if rule.eligible is None else rule.eligible(config, state, can_D)


def capacity_shares(config: CurriculumConfig, rule: Rule, state: TriageState) -> jax.Array:
    """s_D, f32[D]: sum 1, 0 where not drawable, else at least epsilon / drawable domains where there is a floor."""
    can_D = eligible(config, rule, state)
    q_D = jax.nn.softmax(rule.priorities(config, state, can_D).total_D / config.temperature, where=can_D)
    if not rule.floor:
        return q_D
    floor_D = can_D * (config.epsilon / jnp.maximum(can_D.sum(), 1))
    return floor_project(q_D, floor_D) if config.floor == "project" else (1 - config.epsilon) * q_D + floor_D


def costs(state: TriageState) -> jax.Array:
    """f32[D], cost of a prompt; where not known yet, the mean of the known; 1 where none is."""
    known_D = state.cost_ema > 0
    mean = jnp.sum(state.cost_ema) / jnp.maximum(known_D.sum(), 1)
    return jnp.where(known_D, state.cost_ema, jnp.where(mean > 0, mean, 1.0))


def probabilities(config: CurriculumConfig, rule: Rule, state: TriageState) -> jax.Array:
    """p_D, f32[D]: shares of prompts, sum 1, 0 where not drawable."""
    s_D = capacity_shares(config, rule, state)
    if config.capacity == "prompts":
        return s_D
    p_D = s_D / costs(state)
    return p_D / p_D.sum()


def lr_scale(config: CurriculumConfig, state: TriageState) -> jax.Array:
    """f32[D]: drift.lr_scale while a domain's flag stands, 1 otherwise."""
    return jnp.where(state.drift_flag, config.drift.lr_scale, 1.0)


def metrics(config: CurriculumConfig, rule: Rule, state: TriageState, p_D: jax.Array) -> dict[str, jax.Array]:
    """Per-domain arrays [D] for a log, all finite; `p_D` are the shares of the draw they stand beside."""
    terms = rule.priorities(config, state, eligible(config, rule, state))
    return {
        "triage/acc_ema": state.acc_ema,
        "triage/share": p_D,
        "triage/band": state.performance_band,
        "triage/staleness": steps_waited(state),  # steps
        "triage/uncertainty": priorities.uncertainty(config, state),  # in [0, 1]
        "triage/zvf_ema": state.zvf_ema,
        "triage/adv_ema": state.adv_ema,
        "triage/priority_band": terms.band_D,
        "triage/priority_staleness": terms.staleness_D,
        "triage/priority_uncertainty": terms.uncertainty_D,
        "triage/priority_base": terms.base_D,
        "triage/half_life": state.half_life,  # steps
        "triage/level": state.level,
        "triage/cost": state.cost_ema,  # of a prompt, in the unit of capacity; 0 = not known yet
        "triage/lr_scale": lr_scale(config, state),
        "drift/ref": state.ref_mean,
        "drift/cusum": state.cusum,
        "drift/flag": state.drift_flag.astype(jnp.int32),
    }
