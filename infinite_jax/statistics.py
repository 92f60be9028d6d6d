"""Intervals of held-out pass rates, and of differences between runs.

Within a run values lie in [0, 1], NaN where the grader gave none. The prompt is the independent unit: several samples
of one prompt share its difficulty, so n prompts with S samples each are n observations (their means), not n S. Domains
are fixed (the claim is about these domains), their prompts random. With y_i the mean over prompt i's valid samples:

    m = mean_i y_i         macro m = mean_d m_d

An interval holds each theta that a score test does not refute: |m - theta| <= z sqrt(v(theta)), where v(theta) =
N / (N - D + 1) sum_d v_d / n_d / D^2 with N = sum_d n_d is the variance of m at the likeliest probabilities of the
values whose macro mean is theta, of which D - 1 are free beside theta (the factor of Miettinen and Nurminen 1985, Stat.
Med. 4:213, for D = 2). They may lie on values that could have been and were not (0 and 1; -1 and 1 of a change), so
that where all prompts agree the interval still has a width: of one domain it is Wilson's, of a change of single samples
Tango's. The variance of the data themselves, with the normal or Student's quantile, is 0 there; Wilson's limits of the
domains, added in squares (MOVER), lean to 1/2 in every domain alike, which the mean over many does not take out.

Between two arms the seed is the unit: both start from it alike, and their difference is one observation (`paired`).

Sources: Wilson 1927 (JASA 22:209) for k of n; Dean and Pagano 2015 (J. Surv. Stat. Methodol. 3:484) for his interval
with an effective sample size under clustering; Tango 1998 (Stat. Med. 17:891) for a paired difference; Martin Andres
et al. 2011 (Stat. Methods Med. Res. 20:369) for a linear combination of proportions; Owen 1988 (Biometrika 75:237) for
the form of the likeliest probabilities; Miller 2024 (arXiv 2411.00640) for clustered and paired errors of model
evaluations.

Left out: differences of unpaired evaluations or runs, and corrections for the number of comparisons that are made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit


class Estimate(NamedTuple):
    mean: float
    low: float  # ends of the two-sided interval
    high: float


def wilson(k: float, n: float, confidence: float = 0.95) -> tuple[float, float] | None:
    """(low, high) of Wilson's score interval for `k` passes of `n` independent prompts; None when n is 0.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = k / n. Neither need be whole.
    """
    if n == 0:
        return None
    p, z = k / n, ndtri((1 + confidence) / 2)
    middle = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return (0.0 if k == 0 else float(low), 1.0 if k == n else float(high))  # exact there, not up to rounding


def cluster_mean(values_NS: np.ndarray, confidence: float = 0.95) -> Estimate | None:
    """Mean pass rate of N prompts with S samples each, its interval clustered by prompt; None without a valid value.

    Wilson's interval with the effective sample size n* = n^2 m (1 - m) / sum_i (y_i - m)^2: n when S is 1 (it is then
    wilson(k, n) itself), towards n S as the prompts grow alike, at most the number of valid samples, and n where every
    value is 0 or every value is 1, which says nothing about how alike they are.
    """
    y_N = _prompt_means(values_NS)
    if not len(y_N):
        return None
    mean, effective = _effective(values_NS, y_N)
    return Estimate(mean, *wilson(mean * effective, effective, confidence))


def _effective(values_NS: np.ndarray, y_N: np.ndarray) -> tuple[float, float]:
    """(m, n*)"""
    mean, n = float(y_N.mean()), len(y_N)
    binomial = mean * (1 - mean)
    samples = np.count_nonzero(~np.isnan(values_NS))
    variance = float(y_N.var()) / n
    return mean, min(binomial / variance, samples) if variance > 0 else (samples if binomial > 0 else n)


def macro_average(domains: Sequence[np.ndarray], confidence: float = 0.95) -> Estimate | None:
    """Unweighted mean over D domains, each [prompts, samples], with its interval; None when it is undefined.

    Undefined without domains and where a domain has fewer than 2 prompts with a valid value. A domain counts as n* m
    passes of n*, as in cluster_mean, which this is for one domain.
    """
    y_DN = [_prompt_means(values_NS) for values_NS in domains]
    if not y_DN or min(map(len, y_DN)) < 2:
        return None
    known = [_effective(values_NS, y_N) for values_NS, y_N in zip(domains, y_DN)]
    passes = [(np.array([0.0, 1.0]), n * np.array([1 - mean, mean])) for mean, n in known]
    return _score_interval(passes, confidence, 0.0, 1.0)


def paired_difference(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], confidence: float = 0.95
) -> Estimate | None:
    """Macro average after minus before, paired by prompt: row i of a domain is the same prompt in both.

    Each prompt's difference of means is one observation, so that what makes a prompt hard cancels. A prompt without a
    valid value on either side is left out on both. For one domain pass [before_NS], [after_NS]. None as in
    macro_average. Raises ValueError when domains or prompts do not match.
    """
    sizes = [[len(values) for values in side] for side in (before, after)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"paired evaluations have {sizes[0]} and {sizes[1]} prompts a domain: use the same prompts")
    differences = [_means(later) - _means(earlier) for earlier, later in zip(before, after)]
    known = [d_N[~np.isnan(d_N)] for d_N in differences]
    if not known or min(map(len, known)) < 2:
        return None
    return _score_interval([np.unique(d_N, return_counts=True) for d_N in known], confidence, -1.0, 1.0)


def paired(
    values_a_S: Sequence[float | None],
    values_b_S: Sequence[float | None],
    relative: bool = False,
    confidence: float = 0.95,
) -> Estimate | None:
    """Mean over S seeds of a - b, or with `relative` of 100 (a - b) / b, in per cent, with Student's t interval.

    Position s of both is the same seed. A seed without a value (None or NaN) on either side is left out on both.
    None where `why_not_paired` gives a reason. Seeds that all differ by the same have an interval of no width.
    Raises ValueError where the numbers of seeds differ.
    """
    if why_not_paired(values_a_S, values_b_S, relative):
        return None
    a_S, b_S = _both(values_a_S, values_b_S)
    difference_S = 100 * (a_S - b_S) / b_S if relative else a_S - b_S
    return t_interval(difference_S, confidence)


def t_interval(values_S: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Mean of S seeds' values with Student's t interval over seeds; None for fewer than two."""
    values_S = np.asarray(values_S, np.float64)
    n = len(values_S)
    if n < 2:
        return None
    mean = float(values_S.mean())
    half = float(stdtrit(n - 1, (1 + confidence) / 2) * values_S.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


def why_not_paired(
    values_a_S: Sequence[float | None], values_b_S: Sequence[float | None], relative: bool = False
) -> str:
    """Why `paired` is undefined, one line; "" where it is defined. Raises ValueError as it does."""
    a_S, b_S = _both(values_a_S, values_b_S)
    if len(a_S) < 2:
        return f"{len(a_S)} of {len(values_a_S)} seeds have a value in both arms, an interval needs 2"
    if relative and (b_S <= 0).any():
        return f"the baseline is {b_S.min():.4g} in one seed: a gain relative to it means nothing, compare differences"
    return ""


def _both(values_a_S: Sequence[float | None], values_b_S: Sequence[float | None]) -> np.ndarray:
    """f64 [2, seeds with a value on both sides]."""
    if len(values_a_S) != len(values_b_S):
        raise ValueError(f"paired runs have {len(values_a_S)} and {len(values_b_S)} seeds: run both arms on the same")
    both_2S = np.array([values_a_S, values_b_S], np.float64)  # None becomes NaN
    return both_2S[:, ~np.isnan(both_2S).any(axis=0)]


def _means(values_NS: np.ndarray) -> np.ndarray:
    """f64 [N]: mean over the valid samples of each prompt, NaN where there is none."""
    values_NS = np.asarray(values_NS, np.float64)
    valid_NS = ~np.isnan(values_NS)
    samples_N = valid_NS.sum(axis=1)
    return np.where(samples_N > 0, np.where(valid_NS, values_NS, 0).sum(axis=1) / np.maximum(samples_N, 1), np.nan)


def _prompt_means(values_NS: np.ndarray) -> np.ndarray:
    """_means without the prompts that have no valid sample."""
    y_N = _means(values_NS)
    return y_N[~np.isnan(y_N)]


def _score_interval(
    domains: list[tuple[np.ndarray, np.ndarray]], confidence: float, lowest: float, highest: float
) -> Estimate:
    """The score interval of the mean over domains of the domains' means, each (values, their weights)."""
    z, most = float(ndtri((1 + confidence) / 2)), max(len(values) for values, _ in domains)
    x_DK, w_DK = np.zeros((2, len(domains), most))  # filled up with what has no weight
    for d, (values, weights) in enumerate(domains):
        x_DK[d, : len(values)], w_DK[d, : len(weights)] = values, weights
    mean = float(np.mean((w_DK * x_DK).sum(1) / w_DK.sum(1)))
    below = _least(x_DK - lowest, w_DK, z)
    above = _least(highest - x_DK, w_DK, z)
    return Estimate(mean, min(lowest + below, mean), max(highest - above, mean))


def _least(x_DK: np.ndarray, w_DK: np.ndarray, z: float) -> float:
    """The least mean theta that the data do not refute, for values of 0 and more that could have been 0."""
    n_D = w_DK.sum(1)
    mean = float(_tilted(0.0, x_DK, w_DK)[0].mean())  # rounded as those it is compared with
    if mean == 0:
        return 0.0
    lost = n_D.sum() / (n_D.sum() - len(n_D) + 1)

    def refuted(tilt: float) -> float:
        """Above 0 where theta is refuted."""
        mean_D, variance_D = _tilted(tilt, x_DK, w_DK)
        short = mean - float(mean_D.mean())
        if short <= 1e-9 * mean:  # rounding: where all values agree the variance is 0 until some lie at 0
            return -1.0
        return short - z * float(np.sqrt(lost * (variance_D / n_D).sum())) / len(n_D)

    top = float(n_D.max())
    while refuted(top) < 0:
        top *= 2
    tilt = brentq(refuted, 0.0, top, xtol=1e-10 * top)
    return float(_tilted(tilt, x_DK, w_DK)[0].mean())


def _tilted(tilt: float, x_DK: np.ndarray, w_DK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the likeliest q_DK for a mean that `tilt` >= 0 lowers: q_k = w_k / (a + tilt x_k), where a
    makes the sum 1. At a = 0 the sum may be less: the rest lies at 0, where nothing was observed."""
    x_DK = np.where(w_DK > 0, x_DK, 1.0)  # no zero below where the filling stands
    a_D = np.maximum(
        (w_DK - tilt * x_DK).max(axis=1), 0.0
    )  # the sum is 1 or more here, and convex: Newton's from below
    for _ in range(100):
        over = a_D[:, None] + tilt * x_DK
        q_DK = np.divide(w_DK, over, out=np.zeros_like(w_DK), where=w_DK > 0)
        excess_D = q_DK.sum(1) - 1
        if (excess_D <= 1e-12).all():
            break
        slope_D = np.divide(q_DK, over, out=np.zeros_like(w_DK), where=w_DK > 0).sum(1)
        a_D += np.maximum(excess_D, 0) / slope_D
    mean_D = (q_DK * x_DK).sum(1)
    return mean_D, np.maximum((q_DK * x_DK**2).sum(1) - mean_D**2, 0.0)
