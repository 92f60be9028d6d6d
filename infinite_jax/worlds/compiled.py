"""world=compiled: a small transformer learns procedural domains; a run is ONE compiled program, vmapped over runs.

    scan over evaluations [ scan over steps [ draw -> rows -> generate -> grade -> prepare -> train_step -> update ] ]

Every function of a step is the trainer's own: the policy's draw, update and lr_scale, rollout.generate, batch.prepare
and tally, grpo.train_step. Only data and grader differ (worlds/tasks.py): rows are gathered from arrays and graded on
token level, so that nothing leaves the device. Evaluation samples one reply to each of the same held-out rows with the
same keys every time. It stands in a scan of its own around the steps: a batched `cond` inside a step would evaluate at
every step.

A run begins with a model that was taught every domain up to a target pass rate (worlds/practice.py), the same for all
arms of a seed. worlds/stage.py lists the worlds. The dead and the noisy domain enter no metric; `harder` is the mean
pass rate of the trained domains' harder variants at the end. What is tuned is tuned on the domains of
compiled.draw=tuning and judged on those of compiled.draw=judging, which share no family.

With dynamic sampling a step is still P groups, so that all arms generate the same number of rollouts: groups without a
difference are thrown away, the others wait, at unchanged parameters, until they fill a batch.

Left out: dynamic difficulty and prompt-level draws (rows have no levels or priorities), several devices (a run is far
too small for one).
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import AlgorithmConfig
from curriculum import policies
from curriculum.config import CurriculumConfig
from curriculum.triage import TriageState
from infinite_jax import decay, grpo
from infinite_jax.batch import prepare, tally
from infinite_jax.retention import Evaluations
from infinite_jax.rollout import Sampling, generate
from infinite_jax.score import Scorer
from infinite_jax.trainer import ROLLOUT_STREAM, stream_key
from infinite_jax.types import Params, Rollout, TrainState
from infinite_jax.worlds import side_by_side, stage, tasks
from infinite_jax.worlds.stage import Data, Settings, World, take
from infinite_jax.worlds.table import NO_PROBE, Arm, Probe, Runs
from infinite_jax.worlds.tasks import Rows
from models.architectures import DecoderConfig
from rubric.evaluator import PASS_GRADE, Grades


class Program(NamedTuple):
    """What one compilation depends on."""

    algorithm: AlgorithmConfig
    curriculum: CurriculumConfig
    graded: bool  # reward (grade - 1) / 3, else 1 for a pass
    decoder: DecoderConfig
    steps: int
    eval_every: int


class Sample(NamedTuple):
    """P groups, and which of them are to be learnt from."""

    rollout: Rollout
    grades: Grades
    useful_P: jax.Array  # bool


class State(NamedTuple):
    train: TrainState
    triage: TriageState
    cursor_D: jax.Array  # i32, rows drawn so far
    waiting: Sample | None  # only with dynamic sampling


class Curves(NamedTuple):
    """What a run leaves: K evaluations, the first before any step, and K - 1 stretches of steps between them."""

    rate_KD: jax.Array  # f32, held-out pass rates
    harder_KD: jax.Array  # f32, of the harder variants
    share_KD: jax.Array  # f32 [K - 1, D], mean shares of a stretch
    tokens_K: jax.Array  # f32 [K - 1], generated in a stretch


def grade(graded: bool, world: World, rollout: Rollout, rows: Rows, key: jax.Array) -> Grades:
    """Grades of the rollout's B rows; `rows` are those of its P prompts. `key` is consumed by the coins."""
    length_B, answer_BC = rows.length_N[rollout.prompt_B], rows.answer_NC[rollout.prompt_B]
    grade_B = tasks.grade(tasks.completions(rollout.tokens_BT, length_B), answer_BC)
    coin_B = jnp.where(jax.random.bernoulli(key, 0.5, grade_B.shape), 4.0, 1.0)
    grade_B = jnp.where(world.coin_D[rollout.domain_B], coin_B, grade_B)
    reward_B = (grade_B - 1.0) / 3.0 if graded else (grade_B >= PASS_GRADE).astype(jnp.float32)
    return Grades(grade_B, reward_B, jnp.ones(grade_B.shape, bool))


