"""Checkpoints of a run: asynchronous, atomic, with checksums, and with a way back when one is damaged.

    checkpoints/12/                 a step: one Orbax item a part of the state, committed by one rename
    checkpoints/12/manifest.json    score, and path, size, sha256 of every file (manifest.py); written after the commit
    checkpoints/12.damaged/         failed its manifest, and was moved aside by a save: never deleted
    checkpoints/12.superseded/      intact, but the run went back to an older step: moved aside, never deleted
    checkpoints/12.unverified/      had no manifest, and was newer than where the run went on: the last one is kept

Orbax's CheckpointManager writes, commits and retires steps. It does not notice a changed byte (the changed value is
restored in silence), so a manifest is written from a background thread once the step is committed, and checked before
anything is restored. Writing it also flushes the step's files, so a step with a manifest outlives a power cut.

A step WITHOUT a manifest was killed between its commit and its checksums, or half deleted. Nothing vouches for its
bytes, while going one step further back costs at most one checkpoint interval of recomputation with the same result:
so it is passed over, and used, with a warning, only when no verified step is left (it is then that or nothing).

Reading changes nothing on disk, so a run may be evaluated while it trains; abandoned temporary folders are removed,
and steps moved aside, by the first save.

How the leaves lie in a step: leaves.py. Left out: object stores (a step is committed by rename).
"""

import contextlib
import itertools
import logging
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from infinite_jax import manifest
from infinite_jax.leaves import TreeMismatch, parts, read
from sharding import exchange

log = logging.getLogger(__name__)
# Orbax reports progress through absl, which writes to the console; what goes wrong there is also raised.
logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.ERROR or "orbax" not in record.pathname)


class _Held:
    """An Orbax preservation policy: some steps, whatever else is kept."""

    def __init__(self):
        self.steps: tuple[int, ...] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [info.step in self.steps for info in checkpoints]


