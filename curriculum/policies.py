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

In an upgrade (curriculum/upgrade.py) new and prior domains stand in two queues. The rule sees one queue at a time, so
that bands, guards and floor are the queue's own, and s = new_share s_new + (1 - new_share) s_prior; where one queue is
empty, the other has all. Reserved slots and single-domain steps are of the whole batch, whatever the queue.
"""

import functools
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curriculum import baselines, feedback, priorities, triage, upgrade
from curriculum.config import NAMES, CurriculumConfig
from curriculum.priorities import Priorities
from curriculum.sampler import Draw, draw_domains, floor_project
from curriculum.triage import DomainStats, Roster, TriageState, drawable, steps_waited
from curriculum.upgrade import UpgradeConfig

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
    ]  # f32[D], of a domain's learning rate; 1 unless drift or a ramp says so
    resample: bool  # groups without a difference are to be drawn again, and what is thrown away is charged


class Queue(NamedTuple):
    """Domains among which a part of the batch is shared."""

    part: jax.Array | float  # f32[]; the parts of all queues sum to 1
    epsilon: float  # of the part, spread over the queue as a floor
    can_D: jax.Array  # bool[D], who may be drawn


@lru_cache
def build(config: CurriculumConfig, upgraded: UpgradeConfig | None = None) -> Policy:
    """The policy that `config.policy` names; the same functions for an equal config, so that jit knows them again.

    upgraded: None where the run is no upgrade.
    """
    rule = RULES[config.policy]
    given = (config, rule, upgraded)

    def draw(state: TriageState, num_prompts: int) -> Draw:
        found = queues(*given, state)
        p_D, can_D = shares(config, rule, found, state), functools.reduce(jnp.logical_or, (q.can_D for q in found))
        return draw_domains(config, state, p_D, can_D, num_prompts)

    return Policy(
        init=partial(init, config, upgraded),
        update=partial(feedback.update, config),
        probabilities=partial(probabilities, *given),
        draw=draw,
        metrics=partial(metrics, *given),
        lr_scale=partial(lr_scale, config, upgraded),
        resample=rule.resample,
    )


def init(config: CurriculumConfig, upgraded: UpgradeConfig | None, seed, members: Roster) -> TriageState:
    """triage.init, in an upgrade with the new domains' share of tier 0."""
    state = triage.init(config, seed, members)
    if upgraded is None:
        return state
    return state._replace(new_share=jnp.array(1 - upgraded.monitor.prior_share, jnp.float32))


def queues(config: CurriculumConfig, rule: Rule, upgraded: UpgradeConfig | None, state: TriageState) -> Sequence[Queue]:
    """One of all drawable domains; in an upgrade that splits the batch, one of the new and one of the prior ones."""

    def eligible(can_D):
        return can_D if rule.eligible is None else can_D & rule.eligible(config, state, can_D)

    can_D = drawable(config, state)
    if upgraded is None or not upgraded.split:
        return (Queue(1.0, config.epsilon, eligible(can_D)),)
    new_D, prior_D = eligible(can_D & state.is_new), eligible(can_D & ~state.is_new)
    part = jnp.where(prior_D.any(), jnp.where(new_D.any(), state.new_share, 0.0), 1.0)
    return (
        Queue(part, upgraded.new_floor, new_D & (part > 0)),
        Queue(1 - part, upgraded.prior_floor, prior_D & (part < 1)),
    )


def queue_shares(config: CurriculumConfig, rule: Rule, queue: Queue, state: TriageState) -> jax.Array:
    """f32[D]: sum 1, 0 where not drawable, else at least epsilon / drawable domains where there is a floor."""
    can_D = queue.can_D | ~queue.can_D.any()  # an empty queue's shares are multiplied by 0, so let them be finite
    q_D = jax.nn.softmax(rule.priorities(config, state, can_D).total_D / config.temperature, where=can_D)
    if not rule.floor:
        return q_D
    floor_D = can_D * (queue.epsilon / jnp.maximum(can_D.sum(), 1))
    return floor_project(q_D, floor_D) if config.floor == "project" else (1 - queue.epsilon) * q_D + floor_D


def shares(config: CurriculumConfig, rule: Rule, found: Sequence[Queue], state: TriageState) -> jax.Array:
    """p_D, f32[D]: shares of prompts, sum 1, 0 where not drawable."""
    s_D = sum(queue.part * queue_shares(config, rule, queue, state) for queue in found)
    if config.capacity == "prompts":
        return s_D
    p_D = s_D / costs(state)
    return p_D / p_D.sum()


def probabilities(
    config: CurriculumConfig, rule: Rule, upgraded: UpgradeConfig | None, state: TriageState
) -> jax.Array:
    """p_D, f32[D]: the shares of a batch drawn at this state."""
    return shares(config, rule, queues(config, rule, upgraded, state), state)


def costs(state: TriageState) -> jax.Array:
    """f32[D], cost of a prompt; where not known yet, the mean of the known; 1 where none is."""
    known_D = state.cost_ema > 0
    mean = jnp.sum(state.cost_ema) / jnp.maximum(known_D.sum(), 1)
    return jnp.where(known_D, state.cost_ema, jnp.where(mean > 0, mean, 1.0))


def lr_scale(config: CurriculumConfig, upgraded: UpgradeConfig | None, state: TriageState) -> jax.Array:
    """f32[D]: drift.lr_scale while a domain's flag stands, 1 otherwise; in an upgrade times the new domains' ramp."""
    scale_D = jnp.where(state.drift_flag, config.drift.lr_scale, 1.0)
    return scale_D if upgraded is None else scale_D * upgrade.ramp(upgraded, state)


def metrics(
    config: CurriculumConfig, rule: Rule, upgraded: UpgradeConfig | None, state: TriageState, p_D: jax.Array
) -> dict[str, jax.Array]:
    """Per-domain arrays [D] for a log, all finite; `p_D` are the shares of the draw they stand beside."""
    found = queues(config, rule, upgraded, state)
    terms, *prior = (rule.priorities(config, state, queue.can_D) for queue in found)
    if prior:
        terms = jax.tree.map(partial(jnp.where, state.is_new), terms, *prior)
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
        "triage/lr_scale": lr_scale(config, upgraded, state),
        "drift/ref": state.ref_mean,
        "drift/cusum": state.cusum,
        "drift/flag": state.drift_flag.astype(jnp.int32),
    }
