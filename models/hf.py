"""Hugging Face folders: config.json and (sharded) safetensors, read straight onto shardings and written back.

models/hf_table.py says which tensors make up which leaf; `load` and `save` walk that table leaf by leaf, so host memory
holds the parts of one leaf, never the model. Names and shapes are checked from the files' headers before any value is
read. Left out: pickled .bin weights, quantised checkpoints, other heads, vision towers: refused by name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from models import hf_table, policy
from models.architectures import FAMILIES, DecoderConfig, from_hf, to_hf
from sharding.rules import tree_shardings

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5_000_000_000  # of one file, about where transformers splits
FOLLOWS_FROM_CONFIG = re.compile(r"rotary_emb\.inv_freq$")  # tensors of older checkpoints


def load(path_or_hub_id: str, dtype=jnp.bfloat16, *, mesh: Mesh | None = None) -> tuple[DecoderConfig, dict[str, Any]]:
    """Hyper-parameters and parameters of a Hugging Face folder or hub id, computing and stored in `dtype`.

    With `mesh`, a process reads its own devices' parts only. Raises FileNotFoundError or ValueError, of one line that
    names file, tensor and remedy, where something is missing, disagrees or is not supported.
    """
    if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {jnp.dtype(dtype).name} is not supported: use float32 or bfloat16")
    folder = Path(path_or_hub_id)
    folder = folder if folder.is_dir() else snapshot(path_or_hub_id)
    config = dataclasses.replace(read_config(folder), dtype=jnp.dtype(dtype).name)
    files = _weight_files(folder)
    handles = {file: _open(file) for file in sorted(set(files.values()))}
    _check(config, folder, files, handles)
    return config, assemble(config, lambda name: handles[files[name]].get_slice(name), dtype, mesh)


def snapshot(hub_id: str) -> Path:
    """Local folder of a hub model, downloaded unless it is in the cache. Raises FileNotFoundError."""
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"model '{hub_id}' is neither a folder nor a hub model in reach ({reason}): check the name and the network"
        ) from None


def read_config(folder: Path) -> DecoderConfig:
    """Hyper-parameters in folder/config.json. Raises FileNotFoundError, or ValueError for what is not supported."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a Hugging Face model folder")
    model_type = _json(file).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{file}: model_type {model_type!r} is not supported: use one of {', '.join(FAMILIES)}")
    try:
        return from_hf(transformers.AutoConfig.from_pretrained(folder))
    except Exception as error:  # transformers' own checks raise classes that are no ValueError, over several lines
        reason = " ".join(str(error).split()).removeprefix("config.json: ")
        raise ValueError(f"{file}: {reason}") from error


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}): copy the file again") from None


def _weight_files(folder: Path) -> dict[str, Path]:
    """File of every tensor."""
    if (folder / INDEX).is_file():
        files = {name: folder / file for name, file in _json(folder / INDEX).get("weight_map", {}).items()}
    elif (folder / WEIGHTS).is_file():
        files = dict.fromkeys(_open(folder / WEIGHTS).keys(), folder / WEIGHTS)
    else:
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: save the model as safetensors")
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, but {INDEX} places {name} in it: copy the missing file")
    return files


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file ({error}): copy the file again") from None


def _check(config: DecoderConfig, folder: Path, files: dict[str, Path], handles: dict[Path, Any]) -> None:
    """Names and shapes of the whole checkpoint against config.json."""
    left = {name for name in files if not FOLLOWS_FROM_CONFIG.search(name)}
    if config.tied_embeddings:
        left.discard("lm_head.weight")
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, shape, *_ in hf_table.tensors(config):
        if name not in files or name not in held[files[name]]:
            raise ValueError(f"{files.get(name, folder)}: tensor {name} is missing: copy or save the whole model again")
        found = tuple(handles[files[name]].get_slice(name).get_shape())
        if found != shape:
            raise ValueError(
                f"{files[name]}: tensor {name} has shape {found}, but config.json makes it {shape}: correct config.json"
            )
        left.discard(name)
    if left:
        name = min(left)
        raise ValueError(
            f"{files[name]}: tensor {name} has no place in a {config.family} decoder ({len(left)} such tensors): "
            f"give a text-only checkpoint that is not quantised, of {', '.join(FAMILIES)}"
        )


