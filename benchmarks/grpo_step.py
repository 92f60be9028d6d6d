"""One GRPO step out of the trainer's own programs, on random weights, for benchmarks/context.py and scaling.py.

    weights to the rollout's mesh, rollout, log-probabilities of policy and reference, update

What is left out of the trainer's step is the host's part: prompts, decoding to text, grades (here random), triage.
"""

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh

from configs import schema
from configs.schema import AlgorithmConfig
from infinite_jax import trainer
from infinite_jax.placement import initial_train_state, moved, place
from infinite_jax.rollout import Sampling, generate, sync
from infinite_jax.score import Scorer
from infinite_jax.types import Rollout, TrainState
from kernels import select
from models import policy, shapes
from models.architectures import DecoderConfig, unrolls
from rubric.evaluator import Grades
from sharding import mesh as meshes
from sharding.rules import tree_shardings

GRPO = Path(__file__).resolve().parent.parent / "configs" / "algorithm" / "grpo.yaml"
TINY = dict(vocab_size=256, embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


class Step(NamedTuple):
    """All that a step needs but its state."""

    algorithm: AlgorithmConfig
    decoder: DecoderConfig
    mesh: Mesh
    sampling_mesh: Mesh
    reference: dict


def algorithm(prompts: int, group: int, prompt: int, new: int, microbatches: int = 1) -> AlgorithmConfig:
    """configs/algorithm/grpo.yaml but for its sizes, in rows and tokens."""
    defaults = schema.build(AlgorithmConfig, yaml.safe_load(GRPO.read_text(encoding="utf-8")))
    return dataclasses.replace(
        defaults,
        prompts=prompts,
        group_size=group,
        prompt_buckets=(prompt,),
        max_new_tokens=new,
        microbatches=microbatches,
    )


def decoder(shape: str, device: jax.Device, remat: str, attention: str = "auto") -> DecoderConfig:
    """A shape of models/shapes, or "tiny", as it computes on a device."""
    found = shapes.read("shape:" + ("qwen2_5_0_5b" if shape == "tiny" else shape))
    if shape == "tiny":
        found = dataclasses.replace(found, **TINY, windows=(0,) * TINY["num_layers"], query_scale=0.25)
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    sizes = {"head_dim": found.head_dim, "dtype": dtype, "windows": any(found.windows), "packed": False}
    chosen = select.choose(attention, device.platform, device.device_kind, **sizes)
    own = {"dtype": dtype, "attention": chosen, "unrolled": unrolls(device.platform)}
    return dataclasses.replace(found, remat=remat, **own)


def mesh(devices, *, data=1, fsdp=1, seq=1, tensor=1) -> tuple[Mesh, Mesh]:
    """The mesh that trains and the one that samples, in which a device has all of the model."""
    config = meshes.MeshConfig(data, fsdp, seq, tensor, 1, 0, "none")
    trains = meshes.make_mesh(config, devices)
    return trains, meshes.make_rollout_mesh(config, trains, devices)


def begin(config: AlgorithmConfig, network: DecoderConfig, both: tuple[Mesh, Mesh]) -> tuple[Step, TrainState]:
    """Random parameters, born where they belong, with fresh moments and a copy in the compute dtype as reference."""
    trains, samples = both
    split = tree_shardings(trains, policy.logical_axes(network), policy.abstract_params(network))
    with jax.set_mesh(trains):
        params = jax.jit(lambda: policy.init(network, jax.random.key(0)), out_shardings=split)()
        reference = jax.jit(lambda x: jax.tree.map(jnp.copy, policy.cast(network, x)), out_shardings=split)(params)
        state = initial_train_state(config, network, params, trains)
    return Step(config, network, trains, samples, reference), state


def sample(step: Step, state: TrainState, number: int, clock: dict[str, float]) -> Rollout:
    """Completions of random prompts, each of max_new_tokens tokens; times under "sync" and "rollout"."""
    config = step.algorithm
    rng = np.random.default_rng(number)
    shape = config.prompts, config.prompt_buckets[0]
    prompt_PT = rng.integers(2, step.decoder.vocab_size, shape).astype(np.int32)
    sampling = Sampling(config.temperature, 0, 1.0, config.max_new_tokens, config.group_size, (-1,), 0)
    with jax.set_mesh(step.mesh):
        weights = timed(clock, "sync", lambda: sync(step.decoder, state.params, step.sampling_mesh))
    given = (place(step.sampling_mesh, x) for x in (prompt_PT, np.full(shape[0], shape[1], np.int32)))
    with jax.set_mesh(step.sampling_mesh):
        run = lambda: generate(step.decoder, sampling, weights, *given, jax.random.key(number))  # noqa: E731
        made = timed(clock, "rollout", run)
    return _rollout(step, moved(step.mesh, made))


def random_rollout(step: Step, number: int) -> Rollout:
    """Rows of random tokens in place of sampled ones, where sampling them would take long."""
    config, rows = step.algorithm, step.algorithm.prompts * step.algorithm.group_size
    width = config.prompt_buckets[0] + config.max_new_tokens
    tokens = np.random.default_rng(number).integers(2, step.decoder.vocab_size, (rows, width)).astype(np.int32)
    mask = np.broadcast_to(np.arange(width) >= config.prompt_buckets[0], (rows, width))
    logp = np.full((rows, width), -np.log(step.decoder.vocab_size), np.float32) * mask
    arrays = (tokens, mask, logp, np.ones(rows, bool))
    return _rollout(step, tuple(place(step.mesh, x) for x in arrays))


def _rollout(step: Step, made) -> Rollout:
    tokens, mask, logp, done = made
    prompt_B = np.repeat(np.arange(step.algorithm.prompts, dtype=np.int32), step.algorithm.group_size)
    return Rollout(tokens, mask, logp, np.zeros_like(prompt_B), prompt_B, done)


def learn(step: Step, state: TrainState, rollout: Rollout, number: int, clock: dict[str, float]):
    """(next state, metrics); times under "score" and "update". The state is donated."""
    rows = step.algorithm.prompts * step.algorithm.group_size
    reward = np.random.default_rng(number).random(rows).astype(np.float32)
    grades = Grades(1 + 3 * reward, reward, np.ones(rows, bool))
    scorer = Scorer(step.decoder, step.algorithm.temperature, step.algorithm.max_new_tokens, step.algorithm.group_size)
    with jax.set_mesh(step.mesh):
        domains = jnp.ones(1, jnp.float32)
        given = (
            step.algorithm,
            scorer,
            state.params,
            step.reference,
            rollout,
            grades,
            domains,
            step.algorithm.kl_coef * domains,
        )
        made = timed(clock, "score", lambda: trainer._prepare(*given))
        key = jax.random.key(number)
        return timed(clock, "update", lambda: trainer._train_step(step.algorithm, scorer, state, made, key, "none"))


def timed(clock: dict[str, float], name: str, run):
    """run(), waited for; its seconds under `name`."""
    start = time.perf_counter()
    out = jax.block_until_ready(run())
    clock[name] = time.perf_counter() - start
    return out
