"""The trainer's own programs, compiled from shapes alone: the update of a batch, and the rollout with its decoding.

Nothing is allocated and no device is touched: arguments are ShapeDtypeStructs on the shardings that training uses. A
program that does not fit comes back with the bytes that its compiler asked for.
"""

import functools
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import AlgorithmConfig
from infinite_jax import batch
from infinite_jax.placement import abstract_train_state, rows_sharding
from infinite_jax.planning import counts
from infinite_jax.planning.counts import Counts
from infinite_jax.rollout import Sampling, generate, needs_copy
from infinite_jax.score import Scorer
from infinite_jax.trainer import _train_step
from infinite_jax.types import Batch, Rollout, TrainState, learning
from models import policy
from models.architectures import DecoderConfig
from rubric.evaluator import Grades
from sharding.rules import tree_shardings

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
STOP_ID, PAD_ID = 1, 0  # which ids they are changes no shape


class Program(NamedTuple):
    """Bytes are of one device."""

    arguments: int
    outputs: int  # those that do not reuse an argument's memory
    temporaries: int
    code: int
    counts: Counts | None  # None: the compiler refused it for its memory
    compiler_flops: float  # as the compiler counts: a loop's body once
    seconds: float  # that compiling took


def compile_update(config: AlgorithmConfig, decoder: DecoderConfig, mesh: Mesh, offload: str) -> Program:
    state = abstract_train_state(config, decoder, mesh, offload)  # outside set_mesh: optax makes a real zero
    base = abstract_base(decoder, mesh)
    scorer = Scorer(decoder, config.temperature, config.max_new_tokens, config.group_size)
    with jax.set_mesh(mesh):
        arguments = (config, scorer, state, abstract_batch(config, scorer, state, mesh, base), _key(mesh), offload)
        return _compile(lambda: _train_step.lower(*arguments, base), mesh)


def compile_rollout(config: AlgorithmConfig, decoder: DecoderConfig, mesh: Mesh, params) -> Program:
    """`params`: abstract, as the rollout is given them."""
    sampling = Sampling(
        config.temperature, config.top_k, config.top_p, config.max_new_tokens, config.group_size, (STOP_ID,), PAD_ID
    )
    prompt_PT = _rows(mesh, (config.prompts, config.prompt_buckets[-1]), jnp.int32)
    length_P = _rows(mesh, (config.prompts,), jnp.int32)
    with jax.set_mesh(mesh):
        arguments = (decoder, sampling, params, prompt_PT, length_P, _key(mesh))
        return _compile(lambda: generate.lower(*arguments), mesh)


def abstract_base(decoder: DecoderConfig, mesh: Mesh):
    """The frozen parameters that adapters change; None where all of them learn."""
    if not decoder.lora:
        return None
    shapes = jax.eval_shape(lambda params: policy.cast(decoder, params), policy.abstract_params(decoder))
    shardings = tree_shardings(mesh, policy.logical_axes(decoder), shapes)
    return jax.tree.map(lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes, shardings)


def abstract_batch(config: AlgorithmConfig, scorer: Scorer, state: TrainState, mesh: Mesh, base=None) -> Batch:
    """What batch.prepare makes of a full rollout, rows split over the mesh."""
    rows, width = config.prompts * config.group_size, config.prompt_buckets[-1] + config.max_new_tokens
    wide, one = functools.partial(_rows, mesh, (rows, width)), functools.partial(_rows, mesh, (rows,))
    rollout = Rollout(
        wide(jnp.int32), wide(jnp.bool_), wide(jnp.float32), one(jnp.int32), one(jnp.int32), one(jnp.bool_)
    )
    grades = Grades(one(jnp.float32), one(jnp.float32), one(jnp.bool_))
    domains = jax.ShapeDtypeStruct((1,), jnp.float32)

    def prepare(base, *scored):
        return batch.prepare(config, scorer.over(base), *scored)

    made = jax.eval_shape(prepare, base, learning(state), state.params, rollout, grades, domains, domains)
    return jax.tree.map(lambda leaf: _rows(mesh, leaf.shape, leaf.dtype), made)


def copied(decoder: DecoderConfig, mesh: Mesh, sampling: Mesh) -> bool:
    """Whether rollout.sync makes a copy of the parameters for the mesh that samples."""
    return decoder.lora is not None or needs_copy(decoder, policy.abstract_params(decoder), mesh, sampling)


def rollout_params(decoder: DecoderConfig, mesh: Mesh, sampling: Mesh):
    """The parameters as rollout.sync gives them: those that train, or a cast copy on the mesh that samples."""
    shapes, axes = policy.abstract_params(decoder), policy.logical_axes(decoder)
    if copied(decoder, mesh, sampling):
        axes = policy.sampled_axes(decoder)
        shapes = jax.eval_shape(lambda params: policy.sampled(decoder, params), shapes)
    shardings = tree_shardings(sampling, axes, shapes)
    return jax.tree.map(lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes, shardings)


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    array = jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh, array))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _compile(lower, mesh: Mesh) -> Program:
    began = time.monotonic()
    lowered = lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = asked_for(str(error))
        if wanted is None:
            raise
        return Program(0, 0, wanted, 0, None, 0.0, time.monotonic() - began)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        counts=counts.count(compiled.as_text(), mesh.size),
        compiler_flops=float(cost.get("flops", 0.0)),
        seconds=time.monotonic() - began,
    )


def asked_for(message: str) -> int | None:
    """Bytes that a compiler's refusal says the program would need beside its arguments; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message) or re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return int(float(found.group(1)) * UNITS[found.group(2)]) if found else None
