"""From the scores of a row's criteria to its grade, and from rows to what is logged of a domain. Pure functions.

    score = sum of w_c s_c / sum of w_c      over the criteria that the row has
    grade = 1 + the number of the rubric's three thresholds that score reaches, at most the veto of every criterion
            that is not passed

A row is graded when every criterion of a weight, or with a veto, has answered; and when a veto of 1 has struck, since
nothing can then raise the grade.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rubric.checks import Checked
from rubric.schema import Rubric

ROUNDING = 1e-9  # a score of three thirds reaches a threshold of 1


class Graded(NamedTuple):
    grade: float | None  # in [1, 4]; None when there is a reason
    score: float  # in [0, 1]; NaN when there is a reason
    reason: str


class DomainScores(NamedTuple):
    """What N rows of one domain scored; C criteria and M measures in the rubric's order."""

    score_N: np.ndarray  # f32 weighted score; NaN where the row is not valid
    criteria_NC: np.ndarray  # f32 in [0, 1]; NaN where the row has no such criterion, or it gave no answer
    measures_NM: np.ndarray  # f32; NaN likewise


Row = Mapping[str, Checked]  # by criterion; those that the row does not have, or was not asked, are missing


def vetoed(rubric: Rubric, row: Row) -> bool:
    """Whether a criterion has already brought the grade to 1."""
    return _ceiling(rubric, row) == 1


def _ceiling(rubric: Rubric, row: Row) -> int:
    struck = [4]
    for criterion in rubric.criteria:
        checked = row.get(criterion.name)
        if checked is not None and checked.score is not None and checked.score < criterion.passes - ROUNDING:
            struck.append(criterion.veto)
    return min(struck)


def grade(rubric: Rubric, row: Row) -> Graded:
    """The grade of a row of which every criterion has been asked that it has, or a veto of 1 has struck."""
    ceiling, total, weights = _ceiling(rubric, row), 0.0, 0.0
    for criterion in rubric.criteria:
        checked = row.get(criterion.name)
        if checked is None:
            continue
        if checked.score is None:
            if ceiling > 1 and (criterion.weight or criterion.veto < 4):
                return Graded(None, np.nan, f"{criterion.name}: {checked.reason}")
            continue
        total, weights = total + criterion.weight * checked.score, weights + criterion.weight
    if not weights and ceiling > 1:
        return Graded(None, np.nan, "no criterion of the rubric applies to the row")
    score = total / weights if weights else 0.0
    reached = 1 + sum(score >= threshold - ROUNDING for threshold in rubric.grades)
    return Graded(float(min(reached, ceiling)), score, "")


def width(rubrics: Sequence[Rubric | None]) -> int:
    """K: score, criteria and measures of the widest rubric; 0 where there is none."""
    return max((1 + len(each.criteria) + len(each.measures) for each in rubrics if each is not None), default=0)


def columns(rubric: Rubric, row: Row, score: float) -> list[float]:
    """A row's line: its score, its criteria's, its measures; NaN for what it has not."""
    line = [score]
    for each in rubric.criteria:
        checked = row.get(each.name)
        line.append(np.nan if checked is None or checked.score is None else checked.score)
    for each in rubric.criteria:
        measures = row[each.name].measures if each.name in row else {}
        line += [measures.get(name, np.nan) for name in each.log]
    return line


def of_domain(rubric: Rubric, scores_NK: np.ndarray) -> DomainScores:
    """The lines of one domain's rows, taken apart."""
    first, end = 1 + len(rubric.criteria), 1 + len(rubric.criteria) + len(rubric.measures)
    return DomainScores(scores_NK[:, 0], scores_NK[:, 1:first], scores_NK[:, first:end])


def metrics(rubric: Rubric, scores: DomainScores, domain: str, prefix: str = "") -> dict[str, float | None]:
    """Means over the rows that have them: <prefix>criterion_<name>/<domain>, <prefix>score/<domain>, and the measures.

    With prefix "eval/" the measures are eval/<measure>/<domain>. None where no row has one.
    """
    row = {f"{prefix}score/{domain}": mean(scores.score_N)}
    for column, criterion in enumerate(rubric.criteria):
        row[f"{prefix}criterion_{criterion.name}/{domain}"] = mean(scores.criteria_NC[:, column])
    for column, measure in enumerate(rubric.measures):
        row[f"{prefix}{measure}/{domain}"] = mean(scores.measures_NM[:, column])
    return row


def mean(x: np.ndarray) -> float | None:
    known = x[~np.isnan(x)]
    return float(known.mean(dtype=np.float64)) if known.size else None
