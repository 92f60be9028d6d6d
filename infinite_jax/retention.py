"""What a run has learned and kept: retention measures of its held-out evaluations, on the host, in float64.

R_k,i is the pass rate of domain i at evaluation k of 0..K, at_k its place on an axis (steps or tokens), a_i where i
arrives: an evaluation at a_i is made before any training on i. Distinct arrivals begin the phases. R_i,i is the last
evaluation of the phase that introduced i, R_i-1,i the last one of the phase before, b_i evaluation 0, of the untrained
checkpoint. Means are over the trained domains that have arrived by the end, all equal, or over those named:

    acc, worst          mean_i and min_i of R_K,i
    macro               mean_i of the mean over time of R_i, from evaluation 0 on, whether i has arrived or not
    aurc                mean_i 1/(at_K - a_i) int_{a_i}^{at_K} R_i dt, trapezoid, R_i(a_i) interpolated
    ret                 mean_i mean_k R_k,i / max_{l<=k} R_l,i over the evaluations from a_i on; 1 = nothing lost
    bwt                 mean of R_K,i - R_i,i        over domains of all phases but the last
    fwt                 mean of R_i-1,i - b_i        over domains of all phases but the first
    fwt_unseen          mean of R_K,i - b_i          over eval-only domains
    forgetting          mean of max_{1<=l<K} R_l,i - R_K,i over domains trained on before evaluation K - 1
    forgetting_median3  the same with the maximum over medians of three evaluations in a row: the largest of many noisy
                        rates is too high
    forgetting_first    mean over phases but the last of the mean of R_i,i - R_K,i in the phase
    time_to_decay       infinite_jax/decay.py

bwt and fwt are those of GEM (Lopez-Paz and Ranzato 2017, arXiv 1706.08840), forgetting that of Chaudhry et al. 2018
(arXiv 1801.10112), forgetting_first what Avalanche calls forgetting. With one domain a phase and one evaluation at the
end of each, published code gives the same numbers but for this: GEM's metrics.py divides both sums by the number of
tasks T where the paper and we divide by T - 1; Mammoth's forgetting takes the maximum over l <= K, so that a task that
got better counts 0 and not below; Avalanche's forgetting is then -bwt. aurc and ret are defined by this project;
elsewhere AURC may mean a risk-coverage curve.

A value that is missing is never filled in: where a domain has none at the place that a measure asks for, the measure is
undefined and says why. Exceptions, each where nothing else is known: macro and aurc begin at a domain's first value and
interpolate over gaps, ret and forgetting pass over gaps, ret leaves out a domain that never passed (nothing was kept
and nothing lost). Left out: measures that need an evaluation after every step (WC-ACC, De Lange et al. 2023) and
REM, BWT+ (Diaz-Rodriguez et al. 2018), which split bwt by its sign.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from curriculum.domains import DomainConfig
from infinite_jax import decay

SPAN = "values at the last evaluation and at one before it"  # what a measure needs of a domain
PHASE_ENDS = "value at the end of its phase, or of the run"
ONE_PHASE = "one phase: all trained domains arrived together (forgetting is defined)"


class Evaluations(NamedTuple):
    """One run, held out: K evaluations, D domains."""

    at_K: np.ndarray  # f64, ascending: steps or generated tokens
    rate_KD: np.ndarray  # f64 pass rates, NaN where not evaluated
    arrives_D: np.ndarray  # f64, on the same axis: when the domain could first be trained on
    trained_D: np.ndarray  # bool; False: eval only


class Measure(NamedTuple):
    value: float | None
    reason: str  # why there is no value; "" where there is one


class Curves(NamedTuple):
    """Stability curves; NaN before a domain arrives and where it was not evaluated."""

    at_K: np.ndarray
    rate_KD: np.ndarray
    peak_KD: np.ndarray  # highest rate so far
    kept_KD: np.ndarray  # rate / peak, NaN also where the peak is 0


def from_rows(
    rows: Sequence[dict], domains: Sequence[DomainConfig], axis: str = "step", key: str = "eval/pass_rate"
) -> Evaluations:
    """Rows of a metrics.jsonl as Evaluations: those that have `key`/<domain> for any domain; null is NaN.

    Args:
      axis: "step" or a running total such as "tokens/total", 0 where row 0 does not state it; arrivals are carried over
        from steps, inf where the rows do not reach them.
      key: another curve of the domains, e.g. "triage/acc_ema", which has a value a step (and is biased by selection).

    Raises ValueError where no row has the key, or a row that is needed lacks the axis.
    """
    keys = [f"{key}/{domain.name}" for domain in domains]
    chosen = [row for row in rows if any(name in row for name in keys)]
    if not chosen:
        raise ValueError(f"no row has {key}/<domain> for any of {[domain.name for domain in domains]}: is it this run?")
    arrives_D = np.array([domain.arrives for domain in domains], np.float64)
    if axis != "step":
        known = [row for row in rows if row.get(axis) is not None or row["step"] == 0]
        lacking = [row["step"] for row in chosen if row.get(axis) is None and row["step"]]
        if lacking:
            raise ValueError(f"the row of step {lacking[0]} has no {axis}: compare this run over steps")
        arrives_D = np.interp(arrives_D, [r["step"] for r in known], [r.get(axis) or 0 for r in known], right=np.inf)
    return Evaluations(
        np.array([row.get(axis) or 0 for row in chosen], np.float64),
        np.array([[row.get(name) for name in keys] for row in chosen], np.float64),  # None becomes NaN
        arrives_D,
        np.array([not domain.eval_only for domain in domains]),
    )


def summary(evaluations: Evaluations) -> dict[str, Measure]:
    """Every measure of one run by its name, as in the module's table. Raises ValueError as `check` does."""
    check(evaluations)
    return {
        "acc": acc(evaluations),
        "worst": worst(evaluations),
        "macro": macro(evaluations),
        "aurc": aurc(evaluations),
        "ret": ret(evaluations),
        "bwt": bwt(evaluations),
        "fwt": fwt(evaluations),
        "fwt_unseen": fwt_unseen(evaluations),
        "forgetting": forgetting(evaluations),
        "forgetting_median3": forgetting(evaluations, width=3),
        "forgetting_first": forgetting_first(evaluations),
        "time_to_decay": time_to_decay([evaluations]),
    }


