"""Embedding lookup in a table split over devices: no device ever has all of it.

The table is [V, E], V over `tensor`, E over fsdp and seq. A device looks up its slice of E for the tokens of all its
fsdp and seq neighbours, whose ids it gathers; an all-to-all then hands every device the whole vectors of its own
tokens. So what moves is as large as the activations, in their dtype, whatever the size of the vocabulary; backward,
each device adds up, in the table's dtype, the gradient of its own part.
"""

import functools

import jax
import jax.numpy as jnp

from sharding import rules


def lookup(table_VE: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """table_VE[tokens] in `dtype` for tokens [B, T] or [N], split like activations."""
    mesh = rules.current()
    if mesh is None:
        return table_VE[tokens].astype(dtype)
    grid = tokens if tokens.ndim == 2 else tokens[:, None]
    spec = functools.partial(rules.spec, mesh)
    table_spec, grid_spec = spec(("vocab", "embed"), table_VE.shape), spec(("batch", "length"), grid.shape)
    out_spec = spec(("batch", "length", None), (*grid.shape, table_VE.shape[1]))
    local = functools.partial(_local, dtype, _axes(table_spec), _axes(grid_spec))
    mapped = jax.shard_map(local, in_specs=(table_spec, grid_spec), out_specs=out_spec, check_vma=False)
    found = mapped(table_VE, grid)
    return found if tokens.ndim == 2 else found[:, 0]


def _axes(spec) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each of two dimensions."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(map(tuple, [*entries, (), ()][:2]))


def _local(dtype, table_axes, token_axes, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """One device's part, in jax.shard_map: table [V', E'], tokens [B', T'] -> [B', T', E]."""
    (vocab, embed), dimension = table_axes, {axis: d for d, axes in enumerate(token_axes) for axis in axes}
    for axis in reversed(embed):
        if axis in dimension:
            tokens = jax.lax.all_gather(tokens, axis, axis=dimension[axis], tiled=True)
    if vocab:
        tokens -= len(table) * jax.lax.axis_index(vocab)
        here = (tokens >= 0) & (tokens < len(table))
        found = table[jnp.clip(tokens, 0, len(table) - 1)].astype(dtype)
        found = jax.lax.psum(jnp.where(here[..., None], found, 0), vocab)  # one term is not 0: exact in any dtype
    else:
        found = table[tokens].astype(dtype)
    for axis in reversed(embed):
        if axis in dimension:
            found = jax.lax.all_to_all(found, axis, dimension[axis], 2, tiled=True)
        else:
            found = jax.lax.all_gather(found, axis, axis=2, tiled=True)
    return found
