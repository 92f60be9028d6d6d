"""Grader drift told from policy drift: fixed replies, graded again from time to time.

A judge that is updated behind its name changes the grades of replies that did not change. So a run keeps anchors, some
rows of each domain with the replies of its starting model, and their grades. They are graded anew every so many steps,
when a grader's version (rubric/versions.py) differs from the recorded one, and when a domain's pass rate has fallen.

A grader that gave the same grades twice at the start is exact: any reply graded otherwise is drift. Of any other, the
changes d_i of N replies are noise if their signs are: under that hypothesis all 2^N signs of (d_1, ..., d_N) are
equally likely, whatever the sizes, and

    p = P(|sum of s_i |d_i|| >= |sum of d_i|),     s_i = -1 or 1

is computed exactly (Fisher's randomisation test for pairs). Drift is p <= alpha / K, with K such graders: the chance of
a false alarm in one re-grading is at most alpha over all domains together. Fewer than 1 + log2(K / alpha) changed
replies can never reach that, so a judged domain wants some dozens of anchors.

What follows a drift is the caller's: curriculum/rebase.py for what the scheduler knows, a new `era` of the judge for
its cache, and the new grades as the next baseline.
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rubric.evaluator import PASS_GRADE, RubricEvaluator

UNIT = 1e-3  # of a grade: differences are counted in it


class Anchors(NamedTuple):
    """What stays the same for the whole run; N anchors."""

    domains: tuple[str, ...]
    rows: tuple[dict, ...]
    replies: tuple[str, ...]


class Baseline(NamedTuple):
    """What the anchors were graded at a step, and by whom."""

    step: int
    era: int  # of the judge's cache
    versions: dict[str, str]  # by domain
    noisy: tuple[str, ...]  # domains whose grader is not exact
    groups: dict[str, int]  # groups of each domain graded in training so far
    grade_N: np.ndarray  # f64, NaN where invalid


class Shift(NamedTuple):
    """How a domain's anchors were graded this time."""

    domain: str
    n: int  # anchors graded both times
    changed: int  # of them with another grade
    grade_shift: float  # mean change of the grade; 0 with no anchor
    pass_shift: float  # mean change of pass (1) or fail (0)
    p: float  # of the test above; 0 or 1 for an exact grader
    drifted: bool
    version_changed: bool


def choose(
    names: Sequence[str],
    domain_B: Sequence[int],
    rows: Sequence[Mapping],
    replies: Sequence[str],
    grade_B: np.ndarray,
    valid_B: np.ndarray,
    each: int,
) -> Anchors:
    """Up to `each` valid rows a domain, the grades taken in turn, so that a shift anywhere on the scale can show."""
    chosen: list[int] = []
    for domain in range(len(names)):
        by_grade: dict[int, list[int]] = {}
        seen = set()
        for place in np.flatnonzero((np.asarray(domain_B) == domain) & valid_B).tolist():
            what = (json.dumps(rows[place], sort_keys=True, default=str), replies[place])
            if what not in seen:
                seen.add(what)
                by_grade.setdefault(round(float(grade_B[place])), []).append(place)
        queues = [by_grade[grade] for grade in sorted(by_grade)]
        turns = [queue[turn] for turn in range(each) for queue in queues if turn < len(queue)]
        chosen += turns[:each]
    return Anchors(
        tuple(names[int(domain_B[place])] for place in chosen),
        tuple(dict(rows[place]) for place in chosen),
        tuple(replies[place] for place in chosen),
    )


def regrade(evaluator: RubricEvaluator, names: Sequence[str], anchors: Anchors) -> np.ndarray:
    """f64[N], NaN where invalid. A judge is asked anew, whatever is kept on disk."""
    number = {name: domain for domain, name in enumerate(names)}
    domain_N = np.array([number[name] for name in anchors.domains], np.int32)
    grades = evaluator.score(domain_N, anchors.rows, anchors.replies, fresh=True).grades
    return np.where(grades.valid_B, grades.grade_B, np.nan).astype(np.float64)


def of_domains(anchors: Anchors, baseline: Baseline, names: Set[str]) -> tuple[Anchors, Baseline]:
    """Those of some domains alone."""
    here_N = [name in names for name in anchors.domains]
    kept = Anchors(*(tuple(itertools.compress(column, here_N)) for column in anchors))
    return kept, baseline._replace(grade_N=baseline.grade_N[np.array(here_N, bool)])


def noisy(anchors: Anchors, first_N: np.ndarray, second_N: np.ndarray, judged: Sequence[str]) -> tuple[str, ...]:
    """Domains whose grader is not exact: it gave two grades to one reply, or asks a judge."""
    both_N = ~np.isnan(first_N) & ~np.isnan(second_N)
    differ = {anchors.domains[place] for place in np.flatnonzero(both_N & (first_N != second_N))}
    return tuple(sorted(differ | (set(judged) & set(anchors.domains))))


def compare(
    anchors: Anchors, before: Baseline, after_N: np.ndarray, versions: Mapping[str, str], alpha: float
) -> list[Shift]:
    """Of every domain that has anchors, in their order."""
    shifts, tests = [], max(1, len(before.noisy))
    for domain in dict.fromkeys(anchors.domains):
        here_N = np.array([name == domain for name in anchors.domains])
        old_n, new_n = before.grade_N[here_N], after_N[here_N]
        both_n = ~np.isnan(old_n) & ~np.isnan(new_n)
        old_n, new_n = old_n[both_n], new_n[both_n]
        d_n = new_n - old_n
        changed = int(np.sum(np.abs(d_n) > UNIT / 2))
        if domain in before.noisy:
            p = sign_flip_p(d_n)
            drifted = p <= alpha / tests
        else:
            p, drifted = float(changed == 0), changed > 0
        passes = float(np.mean((new_n >= PASS_GRADE).astype(float) - (old_n >= PASS_GRADE))) if len(d_n) else 0.0
        moved = float(d_n.mean()) if len(d_n) else 0.0
        other = versions.get(domain) != before.versions.get(domain)
        shifts.append(Shift(domain, len(d_n), changed, moved, passes, p, drifted, other))
    return shifts


