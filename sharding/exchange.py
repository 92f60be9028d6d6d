"""Host values between processes: what only one of them can know, given to all. One process: nothing to exchange.

Everything here is called by all processes together, in the same order, as every collective is.
"""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

HEAD = 1024  # bytes that an exchange carries at once; longer values take a second one


class Disagreement(RuntimeError):
    """Processes that must hold the same hold something else: a bug or a broken device, no fault of the input."""


def barrier(name: str) -> None:
    """Returns when all processes have come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list:
    """Everybody's `value`, of JSON types, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    message = json.dumps(value).encode()
    framed = np.frombuffer(np.uint64(len(message)).tobytes() + message, np.uint8)
    lines = multihost_utils.process_allgather(_padded(framed[:HEAD], HEAD))
    sizes = [int(np.frombuffer(line[:8].tobytes(), np.uint64)[0]) for line in lines]
    if max(sizes) + 8 > HEAD:  # lengths are powers of two, so that few programs are compiled
        lines = multihost_utils.process_allgather(_padded(framed, 1 << (max(sizes) + 8).bit_length()))
    return [json.loads(line[8 : 8 + size].tobytes()) for line, size in zip(lines, sizes)]


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros(size - len(x), np.uint8)])


def from_first(value: Any) -> Any:
    """The first process's `value`, of JSON types; those of the others are not read."""
    return gather(value if jax.process_index() == 0 else None)[0]


def replicated(mesh: Mesh, tree: Any) -> Any:
    """Small values, the same on all processes, whole on every device of the mesh.

    By way of the host: device_put of an array of one device makes a broken one where a process has one device only (jax
    0.10.2), and compares the values between processes each time.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, everywhere, lambda part: value[part])

    return jax.tree.map(put, tree)


def whole(tree: Any) -> Any:
    """Small device arrays on every host, however they are split."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    if any(not (x.is_fully_addressable or x.is_fully_replicated) for x in leaves):
        tree = _laid_out(tree, leaves[0].sharding.mesh, PartitionSpec())
    return jax.device_get(tree)


def held(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(i64[R] numbers, [R, ...] values) of the rows of which this process holds the first replica.

    Over all processes these are all rows, each once. No host gets the whole array.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.arange(len(x)), np.asarray(x)
    x = _by_rows(x)
    parts = {part.index[0].start or 0: np.asarray(part.data) for part in x.addressable_shards if part.replica_id == 0}
    none = [np.zeros((0, *x.shape[1:]), x.dtype)]
    number_R = [first + np.arange(len(parts[first])) for first in sorted(parts)]
    return np.concatenate([np.zeros(0, int), *number_R]), np.concatenate(none + [parts[i] for i in sorted(parts)])


def mine(x: jax.Array) -> np.ndarray:
    """bool[B], the rows of an array, split along them alone, of which this process holds the first replica."""
    mine_B = np.full(len(x), x.is_fully_addressable)
    for part in () if x.is_fully_addressable else x.addressable_shards:
        mine_B[part.index[0]] |= part.replica_id == 0
    return mine_B


def near(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """Arrays [B, ...] with the rows on this process's devices, of whichever replica; zeros in the others.

    No host gets the whole arrays, and what is made of them may go back to where they lie.
    """
    if all(x.is_fully_addressable for x in arrays):
        return jax.device_get(arrays)
    found = tuple(np.zeros(x.shape, x.dtype) for x in arrays)
    for into, x in zip(found, map(_by_rows, arrays)):
        for part in {part.index[0].start: part for part in x.addressable_shards}.values():
            into[part.index] = part.data
    return found


def _by_rows(x: jax.Array) -> jax.Array:
    """The array, split along its rows alone."""
    first, *others = tuple(x.sharding.spec) or (None,)
    return _laid_out(x, x.sharding.mesh, PartitionSpec(first)) if any(others) else x


def _laid_out(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    return jax.jit(_same, out_shardings=NamedSharding(mesh, spec))(tree)


def _same(tree: Any) -> Any:
    return tree


def rows(mine_B: np.ndarray, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Arrays [B, ...] with each row from the process that has it, bit for bit.

    mine_B: bool, the rows that this process has; every row is had by one.
    """
    if jax.process_count() == 1:
        return arrays
    packed = b"".join(np.ascontiguousarray(x).tobytes() for x in (mine_B, *arrays))
    found = tuple(np.empty_like(x) for x in arrays)
    for line in multihost_utils.process_allgather(np.frombuffer(packed, np.uint8)):
        theirs_B, at = line[: len(mine_B)].astype(bool), len(mine_B)
        for into, x in zip(found, arrays):
            part = np.frombuffer(line[at : at + x.nbytes].tobytes(), x.dtype).reshape(x.shape)
            into[theirs_B], at = part[theirs_B], at + x.nbytes
    return found


def check_same(tree: Any, when: str) -> None:
    """Raises Disagreement, on every process, with a process and a leaf whose bits are not those of process 0.

    tree: of host arrays and of device arrays that every process holds whole.
    """
    if jax.process_count() == 1:
        return
    digests = {
        jax.tree_util.keystr(path, simple=True, separator="."): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    if len(set(gather(hashlib.sha256(json.dumps(digests).encode()).hexdigest()))) == 1:
        return
    everyone = gather(digests)
    for process, theirs in enumerate(everyone):
        for leaf in sorted(theirs.keys() | everyone[0].keys()):
            if theirs.get(leaf) != everyone[0].get(leaf):
                raise Disagreement(f"{when}: {leaf} of process {process} is not that of process 0")
