"""How long a domain's pass rate holds: time to decay, right-censored, and the Kaplan-Meier median over many.

The clock of a domain starts at its peak, the first evaluation with its highest rate since `since` (its arrival, or the
end of practice where a probe withholds it). It has decayed at the first of two consecutive evaluations with a rate
below alpha times the peak, since one may be noise; if that has not come by the last evaluation, its time is censored
there: it is at least so long. Dropping such times, or taking them for decays, would make forgetting look faster.

    S(t) = prod_{t_j <= t} (1 - d_j / n_j)      median = the smallest t with S(t) <= 1/2

Kaplan and Meier 1958 (JASA 53:457), by scipy.stats.ecdf. The peak of noisy evaluations is too high and moves towards
the luckiest, so times of small evaluations are too short. Observed in a run where the domain is practised on, the time
is also the scheduler's doing: only a probe measures the model alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import CensoredData, ecdf


class Decay(NamedTuple):
    time: float  # from the peak, on the axis of the evaluations
    observed: bool  # False: censored, the rate held at least so long


def decay(at_K: np.ndarray, rate_K: np.ndarray, since: float, alpha: float = 0.9) -> Decay | None:
    """Time to decay of one domain; None where it has no value from `since` on, or never passed.

    NaN rates are left out: the evaluations on both sides of a gap are consecutive.
    """
    known_K = (at_K >= since) & ~np.isnan(rate_K)
    at_K, rate_K = at_K[known_K], rate_K[known_K]
    if not rate_K.size or rate_K.max() <= 0:
        return None
    peak = int(np.argmax(rate_K))
    low_K = rate_K[peak:] < alpha * rate_K[peak]
    decayed = np.flatnonzero(low_K[:-1] & low_K[1:])
    end = peak + decayed[0] if decayed.size else -1
    return Decay(float(at_K[end] - at_K[peak]), bool(decayed.size))


def median(decays: Sequence[Decay]) -> float | None:
    """Kaplan-Meier median; None where more than half are expected to hold longer than the longest observation."""
    observed = [decay.time for decay in decays if decay.observed]
    censored = [decay.time for decay in decays if not decay.observed]
    survival = ecdf(CensoredData(uncensored=observed, right=censored)).sf
    reached = np.flatnonzero(survival.probabilities <= 0.5 + 1e-12)  # products of fractions, rounded
    return float(survival.quantiles[reached[0]]) if reached.size else None
