"""What a run writes about itself, one JSON object a line, and the same scalars and pictures for TensorBoard.

    metrics.jsonl      a row a step
    events.jsonl       {step, kind, ...}: changes that want attention, such as a drift flag
    transcripts.jsonl  a few of the rows that some steps learnt from (transcripts.py)

A run that is continued truncates them after its checkpoint, so that they end up as those of a run that never stopped.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from infinite_jax import atomic, pictures

METRICS, EVENTS, TRANSCRIPTS = FILES = ("metrics.jsonl", "events.jsonl", "transcripts.jsonl")
OF_EVALUATION = ("eval/", "canary/", "forgetting/", "safety/")


class RunLog:
    """Appends to the files of RUN_DIR, rows after `start`. Undefined is null, never NaN. Context manager."""

    def __init__(self, run_dir: Path, names: Sequence[str], start: int):
        self.names = names
        self._files = {name: open(run_dir / name, "a", encoding="utf-8") for name in FILES}
        self._metrics = run_dir / METRICS
        rows = read(self._metrics)
        self._evaluations = [_rates(row) for row in rows if "eval/macro" in row]  # all rows would fill the memory
        self._board = SummaryWriter(str(run_dir / "tb"), purge_step=start + 1 if start else None)

    def write(self, step: int, metrics: dict[str, float | int | None], events: Sequence[dict] = ()) -> None:
        row = {"step": step} | {key: _defined(value) for key, value in metrics.items()}
        row |= forgetting(self._evaluations, row, self.names)
        if "eval/macro" in row:
            self._evaluations.append(_rates(row))
        self._append(METRICS, [row])
        self._append(EVENTS, [{"step": step} | event for event in events])
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(key, value, step)

    def transcribe(self, rows: Sequence[dict]) -> None:
        self._append(TRANSCRIPTS, rows)

    def draw(self) -> None:
        """The pictures of the report, for TensorBoard."""
        rows = read(self._metrics)
        for tag, figure in pictures.board_figures(rows, self.names).items():
            self._board.add_figure(tag, figure, rows[-1]["step"])

    def _append(self, name: str, rows: Sequence[dict]) -> None:
        self._files[name].write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        self._files[name].flush()

    def sync(self) -> None:
        """Rows up to now survive a power cut; called before a checkpoint counts as saved."""
        for file in self._files.values():
            os.fsync(file.fileno())
        self._board.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _rates(row: dict) -> dict[str, float | None]:
    """The step and the held-out pass rates of a row."""
    return {key: value for key, value in row.items() if key == "step" or key.startswith("eval/pass_rate/")}


def forgetting(before: Sequence[dict], row: dict, names: Sequence[str]) -> dict[str, float | None]:
    """forgetting/<domain> of a row with an evaluation: the highest rate of earlier ones, the start's left out, minus
    this one (Chaudhry et al. 2018, arXiv 1801.10112); None where there is none."""
    found = {}
    for name in names:
        key = f"eval/pass_rate/{name}"
        if key in row:
            rates = [old[key] for old in before if old["step"] and old.get(key) is not None]
            found[f"forgetting/{name}"] = max(rates) - row[key] if rates and row[key] is not None else None
    return found


def memory() -> dict[str, int]:
    """Peak bytes of the first local device, where the backend tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"time/peak_memory_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def _defined(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def read(path: Path) -> list[dict]:
    """Rows of such a file, none where there is no file; a last line cut short by a crash is left out."""
    rows = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def regraded(events: Sequence[dict]) -> dict[str, int]:
    """Domains whose grader was found changed, with the step of the first time."""
    found: dict[str, int] = {}
    for event in events:
        if event.get("kind") == "grader_drift":
            found.setdefault(event["domain"], event["step"])
    return found


def truncate_after(run_dir: Path, step: int | None, eval_every: int) -> None:
    """Keeps rows up to `step` (None: none): those after the checkpoint that a run continues from are written again.

    The evaluation that `step` has only because the run ended there is dropped, so that the file ends up equal to that
    of a run that never stopped.
    """
    for name in FILES:
        kept = [row for row in read(run_dir / name) if step is not None and row["step"] <= step]
        if name == METRICS and kept and step % eval_every:
            kept[-1] = {key: value for key, value in kept[-1].items() if not key.startswith(OF_EVALUATION)}
        replace(run_dir / name, kept)


def amend(run_dir: Path, step: int, names: Sequence[str], metrics: dict[str, float | int | None]) -> None:
    """Adds the metrics of an evaluation to the row of `step`."""
    rows = read(run_dir / METRICS)
    for place, row in enumerate(rows):
        if row["step"] == step:
            row |= {key: _defined(value) for key, value in metrics.items()}
            row |= forgetting(rows[:place], row, names)
    replace(run_dir / METRICS, rows)


def replace(path: Path, rows: list[dict]) -> None:
    """Such a file, whole or as it was."""
    atomic.replace(path, "".join(json.dumps(row) + "\n" for row in rows))