class Checkpointer:
    """The checkpoints in `folder`. All processes of a run call every method together.

    A context manager: a process that ends without close() loses the save under way. Keeps the newest `keep_last` steps
    and the `keep_best` steps of highest score. `after` is the step that a run goes on from when another Checkpointer
    restored it: newer ones on disk do not count. Raises ValueError for a `keep_last` below 1 or a `keep_best` below 0.
    """

    def __init__(self, folder: str | Path, keep_last: int, keep_best: int, after: int | None = None):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last}, keep_best={keep_best}: at least 1 last and 0 best must be kept")
        self.folder = Path(folder).absolute()
        self._keep_last, self._keep_best, self._held = keep_last, keep_best, _Held()
        self._manager: ocp.CheckpointManager | None = None  # made by the first save
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._last_saved: int | None = None
        self._restored = self.verified = after  # the first until the next save; the newest step known to be whole
        self._passed_over: set[int] = set()  # steps that restore found damaged or unverified

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self, step: int, state: Any, score: float | None, keep: Sequence[int] = ()) -> None:
        """Copies `state` and returns; writing, commit and manifest follow in the background.

        `state`: a pytree of arrays with named parts (RunState), free to be donated or changed at once. `score` ranks
        the step for `keep_best`; None (or a number that is not finite) is never best. `keep`: steps that are
        not to be deleted now, whatever their age and score. First waits for the save before,
        raises what went wrong in it, and moves aside every step on disk that is newer than the one restored or not
        older than `step`. Raises ValueError when `step` is not newer than the last one saved.
        """
        self.wait()
        if self._last_saved is not None and step <= self._last_saved:
            raise ValueError(f"step {step} is not newer than step {self._last_saved}, already saved in {self.folder}")
        score = float(score) if score is not None and math.isfinite(score) else None
        self._move_aside(step)
        self._held.steps = tuple(keep)
        if self._manager is None:
            self._manager = self._open_manager()
        items = {part: ocp.args.StandardSave(leaves) for part, leaves in parts(state).items()}
        metrics = None if score is None else {"score": score}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        self._last_saved, self._restored = step, None
        self._pending = self._background.submit(self._finish, step, score)

    def wait(self) -> None:
        """Blocks until the last save is committed and has its manifest; raises what went wrong in it, once."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except BaseException:
            self._close_manager()  # it would raise the same error again; the next save opens another
            raise
        finally:
            exchange.barrier("checkpoint:manifest")  # the first process has written it
        self.verified = self._last_saved

    def retreat(self, step: int) -> None:
        """Moves aside every step on disk that is newer than `step`, which stays."""
        self.wait()
        self._last_saved, self._restored = None, step
        self._move_aside(step + 1)

    def close(self) -> None:
        """Waits, then ends the background threads. The object is not used again."""
        try:
            self.wait()
        finally:
            self._close_manager()
            self._background.shutdown()

    def steps(self) -> list[int]:
        """Committed steps on disk, oldest first, verified or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal() and path.is_dir())

    def best_step(self) -> int | None:
        """The step of highest score (the newer of equals) according to the manifests; None where none has a score."""
        return next(iter(self._by_score()), None)

    def restore(self, abstract_state: Any, step: int | str | None = None) -> tuple[int, Any]:
        """Restores (step, state): the newest (None), a given or the 'best' step, or the next one that is intact.

        `abstract_state`: the state's pytree with jax.ShapeDtypeStruct leaves (without a sharding: on the first device)
        or arrays. The state comes back with its structure, bit for bit, on its shardings, whatever mesh and processes
        the step was saved from; numpy leaves as numpy; a part that `abstract_state` lacks is not read. A step that
        fails its manifest is passed over with one warning: to the next older one, for 'best' to the next lower score.
        Raises TreeMismatch (a ValueError) naming the leaf when leaves, shapes or dtypes differ, and
        ValueError when no step can be restored.
        """
        self.wait()
        candidates = exchange.from_first(self._candidates(step) if jax.process_index() == 0 else None)
        chosen = exchange.from_first(self._first_intact(candidates) if jax.process_index() == 0 else -1)
        nothing_intact = ValueError(
            f"{self.folder}: none of the checkpoints {', '.join(map(str, candidates))} is intact: "
            "copy one back from a backup, ask for another step, or start a new run"
        )
        if chosen < 0:
            raise nothing_intact
        verified = manifest.exists(self.folder / str(chosen))
        try:
            state = read(self.folder / str(chosen), abstract_state)
        except Exception as error:  # whatever Orbax makes of files that may be incomplete
            if verified or isinstance(error, TreeMismatch):
                raise
            raise nothing_intact from error
        passed_over = candidates[: candidates.index(chosen)] if verified else candidates
        self._passed_over = self._passed_over.union(passed_over) - {chosen}
        self._restored = self.verified = chosen
        self._last_saved = None
        return chosen, state

    def _first_intact(self, candidates: list[int]) -> int:
        """The first candidate that matches its manifest, else the first that has none, else -1. Warns of the others."""
        for n, following in zip(candidates, [*candidates[1:], None]):
            fault = manifest.fault(self.folder / str(n))
            if fault is None:
                return n
            then = "no further step to try" if following is None else f"trying step {following}"
            log.warning("checkpoint of step %d is passed over: %s; %s", n, fault, then)
        for n in candidates:
            if not manifest.exists(self.folder / str(n)):
                log.warning("restoring step %d of %s unverified: no step with a manifest is intact", n, self.folder)
                return n
        return -1

    def _candidates(self, step: int | str | None) -> list[int]:
        """Steps to try, in order. Raises ValueError when there is none."""
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.folder} holds no checkpoint: give the folder of a run that has saved one")
        if step == "best":
            candidates = self._by_score()
            if not candidates:
                raise ValueError(f"{self.folder}: no step has a score: ask for the newest or for one of {steps}")
            return candidates
        if step is not None and step not in steps:
            raise ValueError(f"{self.folder} holds no checkpoint of step {step}: choose one of {steps} or best")
        return [n for n in reversed(steps) if step is None or n <= step]

    def _by_score(self) -> list[int]:
        """Steps whose manifest has a score, best first."""
        contents = {n: manifest.read(self.folder / str(n)) for n in self.steps()}
        scores = {n: content["score"] for n, content in contents.items() if content and content["score"] is not None}
        return sorted(scores, key=lambda n: (scores[n], n), reverse=True)

    def _move_aside(self, step: int) -> None:
        """Renames what a save of `step` must neither overwrite nor count as latest: 12 -> 12.damaged."""
        newest_kept = step - 1 if self._restored is None else min(step - 1, self._restored)
        aside = exchange.from_first([n for n in self.steps() if n > newest_kept or n in self._passed_over])
        if not aside:
            return
        self._close_manager()  # it lists the steps when it is opened
        for n in aside if jax.process_index() == 0 else []:
            if not manifest.exists(self.folder / str(n)):
                suffix = "unverified"
                for older in self.folder.glob("*.unverified"):  # every kill may leave one: they would fill the disk
                    shutil.rmtree(older)
            else:
                suffix = "damaged" if manifest.fault(self.folder / str(n)) else "superseded"
            names = (f"{n}.{suffix}" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
            target = next(self.folder / name for name in names if not (self.folder / name).exists())
            os.rename(self.folder / str(n), target)
            log.warning("checkpoint of step %d moved aside to %s", n, target)
        exchange.barrier("checkpoint:moved")
        self._passed_over.clear()

    def _open_manager(self) -> ocp.CheckpointManager:
        keep_best = BestN(get_metric_fn=_score, n=self._keep_best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,  # makes Orbax store the score; what is kept is the policy's business alone
            preservation_policy=AnyPreservationPolicy([LatestN(self._keep_last), keep_best, self._held]),
            cleanup_tmp_directories=True,
        )
        try:
            return ocp.CheckpointManager(self.folder, options=options)
        except (ValueError, TypeError, KeyError):  # it reads small files of every step, and one of them is damaged
            faults = {n: manifest.fault(self.folder / str(n)) for n in self.steps()}
            if not any(faults.values()):
                raise
            self._passed_over = {n for n, fault in faults.items() if fault}
            self._move_aside(max(faults) + 1)
            return ocp.CheckpointManager(self.folder, options=options)

    def _close_manager(self) -> None:
        if self._manager is not None:
            with contextlib.suppress(Exception):  # wait() has raised it already
                self._manager.close()
        self._manager = None

    def _finish(self, step: int, score: float | None) -> None:
        """In the background: waits for the commit (Orbax then deletes what is not kept) and writes the manifest."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            manifest.write(self.folder / str(step), step=step, score=score)
            self.verified = step


def _score(metrics: Any) -> float:
    """The score that Orbax stored; the lowest of all where its file was damaged but could be read."""
    score = metrics.get("score") if isinstance(metrics, dict) else None
    return float(score) if isinstance(score, int | float) else -math.inf