def check(evaluations: Evaluations) -> None:
    """Raises ValueError where shapes disagree, there is no evaluation, or they are not in order."""
    at, rate, arrives, trained = map(np.shape, evaluations)
    if len(rate) != 2 or rate[0] < 1 or at != rate[:1] or not arrives == trained == rate[1:]:
        raise ValueError(
            f"evaluations have at {at}, rate {rate}, arrives {arrives}, trained {trained}: give [K], [K, D], [D], [D]"
        )
    if not (np.diff(evaluations.at_K) > 0).all():
        raise ValueError(f"evaluations are at {evaluations.at_K.tolist()}: give them once each, in ascending order")


def curves(evaluations: Evaluations) -> Curves:
    """Held-out rate of each domain from its arrival on, its highest so far, and how much of that is kept."""
    rate_KD = np.where(evaluations.at_K[:, None] >= evaluations.arrives_D, evaluations.rate_KD, np.nan)
    peak_KD = np.fmax.accumulate(rate_KD)
    kept_KD = np.divide(rate_KD, peak_KD, out=np.full_like(rate_KD, np.nan), where=peak_KD > 0)
    return Curves(evaluations.at_K, rate_KD, np.where(np.isnan(rate_KD), np.nan, peak_KD), kept_KD)


def acc(evaluations: Evaluations) -> Measure:
    return _over(np.mean, evaluations.rate_KD[-1], *_arrived(evaluations), "value at the last evaluation")


def worst(evaluations: Evaluations) -> Measure:
    return _over(np.min, evaluations.rate_KD[-1], *_arrived(evaluations), "value at the last evaluation")


def macro(evaluations: Evaluations) -> Measure:
    start_D = np.full(evaluations.rate_KD.shape[1], evaluations.at_K[0])
    return _over(np.mean, _time_mean(evaluations, start_D), *_arrived(evaluations), SPAN)


def aurc(evaluations: Evaluations) -> Measure:
    return _over(np.mean, _time_mean(evaluations, evaluations.arrives_D), *_arrived(evaluations), SPAN)


