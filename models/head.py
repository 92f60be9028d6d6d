"""From hidden states to logits and to log-probabilities of given tokens, over the embedding or a head of its own.

    logits = softcap(hidden . W^T)      W is [V, E]: V over `tensor`, E over fsdp and seq

`token_logp` has all its chunks of tokens within one jax.shard_map over all axes but `tensor`: a device gathers W once
and adds up its own gradient of W, and one reduce-scatter ends it. Left to the compiler, each chunk's gradient is summed
over all devices, whole: ten chunks, ten times the table.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels import logprob
from models.architectures import DecoderConfig
from sharding import rules


def unembed(config: DecoderConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [N, E], [B, T, E] or [B, shards of T, tokens, E].

    Of `params` only the table is read: `embed` if embeddings are tied, else `head`.
    """
    hidden = hidden.astype(config.dtype)
    equation = "...E,VE->...V" if config.tied_embeddings else "...E,EV->...V"
    weight = params[_table(config)[0]].astype(config.dtype)
    logits = jnp.einsum(equation, hidden, weight, preferred_element_type=jnp.float32)
    logits = rules.constrain(logits, *("batch", "length", None)[: logits.ndim - 1], "vocab")
    return config.final_softcap * jnp.tanh(logits / config.final_softcap) if config.final_softcap else logits


def _table(config: DecoderConfig) -> tuple[str, tuple[str, str]]:
    """The one parameter that `unembed` reads, and its axes."""
    return ("embed", ("vocab", "embed")) if config.tied_embeddings else ("head", ("embed", "vocab"))


def token_logp(
    config: DecoderConfig, params: dict, hidden_BTE: jax.Array, token_BT: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """(logp_BT, entropy_BT) of kernels/logprob.py, float32, from hidden states and tokens split like activations."""
    name, axes = _table(config)
    mesh, shape = rules.current(), params[name].shape
    most = logprob.MAX_LOGITS * rules.split(("vocab",), (config.vocab_size,))

    def local(table, hidden_BTE, token_BT):
        unembedded = functools.partial(unembed, config, {name: _whole(table, axes, spread)})
        return logprob.token_logp(unembedded, hidden_BTE, token_BT, temperature, most)

    rows = () if mesh is None else rules.spec(mesh, ("batch", "length"), token_BT.shape)
    manual = {axis for entry in rows for axis in _axes(entry)}
    if not any(mesh.shape[axis] > 1 for axis in manual):
        spread = ()
        return local(params[name], hidden_BTE, token_BT)
    manual |= {axis for axis in mesh.shape if mesh.shape[axis] == 1}
    embed = axes.index("embed")
    spread = tuple(axis for axis in _entry(rules.spec(mesh, axes, shape), embed) if axis in manual)
    table_spec = PartitionSpec(*(spread if i == embed and spread else None for i in range(2)))
    mapped = jax.shard_map(
        local, in_specs=(table_spec, rows, rows), out_specs=(rows, rows), axis_names=manual, check_vma=False
    )
    return mapped(params[name], hidden_BTE, token_BT)


def _axes(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _entry(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    return _axes(spec[dimension]) if dimension < len(spec) else ()


def _whole(table: jax.Array, axes: tuple[str, str], spread: tuple[str, ...]) -> jax.Array:
    """A device's part of the table, gathered along `embed`, in the dtype it is stored in, in which gradients add up.

    By way of a dimension of its own, [V, parts, E']: a TPU's compiler makes an all-reduce of twice the bytes of a
    reduce-scatter along tiles.
    """
    if not spread:
        return table
    embed = axes.index("embed")
    parts = jax.lax.all_gather(table, spread, axis=embed)
    shape = [size * (math.prod(parts.shape) // table.size if i == embed else 1) for i, size in enumerate(table.shape)]
    return parts.reshape(shape)
