"""Going back to the last good checkpoint, stopping there, and who lets a stopped run go on.

    safety.json                 the journal: what was decided, oldest first. What stands in it has happened
    review.json                 after a halt: what happened and what to do; then who approved, why and when
    metrics.attempt-N.jsonl     rows of the N-th attempt that are no longer the run's; events, transcripts and
    evaluations/attempt-N/      evaluations alike

A rollback sets parameters, optimizer, triage and the position in the data back to the last good step. The monitor's
state is not set back: it stands in the journal's entry, and from there it goes into the restored state. Its `attempt`
has counted up, and is part of the keys of rollouts, updates and draws, so that the next attempt is another one.

The journal comes first; all else follows from it and may be done again. Whoever restores, in the same process or after
a kill at any moment, compares the attempt of the newest checkpoint with that of the last entry: if the checkpoint's is
smaller, the entry has no checkpoint of its own yet, and the run goes on from the entry's step with the entry's monitor.
A kill before the entry was written costs nothing: the steps since the last checkpoint are run again, to the same end.

A halt goes back in the same way and ends the process. `resume` then refuses until `approve` has written who says so.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from curriculum import monitor, triage
from infinite_jax import atomic, changes, record, run_folder, safety
from infinite_jax.lock import RunLock
from infinite_jax.safety import APPROVAL, HALT, KIND, ROLLBACK
from infinite_jax.session import Session
from infinite_jax.types import RunState
from sharding import exchange, multihost

JOURNAL, REVIEW = "safety.json", "review.json"
KEYS = {"kind", "attempt", "at", "to", "monitor"}  # that every entry of the journal has
REMEDY = (
    "Look at the domains that have fallen (numbers, events.attempt-*.jsonl, evaluations/attempt-*). The newest "
    "checkpoint is the last good one: it can be evaluated and exported as it is. To go on from it at tier 3: "
    "python -m infinite_jax.upgrade --approve RUN_DIR --by NAME --why TEXT, then python -m infinite_jax.resume RUN_DIR"
)


def journal(run_dir: Path) -> list[dict]:
    """The entries, oldest first; none where the run never went back. Raises ValueError, one line."""
    path = run_dir / JOURNAL
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list) or not all(isinstance(entry, dict) and entry.keys() >= KEYS for entry in found):
            raise ValueError("another shape")
        return found
    except ValueError as error:
        raise ValueError(f"{path}: not the file that a run writes: restore it from a backup") from error


def write(run_dir: Path, entry: dict) -> None:
    """Appends an entry; from here on it holds. All processes call it together."""
    if multihost.is_first():
        _append(run_dir, entry)
    exchange.barrier("safety:journal")


def _append(run_dir: Path, entry: dict) -> None:
    atomic.replace(run_dir / JOURNAL, json.dumps([*journal(run_dir), entry], indent=1, allow_nan=False) + "\n")


def _last(run_dir: Path) -> dict | None:
    """The first process's last entry, on all."""
    return exchange.from_first(next(iter(journal(run_dir)[-1:]), None) if multihost.is_first() else None)


def restore(
    session: Session, run_dir: Path, abstract: RunState, changed: Sequence[dict]
) -> tuple[int, RunState, dict | None]:
    """(step, state, entry): the newest intact checkpoint; or, with the entry, where the journal's last one leads.

    The state is as it was saved: see `returned`. changed: what was added to the run, as changes.restore takes it.
    """
    checkpoints, entry, to = run_folder.checkpoints(run_dir), None, None
    if session.config.upgrade.active and (entry := _last(run_dir)) is not None:
        _, known = changes.restore(checkpoints, session, abstract._replace(train=None), changed)
        if int(known.monitor.attempt) < entry["attempt"]:
            to = max((step for step in checkpoints.steps() if step <= entry["to"]), default=entry["to"])
            to = exchange.from_first(to)
        else:
            entry = None
    return *changes.restore(checkpoints, session, abstract, changed, to), entry


def returned(session: Session, state: RunState, entry: dict | None, step: int) -> RunState:
    """`state`, restored at `step` and grown, with the monitor that the entry holds and keys of the entry's attempt."""
    if state.monitor is None:
        return state
    if entry is not None:
        watching = safety.unplain(state.monitor, entry["monitor"])
        watching = watching._replace(last_good_step=np.array(step, np.int32))  # older, where a checkpoint was damaged
        keys = triage.root_key(session.config.run.seed, entry["attempt"])
        keys = exchange.replicated(session.mesh, keys)
        state = state._replace(monitor=watching, curriculum=state.curriculum._replace(key_data=keys))
    return safety.applied(session.config, state)


def go_back(session: Session, run_dir: Path, abstract: RunState) -> tuple[int, RunState]:
    """The step and the state from which the run goes on after an entry was written; the way of a resume, too."""
    step, state, entry = restore(session, run_dir, abstract, run_folder.saved_changes(run_dir))
    state, _ = changes.grow(session, state)
    settle(run_dir, entry, step)
    return step, returned(session, state, entry, step)


def settle(run_dir: Path, entry: dict, step: int) -> None:
    """Puts away what the attempt before the entry left after `step`. To be done again after a kill; all call it."""
    run_folder.checkpoints(run_dir).retreat(step)
    if multihost.is_first():
        _put_away(run_dir, entry, step)
        if entry["kind"] == HALT:
            _ask_for_review(run_dir, entry)
    exchange.barrier("safety:settled")