def assemble(config: DecoderConfig, read: Callable[[str], Any], dtype, mesh: Mesh | None = None) -> dict[str, Any]:
    """The parameter tree, leaf by leaf, in `dtype` and, with `mesh`, on its shardings.

    read: Hugging Face name -> array in Hugging Face's layout, or anything that slicing turns into one.
    """
    shapes, dtype = policy.abstract_params(config), jnp.dtype(dtype)
    shardings = tree_shardings(mesh, policy.logical_axes(config), shapes) if mesh else None
    params: dict[str, Any] = {"layers": {}}
    for leaf in hf_table.leaves(config):
        shape = _at(shapes, leaf.path).shape
        if mesh:
            array = _place(config, leaf, read, dtype, shape, _at(shardings, leaf.path))
        else:
            array = jnp.asarray(_part(config, leaf, read, dtype, [range(size) for size in shape]))
        _at(params, leaf.path[:-1])[leaf.path[-1]] = array
    return params


def _at(tree: dict, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def _part(config: DecoderConfig, leaf: hf_table.Leaf, read, dtype, index: list[range]) -> np.ndarray:
    out = np.empty([len(places) for places in index], dtype)
    hf_table.fill(config, leaf, read, out, tuple(index))
    return out


def _place(config: DecoderConfig, leaf: hf_table.Leaf, read, dtype, shape, sharding) -> jax.Array:
    """The leaf on its sharding; devices that hold the same part share one host copy of it."""
    parts: dict[tuple[range, ...], np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = tuple(range(size)[where] for size, where in zip(shape, index, strict=True))
        if ranges not in parts:
            parts[ranges] = _part(config, leaf, read, dtype, ranges)
        return parts[ranges]

    return jax.make_array_from_callback(shape, sharding, part)


def save(config: DecoderConfig, params: dict, folder: str | Path, dtype=None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and model.safetensors, in several files above `shard_bytes`, as transformers loads them.

    Values are stored in `dtype`, by default the embedding's. Parameters may be sharded, also over processes: all call
    this, and process 0 writes. A model that lies in `folder` is replaced. Token ids (bos, eos, pad) and the tokenizer
    are not written: they are no part of the network.
    """
    folder, dtype, writer = Path(folder), jnp.dtype(dtype or params["embed"].dtype), jax.process_index() == 0
    if writer:
        _start_folder(config, folder, dtype)
    shards = _shards(config, dtype.itemsize, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [WEIGHTS]
    fetched, array = None, None  # the leaf last fetched: tensors come leaf by leaf
    for file, shard in zip(names, shards):
        values = {}
        for tensor in shard:
            if tensor.leaf != fetched:
                fetched, array = tensor.leaf, _fetch(_at(params, tensor.leaf.path))
            values[tensor.name] = hf_table.extract(config, array, tensor).astype(dtype)
        if writer:
            safetensors.numpy.save_file(values, folder / file, metadata={"format": "pt"})
    if writer and len(shards) > 1:
        places = {tensor.name: file for file, shard in zip(names, shards) for tensor in shard}
        total = sum(math.prod(tensor.shape) for shard in shards for tensor in shard) * dtype.itemsize
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))


def _start_folder(config: DecoderConfig, folder: Path, dtype: np.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / INDEX, folder / WEIGHTS, *folder.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)
    hf_config = to_hf(config)
    hf_config.dtype = dtype.name
    hf_config.save_pretrained(folder)


def _shards(config: DecoderConfig, itemsize: int, shard_bytes: int) -> list[list[hf_table.Tensor]]:
    """The checkpoint's tensors, cut where a file would outgrow `shard_bytes`."""
    shards, filled = [[]], 0
    for tensor in hf_table.tensors(config):
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _fetch(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
