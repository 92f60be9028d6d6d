"""world=simulated: toy learners, thousands of runs of every policy in minutes.

A domain i has one skill theta_i in logits. A prompt of it is passed with chance p = sigmoid(theta_i + N(0, 1)), and

    theta_i += rate_i sum_j T_ji share_j^alpha E[4 p_j (1 - p_j)] - decay_i (1 - share_i) (theta_i - its start)

where share_j is the part of the batch that j got, E is over j's prompts and T is the transfer between domains
(infinite_jax/worlds/regimes.py draws them). The policy's own functions (init, draw, update) run inside, on simulated
grades: a reply's quality is theta_i + the prompt's N(0, 1) + logistic noise, and its grade 1 to 4 says between which of
-CUT, 0 and CUT it fell (the proportional odds model, McCullagh 1980), so that a pass (3 or 4) has probability p and
grades vary most at a skill of one half. The reward is the pass.

A dead domain always gets grade 1; a noisy one is passed by a coin toss; neither learns and neither enters a metric.
Domains that are evaluated only move by transfer alone. Every answer costs the same. With dynamic sampling a step is
still P groups: those without variance are thrown away, the others are kept until they fill a batch, and only then does
the learner learn, from P of them. So all arms generate the same number of rollouts, the discarded ones charged, and
since all of a domain's signal is in its groups with variance, what dynamic sampling could gain here is nothing but what
alpha < 1 makes of another mixture; less noise, its purpose, is not modelled. `sequential` trains each domain once, for
steps / domains, or the latest arrivals where domains arrive in phases.

Evaluations are exact pass rates (Gauss-Hermite), the same grid of steps for every arm. Worlds, prompts and grades
depend on regime, seed and step alone, so arms are paired. All of an arm's (regime, seed) units of one shape are one
compiled program; two arms run at a time where there are two cores.

Left out: noise of the learner (an update moves the skill by its expectation), answers of unequal length, domains that
retire, and any way in which a single-domain batch could generalise better than a mixed one.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import nearest
from curriculum import policies
from curriculum.config import GRADE_PASS, CurriculumConfig
from curriculum.triage import roster, statistics
from infinite_jax import decay
from infinite_jax.retention import Evaluations
from infinite_jax.worlds.regimes import FIRST_SEED, GRIDS, SHOCK, UNSEEN, Regime, World, make_world
from infinite_jax.worlds.table import NO_PROBE, Arm, Probe, Runs

CUT = 1.5  # logits between the pass mark and the borders of grades 1 and 4
GROUP = 8  # G, rollouts of a prompt
DEAD = -30.0  # logits
WIDTH = 20  # worlds of fewer domains are padded to as many, so that they share a program
# A program runs for seconds, once: with less of the optimiser it compiles a quarter faster and runs no slower.
QUICK = {"xla_backend_optimization_level": 1, "xla_cpu_parallel_codegen_split_count": 1}
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
WEIGHTS = WEIGHTS / WEIGHTS.sum()  # E f(N(0, 1)) = sum of WEIGHTS f(NODES)


@dataclass(frozen=True)
class Settings:
    """Section `sim` of configs/ablate.yaml. Raises ValueError, one line, on an impossible value."""

    grid: str  # default | full | tuning | heldout
    regimes: tuple[str, ...]  # which worlds of the grid; none = all
    steps: int  # of P groups each
    eval_every: int  # steps

    def __post_init__(self):
        if self.grid not in GRIDS:
            raise ValueError(f"sim.grid={self.grid}: {nearest(self.grid, GRIDS)}")
        for name in self.regimes:
            if name not in GRIDS[self.grid]:
                raise ValueError(
                    f"sim.regimes: no world {name} in sim.grid={self.grid}; {nearest(name, GRIDS[self.grid])}"
                )
        if self.eval_every < 1:
            raise ValueError(f"sim.eval_every={self.eval_every}: must be at least 1 step")
        if self.steps < 10 or self.steps % self.eval_every:
            raise ValueError(f"sim.steps={self.steps}: must be at least 10 and a multiple of sim.eval_every")

    @property
    def chosen(self) -> dict[str, Regime]:
        grid = GRIDS[self.grid]
        return {name: grid[name] for name in self.regimes or grid}

    @property
    def first_seed(self) -> int:
        return FIRST_SEED.get(self.grid, 0)


class Unit(NamedTuple):
    name: str
    regime: Regime
    seed: int


class Program(NamedTuple):
    """What one compilation depends on."""

    curriculum: CurriculumConfig
    prompts: int  # P
    num_domains: int  # D, padded


class Curves(NamedTuple):
    """What one run leaves; K evaluations beside the first."""

    skill_KD: jax.Array  # f32 logits, before training and after every eval_every steps
    share_KD: jax.Array  # f32 mean share of the steps between two evaluations


def run(
    settings: Settings,
    arms: Sequence[Arm],
    missing: Callable[[str, str], list[int]],
    run_dir: Path | None = None,
    probe: Probe = NO_PROBE,
) -> Iterator[Runs]:
    """Every arm in every chosen regime, on the seeds that `missing(regime, arm name)` names; yields as arms finish."""
    del run_dir  # nothing but the rows is kept
    withheld = withhold(settings, probe)
    jobs = []
    for arm in arms:
        programs: dict[Program, list[Unit]] = {}
        for name, regime in settings.chosen.items():
            curriculum = arm.config.curriculum
            if curriculum.policy == "sequential":
                phase = settings.steps // regime.trained if regime.phases == 1 else 0
                curriculum = replace(curriculum, phase_steps=phase)
            program = Program(curriculum, regime.prompts, max(WIDTH, regime.trained + UNSEEN))
            programs.setdefault(program, []).extend(Unit(name, regime, seed) for seed in missing(name, arm.name))
        jobs += [(arm.name, program, units) for program, units in programs.items() if units]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles and runs outside the interpreter's lock
        for runs in pool.map(lambda job: _job(settings, withheld, *job), jobs):
            yield from runs


def check(settings: Settings, arms: Sequence[Arm], probe: Probe) -> None:
    """Raises ValueError, one line, on what cannot be run."""
    withhold(settings, probe)


def withhold(settings: Settings, probe: Probe) -> tuple[int, int] | None:
    """(domain, step after which it is withheld), or None. Raises ValueError, one line, on a probe that no world has."""
    if not probe.domain:
        return None
    fewest = min(regime.trained for regime in settings.chosen.values())
    if not probe.domain.isdecimal() or int(probe.domain) >= fewest:
        raise ValueError(f"probe={probe.domain}: in world=simulated a domain is a number, 0 to {fewest - 1}")
    return int(probe.domain), probe.ends(settings.steps, "sim.steps")


def _job(
    settings: Settings, withheld: tuple[int, int] | None, arm: str, program: Program, units: list[Unit]
) -> list[Runs]:
    """Runs of one arm for units that share a program, one Runs a regime."""
    worlds = [make_world(*unit, settings.steps, program.num_domains) for unit in units]
    if withheld:
        for world in worlds:
            world.retires[withheld[0]] = withheld[1]
    world_U = World(*(np.stack(leaves) for leaves in zip(*worlds)))
    seed_U = np.array([unit.seed for unit in units], np.int32)
    policy = policies.build(program.curriculum)
    learner = partial(simulate, policy, program.prompts, settings.steps, settings.eval_every)
    curves = jax.tree.map(np.asarray, jax.jit(jax.vmap(learner), compiler_options=QUICK)(world_U, seed_U))
    rate_UKD = np.asarray(pass_rate(curves.skill_KD))
    at_K = np.arange(0, settings.steps + 1, settings.eval_every, dtype=np.float64)
    found = []
    for regime in dict.fromkeys(unit.name for unit in units):
        of = [u for u, unit in enumerate(units) if unit.name == regime]
        evaluations, shares, decays = [], [], []
        for u in of:
            kept = worlds[u].measured
            arrives = worlds[u].arrives[kept].astype(np.float64)
            rate_KD = rate_UKD[u][:, kept].astype(np.float64)
            evaluations.append(Evaluations(at_K, rate_KD, arrives, worlds[u].trained[kept]))
            shares.append(curves.share_KD[u][:, kept])
            if withheld:
                decays.append(decay.decay(at_K, rate_UKD[u][:, withheld[0]].astype(np.float64), withheld[1]))
        cost = {"rollouts": float(settings.steps * program.prompts * GROUP)}
        found.append(Runs(regime, arm, seed_U[of], evaluations, np.stack(shares), cost, decay_S=tuple(decays)))
    return found


def pass_rate(skill: jax.Array) -> jax.Array:
    """E sigmoid(skill + N(0, 1)), of skill's shape."""
    return jax.nn.sigmoid(skill[..., None] + NODES.astype(np.float32)) @ WEIGHTS.astype(np.float32)


