"""Whether a grade of 3 means a comparable thing under every rubric. Pure functions but for the grading itself.

`table` shows how each domain's grader spreads the grades of one frozen policy's replies; `cross` grades every domain's
replies under every domain's rubric. A rubric that needs what another domain's rows do not hold gives no grade there:
the cell says how many rows it graded, and its mean is NaN where it graded none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rubric.evaluator import PASS_GRADE, Grades, RubricEvaluator


class Spread(NamedTuple):
    """Grades of a frozen policy's replies under one grader."""

    domain: str
    n: int  # replies graded
    invalid: int
    share_1: float  # shares of the grades, rounded to whole ones; NaN where n is 0
    share_2: float
    share_3: float
    share_4: float
    pass_rate: float
    mean: float
    variance: float


class Matrix(NamedTuple):
    """Replies of domain i (rows) under the rubric of domain j (columns); D x D."""

    names: tuple[str, ...]
    n_DD: np.ndarray  # i64, replies graded
    asked_D: np.ndarray  # i64, replies of each domain
    mean_DD: np.ndarray  # f64 mean grade, NaN where none was graded
    pass_DD: np.ndarray  # f64 pass rate, NaN likewise


class Sample(NamedTuple):
    """What a frozen policy replied on rows of one domain."""

    rows: Sequence[dict]
    replies: Sequence[str]


def spread(domain: str, grades: Grades) -> Spread:
    known = np.asarray(grades.grade_B, float)[np.asarray(grades.valid_B, bool)]
    invalid = int(np.size(grades.valid_B) - known.size)
    if not known.size:
        return Spread(domain, 0, invalid, *([float("nan")] * 7))
    shares = [float((np.rint(known) == grade).mean()) for grade in (1, 2, 3, 4)]
    passed = float((known >= PASS_GRADE).mean())
    return Spread(domain, known.size, invalid, *shares, passed, float(known.mean()), float(known.var()))


def table(names: Sequence[str], domain_B: np.ndarray, grades: Grades) -> list[Spread]:
    """A line a domain, of a batch graded each by its own domain."""
    domain_B = np.asarray(domain_B)
    return [spread(name, Grades(*(leaf[domain_B == domain] for leaf in grades))) for domain, name in enumerate(names)]


def cross(evaluator: RubricEvaluator, names: Sequence[str], samples: Sequence[Sample]) -> Matrix:
    """Every domain's sample under every domain's grader; entries of `samples` stand in the domains' order.

    Raises ValueError where they are not one a domain.
    """
    if len(samples) != len(names):
        raise ValueError(f"{len(samples)} samples for {len(names)} domains: give one a domain")
    rows = [row for sample in samples for row in sample.rows]
    replies = [reply for sample in samples for reply in sample.replies]
    of_B = np.repeat(np.arange(len(samples)), [len(sample.replies) for sample in samples])
    D = len(names)
    n_DD, mean_DD, pass_DD = np.zeros((D, D), np.int64), np.full((D, D), np.nan), np.full((D, D), np.nan)
    for under in range(D):
        grades = evaluator.grade(np.full(len(rows), under, np.int32), rows, replies)
        for domain in range(D):
            known = grades.grade_B[(of_B == domain) & grades.valid_B]
            n_DD[domain, under] = known.size
            if known.size:
                mean_DD[domain, under] = known.mean()
                pass_DD[domain, under] = (known >= PASS_GRADE).mean()
    return Matrix(tuple(names), n_DD, np.bincount(of_B, minlength=D), mean_DD, pass_DD)


def uncalibrated(matrix: Matrix, domain: int, margin: float) -> list[tuple[str, float]]:
    """(rubric, difference in pass rate) of the rubrics that grade this domain's replies unlike its own does.

    Only those that graded at least half of them are comparable at all.
    """
    found = []
    for under, name in enumerate(matrix.names):
        gap = matrix.pass_DD[domain, under] - matrix.pass_DD[domain, domain]
        if under != domain and 2 * matrix.n_DD[domain, under] >= matrix.asked_D[domain] and abs(gap) > margin:
            found.append((name, float(gap)))
    return found
