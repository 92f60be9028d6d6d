"""Whether runs on other devices are the run of one: differences of their metrics, beside those that rounding makes.

    python -m benchmarks.alike ONE=RUN_DIR NOISE=RUN_DIR [NAME=RUN_DIR ...] [--keys reward/mean,loss,...]

Every run is compared with the first, step by step, over the steps that both have. The second is the measure: the same
run on the same device but for what only rounds its sums otherwise, such as algorithm.microbatches. "Of the measure's"
is a run's mean difference over the second's: about 1 is alike. Where one token is sampled otherwise, all that follows
goes apart.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks.measure import table
from infinite_jax import record

KEYS = "reward/mean,rollout/length,loss,policy/grad_norm,policy/kl,policy/entropy,eval/macro"
COLUMNS = ["metric", "run", "its mean", "|difference|, first step", "mean |difference|", "of the measure's", "steps"]


def values(run_dir: Path, keys: list[str]) -> dict[str, dict[int, float]]:
    """Of each key its value by step, where it has one."""
    rows = record.read(run_dir / record.METRICS)
    return {key: {row["step"]: row[key] for row in rows if row.get(key) is not None} for key in keys}


def compare(runs: dict[str, dict[str, dict[int, float]]], keys: list[str]) -> list[list]:
    """The table's rows: the first run's means, and how far the others are from it."""
    (first, one), *others = runs.items()
    rows = []
    for key in keys:
        if not one[key]:
            continue
        rows.append([key, first, float(np.mean(list(one[key].values()))), None, None, None, len(one[key])])
        measure = None
        for name, other in others:
            steps = sorted(one[key].keys() & other[key].keys())
            if not steps:
                continue
            apart = [abs(other[key][step] - one[key][step]) for step in steps]
            mean = float(np.mean(apart))
            measure = mean if name == others[0][0] else measure
            mine = float(np.mean([other[key][step] for step in steps]))
            rows.append([key, name, mine, apart[0], mean, mean / measure if measure else None, len(steps)])
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.alike", description=__doc__.splitlines()[0])
    arguments.add_argument("runs", nargs="+", metavar="NAME=RUN_DIR")
    arguments.add_argument("--keys", default=KEYS)
    given = arguments.parse_args()
    keys = given.keys.split(",")
    folders = {name: Path(folder) for name, _, folder in (run.partition("=") for run in given.runs)}
    for name, folder in folders.items():
        if not (folder / record.METRICS).is_file():
            sys.exit(f"{name}={folder}: there is no {record.METRICS} in it: name the folders of runs as NAME=RUN_DIR")
    print(table(COLUMNS, compare({name: values(folder, keys) for name, folder in folders.items()}, keys)))


if __name__ == "__main__":
    main()
