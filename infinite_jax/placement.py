"""Where the loop's arrays lie: rows, the train state, the frozen reference; on devices, or in their host's memory.

Parameters, gradients and moments are split alike (ZeRO, arXiv 1910.02054). What mesh.offload names waits in pinned host
memory: a step fetches the moments and puts them back within its own program, and scoring takes the reference along for
as long as it runs. Left out: parameters on the host; moments updated there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from configs import limits
from configs.schema import AlgorithmConfig, Config
from infinite_jax import critic, grpo
from infinite_jax.types import Critic, Params, TrainState
from models import lora, policy
from models.architectures import DecoderConfig
from sharding import auto, exchange
from sharding.mesh import MeshConfig
from sharding.rules import sharding, tree_shardings

HOST, DEVICE = "pinned_host", "device"  # JAX's names of memories
OF_MOMENTS, OF_REFERENCE = ("optimizer", "both"), ("reference", "both")  # values of mesh.offload


def place(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """A host array, the same on every process, onto the mesh, rows split over the batch axes."""
    return jax.make_array_from_callback(x.shape, rows_sharding(mesh, x), lambda part: x[part])


def rows_sharding(mesh: Mesh, x) -> NamedSharding:
    return sharding(mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape)


def moved(mesh: Mesh, tree):
    """Arrays of rows from another mesh onto this one; as they are where they are on it."""
    if jax.tree.leaves(tree)[0].sharding.mesh == mesh:
        return tree
    return jax.device_put(tree, jax.tree.map(lambda x: rows_sharding(mesh, x), tree))


def abstract_train_state(
    config: AlgorithmConfig, decoder: DecoderConfig, mesh: Mesh | AbstractMesh, offload: str = "none"
) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; optimizer moments are split like the parameters they belong to.

    offload: mesh.offload; decides in which memory the moments lie.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    tx, memory = grpo.optimizer(config), HOST if offload in OF_MOMENTS else None

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def learnt(shapes, axes):
        params = jax.tree.map(placed, shapes, tree_shardings(mesh, axes, shapes))
        opt_state = optax.tree_map_params(
            tx,
            lambda shape, param: placed(shape, param.sharding.with_memory_kind(memory) if memory else param.sharding),
            jax.eval_shape(tx.init, shapes),
            params,
            transform_non_params=lambda shape: placed(shape, replicated),
        )
        return params, opt_state

    (shapes, axes), judge = trained(decoder), None
    step, kind = placed(jax.ShapeDtypeStruct((), jnp.int32), replicated), config.critic
    if kind != "none":
        judge = Critic(*learnt(critic.abstract_params(kind, decoder), critic.logical_axes(kind, decoder)))
    return TrainState(*learnt(shapes, axes), step, judge)


def trained(decoder: DecoderConfig) -> tuple[Params, Params]:
    """(shapes, logical axes) of what learns of a policy: adapters where the decoder names any, else all of it."""
    of = lora if decoder.lora else policy
    return of.abstract_params(decoder), of.logical_axes(decoder)


def initial_adapters(decoder: DecoderConfig, mesh: Mesh, key: jax.Array) -> Params:
    """Fresh adapters, born on their shardings. Consumes `key`."""
    shapes, axes = trained(decoder)
    return jax.jit(functools.partial(lora.init, decoder), out_shardings=tree_shardings(mesh, axes, shapes))(key)


def initial_train_state(
    config: AlgorithmConfig, decoder: DecoderConfig, params: Params, mesh: Mesh, offload: str = "none"
) -> TrainState:
    """`params`, what learns, with fresh optimizer moments and, where algorithm.critic names one, a fresh critic."""
    split = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(config, decoder, mesh, offload))
    start, judge = grpo.optimizer(config).init, None
    if config.critic != "none":
        make = functools.partial(critic.init, config.critic, decoder)
        judge = jax.jit(make, out_shardings=split.critic.params)(params)
        judge = Critic(judge, jax.jit(start, out_shardings=split.critic.opt_state)(judge))
    opt_state = jax.jit(start, out_shardings=split.opt_state)(params)
    return TrainState(params, opt_state, exchange.replicated(mesh, np.zeros((), np.int32)), judge)


def moments_in(memory: jax.memory.Space, offload: str, state: TrainState) -> TrainState:
    """Within a program: the moments in a memory of the devices that hold them, if mesh.offload has them wait."""
    if offload not in OF_MOMENTS:
        return state

    def put(opt_state):
        return jax.tree.map(lambda x: jax.device_put(x, memory) if x.ndim else x, opt_state)

    judge = state.critic and state.critic._replace(opt_state=put(state.critic.opt_state))
    return state._replace(opt_state=put(state.opt_state), critic=judge)


def waiting(offload: str, reference: Params | None) -> Params | None:
    """The reference, on the host if mesh.offload has it wait there."""
    if offload not in OF_REFERENCE:
        return reference
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), reference)


def fetched(tree):
    """Arrays that wait on the host, copied to their devices; others as they are."""
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(DEVICE)) if x.sharding.memory_kind == HOST else x, tree
    )


def chosen(config: Config, decoder: DecoderConfig, num_devices: int, memory: int | None) -> tuple[MeshConfig, str]:
    """config.mesh with the sizes chosen that it leaves open, and why; "" where it leaves none.

    Args:
      memory: bytes of a device, None = unknown.

    Raises ValueError, one line, where no mesh will do.
    """
    algorithm, mesh, reason = config.algorithm, config.mesh, ""
    rows = algorithm.prompts * algorithm.group_size
    if mesh.chosen:
        judge = [] if algorithm.critic == "none" else [critic.abstract_params(algorithm.critic, decoder)]
        frozen = [policy.abstract_params(decoder)] if decoder.lora else []
        learns = sum(leaf.size for leaf in jax.tree.leaves([trained(decoder)[0], *judge]))
        need = auto.Need(
            parameters=learns + sum(leaf.size for leaf in jax.tree.leaves(frozen)),
            trained=learns,
            width=decoder.embed_dim,
            layers=decoder.num_layers,
            kv_heads=decoder.num_kv_heads,
            rows=rows // (algorithm.minibatches * algorithm.microbatches),
            sampled=rows,
            longest=algorithm.prompt_buckets[-1] + algorithm.max_new_tokens,
            memory=memory,
        )
        mesh, reason = auto.choose(mesh, num_devices, need)
    limits.rollout_rows(mesh, rows, num_devices)
    return mesh, reason
