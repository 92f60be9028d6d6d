"""Alarms of the upgrade monitor, false and true, in simulated upgrades whose pass rates are known.

    python -m benchmarks.monitor [--runs 4000] [--seed 0] [--rate 0.7]

A run is 50 evaluations of D prior domains with n prompts each, against a baseline of N = 4n. In all domains M0 passes a
prompt with probability `rate`; from the first evaluation on the model passes those of one domain with `rate` minus the
drop. Mitigations have no effect, which is the worst case. An alert is a tier above 0. A cell is the share of runs with
an alert, and with a halt, @ the median evaluation of the first; runs without count as later than all others, so that
there is no median where less than half have one. In brackets stand 95 % intervals (Wilson), below each row the figures
of the method's specification, from 400 runs. `*` marks a share that differs from the specification's by more than two
samples of these sizes do (two-sided 5 %, and by more than its last digit).

The second table has n prompts that M0 and the model both answer. They are of two kinds, one passed often and one
seldom; the drop lowers both pass rates in proportion. `differ` is the share of prompts whose verdicts differ without a
drop. McNemar's test sees one verdict a side, the unpaired test four samples of M0, as above. `detectable` is the drop
that one evaluation calls a violation four times of five, by curriculum/drops.py.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from curriculum import drops, monitor
from infinite_jax.statistics import wilson

EVALUATIONS = 50
DROPS = (0.0, 0.03, 0.06, 0.10)
SPECIFIED_RUNS = 400
CONFIG = monitor.MonitorConfig(
    test="unpaired",
    alpha=0.05,
    delta=0.01,
    hard=0.05,
    patience=2,
    recovery=3,
    fails=3,
    boost=0.5,
    boost_cap=1.5,
    kl_scale=2.0,
    kl_per_domain=False,
    prior_share=0.3,
    prior_share_raised=0.4,
    new_scale=0.5,
)
# name, (D, n, what differs from CONFIG), and by drop the specification's (alert, @, halt, @), None where it has none
ROWS = (
    (
        "delta 1pt, z 0, K 1, n 1000, D 5",
        (5, 1000, dict(alpha=2.5, patience=1)),
        (("1.00", None, "1.00", None), None, None, None),
    ),
    (
        "delta 2pt, z 1.645, K 2, n 1000, D 20",
        (20, 1000, dict(alpha=1.0, delta=0.02)),
        (("0.94", None, "0.52", None), ("1.00", 3, None, None), ("1.00", 2, None, None), ("1.00", 1, None, 6)),
    ),
    (
        "delta 1pt, z 2.33, K 2, n 1000, D 5",
        (5, 1000, {}),
        (("0.060", None, "0.000", None), ("0.89", 9, None, None), ("1.00", 2, None, None), ("1.00", 1, "1.00", 6)),
    ),
    (
        "delta 1pt, z 2.33, K 2, n 200, D 5",
        (5, 200, {}),
        (("0.083", None, "0.000", None), ("0.27", None, None, None), ("0.79", 14, None, None), ("1.00", 2, "0.95", 12)),
    ),
    (
        "delta 1pt, z 2.81, K 2, n 1000, D 20",
        (20, 1000, {}),
        (("0.030", None, "0.000", None), ("0.58", 36, None, None), ("1.00", 2, None, None), ("1.00", 1, "1.00", 7)),
    ),
    (
        "delta 1pt, z 2.81, K 2, n 200, D 20",
        (20, 200, {}),
        (
            ("0.048", None, "0.000", None),
            ("0.08", None, None, None),
            ("0.48", None, None, None),
            ("0.98", 4, "0.70", 24),
        ),
    ),
)
# share of prompts that differ -> (pass rate, part of the prompts); the mean is .7
KINDS = {0.42: ((0.7, 1.0),), 0.22: ((0.9, 5 / 7), (0.2, 2 / 7)), 0.10: ((0.95, 13 / 18), (0.05, 5 / 18))}


@partial(jax.jit, static_argnums=0)
def tiers(config: monitor.MonitorConfig, K_RD, n_D, k_TRD, lost_TRD, gained_TRD):
    """i32[T, R], the tier after each evaluation of R runs."""
    prior_D = jnp.ones(n_D.shape, bool)

    def evaluate(state, given):
        step, *counts = given
        state, change = jax.vmap(advance, in_axes=(0, 0, None, 0, 0, 0))(state, K_RD, step, *counts)
        return state, change.tier

    def advance(state, K_D, step, k_D, lost_D, gained_D):
        return monitor.update(config, state, K_D, 4 * n_D, k_D, n_D, prior_D, step, lost_D, gained_D)

    runs = K_RD.shape[0]
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (runs, *x.shape)), monitor.init(config, n_D.size))
    return jax.lax.scan(evaluate, start, (jnp.arange(EVALUATIONS), k_TRD, lost_TRD, gained_TRD))[1]


def draw(rng: np.random.Generator, D: int, kinds: tuple, runs: int, drop: float):
    """(K_RD, n_D, k_TRD, lost_TRD, gained_TRD) of prompts in kinds of (pass rate, number).

    M0's first answer to each prompt is its verdict; all answers are independent given the prompt's pass rate, and one
    kind alone is the same as new prompts for everything but `lost` and `gained`.
    """
    n = sum(number for _, number in kinds)
    scale_D = np.where(np.arange(D) == 0, 1 - drop * n / sum(rate * number for rate, number in kinds), 1.0)
    sums = [0, 0, 0, 0]
    for rate, number in kinds:
        first_RD = rng.binomial(number, rate, (runs, D))
        rest_RD = rng.binomial(3 * number, rate, (runs, D))
        lost_TRD = rng.binomial(first_RD, 1 - rate * scale_D, (EVALUATIONS, runs, D))
        gained_TRD = rng.binomial(number - first_RD, rate * scale_D, (EVALUATIONS, runs, D))
        parts = first_RD + rest_RD, first_RD - lost_TRD + gained_TRD, lost_TRD, gained_TRD
        sums = [total + part for total, part in zip(sums, parts)]
    K_RD, *now_TRD = (total.astype(np.float32) for total in sums)
    return K_RD, np.full(D, n, np.float32), *now_TRD


def share(at_TR: np.ndarray, specified=None, at=None) -> tuple[str, str]:
    """(share [interval] @ median evaluation, the same as specified), `*` where the two shares do not agree."""
    found_R = at_TR.any(0)
    p, runs = found_R.mean(), found_R.size
    low, high = wilson(found_R.sum(), runs)
    middle = np.median(np.where(found_R, at_TR.argmax(0) + 1.0, np.inf))
    text = f"{p:.3f} [{low:.3f}, {high:.3f}]" + (f" @ {middle:.0f}" if np.isfinite(middle) else "")
    when = f" @ {at}" if at else ""
    if specified is None:
        return text, f"-{when}"
    pooled = (p * runs + float(specified) * SPECIFIED_RUNS) / (runs + SPECIFIED_RUNS)
    error = (pooled * (1 - pooled) * (1 / runs + 1 / SPECIFIED_RUNS)) ** 0.5
    digit = 0.5 * 10.0 ** -len(specified.partition(".")[2])
    mark = "*" if abs(p - float(specified)) > max(1.96 * error, digit) else ""
    return text + mark, f"{specified}{when}"


def cell(tier_TR: np.ndarray, specified=None) -> tuple[str, str]:
    alert, at, halt, halt_at = specified or (None,) * 4
    alerts, halts = share(tier_TR > 0, alert, at), share(tier_TR == monitor.HALT, halt, halt_at)
    return tuple(f"{a} / {h}" for a, h in zip(alerts, halts))


def table(head: list[str], rows) -> None:
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def specified_rows(runs: int, seed: int, rate: float):
    for i, (name, (D, n, changed), specified) in enumerate(ROWS):
        config = monitor.MonitorConfig(**vars(CONFIG) | changed)
        cells = []
        for j, drop in enumerate(DROPS):
            drawn = draw(np.random.default_rng((seed, i, j)), D, ((rate, n),), runs, drop)
            cells.append(cell(np.asarray(tiers(config, *drawn)), specified[j]))
        yield name, *(measured for measured, _ in cells)
        yield "specified", *(known for _, known in cells)


def paired_rows(runs: int, seed: int):
    D = 5
    for n in (1000, 200):
        for differ, kinds in KINDS.items():
            kinds = tuple((rate, round(part * n)) for rate, part in kinds)
            drawn = [draw(np.random.default_rng((seed, n, j)), D, kinds, runs, drop) for j, drop in enumerate(DROPS)]
            for test in ("unpaired", "exact", "midp"):
                config = monitor.MonitorConfig(**vars(CONFIG) | dict(test=test))
                variance, N = (0.21, 4 * n) if test == "unpaired" else (differ, np.inf)
                least = drops.detectable_drop(n, N, D, config.alpha, config.delta, variance, power=0.8)
                cells = [cell(np.asarray(tiers(config, *given)))[0] for given in drawn]
                yield f"{test}, n {n}", f"{differ:.2f}", f"{100 * least:.1f}", *cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.7, help="pass rate of M0, first table")
    args = parser.parse_args()
    device, start = jax.devices()[0], time.perf_counter()
    print(f"{device.platform} ({device.device_kind}), {args.runs} runs a cell, seed {args.seed}, rate {args.rate:g}\n")
    columns = ["no drop: alert / halt", *(f"{100 * drop:.0f} points" for drop in DROPS[1:])]
    table(["monitor", *columns], specified_rows(args.runs, args.seed, args.rate))
    print(f"{time.perf_counter() - start:.0f} s\n")
    table(["D 5, test", "differ", "detectable, points", *columns], paired_rows(args.runs, args.seed))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
