"""InfiniteGRPOTrainer: one step of the method.

    triage -> draw domains -> prompts -> rollout -> rubric grades -> GRPO update -> triage

The step takes the whole RunState and returns the next one; the trainer itself holds nothing that changes.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import AlgorithmConfig
from curriculum import upgrade
from curriculum.monitor import MonitorState
from curriculum.triage import DomainStats, TriageState, of_attempt
from curriculum.upgrade import UpgradeConfig
from infinite_jax import batch, conversation, grpo, prompts, resampling, rows, step_metrics
from infinite_jax.clock import Clock, CompilationCounter
from infinite_jax.conversation import Conversed, Talk
from infinite_jax.placement import abstract_train_state, fetched, moments_in, moved
from infinite_jax.prompts import PriorityStream, Prompt, Stream
from infinite_jax.rollout import Sampling, sync
from infinite_jax.rows import Round
from infinite_jax.score import Scorer
from infinite_jax.step_metrics import Metrics
from infinite_jax.types import Batch, Rollout, RunState, TrainState, learning
from models import lora
from models.architectures import DecoderConfig
from rubric.evaluator import RubricEvaluator, Scored
from sharding import exchange

# ids of the random streams: fold_in(fold_in(key(seed), step), stream)
ROLLOUT_STREAM, EVAL_STREAM, UPDATE_STREAM, ADAPTER_STREAM = range(4)


class Outcome(NamedTuple):  # what a step leaves for people to read
    metrics: Metrics
    sampled: Round  # what the update learnt from
    events: list[dict]  # changes that want attention: {kind, domain, ...}


def stream_key(seed: int, step: int, stream: int, attempt: int = 0) -> jax.Array:
    """attempt: rollbacks so far; a step tried again has keys of its own."""
    root = of_attempt(jax.random.key(seed), attempt)
    return jax.random.fold_in(jax.random.fold_in(root, step), stream)


def attempt_of(state: RunState) -> int:
    return 0 if state.monitor is None else int(state.monitor.attempt)


class InfiniteGRPOTrainer:
    """Composes the pure parts. All arrays live in the RunState that `step` takes and returns.

    Args:
      mesh, rollout_mesh, offload: sharding.mesh.MeshConfig.
      reference: frozen parameters in the compute dtype, the KL anchor; never updated.
      base: frozen parameters of which adapters learn a change, or None; then the reference is the same object.
      curriculum: a policy of curriculum.policies.
      capacity: prompts, tokens or seconds: what the curriculum counts as the cost of a prompt.
      kl_D: f32[D], factor of each domain on algorithm.kl_coef.
      upgraded: None where the run is no upgrade.
      mute_D: bool[D], domains whose grades say nothing (rows that M0 wrote, without a reward); None where all do.
      talk: None where every domain grades single replies.
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        decoder: DecoderConfig,
        mesh: Mesh,
        rollout_mesh: Mesh,
        offload: str,
        reference,
        base,
        tokenizer,
        stop_ids: tuple[int, ...],
        pad_id: int,
        names: list[str],
        stream: Stream | PriorityStream,
        curriculum,
        capacity: str,
        kl_D: np.ndarray,
        upgraded: UpgradeConfig | None,
        mute_D: np.ndarray | None,
        grader: RubricEvaluator,
        talk: Talk | None,
        seed: int,
    ):
        self.config, self.decoder, self.reference, self.base = config, decoder, reference, base
        self.mesh, self.rollout_mesh, self.offload = mesh, rollout_mesh, offload
        self.tokenizer, self.names, self.stream, self.curriculum = tokenizer, names, stream, curriculum
        self.capacity, self.grader, self.talk, self.seed = capacity, grader, talk, seed
        self.kl_coef_D, self.upgraded = np.float32(config.kl_coef) * kl_D, upgraded
        self.mute_D = mute_D
        self.talks_D = [talk is not None and talk.environments.of_domain[d] is not None for d in range(len(names))]
        self.sampling = Sampling(
            config.temperature,
            config.top_k,
            config.top_p,
            config.max_new_tokens,
            config.group_size,
            stop_ids,
            pad_id,
        )
        self.scorer = Scorer(decoder, config.temperature, config.max_new_tokens, config.group_size)
        self._compilations = CompilationCounter()
        self._draw = jax.jit(curriculum.draw, static_argnums=1)
        self._lr_scale = jax.jit(curriculum.lr_scale)
        self._triage = jax.jit(curriculum.update)
        self._observe = jax.jit(curriculum.metrics)

    def step(self, state: RunState) -> tuple[RunState, Outcome]:
        """One update and what is to be said of it. `state.train` is donated: use the returned state only.

        Waits for the update before it returns, so that the times of the phases are exact; the host work that could
        overlap with it (drawing and padding the next prompts) is a few milliseconds.
        """
        clock, _ = Clock(), self._compilations.since_last()
        with jax.set_mesh(self.mesh):
            draw = jax.device_get(self._draw(state.curriculum, self.config.prompts))
            whole = lora.join(self.decoder, self.base, state.train.params)
            policy = sync(self.decoder, whole, self.rollout_mesh)
            rounds, sampled, position = self.sample(state, policy, draw.domain_P, clock)
            del policy  # mostly a copy
            lr_scale_D, kl_coef_D = self._lr_scale(state.curriculum), self.kl_coef(state.monitor)
            reference = fetched(self.reference)
            learnt = learning(state.train._replace(params=whole))
            scored = (learnt, reference, sampled.rollout, sampled.grades, lr_scale_D, kl_coef_D)
            key = stream_key(self.seed, int(state.curriculum.step), UPDATE_STREAM, attempt_of(state))
            made = _prepare(self.config, self.scorer, *scored)
            del reference, scored, learnt, whole  # a copy, where it waits on the host
            train, update = _train_step(self.config, self.scorer, state.train, made, key, self.offload, self.base)
            jax.block_until_ready(train.step)
            clock.lap("update")
            seconds = None if self._compilations.since_last() else clock.seconds
            if self.capacity == "seconds":
                seconds = exchange.from_first(seconds)  # one clock for all: costs enter the triage state
            stats = [self.statistics(done, seconds, len(rounds)) for done in rounds]
            summed = jax.tree.map(lambda *sums: sum(sums), *stats)
            curriculum = self._triage(state.curriculum, summed, self.mute_D)
            triage = jax.device_get(self._observe(curriculum, draw.p_D)) | self.stream.metrics(position)
            if made.judged is not None:
                triage |= jax.device_get(_value_drift(len(self.names), made, sampled.rollout.domain_B))
            fallen_D = jax.device_get((state.curriculum.drift_flag, curriculum.drift_flag))
        about = (self.names, self.grader.rubrics, self.talks_D)
        metrics = step_metrics.of_step(rounds, draw.single, jax.device_get(update), triage, *about)
        metrics |= self._of_upgrade(state.curriculum, draw.p_D, kl_coef_D)
        tokens = state.tokens + metrics["tokens/generated"]
        metrics |= {"tokens/total": int(tokens), "time/step_s": sum(clock.seconds.values())} | clock.seconds
        metrics["time/rollout_tokens_per_s"] = metrics["tokens/generated"] / clock.seconds["time/rollout_s"]
        outcome = Outcome(metrics, sampled, self._events(*fallen_D, triage))
        return RunState(train, curriculum, position, tokens, state.monitor), outcome

    def kl_coef(self, watched: MonitorState | None) -> np.ndarray:
        """f32[D], weight of each domain's KL, as the monitor of an upgrade has it now."""
        if watched is None:
            return self.kl_coef_D
        return self.kl_coef_D * jax.device_get(_effects(self.upgraded, watched)).kl_scale

    def sample(self, state: RunState, params, domain_P: np.ndarray, clock: Clock) -> tuple[list[Round], Round, object]:
        """(all rounds, the groups to learn from, position in the data): prompts of the drawn domains, answered, graded.

        One round, unless the curriculum wants groups without a difference drawn again (DAPO, 2503.14476): then rounds
        follow until every group has one, or algorithm.resample_rounds have passed. All that was generated is charged.
        params: as `sync` gives them.
        """
        position, rounds, sampled = state.position, [], None
        most = self.config.resample_rounds if self.curriculum.resample else 1
        level_D = jax.device_get(state.curriculum.level)
        while len(rounds) < most and (sampled is None or not resampling.differs(sampled).all()):
            chosen, position = self.stream.take(domain_P, level_D, position)
            step, attempt = int(state.curriculum.step), attempt_of(state)
            rollout, conversed = self.rollout(params, chosen, step, len(rounds), attempt)
            replies = self.read(rollout, conversed)
            clock.lap("rollout")
            grades, scores_BK = self.grade(chosen, replies, conversed)
            position = self.stream.learn(position, chosen, grades)
            clock.lap("grade")
            said = replies if conversed is None else conversation.shown(chosen, conversed)
            rounds.append(Round(chosen, rollout, said, grades, scores_BK))
            sampled = rounds[0] if sampled is None else resampling.replace_equal(sampled, rounds[-1])
        return rounds, sampled, position

    def rollout(
        self, params, chosen: list[Prompt], step: int, number: int = 0, attempt: int = 0
    ) -> tuple[Rollout, Conversed | None]:
        """G samples of each prompt; rows p x G .. p x G + G - 1 are those of prompt p.

        params: as `sync` gives them. number: of the round. attempt: at this step.
        """
        # the first step takes the largest shape, so that a run that will not fit in memory fails at once; rounds are
        # mixed row by row, so that all have one shape
        buckets = self.config.prompt_buckets
        buckets = buckets if step and not self.curriculum.resample else buckets[-1:]
        prompt_PT, length_P = prompts.pad(chosen, buckets, self.sampling.pad_id)
        with jax.set_mesh(self.rollout_mesh):
            key = stream_key(self.seed, step, ROLLOUT_STREAM, attempt)
            key = jax.random.fold_in(key, number) if number else key
        asked = (chosen, prompt_PT, length_P, key)
        made, conversed = conversation.respond(
            self.decoder, self.sampling, params, self.rollout_mesh, self.talk, *asked
        )
        made = moved(self.mesh, made)
        prompt_B = np.repeat(np.arange(len(chosen), dtype=np.int32), self.config.group_size)
        domain_B = np.array([chosen[p].domain for p in prompt_B], np.int32)
        return Rollout(made.tokens_BT, made.loss_mask_BT, made.logp_BT, domain_B, prompt_B, made.done_B), conversed

    def read(self, rollout: Rollout, conversed: Conversed | None) -> list[str | None]:
        if conversed is not None:
            return conversation.last_turns(conversed)
        return rows.read(self.tokenizer, rollout.tokens_BT, rollout.loss_mask_BT)

    def grade(self, chosen: list[Prompt], replies: list[str | None], conversed: Conversed | None) -> Scored:
        """Grades and scores of P x G replies, in the rollout's row order; each process grades its own."""
        row_prompt = [chosen[b // self.config.group_size] for b in range(len(replies))]
        graded = {} if conversed is None else conversation.grade(self.talk.environments, row_prompt, conversed)
        return rows.whole(*rows.grade(self.grader, row_prompt, replies, graded))

    def statistics(self, done: Round, seconds: dict[str, float] | None, rounds: int) -> DomainStats:
        """Sums a domain of one of `rounds` rounds, with the cost of its prompts in the unit of capacity.

        In seconds, a round's part of rollout and update is split by the positions computed (a prompt once, its
        completions), that of grading evenly. None: the step compiled, which is no prompt's cost, so none is known.
        """
        groups = (-1, self.config.group_size)
        tokens_P = rows.generated(done.rollout.loss_mask_BT).reshape(groups).sum(1).astype(np.float32)
        cost_P = tokens_P if self.capacity == "tokens" else np.ones_like(tokens_P)
        if self.capacity == "seconds" and seconds is None:
            cost_P = np.zeros_like(tokens_P)
        elif self.capacity == "seconds":
            work_P = tokens_P + np.array([len(prompt.ids) for prompt in done.chosen], np.float32)
            computing = (seconds["time/rollout_s"] + seconds["time/update_s"]) / rounds
            cost_P = computing * work_P / work_P.sum() + seconds["time/grade_s"] / rounds / len(work_P)
        return _tally(self.config.group_size, len(self.names), done.rollout.domain_B, done.grades, cost_P)

    def _of_upgrade(self, curriculum: TriageState, p_D: np.ndarray, kl_coef_D: np.ndarray) -> Metrics:
        """What a step of an upgrade was drawn and learnt with; nothing in other runs."""
        if self.upgraded is None:
            return {}
        ramp_D, is_new_D = jax.device_get((_ramp(self.upgraded, curriculum), curriculum.is_new))
        found = {"upgrade/new_share": p_D[is_new_D].sum().item()}
        for name, ramp, coefficient in zip(self.names, ramp_D, kl_coef_D, strict=True):
            found |= {f"upgrade/ramp/{name}": ramp.item(), f"upgrade/kl_coef/{name}": coefficient.item()}
        return found

    def _events(self, before_D: np.ndarray, after_D: np.ndarray, triage: dict) -> list[dict]:
        """Drift flags that rose or fell with this step."""
        events = []
        for d in np.flatnonzero(before_D != after_D):
            kind = "drift" if after_D[d] else "drift_over"
            found = {key: triage[key][d].item() for key in ("triage/acc_ema", "drift/ref", "drift/cusum")}
            events.append({"kind": kind, "domain": self.names[d]} | found)
        return events


# Of the module, not of a trainer: a second run in this process with the same static settings compiles nothing.
_prepare = jax.jit(batch.prepare, static_argnums=(0, 1))
_effects, _ramp = (jax.jit(part, static_argnums=0) for part in (upgrade.effects, upgrade.ramp))
_tally = jax.jit(batch.tally, static_argnums=(0, 1))
_value_drift = jax.jit(batch.value_drift, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 5), donate_argnums=2)
def _train_step(
    config: AlgorithmConfig, scorer: Scorer, state: TrainState, made: Batch, key: jax.Array, offload="none", base=None
) -> tuple[TrainState, dict]:
    """The updates of a batch; the state keeps its split: another of the compiler's choice would be compiled for."""
    state = moments_in(jax.memory.Space.Device, offload, state)
    state, metrics = grpo.update(config, scorer.over(base), state, made, key)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(config, scorer.decoder, mesh))
        state = jax.lax.with_sharding_constraint(state, shardings)
    return moments_in(jax.memory.Space.Host, offload, state), metrics
