"""What the report reads of a run directory: all that is there, and nothing that has to be.

A run may be in progress, cut off, or of an earlier version: only rows in metrics.jsonl are asked for. config.yaml is
read as plain data, not against the schema, so that a run written before a key was added still has its report.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from infinite_jax import heldout, record

CALIBRATION = "calibration.json"


class Domain(NamedTuple):
    """What the configuration says of a domain; the fields that retention.from_rows reads of a DomainConfig."""

    name: str
    eval_only: bool = False
    arrives: int = 0
    retires: int | None = None


class Run(NamedTuple):
    folder: Path
    config: dict  # empty where there is no config.yaml
    rows: list[dict]  # of metrics.jsonl, at least one
    domains: list[Domain]  # in the order of the configuration, then those that only the rows know
    evaluations: dict[int, heldout.Results]  # by step, ascending
    transcripts: list[dict]
    events: list[dict]  # of events.jsonl
    calibration: dict | None = None  # what infinite_jax.calibrate wrote
    attempts: Sequence[tuple[list[dict], list[dict]]] = ()  # (rows, events) that an upgrade gave up, oldest first

    @property
    def names(self) -> list[str]:
        return [domain.name for domain in self.domains]

    @property
    def name(self) -> str:
        return self.setting("run.name") or self.folder.resolve().name

    @property
    def last(self) -> dict:
        return self.rows[-1]

    @property
    def evaluated(self) -> dict:
        """The row of the last evaluation, empty where there is none."""
        return next((row for row in reversed(self.rows) if "eval/macro" in row), {})

    def setting(self, key: str):
        """The configuration's value of a dotted key, None where it has none."""
        value = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def logs(self, prefix: str) -> list[str]:
        """The domains with a value under prefix/<domain> in any row."""
        keys = {key for row in self.rows for key, value in row.items() if value is not None}
        return [name for name in self.names if f"{prefix}/{name}" in keys]


def read(folder: Path) -> Run:
    """Raises ValueError, one line, where the folder is no run or its record is empty."""
    path = folder / record.METRICS
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run directory; give one that infinite_jax.train wrote")
    if not path.is_file():
        raise ValueError(f"{folder}: no metrics.jsonl there, so this is no run directory")
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path}: no complete row yet; try again after the run's first evaluation")
    config, last = _config(folder / "config.yaml"), rows[-1]["step"]
    return Run(
        folder,
        config,
        rows,
        _domains(config, rows),
        _evaluations(folder / "evaluations", last),
        *([row for row in _rows(folder / name) if row["step"] <= last] for name in (record.TRANSCRIPTS, record.EVENTS)),
        _calibration(folder / CALIBRATION),
        _attempts(folder),
    )


def _rows(path: Path) -> list[dict]:
    return [row for row in record.read(path) if isinstance(row, dict) and "step" in row]


def _attempts(folder: Path) -> list[tuple[list[dict], list[dict]]]:
    found = []
    while rows := _rows(folder / f"metrics.attempt-{len(found)}.jsonl"):
        found.append((rows, _rows(folder / f"events.attempt-{len(found)}.jsonl")))
    return found


def _calibration(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not the file that calibrate writes: make it again, or remove it") from error


def _config(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not the file that a run writes: restore it from a backup, or remove it") from error
    return data if isinstance(data, dict) else {}


def _domains(config: dict, rows: list[dict]) -> list[Domain]:
    known = {}
    for entry in config.get("domains") or []:
        given = {key: entry[key] for key in Domain._fields if entry.get(key) is not None}
        known[entry["name"]] = Domain(**given)
    for key in dict.fromkeys(key for row in rows for key in row):
        for prefix in ("eval/pass_rate/", "pass_rate/"):
            if key.startswith(prefix):
                known.setdefault(key.removeprefix(prefix), Domain(key.removeprefix(prefix)))
    return list(known.values())


def _evaluations(folder: Path, last: int) -> dict[int, heldout.Results]:
    """Those of steps that the record has; files of steps after it are left from before a resume."""
    files = {int(path.stem): path for path in folder.glob("*.npz") if path.stem.isdecimal()}
    return {step: heldout.load(files[step]) for step in sorted(files) if step <= last}
