"""Draws first-run.png from a run: python docs/images/first_run.py RUN_DIR (needs matplotlib)."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from infinite_jax import record

BANDS = ("low", "medium", "high")
TINTS = ("#f7d3bd", "#ececec", "#cfe3f1")  # of the bands; blue and orange tell apart under every colour blindness
PASS, SHARE = "#0b559f", "#b34700"


def domain_panel(axes, rows: list[dict], name: str) -> set[int]:
    """Held-out pass rate, share of the batch, and behind them the band that the share was drawn under."""
    steps = [row["step"] for row in rows[1:]]
    # a row's band is that after its update: the draw of a step saw the band before, at first that of an unknown domain
    bands = [BANDS.index("medium")] + [row[f"triage/band/{name}"] for row in rows[1:-1]]
    for step, band in zip(steps, bands):
        axes.axvspan(step - 1, step, color=TINTS[band], lw=0)
    shares = [row[f"triage/share/{name}"] for row in rows[1:]]
    axes.stairs(shares, [0, *steps], baseline=None, color=SHARE, lw=1.6)
    points(axes, rows, f"eval/pass_rate/{name}", PASS)
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
    return set(bands)


def points(axes, rows: list[dict], key: str, colour: str) -> None:
    """The curve of the evaluations, its first and last value written beside it."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    axes.plot(*zip(*found), color=colour, lw=2, marker="o", ms=4.5)
    (_, first), (_, second), (_, last) = found[0], found[1], found[-1]
    label(axes, 0, first, colour, above=second <= first < 0.85, right=12 if first < 0.05 else 5)
    label(axes, found[-1][0], last, colour, above=last < 0.85, right=-2)


def label(axes, step: int, value: float, colour: str, above: bool, right: int) -> None:
    axes.annotate(
        f"{value:.2f}",
        (step, value if above else max(value, 0.14)),  # never below the axis
        (right, 6 if above else -6),
        textcoords="offset points",
        ha="left" if right > 0 else "right",
        va="bottom" if above else "top",
        fontsize=9.5,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.6},
    )


def main() -> None:
    rows = record.read(Path(sys.argv[1]) / "metrics.jsonl")
    names = [key.removeprefix("triage/band/") for key in rows[1] if key.startswith("triage/band/")]
    figure, grid = plt.subplots(3, 3, figsize=(9.2, 7.0), sharex=True, sharey=True, layout="constrained")
    shown = set().union(*(domain_panel(axes, rows, name) for axes, name in zip(grid.flat, names)))
    last = grid.flat[len(names)]
    points(last, rows, "eval/macro", "black")
    last.set_title("macro average (held-out)", loc="left", fontsize=11, fontweight="bold")
    for axes in grid.flat:
        axes.set(xlim=(0, rows[-1]["step"]), ylim=(-0.03, 1.05), yticks=(0, 0.5, 1))
        axes.tick_params(labelsize=9.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step (one update of the policy)", fontsize=10.5)
    figure.supylabel("pass rate / share of the batch", fontsize=10.5)
    figure.legend(
        handles=[
            Line2D([], [], color=PASS, lw=2, marker="o", ms=4.5, label="held-out pass rate"),
            Line2D([], [], color=SHARE, lw=1.6, label="share of the batch"),
            *(Patch(color=TINTS[band], label=f"band {BANDS[band]}") for band in sorted(shown)),
        ],
        loc="outside upper center",
        ncols=5,
        frameon=False,
        fontsize=10,
    )
    figure.savefig(Path(__file__).with_name("first-run.png"), dpi=180)


if __name__ == "__main__":
    main()
