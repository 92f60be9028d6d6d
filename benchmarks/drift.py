"""Alarms of the drift detector, false and true, in simulated domains whose pass rate is known.

    python -m benchmarks.drift [--runs 1000] [--seed 0] [--thresholds 8 12] [--groups 4 13] [--spread 1]

A domain is visited 1,000 times with n groups of G = 8 responses each. Its prompts are unequal: a group passes with
probability sigmoid(theta + spread N(0, 1)), theta such that the mean over prompts is p (0: all alike). Columns:

    p=.1, .5, .9   false alarms a domain and 1,000 visits where p stays
    rising         the same where p rises from .1 to .9 in equal steps of log-odds
    .9->.8, .9->.7, ramp   p falls at visit 200 (ramp: to .6 over 200 visits, in equal steps of log-odds): share of runs
                   with an alarm within 300 visits @ the median number of visits until then

Every run is a domain of one state, moved by curriculum/feedback.py as training moves it. In brackets stand 95 %
intervals: exact Poisson for alarms, Wilson for shares, order statistics for medians. The row below gives the figures of
the method's specification, from 100 to 200 runs.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logit
from scipy.stats import binom, chi2

from configs.cli import compose_config
from curriculum import policies
from curriculum.triage import DomainStats, roster
from infinite_jax.statistics import wilson

SAMPLES = 8  # G
VISITS, FALL, WINDOW = 1000, 200, 300
LEVELS = ("p=.1", "p=.5", "p=.9", "rising")
FALLS = (".9->.8", ".9->.7", "ramp")
SPECIFIED = {
    (8.0, 4): ("0", ".02", ".10", "0", ".99@10", "1@4", "1@74"),
    (8.0, 13): ("0", ".05", ".03", "-", "1@4", "-", "1@48"),
    (12.0, 4): ("0", "0", "0", "0", ".99@15", "1@6", "1@100"),
    (12.0, 13): ("0", "0", "0", "-", "1@6", "-", "1@60"),
}


def scenarios() -> dict[str, np.ndarray]:
    """Log-odds of the mean pass rate by visit, [VISITS]."""
    visit = np.arange(VISITS)

    def through(visits, *rates):
        return np.interp(visit, visits, logit(rates))

    return {
        "p=.1": through([0], 0.1),
        "p=.5": through([0], 0.5),
        "p=.9": through([0], 0.9),
        "rising": through([0, VISITS], 0.1, 0.9),
        ".9->.8": through([FALL - 1, FALL], 0.9, 0.8),
        ".9->.7": through([FALL - 1, FALL], 0.9, 0.7),
        "ramp": through([FALL, FALL + 200], 0.9, 0.6),
    }


def simulator(threshold: float, runs: int, groups: int, spread: float):
    """Jitted (key, log-odds f32[T]) -> bool[T, runs], whether a visit ended in an alarm."""
    overrides = [f"curriculum.drift.threshold={threshold}"]
    config = compose_config("config", None, overrides).curriculum
    policy = policies.build(config)
    n_D = jnp.full(runs, groups, jnp.float32)
    widened = (1 + np.pi * spread**2 / 8) ** 0.5  # keeps the mean over prompts near p (MacKay 1992)

    def visit(state, given):
        key, odds = given
        key_prompt, key_pass = jax.random.split(key)
        shift_DN = spread * jax.random.normal(key_prompt, (runs, groups))
        p_DN = jax.nn.sigmoid(odds * widened + shift_DN)
        rate_DN = jnp.mean(jax.random.uniform(key_pass, (SAMPLES, runs, groups)) < p_DN, axis=0)
        zero_D = jnp.zeros(runs)
        sums = dict(n_groups=n_D, pass_sum=rate_DN.sum(1), pass_sq_sum=(rate_DN**2).sum(1), tried=n_D)
        sums |= dict(n_grades=n_D, grade_sum=2 * n_D, grade_sq_sum=4 * n_D)  # grades play no part here
        stats = DomainStats(**{name: sums.get(name, zero_D) for name in DomainStats._fields})
        state = policy.update(state, stats)
        return state, state.drift_left == config.drift.patience  # as an alarm leaves it

    def simulate(key, odds_T):
        state = policy.init(0, roster(runs))
        return jax.lax.scan(visit, state, (jax.random.split(key, VISITS), odds_T))[1]

    return jax.jit(simulate)


def alarms_per_thousand(at_TR: np.ndarray) -> str:
    """Mean over runs with the exact Poisson interval of the total."""
    total, runs = int(at_TR.sum()), at_TR.shape[1]
    low = chi2.ppf(0.025, 2 * total) / 2 if total else 0.0
    high = chi2.ppf(0.975, 2 * total + 2) / 2
    return f"{total / runs:.3f} [{low / runs:.3f}, {high / runs:.3f}]"


def detection(at_TR: np.ndarray) -> str:
    """rate [interval] @ median visits [interval]; runs without an alarm count as later than all others."""
    seen_TR = at_TR[FALL : FALL + WINDOW]
    found_R = seen_TR.any(0)
    runs, (low, high) = found_R.size, wilson(found_R.sum(), found_R.size)
    delay_R = np.sort(np.where(found_R, seen_TR.argmax(0) + 1.0, np.inf))
    rank = int(binom.ppf(0.025, runs, 0.5))
    middle = f"{np.median(delay_R):.0f} [{delay_R[max(rank - 1, 0)]:.0f}, {delay_R[min(runs - rank, runs - 1)]:.0f}]"
    return f"{found_R.mean():.3f} [{low:.3f}, {high:.3f}] @ {middle}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[8.0, 12.0])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 13])
    parser.add_argument("--spread", type=float, default=1.0)
    args = parser.parse_args()
    device, start = jax.devices()[0], time.perf_counter()
    print(
        f"{device.platform} ({device.device_kind}), {args.runs} runs a cell, seed {args.seed}, spread {args.spread:g}"
    )
    print("| threshold | n | " + " | ".join((*LEVELS, *FALLS)) + " |")
    print("|---" * (2 + len(LEVELS) + len(FALLS)) + "|")
    for threshold in args.thresholds:
        for groups in args.groups:
            simulate, cells = simulator(threshold, args.runs, groups, args.spread), []
            for i, (name, odds_T) in enumerate(scenarios().items()):
                at_TR = np.asarray(simulate(jax.random.fold_in(jax.random.key(args.seed), i), odds_T))
                cells.append(detection(at_TR) if name in FALLS else alarms_per_thousand(at_TR))
            print(f"| {threshold:g} | {groups} | " + " | ".join(cells) + " |")
            if (threshold, groups) in SPECIFIED:
                print("| | specified | " + " | ".join(SPECIFIED[threshold, groups]) + " |")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
