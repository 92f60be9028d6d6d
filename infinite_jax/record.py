"""What a run writes about itself: metrics.jsonl (one object a step) and the same scalars for TensorBoard."""

import json
import math
import os
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class RunLog:
    """Appends rows to RUN_DIR/metrics.jsonl, those after `start`. Undefined is null, never NaN. Context manager."""

    def __init__(self, run_dir: Path, start: int):
        self.path = run_dir / "metrics.jsonl"
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tb"), purge_step=start + 1 if start else None)

    def write(self, step: int, metrics: dict[str, float | int | None]) -> None:
        row = {"step": step} | {key: _defined(value) for key, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(key, value, step)

    def sync(self) -> None:
        """Rows up to now survive a power cut; called before a checkpoint counts as saved."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class CompilationCounter:
    """Counts XLA compilations of this process, so that a run that recompiles after warm-up shows it."""

    def __init__(self):
        self._events = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, _seconds: float, **_) -> None:
        self._events += event == "/jax/core/compile/backend_compile_duration"

    def since_last(self) -> dict[str, int]:
        found, self._events = self._events, 0
        return {"time/compilations": found}


def memory() -> dict[str, int]:
    """Peak bytes of the first local device, where the backend tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"time/peak_memory_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def _defined(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def read(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def truncate_after(path: Path, step: int | None, eval_every: int) -> None:
    """Keeps rows up to `step` (None: none): those after the checkpoint that a run continues from are written again.

    The evaluation that `step` has only because the run ended there is dropped, so that the file ends up equal to that
    of a run that never stopped.
    """
    kept = [row for row in read(path) if step is not None and row["step"] <= step] if path.is_file() else []
    if kept and step % eval_every:
        kept[-1] = {key: value for key, value in kept[-1].items() if not key.startswith("eval/")}
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(scratch, path)
