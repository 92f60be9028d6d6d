"""A run's folder: its name, and config.yaml with what is needed to trust a continuation."""

import contextlib
import datetime
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from configs import schema
from configs.schema import Config
from infinite_jax import atomic
from infinite_jax.checkpoint import Checkpointer
from infinite_jax.lock import FILE as LOCK
from infinite_jax.lock import RunLock
from models import source
from sharding import exchange, multihost


def choose(config: Config) -> Path:
    """run.dir (default runs/<name>-<UTC time>), on all processes the first one's choice. Leaves no folder behind yet.

    Raises ValueError, on the first process, if the folder holds anything or cannot be written.
    """
    return Path(exchange.from_first(str(_choose(config)) if multihost.is_first() else None))


def _choose(config: Config) -> Path:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(config.run.dir or f"runs/{config.run.name}-{stamp}")
    check_writable(folder, "run.dir=")
    _check_new(folder)
    return folder


def _check_new(folder: Path) -> None:
    """Raises ValueError if the folder holds anything of a run."""
    # a report of the contamination gate, or what M0 wrote, is no run: the gate halted one, or was asked before
    before = ("contamination", "rehearsal", LOCK)
    if folder.exists() and any(path.name not in before for path in folder.iterdir()):
        raise ValueError(
            f"run.dir={folder} is not empty: continue it with `python -m infinite_jax.resume {folder}` or name another"
        )


def hold(lock: RunLock, folder: Path) -> None:
    """The lock of a new run's folder, before anything is written there. All processes call it.

    Raises ValueError, on the first process, where another run holds it, or has come and gone since `choose`.
    """
    lock.take(folder)
    if multihost.is_first():
        _check_new(folder)


def check_writable(folder: Path, what: str) -> None:
    """Raises ValueError, one line, where `folder` is a file, cannot be made or takes no files; what: before its name.

    Tried out, since only the file system knows: what was made for that is removed, but for folders above `folder`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{what}{folder} is a file: name a folder")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{what}{folder} cannot be written ({error.strerror}): name another folder") from error
    finally:
        if new:
            with contextlib.suppress(OSError):  # by now it may be another run's
                folder.rmdir()


def claim(folder: Path, config: Config, data_sha256: dict[str, str]) -> None:
    """Makes the folder, with config.yaml in it. All processes see it, or ValueError says which does not."""
    if multihost.is_first():
        save_config(folder, config, data_sha256)
    exchange.barrier("claimed")
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"run.dir={folder}: process {jax.process_index()} does not see what process 0 wrote there: name a folder "
            "of a file system that all hosts share"
        )


def save_config(folder: Path, config: Config, data_sha256: dict[str, str], changes: Sequence[dict] = ()) -> None:
    """config.yaml: the resolved configuration, hashes of it, of the KL reference's weights and of each domain's data.

    `changes`: what was added and retired at which step, over the whole run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {
        "config_hash": schema.config_hash(config),
        "reference_sha256": source.content_hash(config.model.path),
        "data_sha256": data_sha256,
    }
    contents = schema.as_dict(config) | {"provenance": provenance} | ({"changes": list(changes)} if changes else {})
    atomic.replace(folder / "config.yaml", yaml.safe_dump(contents, sort_keys=False))


def load_config(folder: Path, overrides: list[str], also_free: tuple[str, ...] = ()) -> Config:
    """The run's configuration with `overrides`, of which only schema.FREE_AT_RESUME and `also_free` may differ.

    Raises ValueError, one line, when the folder is no run, a fixed key is changed, the file was edited or the
    reference weights are not those that the run began with.
    """
    path = folder / "config.yaml"
    data, provenance, _ = _read(path)
    try:
        saved = schema.build(Config, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: an earlier version wrote it: continue the run with that version") from error
    if schema.config_hash(saved) != provenance["config_hash"]:
        raise ValueError(f"{path}: edited since the run began (hash differs): undo the edit, or start another run")
    config = schema.override(saved, overrides)
    before, after = schema.flat(saved), schema.flat(config)
    free = (*schema.FREE_AT_RESUME, *also_free)
    for key in before:
        if before[key] != after[key] and not schema.covers(free, key):
            raise ValueError(f"{key}={after[key]}: the run has {before[key]}; only {', '.join(free)} may change")
    found = source.content_hash(config.model.path)
    if found != provenance["reference_sha256"]:
        raise ValueError(
            f"model.path={config.model.path}: its weights (sha256 {found[:12]}) are not those the run began with "
            f"({provenance['reference_sha256'][:12]}): put the original model back"
        )
    return config


def _read(path: Path) -> tuple[dict, dict, list[dict]]:
    """(configuration, provenance, changes)"""
    if not path.is_file():
        raise ValueError(f"{path.parent}: no config.yaml there, so this is no run directory")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return data, data.pop("provenance"), data.pop("changes", [])
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: not the file that a run writes: restore it from a backup") from error


def check_data(folder: Path, data_sha256: dict[str, str]) -> None:
    """Raises ValueError if the rows read of any domain are not those that it came to the run with."""
    saved = _read(folder / "config.yaml")[1].get("data_sha256")
    if not isinstance(saved, dict):
        raise ValueError(
            f"{folder}/config.yaml: one data_sha256 for all domains, as an earlier version wrote it: continue the run "
            "with that version, or start another run"
        )
    for name, digest in saved.items():
        if data_sha256.get(name) != digest:
            raise ValueError(
                f"{folder}: the data of domain {name} has changed since the run began: put the files back, or start "
                "another run"
            )


def saved_changes(folder: Path) -> list[dict]:
    """What was added and retired so far: {step, add, retire}, oldest first."""
    return _read(folder / "config.yaml")[2]


def saved_eval_every(folder: Path) -> int:
    return _read(folder / "config.yaml")[0]["run"]["eval_every"]


def take_step(overrides: list[str]) -> tuple[int | str | None, list[str]]:
    """Splits step=best or step=N off a verb's arguments; None = the newest. Raises ValueError on another value."""
    steps = [item.removeprefix("step=") for item in overrides if item.startswith("step=")]
    rest = [item for item in overrides if not item.startswith("step=")]
    if not steps or steps[-1] == "best":
        return (steps[-1] if steps else None), rest
    if not steps[-1].isdecimal():
        raise ValueError(f"step={steps[-1]}: expected best or a step number")
    return int(steps[-1]), rest


def checkpoints(folder: Path) -> Checkpointer:
    """The run's checkpoints, for reading."""
    return Checkpointer(folder / "checkpoints", keep_last=1, keep_best=0)


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of `state`, which may then be freed; numpy leaves stay as they are."""

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(shape, state)
