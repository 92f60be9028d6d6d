"""The one table from logical axes, which the model names, to mesh axes.

Where the sizes of several mesh axes do not divide the array's dimension, the last ones are dropped for that array until
they do (the dimension is then replicated over them): so three key/value heads work on any `tensor` size.
"""

import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("seq",),
    "layers": (),
    "embed": ("fsdp", "seq"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "rank": (),
    None: (),
}

Axes = tuple[str | None, ...]


def spec(mesh: Mesh | AbstractMesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    """PartitionSpec of an array of `shape` whose dimensions have the logical names `axes`.

    Within jax.shard_map `shape` is that of a device's part, and the axes that it splits by hand are left out.
    """
    entries, used = [], set(getattr(mesh, "manual_axes", ()))
    for name, size in zip(axes, shape, strict=True):
        chosen = tuple(axis for axis in RULES[name] if axis not in used and mesh.shape[axis] > 1)
        while size % math.prod(mesh.shape[axis] for axis in chosen):
            chosen = chosen[:-1]
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


def current() -> AbstractMesh | None:
    """The mesh of jax.set_mesh, inside jit or out of it; None where there is none, or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shards(axis: str) -> int:
    """Size of an axis of the current mesh; 1 where there is none."""
    mesh = current()
    return mesh.shape[axis] if mesh else 1


def split(axes: Axes, shape: tuple[int, ...]) -> int:
    """Over how many parts of the current mesh an array is split."""
    mesh = current()
    if mesh is None:
        return 1
    return math.prod(shape) // math.prod(NamedSharding(mesh, spec(mesh, axes, shape)).shard_shape(shape))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation inside jit to the current mesh (jax.set_mesh); the identity where there is none."""
    mesh = current()
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape)) if mesh else x


def gathered(x: jax.Array, dtype, *axes: str | None) -> jax.Array:
    """A parameter as its use wants it: cast, then whole along `embed`, split along the others.

    Cast first, so that fewer bytes move. The gradient takes the way back: scattered over the parts of the parameter,
    where a constraint of its own would have it whole on every device first, and cast there.
    """
    mesh = current()
    if mesh is None:
        return x.astype(dtype)
    whole = tuple(None if name == "embed" else name for name in axes)

    @jax.custom_vjp
    def gather(x):
        return constrain(constrain(x, *axes).astype(dtype), *whole)

    gather.defvjp(lambda x: (gather(x), None), lambda _, ct: (constrain(ct, *axes).astype(x.dtype),))
    return gather(x)
