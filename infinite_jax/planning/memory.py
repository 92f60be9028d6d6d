"""Bytes of one device, by kind, before anything is compiled; and, after two compilations, for other batches and meshes.

    resident     parameters, optimizer, reference: exactly, from the shardings that training uses
    KV cache     exactly, from the shapes that the rollout carries
    temporaries  of the update: a x fixed + b x moving. `fixed` are gradients and gathered weights, `moving` what grows
                 with the tokens that a device computes at a time (the residuals kept for the backward pass and the
                 working set of one layer). Uncalibrated a = b = 1; two compilations that differ in the batch give both.

The split follows ZeRO's accounting (arXiv 1910.02054, section 3). Left out: fragmentation, and the bytes of a tiling's
padding, which the compiler's own numbers hold.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from configs.schema import Config
from infinite_jax import critic
from infinite_jax.placement import OF_MOMENTS, OF_REFERENCE, trained
from infinite_jax.planning.roofline import head_weights, layer_weights
from models import policy
from models.architectures import DecoderConfig
from sharding.mesh import AXES
from sharding.rules import sharding, tree_shardings

COUNTER = 4  # bytes of AdamW's count of steps


class Resident(NamedTuple):
    """Bytes of a device throughout a run, and of its share of the host's memory."""

    parameters: int
    optimizer: int
    reference: int
    host: int  # what waits there

    @property
    def device(self) -> int:
        return self.parameters + self.optimizer + self.reference