def ret(evaluations: Evaluations) -> Measure:
    _, _, peak_KD, kept_KD = curves(evaluations)
    arrived_D, nobody = _arrived(evaluations)
    chosen_D = arrived_D & (np.fmax.reduce(peak_KD) != 0)  # NaN, no value at all, stays: it makes the mean undefined
    defined_KD = ~np.isnan(kept_KD)
    with np.errstate(invalid="ignore"):  # 0 / 0
        ret_D = np.where(defined_KD, kept_KD, 0).sum(axis=0) / defined_KD.sum(axis=0)
    nobody = "no trained domain was ever passed: nothing could be lost" if arrived_D.any() else nobody
    return _over(np.mean, ret_D, chosen_D, nobody, "value after it arrived")


def bwt(evaluations: Evaluations) -> Measure:
    phase_D, phases, reason = _phases(evaluations)
    change_D = evaluations.rate_KD[-1] - _introduced(evaluations)
    earlier_D = (phase_D >= 0) & (phase_D < phases - 1)
    return _over(np.mean, change_D, earlier_D, reason, PHASE_ENDS)


def fwt(evaluations: Evaluations) -> Measure:
    phase_D, phases, reason = _phases(evaluations)
    if phases and (late := _late_start(evaluations)):
        return Measure(None, late)
    begins = np.unique(evaluations.arrives_D[phase_D >= 0])
    later_D = phase_D > 0
    before_D = np.full(len(phase_D), np.nan)
    before_D[later_D] = begins[phase_D[later_D] - 1]
    gain_D = _last_within(evaluations, before_D, evaluations.arrives_D) - evaluations.rate_KD[0]
    return _over(np.mean, gain_D, later_D, reason, "value at evaluation 0, or in the phase before its own")


def fwt_unseen(evaluations: Evaluations) -> Measure:
    if late := _late_start(evaluations):
        return Measure(None, late)
    if len(evaluations.at_K) < 2:
        return Measure(None, "one evaluation: nothing to compare it with")
    gain_D = evaluations.rate_KD[-1] - evaluations.rate_KD[0]
    return _over(np.mean, gain_D, ~evaluations.trained_D, "no eval-only domain", "value at evaluation 0, or at the end")


