"""How far two graders agree on the same replies: a judge with people, with a verifier, or with itself.

Quadratically weighted kappa (Cohen 1968) over the grades 1 to 4,

    kappa = 1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij,   w_ij = (i - j)^2

with O the joint shares and E those of independent graders with the same marginals: 1 is full agreement, 0 is chance.
"""

from typing import NamedTuple

import numpy as np

GRADES = np.arange(1, 5)


class Agreement(NamedTuple):
    n: int  # replies that both graded
    exact: float  # share with the same grade
    within_one: float  # share with grades at most 1 apart
    same_verdict: float  # share that both pass, or both fail
    kappa: float  # NaN where either gave one grade only: there is nothing to agree on by chance
    shift: float  # mean of b - a


def agreement(a_N: np.ndarray, b_N: np.ndarray) -> Agreement:
    """Of grades in [1, 4], NaN where a grader gave none; grades between two whole ones count as the nearest."""
    a_N, b_N = np.asarray(a_N, float), np.asarray(b_N, float)
    if a_N.shape != b_N.shape:
        raise ValueError(f"{a_N.size} grades and {b_N.size}: one of each a reply")
    both_N = ~np.isnan(a_N) & ~np.isnan(b_N)
    a_N, b_N = a_N[both_N], b_N[both_N]
    if not a_N.size:
        return Agreement(0, *([float("nan")] * 5))
    i_N, j_N = (np.clip(np.rint(x), 1, 4).astype(int) - 1 for x in (a_N, b_N))
    observed = np.zeros((4, 4))
    np.add.at(observed, (i_N, j_N), 1 / len(i_N))
    expected = np.outer(observed.sum(1), observed.sum(0))
    weight = (GRADES[:, None] - GRADES[None, :]) ** 2
    by_chance = float((weight * expected).sum())
    spread = len(set(i_N)) > 1 or len(set(j_N)) > 1
    kappa = 1.0 - float((weight * observed).sum()) / by_chance if spread and by_chance else float("nan")
    apart_N = np.abs(i_N - j_N)
    return Agreement(
        len(i_N),
        float((apart_N == 0).mean()),
        float((apart_N <= 1).mean()),
        float(((a_N >= 3) == (b_N >= 3)).mean()),
        kappa,
        float((b_N - a_N).mean()),
    )