def abstract_mesh(config: Config) -> AbstractMesh:
    """The mesh that trains, of sizes alone. The sizes must be chosen."""
    return AbstractMesh(config.mesh.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_rollout_mesh(config: Config) -> AbstractMesh:
    mesh = config.mesh
    devices, tensor = mesh.rollout_devices or math.prod(mesh.sizes), mesh.rollout_tensor or mesh.tensor
    return AbstractMesh((devices // tensor, 1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resident(config: Config, decoder: DecoderConfig, mesh: Mesh | AbstractMesh) -> Resident:
    """What placement.abstract_train_state and the frozen reference take: AdamW's moments are two more parameters.

    A critic's parameters and moments count among them. Under adapters the parameters are the frozen base in the compute
    dtype, which is the reference, too, and what learns.
    """
    kind = config.algorithm.critic
    parameters = 4 * _held(mesh, *trained(decoder))
    if kind != "none":
        shapes, axes = critic.abstract_params(kind, decoder), critic.logical_axes(kind, decoder)
        parameters += 4 * _held(mesh, shapes, axes)
    base = cast_weights(decoder, mesh) if decoder.lora else 0
    reference = 0 if config.algorithm.kl_type == "none" or decoder.lora else cast_weights(decoder, mesh)
    moments, waits = 2 * parameters, config.mesh.offload
    host = moments * (waits in OF_MOMENTS) + reference * (waits in OF_REFERENCE)
    counters = COUNTER * (1 + (kind != "none"))
    own = moments * (waits not in OF_MOMENTS) + counters, reference * (waits not in OF_REFERENCE)
    return Resident(parameters + base, *own, host)


def _held(mesh: Mesh | AbstractMesh, shapes, axes) -> int:
    """Elements of a tree on one device."""
    splits = tree_shardings(mesh, axes, shapes)
    sizes = jax.tree.map(lambda leaf, split: math.prod(split.shard_shape(leaf.shape)), shapes, splits)
    return sum(jax.tree.leaves(sizes))


def cast_weights(decoder: DecoderConfig, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of the parameters in the compute dtype on one device of a mesh: of the reference, or of the rollout's."""
    return sum(elements * itemsize for elements, itemsize in _shards(decoder, mesh))


def _shards(decoder: DecoderConfig, mesh: Mesh | AbstractMesh) -> list[tuple[int, int]]:
    """Of every parameter (elements on one device, bytes of one in the compute dtype)."""
    return [
        (math.prod(sharding(mesh, axes, shape).shard_shape(shape)), itemsize)
        for axes, shape, itemsize in _parameters(decoder)
    ]


@functools.lru_cache
def _parameters(decoder: DecoderConfig) -> list[tuple[tuple, tuple[int, ...], int]]:
    """Of every parameter (logical axes, shape, bytes of an element in the compute dtype); traces the model."""
    shapes = jax.eval_shape(lambda params: policy.cast(decoder, params), policy.abstract_params(decoder))
    axes = jax.tree.leaves(policy.logical_axes(decoder), is_leaf=lambda x: type(x) is tuple)
    return [(names, leaf.shape, leaf.dtype.itemsize) for names, leaf in zip(axes, jax.tree.leaves(shapes), strict=True)]


def num_parameters(decoder: DecoderConfig) -> int:
    return sum(math.prod(shape) for _, shape, _ in _parameters(decoder))


def num_trained(decoder: DecoderConfig) -> int:
    """Of the policy's parameters those that learn: all, or adapters beside them."""
    return sum(leaf.size for leaf in jax.tree.leaves(trained(decoder)[0]))


def kv_cache(config: Config, decoder: DecoderConfig) -> int:
    """Bytes of the keys and values of prompts and completions on one device of the rollout."""
    algorithm, mesh = config.algorithm, abstract_rollout_mesh(config)
    rows = algorithm.prompts * algorithm.group_size
    total = 0
    for count, length in ((algorithm.prompts, algorithm.prompt_buckets[-1]), (rows, algorithm.max_new_tokens)):
        shape = (decoder.num_layers, count, decoder.num_kv_heads, length, decoder.head_dim)
        split = sharding(mesh, ("layers", "batch", "kv_heads", None, "head_dim"), shape)
        total += 2 * math.prod(split.shard_shape(shape)) * np.dtype(jax.numpy.dtype(decoder.dtype)).itemsize
    return total


def local_tokens(config: Config) -> float:
    """Tokens of a micro-batch that one device computes: prompts once a group, completions whole."""
    algorithm, (data, fsdp, seq, _) = config.algorithm, config.mesh.sizes
    groups = algorithm.prompts / (algorithm.minibatches * algorithm.microbatches)
    return (
        groups * (algorithm.prompt_buckets[-1] + algorithm.group_size * algorithm.max_new_tokens) / (data * fsdp * seq)
    )


def kept_widths(decoder: DecoderConfig, tensor: int) -> float:
    """Elements that one layer keeps of a token for the backward pass."""
    heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim / tensor
    if decoder.remat == "full":
        return decoder.embed_dim
    products = heads + decoder.embed_dim * 2 + 3 * decoder.mlp_dim / tensor
    return decoder.embed_dim + products * (1 if decoder.remat == "dots" else 2)


def update_temporaries(config: Config, decoder: DecoderConfig) -> tuple[float, float]:
    """(fixed, moving) bytes of the update on one device, uncalibrated.

    Gradients of the prompts' pass, of the completions' pass and the optimizer's step are a float32 tree each, one more
    is the sum over micro-batches. One layer and the head are there whole; half of a layer's widest arrays at the peak.
    """
    _, fsdp, seq, tensor = config.mesh.sizes
    itemsize = 2 if decoder.dtype == "bfloat16" else 4
    weights = layer_weights(decoder) * decoder.num_layers + head_weights(decoder) * (2 - decoder.tied_embeddings)
    weights = num_trained(decoder) if decoder.lora else weights
    trees = 3 + (config.algorithm.microbatches > 1)
    gathered = 2 * itemsize * layer_weights(decoder) / tensor + (itemsize + 4) * head_weights(decoder) / tensor
    kept = decoder.num_layers * kept_widths(decoder, tensor) * itemsize
    working = 8 * (decoder.mlp_dim + decoder.num_heads * decoder.head_dim) / tensor + 8 * decoder.embed_dim
    return trees * 4 * weights / (fsdp * seq * tensor) + gathered, local_tokens(config) * (kept + working)


def rollout_temporaries(config: Config, decoder: DecoderConfig) -> float:
    """Bytes of sampling beside keys and values on one device, uncalibrated.

    The weights, those of qkv and gate_up once more in the layout that decoding wants, and one step's logits.
    """
    mesh, algorithm, itemsize = abstract_rollout_mesh(config), config.algorithm, 2 if decoder.dtype == "bfloat16" else 4
    wide = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim + 2 * decoder.mlp_dim
    again = itemsize * decoder.num_layers * decoder.embed_dim * wide / mesh.shape["tensor"]
    rows = algorithm.prompts * algorithm.group_size / mesh.shape["data"]
    return cast_weights(decoder, mesh) + again + 12 * rows * decoder.vocab_size / mesh.shape["tensor"]


@dataclass(frozen=True)
class Calibration:
    """Factors on the estimates; 1 where nothing was compiled."""

    fixed: float = 1.0
    moving: float = 1.0
    rollout: float = 1.0  # on keys, values and what sampling needs beside them
    code: float = 0.0  # bytes of the programs
    compiled: bool = False


def calibrate(points: list[tuple[tuple[float, float], float]]) -> tuple[float, float]:
    """(a, b) of a x fixed + b x moving = bytes, from one or two ((fixed, moving), bytes).

    One point, or two that no positive factors fit, scale both parts alike.
    """
    (fixed, moving), measured = points[0]
    alike = measured / (fixed + moving)
    if len(points) == 1:
        return alike, alike
    matrix, right = np.array([point[0] for point in points]), np.array([point[1] for point in points])
    if abs(np.linalg.det(matrix)) < 1e-9 * np.prod(np.abs(matrix).sum(axis=1)):
        return alike, alike
    a, b = np.linalg.solve(matrix, right)
    return (float(a), float(b)) if a >= 0 and b >= 0 else (alike, alike)


class Total(NamedTuple):
    """Bytes of a device at the peak of each phase."""

    update: float
    rollout: float

    @property
    def peak(self) -> float:
        return max(self.update, self.rollout)


def total(config: Config, decoder: DecoderConfig, calibration: Calibration) -> Total:
    """What the model of this file predicts for a configuration whose mesh sizes are chosen."""
    stays = resident(config, decoder, abstract_mesh(config)).device + calibration.code
    while_sampling = calibration.code if config.mesh.rollout_devices else stays
    fixed, moving = update_temporaries(config, decoder)
    update = calibration.fixed * fixed + calibration.moving * moving
    sampling = calibration.rollout * (kv_cache(config, decoder) + rollout_temporaries(config, decoder))
    return Total(stays + update, while_sampling + sampling)
