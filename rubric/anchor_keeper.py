"""The anchors of a run: chosen at its start, graded again when that is due, recorded beside its checkpoints.

    keeper = Keeper.start(path, evaluator, names, config, domain_B, rows, replies)    or Keeper.resume(path, ..., step)
    if keeper.due(step, fallen): found = keeper.check(step, groups)

`found` says what the trainer is to do where a grader drifted: curriculum.rebase.rebase with its arrays, its events in
the place of the drift events of the same domains. What anchors, tests and baselines are: rubric/anchors.py.

Left out: anchors for domains that are added to a run in progress; they have none until it starts anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rubric import anchors
from rubric.anchors import Anchors, Baseline, Shift
from rubric.evaluator import RubricEvaluator
from rubric.judge import Judge


@dataclass(frozen=True)
class AnchorConfig:
    each: int  # anchors a domain; 0 = none, graders are not watched
    every: int  # steps between re-gradings
    alpha: float  # chance at most of a false alarm in one re-grading, over all graders that are not exact


class Found(NamedTuple):
    """What a re-grading found."""

    shifts: list[Shift]
    events: list[dict]  # {kind: grader_drift, domain, ...}
    drifted_D: np.ndarray  # bool; this and the next three are the arguments of curriculum.rebase.rebase
    shift_D: np.ndarray  # f32, of the pass rate
    grade_shift_D: np.ndarray  # f32, of the mean grade
    groups_D: np.ndarray  # f32, groups graded since the last re-grading

    @property
    def drifted(self) -> set[str]:
        return {event["domain"] for event in self.events}


def check(config: AnchorConfig) -> None:
    """Raises ValueError, one line, on what no run can use."""
    if config.each < 0:
        raise ValueError(f"anchors.each={config.each}: must be at least 0 (0 = graders are not watched)")
    if config.every < 1:
        raise ValueError(f"anchors.every={config.every}: must be at least 1 step")
    if not 0 < config.alpha < 1:
        raise ValueError(f"anchors.alpha={config.alpha}: must be a chance above 0 and below 1, such as 0.01")


class Keeper:
    """Owns the anchors of a run; the baseline is on disk after every change."""

    def __init__(
        self,
        path: Path,
        evaluator: RubricEvaluator,
        names: Sequence[str],
        config: AnchorConfig,
        held: Anchors,
        baseline: Baseline,
    ):
        self.path, self.evaluator, self.names, self.config = path, evaluator, list(names), config
        self.anchors, self.baseline = held, baseline
        self._renew()

    @classmethod
    def start(
        cls,
        path: Path,
        evaluator: RubricEvaluator,
        names: Sequence[str],
        config: AnchorConfig,
        domain_B: Sequence[int],
        rows: Sequence[Mapping],
        replies: Sequence[str],
    ) -> "Keeper":
        """Anchors from replies of the starting model, and from the rows' own answers where they are text: a model that
        cannot do a task yet shows one end of the scale only. Grades them twice, to see which graders are exact."""
        answered = [place for place, row in enumerate(rows) if isinstance(row.get("answer"), str)]
        domain_B = [*domain_B, *(domain_B[place] for place in answered)]
        replies = [*replies, *(rows[place]["answer"] for place in answered)]
        rows = [*rows, *(rows[place] for place in answered)]
        grades = evaluator.grade(np.asarray(domain_B), rows, replies)
        held = anchors.choose(names, domain_B, rows, replies, grades.grade_B, grades.valid_B, config.each)
        first, second = (anchors.regrade(evaluator, names, held) for _ in range(2))
        judged = [name for name, rubric in zip(names, evaluator.rubrics) if rubric is not None and rubric.judged]
        noisy = anchors.noisy(held, first, second, judged)
        versions = dict(zip(names, evaluator.versions()))
        baseline = Baseline(0, 0, versions, noisy, dict.fromkeys(names, 0), first)
        anchors.save(path, held, baseline)
        return cls(path, evaluator, names, config, held, baseline)

    @classmethod
    def resume(
        cls, path: Path, evaluator: RubricEvaluator, names: Sequence[str], config: AnchorConfig, step: int
    ) -> "Keeper":
        """The anchors as they were at `step`. Raises FileNotFoundError or ValueError, one line."""
        return cls(path, evaluator, names, config, *anchors.load(path, step))

    def due(self, step: int, fallen: Sequence[str] = ()) -> bool:
        """Whether to grade the anchors again: every so many steps, where a domain with anchors has fallen, or where a
        grader's version is another."""
        known = set(self.anchors.domains)
        return bool(known) and (step % self.config.every == 0 or bool(known & set(fallen)) or bool(self.changed()))

    def changed(self) -> list[str]:
        """Domains whose grader's version is not the recorded one; of an added domain none is recorded yet."""
        versions = zip(self.names, self.evaluator.versions())
        return [name for name, version in versions if version != self.baseline.versions.get(name, version)]

    def check(self, step: int, groups: Mapping[str, int]) -> Found:
        """Grades the anchors again after `step`; groups: of each domain graded in training so far."""
        before, versions = self.baseline, dict(zip(self.names, self.evaluator.versions()))
        after_N = anchors.regrade(self.evaluator, self.names, self.anchors)
        shifts = anchors.compare(self.anchors, before, after_N, versions, self.config.alpha)
        self.baseline = anchors.next_baseline(before, shifts, self.anchors, after_N, versions, step, groups)
        anchors.append(self.path, self.baseline)
        self._renew()
        since = [max(0, groups.get(name, 0) - before.groups.get(name, 0)) for name in self.names]
        moved = anchors.rebased(shifts, self.names)
        return Found(shifts, anchors.events(shifts), **moved, groups_D=np.array(since, np.float32))

    def _renew(self) -> None:
        """A judge found changed answers nothing from disk that its former self said."""
        if isinstance(self.evaluator.judge, Judge):
            self.evaluator.judge.era = self.baseline.era
