"""The one table from logical axes, which the model names, to mesh axes.

A mesh axis that does not divide the array's dimension is dropped for that array (the dimension is replicated), so that
three key/value heads work on any `tensor` size.
"""

import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    None: (),
}

Axes = tuple[str | None, ...]


def spec(mesh: Mesh | AbstractMesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    """PartitionSpec of an array of `shape` whose dimensions have the logical names `axes`."""
    entries, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        chosen = tuple(axis for axis in RULES[name] if axis not in used and mesh.shape[axis] > 1)
        if size % math.prod(mesh.shape[axis] for axis in chosen):
            chosen = ()
        used.update(chosen)
        entries.append(chosen or None)
    # as the compiler writes the split of an output: P("fsdp", None) is the same split, but another one to jit's cache
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, spec(mesh, axes, shape))


def tree_shardings(mesh: Mesh, axes_tree, shapes_tree):
    """NamedShardings for a tree of arrays (or ShapeDtypeStructs), given the same tree of logical axis names."""
    return jax.tree.map(
        lambda axes, leaf: sharding(mesh, axes, leaf.shape), axes_tree, shapes_tree, is_leaf=lambda x: type(x) is tuple
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation inside jit to the current mesh (jax.set_mesh); the identity where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))
