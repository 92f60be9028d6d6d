"""Graders watched over a run: anchors chosen at its start, graded again when due, and what follows where one changed.

The first process holds and grades the anchors (rubric/anchor_keeper.py), beside the checkpoints in anchors.jsonl; what
it finds, all take alike. Where a grader drifted, the scheduler's averages of its domain move to the new scale
(curriculum/rebase.py), the step's drift event of the domain gives way to one of kind grader_drift, and the step's row
shows the moved averages. Baselines of steps after the checkpoint that a run continues from are dropped and found again.

A run that is continued grades its anchors after its first step: graders are read anew there. A grader that is exact, or
whose version is another, then changed before that step, so all of the domain's groups of the step, n, are on the new
scale and (1 - beta)^n of the averages on the old; rebase takes a change to lie midway, hence 2 n there.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from configs.schema import Config
from curriculum.rebase import rebase
from infinite_jax import safety
from infinite_jax.heldout import Results
from infinite_jax.session import Session
from infinite_jax.trainer import Outcome
from infinite_jax.types import RunState
from rubric import anchors
from rubric.anchor_keeper import Keeper
from rubric.evaluator import RubricEvaluator
from rubric.judge import Judge
from sharding import exchange, multihost

FILE = "anchors.jsonl"
MOVED = {  # what a row says of an average that moves
    "triage/acc_ema": "acc_ema",
    "triage/band": "performance_band",
    "drift/ref": "ref_mean",
    "drift/cusum": "cusum",
    "drift/flag": "drift_flag",
}


class GraderWatch:
    """`after` each step; all processes call everything together. anchors.each=0: nothing is watched."""

    def __init__(self, session: Session, keeper: Keeper | None, continued: bool):
        self.session, self._keeper, self._unread = session, keeper, continued

    @classmethod
    def start(cls, session: Session, run_dir: Path, results: Results) -> "GraderWatch":
        """Anchors from the evaluation of the starting model."""
        config, keeper = session.config.anchors, None
        if config.each:
            domain_B = [d for d, name in enumerate(session.names) for _ in results[name].rows]
            rows = [row for name in session.names for row in results[name].rows]
            told = exchange.gather([reply for name in session.names for reply in results[name].replies])
            replies = [next(reply for reply in each if reply is not None) for each in zip(*told)]
            if multihost.is_first():
                with _uncounted(session.grader):
                    keeper = Keeper.start(
                        run_dir / FILE, session.grader, session.names, config, domain_B, rows, replies
                    )
        return cls(session, keeper, False)

    @classmethod
    def resume(cls, session: Session, run_dir: Path, step: int) -> "GraderWatch":
        """The anchors as they were after `step`."""
        config, keeper = session.config.anchors, None
        if config.each:
            if multihost.is_first():
                keeper = Keeper.resume(run_dir / FILE, session.grader, session.names, config, step)
                for name in keeper.changed():
                    tells = "the first step tells whether fixed replies are graded otherwise now"
                    if name not in keeper.anchors.domains:
                        tells = "no fixed replies of it are kept, so nothing tells whether its grades moved"
                    say(f"the grader of domain {name} has another version than the run had up to step {step}: {tells}")
            _set_era(session.grader, exchange.from_first(keeper.baseline.era if keeper else None))
        return cls(session, keeper, True)

    def after(self, step: int, before: RunState, state: RunState, outcome: Outcome) -> tuple[RunState, Outcome]:
        """State and outcome of the step, those of graders that have changed corrected. `before`: with it began."""
        if not self.session.config.anchors.each:
            return state, outcome
        found = exchange.from_first(self._check(step, before, state, outcome) if self._keeper else None)
        self._unread = False
        if found is None:
            return state, outcome
        _set_era(self.session.grader, found["era"])
        if multihost.is_first():
            for event in found["events"]:
                say(
                    f"step {step}: the grader of domain {event['domain']} changed: the same {event['n']} replies moved "
                    f"by {event['pass_shift']:+.3f} in pass rate, {event['grade_shift']:+.3f} in grade; curves across "
                    "this step show that too"
                )
        drifted_D = np.array(found["drifted"])
        shift_D, grade_shift_D, groups_D = (np.array(found[key], np.float32) for key in ("pass", "grade", "groups"))
        with jax.set_mesh(self.session.mesh):
            moved = _rebase(
                self.session.config.curriculum, state.curriculum, drifted_D, shift_D, grade_shift_D, groups_D
            )
        moved = jax.device_put(moved, NamedSharding(self.session.mesh, PartitionSpec()))
        shown = jax.device_get({key: getattr(moved, leaf) for key, leaf in MOVED.items()})
        names = [name for name, drifted in zip(self.session.names, drifted_D) if drifted]
        metrics = outcome.metrics | {
            f"{key}/{name}": value_D[d].item() + 0
            for d, name in enumerate(self.session.names)
            if drifted_D[d]
            for key, value_D in shown.items()
        }
        events = [event for event in outcome.events if event["kind"] != "drift" or event["domain"] not in names]
        return state._replace(curriculum=moved), outcome._replace(metrics=metrics, events=[*events, *found["events"]])

    def _check(self, step: int, before: RunState, state: RunState, outcome: Outcome) -> dict | None:
        """What drifted, in JSON types; None where nothing did, or nothing was due."""
        fallen = [event["domain"] for event in outcome.events if event["kind"] == "drift"]
        if not (self._unread or self._keeper.due(step, fallen)):
            return None
        earlier_D, now_D = jax.device_get((before.curriculum.n_prompts, state.curriculum.n_prompts))
        noisy = self._keeper.baseline.noisy
        with _uncounted(self.session.grader):
            found = self._keeper.check(step, dict(zip(self.session.names, now_D.tolist())))
        if not found.events:
            return None
        groups_D = found.groups_D
        for d, name in enumerate(self.session.names):
            shift = next((shift for shift in found.shifts if shift.domain == name), None)
            if shift and (shift.version_changed or (self._unread and name not in noisy)):
                groups_D[d] = 2 * (now_D[d] - earlier_D[d])
        return {
            "events": found.events,
            "era": self._keeper.baseline.era,
            "drifted": found.drifted_D.tolist(),
            "pass": found.shift_D.tolist(),
            "grade": found.grade_shift_D.tolist(),
            "groups": groups_D.tolist(),
        }


def say(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def check_saved(config: Config, run_dir: Path, step: int | None) -> None:
    """Raises FileNotFoundError or ValueError, one line, where there are no anchors to continue with after `step`."""
    if config.anchors.each and step is not None:
        anchors.load(run_dir / FILE, step)


def check_measured(session: Session, run_dir: Path) -> None:
    """Of an upgrade that goes on: M0's grades still mean what they did. To be called on the first process.

    Raises ValueError, one line, where the grader of a prior domain has another version and grades the anchors otherwise
    than when M0 was measured: the monitor would take that for a drop, or miss one. A version alone may be a remark in a
    file. Without anchors, or where nobody acts on the monitor, nothing is asked.
    """
    config = session.config
    if not (config.anchors.each and safety.acts(config)):
        return
    held, first = anchors.first(run_dir / FILE)
    versions = dict(zip(session.names, session.grader.versions()))
    prior = {domain.name for domain in config.domains if not domain.new}
    other = {name for name in prior if versions[name] != first.versions.get(name)}
    if not other:
        return
    held, first = anchors.of_domains(held, first, other)
    with _uncounted(session.grader):
        after_N = anchors.regrade(session.grader, session.names, held)
    for shift in anchors.compare(held, first, after_N, versions, config.anchors.alpha):
        if shift.drifted or not shift.n:
            moved = f"gives {shift.changed} of {shift.n} anchors another grade" if shift.n else "can grade no anchor"
            raise ValueError(
                f"{run_dir}: domain {shift.domain}: its grader is another than M0 was measured with, and {moved}, "
                "which would pass for a drop or hide one: put the old grader back, or begin a new upgrade with this one"
            )


@contextlib.contextmanager
def _uncounted(grader: RubricEvaluator) -> Iterator[None]:
    """What the grader cannot grade within is no reply of a training batch, and no cause for a warning."""
    before = Counter(grader.failures)
    try:
        yield
    finally:
        grader.failures.clear()
        grader.failures.update(before)


def _set_era(grader: RubricEvaluator, era: int) -> None:
    """Every process's judge forgets what its former self said."""
    if isinstance(grader.judge, Judge):
        grader.judge.era = era


_rebase = jax.jit(rebase, static_argnums=0)