def sign_flip_p(d_n: np.ndarray) -> float:
    """The two-sided p above, exact; 1 where nothing changed. d_n: changes of grades, counted in UNIT."""
    size_n = np.rint(np.abs(np.asarray(d_n, float)) / UNIT).astype(int)
    observed = abs(int(np.rint(np.asarray(d_n, float) / UNIT).sum()))
    size_n = size_n[size_n > 0]
    if not size_n.size:
        return 1.0
    step = int(np.gcd.reduce(size_n))
    size_n, observed = size_n // step, observed // step
    reach = int(size_n.sum())
    chance = np.zeros(2 * reach + 1)  # of each sum from -reach to reach
    chance[reach] = 1.0
    for size in size_n:
        chance = 0.5 * (np.roll(chance, size) + np.roll(chance, -size))  # the ends are empty until the last turn
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, chance[sums >= observed].sum()))


def events(shifts: Sequence[Shift]) -> list[dict]:
    """{kind: grader_drift, domain, ...} of those that drifted."""
    found = []
    for shift in shifts:
        if shift.drifted:
            found.append({"kind": "grader_drift"} | {k: v for k, v in shift._asdict().items() if k != "drifted"})
    return found


def rebased(shifts: Sequence[Shift], names: Sequence[str]) -> dict[str, np.ndarray]:
    """drifted_D, shift_D and grade_shift_D for curriculum/rebase.py; 0 where nothing drifted."""
    by_name = {shift.domain: shift for shift in shifts if shift.drifted}
    found = [by_name.get(name) for name in names]
    return {
        "drifted_D": np.array([shift is not None for shift in found]),
        "shift_D": np.array([shift.pass_shift if shift else 0.0 for shift in found], np.float32),
        "grade_shift_D": np.array([shift.grade_shift if shift else 0.0 for shift in found], np.float32),
    }


def next_baseline(
    before: Baseline,
    shifts: Sequence[Shift],
    anchors: Anchors,
    after_N: np.ndarray,
    versions: Mapping[str, str],
    step: int,
    groups: Mapping[str, int],
) -> Baseline:
    """The new grades where a domain drifted, the old ones elsewhere: small changes must not be taken in one by one."""
    drifted = {shift.domain for shift in shifts if shift.drifted}
    moved_N = np.array([name in drifted for name in anchors.domains], bool) & ~np.isnan(after_N)
    grade_N = np.where(moved_N | np.isnan(before.grade_N), after_N, before.grade_N)
    era = before.era + bool(drifted & set(before.noisy))
    return Baseline(step, era, dict(versions), before.noisy, dict(groups), grade_N)


def save(path: Path, anchors: Anchors, baseline: Baseline) -> None:
    """A JSON line an anchor, then one a baseline; in one step for the file system."""
    lines = [
        {"domain": domain, "row": row, "reply": reply}
        for domain, row, reply in zip(anchors.domains, anchors.rows, anchors.replies)
    ]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in [*lines, _plain(baseline)]), encoding="utf-8")
    os.replace(scratch, path)


def append(path: Path, baseline: Baseline) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(baseline)) + "\n")


def load(path: Path, step: int) -> tuple[Anchors, Baseline]:
    """The anchors and the last baseline of `step` or before, for a run continued from there; later ones are dropped.

    Raises FileNotFoundError or ValueError, one line.
    """
    found, baselines = _read(path)
    kept = [baseline for baseline in baselines if baseline.step <= step]
    if not kept:
        raise ValueError(f"{path}: no baseline of step {step} or before")
    if len(kept) < len(baselines):
        save(path, found, kept[0])
        for baseline in kept[1:]:
            append(path, baseline)
    return found, kept[-1]


def first(path: Path) -> tuple[Anchors, Baseline]:
    """The anchors as they were graded when they were chosen. Raises as `load` does, and changes nothing."""
    found, baselines = _read(path)
    if not baselines:
        raise ValueError(f"{path}: no baseline, so this is not the file that a run writes: restore it from a backup")
    return found, baselines[0]


def _read(path: Path) -> tuple[Anchors, list[Baseline]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the run was started without anchors")
    anchors, baselines = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            (baselines if "grade_N" in entry else anchors).append(entry)
        except (json.JSONDecodeError, TypeError) as error:
            if baselines:
                break  # a line cut short by a crash
            raise ValueError(f"{path}:{number}: not a JSON object") from error
    columns = zip(*((entry["domain"], entry["row"], entry["reply"]) for entry in anchors))
    found = Anchors(*columns) if anchors else Anchors((), (), ())
    return found, [_baseline(entry) for entry in baselines]


def _plain(baseline: Baseline) -> dict:
    return baseline._asdict() | {"grade_N": [None if np.isnan(grade) else float(grade) for grade in baseline.grade_N]}


def _baseline(entry: dict) -> Baseline:
    grades = [np.nan if grade is None else grade for grade in entry["grade_N"]]
    return Baseline(**entry | {"noisy": tuple(entry["noisy"]), "grade_N": np.array(grades, np.float64)})