def sample(program: Program, data: Data, world: World, seed: jax.Array, state: State, domain_P: jax.Array):
    """(Sample, cursor_D): the step's prompts of the drawn domains, answered and graded."""
    algorithm, number = program.algorithm, state.triage.step
    rows, cursor_D = take(data, world.members.size, state.cursor_D, domain_P)
    options = (algorithm.temperature, algorithm.top_k, algorithm.top_p, algorithm.max_new_tokens, algorithm.group_size)
    sampling, key = Sampling(*options, stage.STOP_IDS, tasks.PAD), stream_key(seed, number, ROLLOUT_STREAM)
    made = generate(program.decoder, sampling, state.train.params, rows.prompt_NT, rows.length_N, key)
    prompt_B = jnp.repeat(jnp.arange(algorithm.prompts), algorithm.group_size)
    rollout = Rollout(made.tokens_BT, made.loss_mask_BT, made.logp_BT, domain_P[prompt_B], prompt_B, made.done_B)
    grades = grade(program.graded, world, rollout, rows, stream_key(seed, number, stage.COIN))
    reward_PG, valid_PG = (x.reshape(-1, algorithm.group_size) for x in (grades.reward_B, grades.valid_B))
    useful_P = jnp.any(grpo.group_advantage(reward_PG, valid_PG, "none") != 0, axis=1)
    return Sample(rollout, grades, useful_P), cursor_D


