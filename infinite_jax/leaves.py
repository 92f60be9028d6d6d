"""The leaves of a checkpoint: stored under their path in the state ("train.params.embed"), not as a nested tree.

Restoring takes the structure, and with it every NamedTuple and optax type, from the caller's abstract state, and a leaf
that disagrees can be named. Left out: leaves that are not arrays.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding


class TreeMismatch(ValueError):
    """The checkpoint holds another state than the one asked for."""


def parts(state: Any) -> dict[str, dict[str, Any]]:
    """{part: {path: leaf}}: leaves by the first name and by the whole of their path, as in "train.params.embed"."""
    found: dict[str, dict[str, Any]] = {}
    leaves = jax.tree.leaves_with_path(state)
    for path, leaf in leaves:
        part = jax.tree_util.keystr(path[:1], simple=True)
        found.setdefault(part, {})[jax.tree_util.keystr(path, simple=True, separator=".")] = leaf
    if sum(map(len, found.values())) != len(leaves):
        raise ValueError("two leaves of the state have one path: a key of a dictionary holds a dot; rename it")
    return found


def read(step_folder: Path, abstract_state: Any) -> Any:
    """Reads a step into the structure, dtypes and shardings of `abstract_state`. Raises TreeMismatch."""
    asked_of = parts(jax.tree.map(_abstract, abstract_state))
    asked = {path: leaf for leaves in asked_of.values() for path, leaf in leaves.items()}
    stored, restored = {}, {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for part in asked_of:
            if (step_folder / part).is_dir():
                stored.update(reader.metadata(step_folder / part).item_metadata.tree)
        _check_leaves(step_folder, stored, asked)
        for part, leaves in asked_of.items():
            restored.update(reader.restore(step_folder / part, args=ocp.args.StandardRestore(leaves)))
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[path] for path in asked])


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(step_folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises TreeMismatch for the first leaf that is not the same in both: Orbax would cast a dtype in silence."""
    for path in sorted(stored.keys() | asked.keys()):
        there, here = (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" if leaf is not None else "no such leaf"
            for leaf in (stored.get(path), asked.get(path))
        )
        if there != here:
            raise TreeMismatch(
                f"{step_folder}: leaf {path} is {there} in the checkpoint and {here} in this run: "
                "use the model, optimizer and domains that the checkpoint was saved with"
            )