def simulate(
    policy: policies.Policy, prompts: int, steps: int, eval_every: int, world: World, seed: jax.Array
) -> Curves:
    """One run of a policy on one world; pure, to be vmapped over `world` and `seed`.

    Args:
      policy, prompts (P), steps, eval_every: static. world: arrays. seed: i32[], of the draws and of the grades.
    """
    D = world.start.shape[0]
    members = roster(D, size=world.size, active=world.trained, arrives=world.arrives, retires=world.retires)
    state = policy.init(seed, members)
    root = jax.random.key(seed)

    def step(carry, number):
        skill_D, state, waiting_D = carry
        draw = policy.draw(state, prompts)
        grade_PG = grades(jax.random.fold_in(root, number), world, skill_D, draw.domain_P)
        passed_PG = (grade_PG >= GRADE_PASS).astype(jnp.float32)
        valid_PG = jnp.ones(grade_PG.shape, bool)
        stats = statistics(draw.domain_P, grade_PG, passed_PG, valid_PG, jnp.ones(prompts), D)
        state = policy.update(state, stats)
        useful_D = stats.n_groups - stats.zero_var_sum
        skill_D, waiting_D = learn(policy.resample, world, prompts, skill_D, waiting_D, draw.counts_D, useful_D)
        skill_D = skill_D - SHOCK * (world.shock_step == number)
        return (skill_D, state, waiting_D), draw.p_D

    def until_evaluation(carry, k):
        carry, share_TD = jax.lax.scan(step, carry, k * eval_every + jnp.arange(eval_every))
        return carry, Curves(carry[0], share_TD.mean(axis=0))

    first = (jnp.asarray(world.start), state, jnp.zeros(D))
    curves = jax.lax.scan(until_evaluation, first, jnp.arange(steps // eval_every))[1]
    return curves._replace(skill_KD=jnp.concatenate([world.start[None], curves.skill_KD]))


def grades(key: jax.Array, world: World, skill_D: jax.Array, domain_P: jax.Array) -> jax.Array:
    """f32[P, G] grades 1 to 4 of a step's rollouts; `key` is consumed once.

    Sixteen random bits a rollout: with G = 8 of up to 64 prompts they are most of what a step computes.
    """
    P = domain_P.shape[0]
    bits = jax.random.bits(key, (P * (1 + GROUP // 2),))
    normal_P = jax.scipy.special.ndtri(((bits[:P] >> 9).astype(jnp.float32) + 0.5) * 2.0**-23)
    halves = jnp.concatenate([bits[P:] >> 16, bits[P:] & 0xFFFF]).reshape(P, GROUP)
    uniform_PG = (halves.astype(jnp.float32) + 0.5) * 2.0**-16
    mean_P = jnp.where(world.dead, DEAD, skill_D)[domain_P] + normal_P
    mean_P = jnp.where(world.noisy[domain_P], 0.0, mean_P)
    above_P3 = jax.nn.sigmoid(mean_P[:, None] + jnp.array([CUT, 0.0, -CUT]))  # chances of at least grade 2, 3, 4
    grade_PG = 1.0 + jnp.sum(uniform_PG[:, :, None] < above_P3[:, None, :], axis=-1).astype(jnp.float32)
    return jnp.where(world.binary[domain_P][:, None], jnp.where(grade_PG >= GRADE_PASS, 4.0, 1.0), grade_PG)


def learn(
    resample: bool,
    world: World,
    prompts: int,
    skill_D: jax.Array,
    waiting_D: jax.Array,
    counts_D: jax.Array,
    useful_D: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(skill_D, waiting_D) after a step whose batch had counts_D groups, useful_D of them with a difference.

    With `resample` (static) useful groups wait until they fill a batch. All the signal of a domain is in its useful
    groups, so each of them carries E[4 p (1 - p)] divided by the chance that a group is useful.
    """
    p_DN = jax.nn.sigmoid(skill_D[:, None] + NODES.astype(np.float32))
    weight_N = WEIGHTS.astype(np.float32)
    signal_D = 4 * (p_DN * (1 - p_DN)) @ weight_N
    share_D = counts_D / prompts
    loss_D = world.decay * (1 - share_D) * (skill_D - world.start)  # by rollouts, whether learned from or waiting
    full = True
    if resample:
        waiting_D = waiting_D + useful_D
        full = waiting_D.sum() >= prompts
        share_D = waiting_D / jnp.maximum(waiting_D.sum(), 1.0)
        signal_D = signal_D / ((1 - p_DN**GROUP - (1 - p_DN) ** GROUP) @ weight_N)
        waiting_D = waiting_D - jnp.where(full, prompts * share_D, 0.0)
    effort_D = jnp.where(share_D > 0, jnp.maximum(share_D, 1e-9) ** world.alpha, 0.0)
    gain_D = world.rate * ((effort_D * signal_D) @ world.transfer)
    return skill_D - loss_D + jnp.where(full, gain_D, 0.0), waiting_D