def gathered(waiting: Sample, fresh: Sample) -> Sample:
    """The first P useful groups of both, filled up with others while there are fewer; useful ones beyond are lost."""
    prompts, rows = len(fresh.useful_P), len(fresh.grades.grade_B)
    useful = jnp.concatenate([waiting.useful_P, fresh.useful_P])
    group_P = jnp.argsort(~useful, stable=True)[:prompts]
    row_B = (group_P[:, None] * (rows // prompts) + jnp.arange(rows // prompts)).reshape(-1)
    parts = (waiting.rollout, waiting.grades), (fresh.rollout, fresh.grades)
    rollout, grades = jax.tree.map(lambda old, new: jnp.concatenate([old, new])[row_B], *parts)
    return Sample(rollout, grades, useful[group_P])


def step(program: Program, data: Data, world: World, reference: Params, seed: jax.Array, state: State):
    """One step of the method: (state, shares p_D, tokens generated). Pure; `program` is static."""
    algorithm, decoder, curriculum = program.algorithm, program.decoder, policies.build(program.curriculum)
    draw = curriculum.draw(state.triage, algorithm.prompts)
    fresh, cursor_D = sample(program, data, world, seed, state, draw.domain_P)
    learnt = gathered(state.waiting, fresh) if curriculum.resample else fresh
    scorer = Scorer(decoder, algorithm.temperature, algorithm.max_new_tokens, algorithm.group_size)
    scored = (state.train.params, reference, learnt.rollout, learnt.grades, curriculum.lr_scale(state.triage))
    scored += (jnp.full(len(world.coin_D), algorithm.kl_coef, jnp.float32),)
    train, _ = grpo.train_step(algorithm, scorer, state.train, prepare(algorithm, scorer, *scored))
    waiting = None
    if curriculum.resample:
        full = learnt.useful_P.all()
        train = jax.tree.map(lambda new, old: jnp.where(full, new, old), train, state.train)
        waiting = learnt._replace(useful_P=learnt.useful_P & ~full)
    tokens_P = fresh.rollout.loss_mask_BT.sum(1).reshape(algorithm.prompts, -1).sum(1).astype(jnp.float32)
    cost_P = tokens_P if program.curriculum.capacity == "tokens" else jnp.ones_like(tokens_P)
    stats = tally(algorithm.group_size, len(world.coin_D), fresh.rollout.domain_B, fresh.grades, cost_P)
    return State(train, curriculum.update(state.triage, stats), cursor_D, waiting), draw.p_D, tokens_P.sum()


def initial_state(program: Program, data: Data, world: World, start: Params, seed: jax.Array) -> State:
    """The state before step 0; `start` is also the reference of the KL term."""
    curriculum = policies.build(program.curriculum)
    train = TrainState(start, grpo.optimizer(program.algorithm).init(start), jnp.zeros((), jnp.int32))
    state = State(train, curriculum.init(seed, world.members), jnp.zeros(len(world.coin_D), jnp.int32), None)
    if curriculum.resample:
        nothing_P = jnp.zeros(program.algorithm.prompts, jnp.int32)
        shapes, _ = jax.eval_shape(functools.partial(sample, program), data, world, seed, state, nothing_P)
        state = state._replace(waiting=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return state


def learn(program: Program, data: Data, world: World, start: Params, seed: jax.Array) -> Curves:
    """A whole run. Pure and jittable; all but `program` may be batched."""
    held_out = jax.tree.map(lambda test, harder: jnp.concatenate([test, harder]), data.test, data.harder)

    def evaluate(params):
        return stage.pass_rates(program.decoder, params, held_out, jax.random.key(0))

    def one(state, _):
        state, p_D, tokens = step(program, data, world, start, seed, state)
        return state, (p_D, tokens)

    def stretch(state, _):
        state, (p_TD, tokens_T) = jax.lax.scan(one, state, length=program.eval_every)
        return state, (evaluate(state.train.params), p_TD.mean(0), tokens_T.sum())

    state = initial_state(program, data, world, start, seed)
    _, (rate_KD, share_KD, tokens_K) = jax.lax.scan(stretch, state, length=program.steps // program.eval_every)
    rate_KD, harder_KD = jnp.split(jnp.concatenate([evaluate(start)[None], rate_KD]), 2, axis=1)
    return Curves(rate_KD, harder_KD, share_KD, tokens_K)


def compose(settings: Settings, arm: Arm, regime: str) -> Program:
    """What an arm is in a world. Raises ValueError, one line, on what the world cannot do."""
    curriculum = arm.config.curriculum
    if arm.config.algorithm.critic != "none":
        raise ValueError(
            f"arms: {arm.name}: world=compiled has no critic; set algorithm.critic=none and another algorithm.advantage"
        )
    if curriculum.capacity == "seconds":
        raise ValueError(
            f"arms: {arm.name}: world=compiled measures no seconds; set capacity=prompts or capacity=tokens"
        )
    if curriculum.policy == "sequential":
        domains = tasks.TRAINED + sum(name in regime.split("+") for name in ("dead", "noisy"))
        phase = 0 if "arrivals" in regime.split("+") else max(settings.steps // domains, 1)
        curriculum = dataclasses.replace(curriculum, phase_steps=phase)
    algorithm = dataclasses.replace(
        arm.config.algorithm,
        prompts=settings.prompts,
        group_size=settings.group_size,
        learning_rate=settings.learning_rate,
        prompt_buckets=(tasks.PROMPT,),
        max_new_tokens=tasks.ANSWER,
        microbatches=1,
    )
    graded = arm.config.rubric.reward == "graded"
    return Program(algorithm, curriculum, graded, stage.decoder_config(settings), settings.steps, settings.eval_every)


def run(
    settings: Settings,
    arms: Sequence[Arm],
    missing: Callable[[str, str], list[int]],
    run_dir: Path | None = None,
    probe: Probe = NO_PROBE,
) -> Iterator[Runs]:
    """Every arm in every world of `settings.regimes`, on the seeds that `missing(world, arm name)` names.

    Yields as arms finish. A seed's data and start are the same in all worlds and for all arms.
    """
    del run_dir  # nothing but the rows is kept
    withheld = stage.withhold(settings, probe)
    jobs: dict[tuple[str, Program], list[tuple[str, int]]] = {}
    for arm in arms:
        for regime in settings.regimes:
            program = compose(settings, arm, regime)
            if units := [(regime, seed) for seed in missing(regime, arm.name)]:
                jobs.setdefault((arm.name, program), []).extend(units)
    seeds = sorted({seed for units in jobs.values() for _, seed in units})
    if not seeds:
        return
    seed_S = (np.array(seeds, np.int32),)
    made = [functools.partial(make, settings) for make in (stage.make_data, stage.make_start)]
    shared = jax.device_put(
        tuple(side_by_side.run(side_by_side.build(each, settings.parallel, seed_S), seed_S) for each in made)
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles outside the interpreter's lock
        queue = []
        for (name, program), units in jobs.items():
            inputs = _inputs(settings, withheld, seeds, units)
            one = functools.partial(_unit, program)
            queue.append((name, units, inputs, pool.submit(side_by_side.build, one, settings.parallel, inputs, shared)))
        for name, units, inputs, compiling in queue:
            executable, began = compiling.result(), time.perf_counter()
            curves = side_by_side.run(executable, inputs, shared)
            seconds = (time.perf_counter() - began) / len(units)
            yield from _results(settings, name, units, inputs[1], curves, seconds, withheld)


def check(settings: Settings, arms: Sequence[Arm], probe: Probe) -> None:
    """Raises ValueError, one line, on what cannot be run."""
    stage.withhold(settings, probe)
    for arm in arms:
        for regime in settings.regimes:
            compose(settings, arm, regime)


def _inputs(
    settings: Settings, withheld: tuple[int, int] | None, seeds: Sequence[int], units: Sequence[tuple[str, int]]
) -> tuple[np.ndarray, World, np.ndarray]:
    """For each unit (world, seed): the place of its seed in `seeds`, the world's arrays, the seed."""
    world_U = jax.tree.map(lambda *x: np.stack(x), *(stage.make_world(settings, *unit) for unit in units))
    if withheld:
        world_U.members.retires[:, withheld[0]] = withheld[1]
    place_U, seed_U = (np.array(x, np.int32) for x in zip(*((seeds.index(seed), seed) for _, seed in units)))
    return place_U, world_U, seed_U


def _unit(program: Program, place: jax.Array, world: World, seed: jax.Array, data_S: Data, start_S: Params) -> Curves:
    data, start = jax.tree.map(lambda x: x[place], (data_S, start_S))
    return learn(program, data, world, start, seed)


def _results(
    settings: Settings,
    arm: str,
    units: Sequence[tuple[str, int]],
    worlds: World,
    curves: Curves,
    seconds: float,
    withheld: tuple[int, int] | None,
) -> Iterator[Runs]:
    """The runs of an arm as the table wants them, one Runs a world."""
    tested = len(tasks.DRAWS[settings.draw])
    at_K = np.arange(0, settings.steps + 1, settings.eval_every, dtype=np.float64)
    trained_D = np.arange(tested) < tasks.TRAINED
    for regime in dict.fromkeys(name for name, _ in units):
        of = np.array([u for u, (name, _) in enumerate(units) if name == regime])
        evaluations = []
        for u in of:
            arrives_D = worlds.members.arrives[u, :tested].astype(np.float64)
            evaluations.append(Evaluations(at_K, curves.rate_KD[u].astype(np.float64), arrives_D, trained_D))
        cost = {"tokens": float(curves.tokens_K[of].sum(1).mean()), "seconds": seconds}
        harder_S = curves.harder_KD[of, -1, : tasks.TRAINED].mean(1).astype(np.float64)
        seed_S = np.array([units[u][1] for u in of])
        decays = ()
        if withheld:
            decays = tuple(decay.decay(at_K, found.rate_KD[:, withheld[0]], withheld[1]) for found in evaluations)
        yield Runs(regime, arm, seed_S, evaluations, curves.share_KD[of], cost, {"harder": harder_S}, decays)