def _put_away(run_dir: Path, entry: dict, step: int) -> None:
    """Moves rows and evaluations after `step`; rows that a later attempt left there before a kill are dropped."""
    suffix = f"attempt-{entry['attempt'] - 1}"
    names = [(name, run_dir / name.replace(".jsonl", f".{suffix}.jsonl")) for name in record.FILES]
    names.sort(key=lambda pair: pair[0] == record.METRICS)  # last: where it is, all the others are
    if not names[-1][1].exists():
        for path in sorted((run_dir / "evaluations").glob("*.npz")):
            if int(path.stem) > step:
                _move(path, path.parent / suffix)
        for name, target in names:
            record.replace(target, [row for row in record.read(run_dir / name) if row["step"] > step])
    event = {"step": step, "kind": KIND, "what": entry["kind"]}
    event |= {key: entry[key] for key in ("attempt", "at", "because", "by", "why", "when") if key in entry}
    for name, _ in names:
        kept = [row for row in record.read(run_dir / name) if row["step"] <= step]
        if name == record.EVENTS:
            kept = [row for row in kept if row != event] + [event]
        record.replace(run_dir / name, kept)


def _move(path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / path.name)


# ---- the human gate


def _ask_for_review(run_dir: Path, entry: dict) -> None:
    path = run_dir / REVIEW
    if path.is_file():
        before = _review(run_dir)
        if before["attempt"] == entry["attempt"]:
            return
        os.replace(path, run_dir / f"review.attempt-{before['attempt']}.json")
    asked = {key: entry[key] for key in ("attempt", "at", "to", "because", "numbers")}
    earlier = [
        {key: old[key] for key in ("kind", "attempt", "at", "to", "because", "by", "why", "when") if key in old}
        for old in journal(run_dir)
        if old["attempt"] < entry["attempt"]
    ]
    asked |= {"earlier": earlier, "remedy": REMEDY.replace("RUN_DIR", str(run_dir))}
    atomic.replace(path, json.dumps(asked, indent=1) + "\n")


def _review(run_dir: Path) -> dict:
    path = run_dir / REVIEW
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "attempt" not in found:
            raise ValueError("another shape")
        return found
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not the file that a run writes: restore it from a backup") from error


def halted(run_dir: Path) -> str | None:
    """Why the run may not be resumed, one line; None where it may. All processes call it.

    Ends what a kill may have left undone. Raises ValueError where the review is not the one that was signed.
    """
    entry = _last(run_dir)
    if entry is None:
        return None
    if entry["kind"] == HALT:
        settle(run_dir, entry, entry["to"])
        return (
            f"{run_dir} was halted at step {entry['at']}: {entry['because']}: read {run_dir / REVIEW}, then "
            f"python -m infinite_jax.upgrade --approve {run_dir} --by NAME --why TEXT"
        )
    if entry["kind"] == APPROVAL and multihost.is_first():
        review = _review(run_dir)
        signed = {key: entry[key] for key in ("by", "why", "when", "sha256")}
        if review.pop("approved", None) != signed or signed.pop("sha256") != signature(review, **signed):
            raise ValueError(f"{run_dir / REVIEW}: not what {entry['by']} signed: undo the edit")
    return None


def signature(review: dict, by: str, why: str, when: str) -> str:
    """sha256 of the review and of who approved it, why and when."""
    signed = {"review": review, "by": by, "why": why, "when": when}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def approve(run_dir: Path, by: str, why: str) -> str:
    """Signs the review of a halted run, so that `resume` goes on at tier 3. Returns what to say.

    Raises ValueError, one line, where the run is not halted, a name or reason is missing or a run holds the folder.
    """
    for option, value in (("--by", by), ("--why", why)):
        if not value.strip():
            raise ValueError(f"{option} {value!r}: may not be empty: the review says who lets the run go on, and why")
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: no config.yaml there, so this is no run directory")
    with RunLock() as lock:
        lock.take(run_dir)
        return _sign(run_dir, by.strip(), why.strip())


def _sign(run_dir: Path, by: str, why: str) -> str:
    entry = next(iter(journal(run_dir)[-1:]), None)
    if entry is None or entry["kind"] == ROLLBACK:
        raise ValueError(f"{run_dir}: the run is not halted, there is nothing to approve: continue it with resume")
    if entry["kind"] == APPROVAL:
        raise ValueError(f"{run_dir}: {entry['by']} approved it already, on {entry['when']}: continue it with resume")
    settle(run_dir, entry, entry["to"])
    review = {key: value for key, value in _review(run_dir).items() if key != "approved"}
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    signed = {"by": by, "why": why, "when": when}
    signed["sha256"] = signature(review, **signed)
    atomic.replace(run_dir / REVIEW, json.dumps(review | {"approved": signed}, indent=1) + "\n")
    watching = _approved(entry["monitor"])
    kept = {key: entry[key] for key in ("attempt", "at", "to")}
    _append(run_dir, {"kind": APPROVAL} | kept | signed | {"monitor": watching})
    return f"approved by {signed['by']}: continue it with: python -m infinite_jax.resume {run_dir}"


def _approved(values: dict) -> dict:
    state = monitor.MonitorState(**{name: np.array(value) for name, value in values.items()})
    return safety.plain(monitor.approve(state))
