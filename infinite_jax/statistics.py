"""Intervals of held-out pass rates, and of differences between runs.

Within a run values lie in [0, 1], NaN where the grader gave none. The prompt is the independent unit: several samples
of one prompt share its difficulty, so n prompts with S samples each are n observations (their means), not n S. Domains
are fixed (the claim is about these domains), their prompts random. With y_i the mean over prompt i's valid samples:

    m = mean_i y_i         v = sum_i (y_i - m)^2 / (n (n - 1)), the variance of m
    macro m = mean_d m_d   macro v = sum_d v_d / D^2

Between two arms the seed is the unit: both start from it alike, and their difference is one observation (`paired`).

Sources: Wilson 1927 (JASA 22:209) for k of n; Dean and Pagano 2015 (J. Surv. Stat. Methodol. 3:484) for his interval
with an effective sample size under clustering; Satterthwaite 1946 (Biometrics Bull. 2:110) for the degrees of freedom
of a sum of variances; Miller 2024 (arXiv 2411.00640) for clustered and paired errors of model evaluations.

Left out: differences of unpaired evaluations or runs, and corrections for the number of comparisons that are made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
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
    n = len(y_N)
    if n == 0:
        return None
    mean = float(y_N.mean())
    binomial = mean * (1 - mean)
    samples = np.count_nonzero(~np.isnan(values_NS))
    variance = float(y_N.var()) / n
    effective = min(binomial / variance, samples) if variance > 0 else (samples if binomial > 0 else n)
    return Estimate(mean, *wilson(mean * effective, effective, confidence))


def macro_average(domains: Sequence[np.ndarray], confidence: float = 0.95) -> Estimate | None:
    """Unweighted mean over D domains, each [prompts, samples], with its interval; None when it is undefined.

    Undefined without domains and where a domain has fewer than 2 prompts with a valid value. A domain whose prompts
    all have one mean adds no variance.
    """
    return _mean_of_means([_prompt_means(values_NS) for values_NS in domains], confidence, 0.0, 1.0)


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
    return _mean_of_means([d_N[~np.isnan(d_N)] for d_N in differences], confidence, -1.0, 1.0)


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


def _mean_of_means(domains: list[np.ndarray], confidence: float, lowest: float, highest: float) -> Estimate | None:
    """m -+ t_f sqrt(v), cut to the possible range; f = (sum_d v_d)^2 / sum_d (v_d^2 / (n_d - 1)), Satterthwaite's."""
    if not domains or min(map(len, domains)) < 2:
        return None
    mean = float(np.mean([y_N.mean() for y_N in domains]))
    n_D = np.array([len(y_N) for y_N in domains])
    v_D = np.array([y_N.var(ddof=1) for y_N in domains]) / n_D
    total = v_D.sum()
    if total == 0:
        return Estimate(mean, mean, mean)
    freedom = total**2 / (v_D**2 / (n_D - 1)).sum()
    half = float(stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(total)) / len(domains)
    return Estimate(mean, max(mean - half, lowest), min(mean + half, highest))
