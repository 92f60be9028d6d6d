"""Draws held-out pass rates over generated tokens, one panel a domain, from the metrics.jsonl of one or more runs.

python -m benchmarks.curves OUT.png NAME=metrics.jsonl [NAME=metrics.jsonl ...]
"""

import argparse
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from infinite_jax import record

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, told apart by colour-blind readers


def series(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(thousands of generated tokens so far, value) at every row that has the key."""
    tokens = itertools.accumulate(row.get("tokens/generated") or 0 for row in rows)
    points = [(count / 1000, row[key]) for count, row in zip(tokens, rows) if row.get(key) is not None]
    return tuple(zip(*points)) if points else ([], [])


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("runs", nargs="+", metavar="NAME=metrics.jsonl")
    given = arguments.parse_args()
    runs = {name: record.read(Path(path)) for name, path in (run.split("=", 1) for run in given.runs)}
    first = next(iter(runs.values()))
    names = [key.removeprefix("eval/pass_rate/") for key in first[0] if key.startswith("eval/pass_rate/")]
    columns = 5
    rows = -(-(len(names) + 1) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(13, 2.4 * rows + 0.8), sharex=True, sharey=True, layout="constrained"
    )
    for axis, name in itertools.zip_longest(axes.flat, ["macro average", *names]):
        if name is None:
            axis.axis("off")
            continue
        keys = ("eval/macro", "eval/macro_pass_at_1")
        if name != "macro average":
            keys = (f"eval/pass_rate/{name}", f"eval/pass_at_1/{name}")
        for (run, metrics), colour in zip(runs.items(), COLOURS):
            for key, style, label in zip(keys, ("o-", "s--"), ("greedy", "pass@1, T = 1")):
                axis.plot(*series(metrics, key), style, color=colour, markersize=4, label=f"{run}, {label}")
        axis.set_title(name, fontsize=10)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    figure.supxlabel("tokens generated in training, thousands")
    figure.supylabel("held-out pass rate")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