def forgetting(evaluations: Evaluations, width: int = 1) -> Measure:
    """width: evaluations in a row, odd, whose median stands for one in the maximum."""
    at_K, rate_KD, arrives_D, trained_D = evaluations
    begin = np.min(arrives_D[trained_D], initial=np.inf)
    earlier_KD = rate_KD[:-1][at_K[:-1] > begin]
    if len(earlier_KD) < width:
        return Measure(None, f"fewer than {width + 1} evaluations after training began")
    practised_D = trained_D & (arrives_D < at_K[-2])
    if width > 1:
        window_KDW = np.lib.stride_tricks.sliding_window_view(earlier_KD, width, axis=0)
        gap_KD = np.isnan(window_KDW).any(axis=-1)
        earlier_KD = np.where(gap_KD, np.nan, np.sort(window_KDW, axis=-1)[..., width // 2])
    loss_D = np.fmax.reduce(earlier_KD) - rate_KD[-1]
    return _over(np.mean, loss_D, practised_D, "no domain was trained on early enough", "value before and at the end")


def forgetting_first(evaluations: Evaluations) -> Measure:
    phase_D, phases, reason = _phases(evaluations)
    loss_D = _introduced(evaluations) - evaluations.rate_KD[-1]
    loss_P = np.array([loss_D[phase_D == phase].mean() for phase in range(phases - 1)])
    return _over(np.mean, loss_P, np.full(len(loss_P), True), reason, PHASE_ENDS, "phase")


def time_to_decay(runs: Sequence[Evaluations], alpha: float = 0.9) -> Measure:
    """Kaplan-Meier median over the domains of one or several runs, observed from their arrivals on (decay.py)."""
    found = [
        decay.decay(run.at_K, run.rate_KD[:, d], run.arrives_D[d], alpha)
        for run in runs
        for d in np.flatnonzero(_arrived(run)[0])
    ]
    times = [time for time in found if time is not None]
    if not times:
        return Measure(None, "no trained domain was ever passed")
    median = decay.median(times)
    if median is None:
        decayed = sum(time.observed for time in times)
        return Measure(None, f"censored: {decayed} of {len(times)} decayed, fewer than the median needs")
    return Measure(median, "")


def _over(reduce, values, chosen, nobody: str, needed: str, kind: str = "domain") -> Measure:
    """`reduce` of values[chosen], or why not: `nobody` where none is chosen, else the first that lacks `needed`."""
    if not chosen.any():
        return Measure(None, nobody)
    missing = np.flatnonzero(chosen & np.isnan(values))
    if missing.size:
        return Measure(None, f"{kind} {missing[0]} has no {needed}")
    return Measure(float(reduce(values[chosen])), "")


def _arrived(evaluations: Evaluations) -> tuple[np.ndarray, str]:
    """(bool [D] trained domains that may have been trained on by the last evaluation, why there is none)."""
    arrived_D = evaluations.trained_D & (evaluations.arrives_D < evaluations.at_K[-1])
    return arrived_D, "no domain was trained on before the last evaluation"


def _phases(evaluations: Evaluations) -> tuple[np.ndarray, int, str]:
    """(i64 [D] which phase introduced the domain, -1 where none did; how many there are; why, if fewer than two)."""
    arrived_D, nobody = _arrived(evaluations)
    begins, phase = np.unique(evaluations.arrives_D[arrived_D], return_inverse=True)
    phase_D = np.full(len(arrived_D), -1)
    phase_D[arrived_D] = phase
    return phase_D, len(begins), ONE_PHASE if len(begins) else nobody


def _introduced(evaluations: Evaluations) -> np.ndarray:
    """R_i,i of each domain, NaN where its phase has no evaluation with a value or it has not arrived."""
    phase_D, _, _ = _phases(evaluations)
    begins = np.unique(evaluations.arrives_D[phase_D >= 0])
    ends = np.append(begins[1:], [np.inf, np.nan])  # the last phase is open, phase -1 never is
    return _last_within(evaluations, evaluations.arrives_D, ends[phase_D])


def _last_within(evaluations: Evaluations, low_D: np.ndarray, high_D: np.ndarray) -> np.ndarray:
    """Each domain's last value in (low, high], NaN where there is none."""
    at_K1, rate_KD = evaluations.at_K[:, None], evaluations.rate_KD
    inside_KD = (at_K1 > low_D) & (at_K1 <= high_D) & ~np.isnan(rate_KD)
    last_D = len(at_K1) - 1 - np.argmax(inside_KD[::-1], axis=0)
    return np.where(inside_KD.any(axis=0), np.take_along_axis(rate_KD, last_D[None], axis=0)[0], np.nan)


def _late_start(evaluations: Evaluations) -> str:
    """Why evaluation 0 is not of the untrained checkpoint; "" where it is."""
    begin = np.min(evaluations.arrives_D[evaluations.trained_D], initial=np.inf)
    first = evaluations.at_K[0]
    return f"no evaluation of the untrained checkpoint: the first is at {first:g}" if first > begin else ""


def _time_mean(evaluations: Evaluations, start_D: np.ndarray) -> np.ndarray:
    """Mean over time of each domain's rate from `start` to the last evaluation, NaN where it has no such span."""
    at_K, rate_KD = evaluations.at_K, evaluations.rate_KD
    missing_KD = np.isnan(rate_KD)
    if missing_KD.any():
        rate_KD, start_D = rate_KD.copy(), start_D.copy()
        for d in np.flatnonzero(missing_KD.any(axis=0) & ~missing_KD[-1]):
            known_K = ~missing_KD[:, d]
            rate_KD[:, d] = np.interp(at_K, at_K[known_K], rate_KD[known_K, d])
            start_D[d] = max(start_D[d], at_K[known_K][0])
    start_D = np.maximum(start_D, at_K[0])
    low_KD, high_KD = at_K[:-1, None], at_K[1:, None]
    from_KD = np.clip(start_D, low_KD, high_KD)  # a segment counts from there to its end
    slope_KD = np.diff(rate_KD, axis=0) / (high_KD - low_KD)
    area_KD = (high_KD - from_KD) * (rate_KD[1:] - slope_KD * (high_KD - from_KD) / 2)
    span_D = at_K[-1] - start_D
    return np.where(span_D > 0, area_KD.sum(axis=0) / np.where(span_D > 0, span_D, 1), np.nan)
