"""InfiniteGRPOTrainer: one step of the method.

    triage -> draw domains -> prompts -> rollout -> rubric grades -> GRPO update -> triage

The step takes the whole RunState and returns the next one; the trainer itself holds nothing that changes.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import AlgorithmConfig
from curriculum.triage import statistics
from infinite_jax import grpo, prompts
from infinite_jax.prompts import Prompt, Stream
from infinite_jax.rollout import Sampling, generate
from infinite_jax.score import completion_logp
from infinite_jax.types import Batch, Rollout, RunState, TrainState
from models import policy
from models.architectures import DecoderConfig
from rubric.evaluator import Grades, RubricEvaluator
from sharding.rules import sharding, tree_shardings

ROLLOUT_STREAM, EVAL_STREAM = 0, 1  # ids of the random streams: fold_in(fold_in(key(seed), step), stream)


Metrics = dict[str, float | int | None]


class Clock:
    """Wall time of the phases of a step, in seconds, under time/<phase>_s."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[f"time/{phase}_s"], self._last = now - self._last, now


def stream_key(seed: int, step: int, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stream)


class InfiniteGRPOTrainer:
    """Composes the pure parts. All arrays live in the RunState that `step` takes and returns.

    Args:
      reference: frozen parameters in the compute dtype, the KL anchor; never updated.
      curriculum: a policy of curriculum.policies (init, update, probabilities, draw).
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        decoder: DecoderConfig,
        mesh: Mesh,
        reference,
        tokenizer,
        stop_ids: tuple[int, ...],
        pad_id: int,
        names: list[str],
        stream: Stream,
        curriculum,
        grader: RubricEvaluator,
        seed: int,
    ):
        self.config, self.decoder, self.mesh, self.reference = config, decoder, mesh, reference
        self.tokenizer, self.names, self.stream, self.curriculum = tokenizer, names, stream, curriculum
        self.grader, self.seed = grader, seed
        self.sampling = Sampling(
            config.temperature,
            config.top_k,
            config.top_p,
            config.max_new_tokens,
            config.group_size,
            stop_ids,
            pad_id,
        )

        def logp_fn(params, tokens_BT, mask_BT):
            lengths = (config.max_new_tokens, config.group_size)
            return completion_logp(decoder, params, tokens_BT, mask_BT, config.temperature, *lengths)

        self._draw = jax.jit(curriculum.draw, static_argnums=1)
        self._prepare = jax.jit(functools.partial(prepare, config, logp_fn, len(names)))
        self._update = jax.jit(functools.partial(grpo.train_step, config, logp_fn), donate_argnums=0)
        self._triage = jax.jit(curriculum.update)
        self._observe = jax.jit(curriculum.metrics)

    def step(self, state: RunState) -> tuple[RunState, Metrics]:
        """One update and its metrics. `state.train` is donated: use the returned state only.

        Waits for the update before it returns, so that the times of the phases are exact; the host work that could
        overlap with it (drawing and padding the next prompts) is a few milliseconds.
        """
        step, clock = int(state.curriculum.step), Clock()
        with jax.set_mesh(self.mesh):
            draw = jax.device_get(self._draw(state.curriculum, self.config.prompts))
            chosen, cursor_D, epoch_D = self.stream.take(draw.domain_P, state.cursor_D, state.epoch_D)
            rollout = self.rollout(state.train.params, chosen, step)
            replies = self.read(rollout)
            clock.lap("rollout")
            grades = self.grade(chosen, replies)
            clock.lap("grade")
            batch, stats = self._prepare(state.train.params, self.reference, rollout, grades)
            train, metrics = self._update(state.train, batch)
            curriculum = self._triage(state.curriculum, stats)
            jax.block_until_ready(train.step)
            clock.lap("update")
            triage = self._observe(curriculum, draw.p_D)
        metrics = self._metrics(rollout, grades, draw.single, metrics, triage) | clock.seconds
        metrics["time/step_s"] = sum(clock.seconds.values())
        metrics["time/rollout_tokens_per_s"] = metrics["tokens/generated"] / clock.seconds["time/rollout_s"]
        tokens = state.tokens + metrics["tokens/generated"]
        metrics["tokens/total"] = int(tokens)
        return RunState(train, curriculum, cursor_D, epoch_D, tokens), metrics

    def rollout(self, params, chosen: list[Prompt], step: int) -> Rollout:
        """G samples of each prompt; rows p x G .. p x G + G - 1 are those of prompt p."""
        # the first step takes the largest shape, so that a run that will not fit in memory fails at once
        buckets = self.config.prompt_buckets if step else self.config.prompt_buckets[-1:]
        prompt_PT, length_P = prompts.pad(chosen, buckets, self.sampling.pad_id)
        key = stream_key(self.seed, step, ROLLOUT_STREAM)
        made = generate(
            self.decoder, self.sampling, params, place(self.mesh, prompt_PT), place(self.mesh, length_P), key
        )
        prompt_B = np.repeat(np.arange(len(chosen), dtype=np.int32), self.config.group_size)
        domain_B = np.array([chosen[p].domain for p in prompt_B], np.int32)
        return Rollout(made.tokens_BT, made.loss_mask_BT, made.logp_BT, domain_B, prompt_B, made.done_B)

    def read(self, rollout: Rollout) -> list[str]:
        return list(prompts.replies(self.tokenizer, np.asarray(rollout.tokens_BT), np.asarray(rollout.loss_mask_BT)))

    def grade(self, chosen: list[Prompt], replies: list[str]) -> Grades:
        """Grades of P x G replies, in the rollout's row order."""
        row_prompt = [chosen[b // self.config.group_size] for b in range(len(replies))]
        return self.grader.grade([p.domain for p in row_prompt], [p.row for p in row_prompt], replies)

    def _metrics(self, rollout: Rollout, grades: Grades, single, update: dict, triage: dict) -> dict:
        """Flat name -> float or None. What a domain did not show this step is None."""
        update, triage = jax.device_get((update, triage))
        mask_BT, done_B = jax.device_get((rollout.loss_mask_BT, rollout.done_B))
        tokens_B, valid_B = mask_BT.sum(1), grades.valid_B
        shown = {
            "reward/mean": mean(grades.reward_B[valid_B]),
            "reward/grade": mean(grades.grade_B[valid_B]),
            "rollout/invalid": 1.0 - float(valid_B.mean()),
            "rollout/length": float(tokens_B.mean()),
            "rollout/truncated": 1.0 - float(done_B.mean()),
            "tokens/generated": int(tokens_B.sum()),
            "curriculum/single_domain": float(single),
        }
        shown |= {name: float(value) for name, value in update.items()}
        for d, name in enumerate(self.names):
            rows = valid_B & (rollout.domain_B == d)
            shown[f"pass_rate/{name}"] = mean(grades.grade_B[rows] >= 3)
            shown |= {f"triage/{key}/{name}": value_D[d].item() for key, value_D in triage.items()}
        return shown


def mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if x.size else None


def place(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """A host array onto the mesh, rows split over the batch axes."""
    return jax.device_put(x, sharding(mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape))


def prepare(config: AlgorithmConfig, logp_fn, num_domains: int, params, reference, rollout: Rollout, grades: Grades):
    """From what was sampled and graded to what the gradient and the triage may see. Pure and jitted.

    Returns:
      (Batch, DomainStats). Rows without a valid grade have an empty mask and count in neither.
    """
    groups = (-1, config.group_size)
    scored = (rollout.tokens_BT, rollout.loss_mask_BT)
    logp_old_BT = score(config, logp_fn, params, *scored)
    logp_ref_BT = logp_old_BT if config.kl_type == "none" else score(config, logp_fn, reference, *scored)
    valid_PG = grades.valid_B.reshape(groups)
    advantage_PG = grpo.group_advantage(grades.reward_B.reshape(groups), valid_PG, config.advantage)
    learnt_B = grades.valid_B
    if config.zero_variance == "drop":
        learnt_B &= jnp.repeat(jnp.any(advantage_PG != 0, axis=1), config.group_size)
    if config.kl_type == "reward":
        # Its own centred term: inside the normalisation, a group whose replies are all right would have nothing but
        # the penalty's noise to divide, and that noise would come out as large as any advantage.
        penalty_B = grpo.kl_penalty(logp_old_BT, logp_ref_BT, rollout.loss_mask_BT, config.kl_estimator)
        advantage_PG -= config.kl_coef * grpo.group_advantage(penalty_B.reshape(groups), valid_PG, "none")
    mask_BT = rollout.loss_mask_BT & learnt_B[:, None]
    batch = Batch(
        tokens_BT=rollout.tokens_BT,
        loss_mask_BT=mask_BT,
        logp_beh_BT=rollout.logp_BT,
        logp_old_BT=logp_old_BT,
        logp_ref_BT=logp_ref_BT,
        advantage_BT=jnp.where(mask_BT, advantage_PG.reshape(-1, 1), 0.0),
        kl_coef_B=jnp.full(learnt_B.shape, config.kl_coef if config.kl_type == "loss" else 0.0, jnp.float32),
        lr_scale_B=jnp.ones(learnt_B.shape, jnp.float32),
    )
    domain_P = rollout.domain_B.reshape(groups)[:, 0]
    stats = statistics(domain_P, grades.grade_B.reshape(groups), grades.reward_B.reshape(groups), valid_PG, num_domains)
    return batch, stats


def score(config: AlgorithmConfig, logp_fn, params, tokens_BT, mask_BT) -> jax.Array:
    """logp_BT of the sampled tokens, float32, micro-batch by micro-batch."""
    parts = grpo.microbatches((tokens_BT, mask_BT), config.microbatches, config.group_size)
    logp = jax.lax.map(lambda part: logp_fn(params, *part)[0], parts)
    groups = logp.reshape(config.microbatches, -1, config.group_size, tokens_BT.shape[1])
    return jnp.swapaxes(groups, 0, 1).reshape(tokens_BT.shape)


def abstract_train_state(config: AlgorithmConfig, decoder: DecoderConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; optimizer moments are split like the parameters they belong to."""
    replicated = NamedSharding(mesh, PartitionSpec())
    tx, shapes = grpo.optimizer(config), policy.abstract_params(decoder)

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    params = jax.tree.map(placed, shapes, tree_shardings(mesh, policy.logical_axes(decoder), shapes))
    opt_state = optax.tree_map_params(
        tx,
        lambda shape, param: placed(shape, param.sharding),
        jax.eval_shape(tx.init, shapes),
        params,
        transform_non_params=lambda shape: placed(shape, replicated),
    )
    return TrainState(params, opt_state, placed(jax.ShapeDtypeStruct((), jnp.int32), replicated))


def initial_train_state(config: AlgorithmConfig, decoder: DecoderConfig, params, mesh: Mesh) -> TrainState:
    """`params` with fresh optimizer moments."""
    abstract = abstract_train_state(config, decoder, mesh)
    moments = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(grpo.optimizer(config).init, out_shardings=moments)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding))
