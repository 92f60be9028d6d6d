"""Pictures of a run: rows of metrics.jsonl -> drawings on matplotlib axes, for the report page and TensorBoard.

Every function takes axes and rows and draws one thing; the caller chooses size and titles. A key that a run does not
log draws nothing, a null is a gap.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from infinite_jax.drawing import (
    CARD,
    COLUMNS,
    DPI,
    GRADES,
    HELD,
    INK,
    LAYERS,
    LINE,
    MUTED,
    PHASES,
    SHARE,
    SMALL,
    TERMS,
    TEXT,
    TINTS,
    binned,
    blocks,
    column,
    fitted,
    left_names,
    rates,
    runs,
    steps,
    trained_now,
)

FULL_WAIT = 10  # steps; a run whose longest wait is shorter stays pale
MOST_LAYERS = 24  # of the picture of shares; more could not be told apart

# ---- what a domain did


def stability(axes: Axes, rows: Sequence[dict], name: str, thresholds: tuple[float, float] = (0.4, 0.8)) -> None:
    """Pass rate of one domain: moving average of training (line), held-out (points), the band behind them.

    Both average and band are those after the row's update; nothing is drawn while the domain had no share.
    """
    here_K = trained_now(rows, name)
    step_K, band_K = column(rows, f"triage/band/{name}")
    end_K = np.append(step_K[1:], step_K[-1])
    for band, tint in enumerate(TINTS):
        spans = ((step_K[a], end_K[b - 1]) for a, b in runs(here_K & (band_K == band)))
        blocks(axes, spans, -0.03, 1.03, facecolor=tint, zorder=0)
    for threshold in thresholds:
        axes.axhline(threshold, color=MUTED, lw=0.6, dashes=(2, 3))
    ema_K = column(rows, f"triage/acc_ema/{name}")[1]
    if not np.isnan(ema_K).all():
        axes.plot(step_K, np.where(here_K, ema_K, math.nan), color=INK, lw=1.4)
    else:
        step_K, rate_K = column(rows, f"pass_rate/{name}")
        axes.plot(step_K, rate_K, color=INK, lw=1, alpha=0.7)
    held_out(axes, rows, f"eval/pass_rate/{name}")
    steps(axes, rows)
    rates(axes)
    axes.grid(False)


def held_out(axes: Axes, rows: Sequence[dict], key: str, colour: str = HELD, style: str = "o-") -> None:
    """The points of the evaluations."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if found:
        few = len(found) <= 40
        axes.plot(*zip(*found), style if few else "-", color=colour, lw=1.3, ms=4.4, mec=CARD, mew=0.8, clip_on=False)


def macro(axes: Axes, rows: Sequence[dict]) -> None:
    """Held-out macro average: greedy, and pass@1 where it was measured."""
    held_out(axes, rows, "eval/macro_pass_at_1", SHARE, "s--")
    held_out(axes, rows, "eval/macro")
    steps(axes, rows)
    rates(axes)


def shares(axes: Axes, rows: Sequence[dict], names: Sequence[str], most: int = MOST_LAYERS) -> None:
    """Shares of the prompts over time, one on the other, named at the right; marks below: single-domain steps.

    Beyond `most` domains those with the smallest mean share are one layer.
    """
    rows = [row for row in rows if any(row.get(f"triage/share/{name}") is not None for name in names)]
    if not rows:
        return
    share_KD = np.nan_to_num(np.stack([column(rows, f"triage/share/{name}")[1] for name in names], axis=1))
    kept = [d for d in range(len(names)) if share_KD[:, d].any()]
    if len(kept) > most:
        kept = sorted(np.argsort(-share_KD.mean(0), kind="stable")[: most - 1].tolist())
    rest_K = share_KD.sum(1) - share_KD[:, kept].sum(1)
    labels = [names[d] for d in kept] + ([f"{len(names) - len(kept)} others"] if rest_K.max() > 1e-6 else [])
    layer_KL = np.column_stack([share_KD[:, kept], *([rest_K] if len(labels) > len(kept) else [])])
    step_K = column(rows, "step")[0]
    start, layer_KL = binned(layer_KL)
    edges = np.append(step_K[start] - 1, step_K[-1])  # the share of step s is that of the draw between s - 1 and s
    low_K = np.zeros(len(start))
    for layer, label_K in enumerate(layer_KL.T):
        high_K, colour = low_K + label_K, LAYERS[layer % len(LAYERS)]
        axes.fill_between(
            edges, np.append(low_K, low_K[-1]), np.append(high_K, high_K[-1]), step="post", color=colour, lw=0
        )
        axes.stairs(high_K, edges, baseline=None, color=CARD, lw=0.5)
        low_K = high_K
    _beside(axes, np.cumsum(layer_KL[-1]) - layer_KL[-1] / 2, labels)
    single = [row["step"] for row in rows if row.get("curriculum/single_domain")]
    if len(single) <= COLUMNS:
        blocks(axes, ((step - 1, step) for step in single), -0.035, -0.012, facecolor=INK, clip_on=False)
    steps(axes, rows)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.04, 1.0))
    axes.set_yticks((0, 0.5, 1), ("0", ".5", "1"))


def _beside(axes: Axes, wanted_L: np.ndarray, labels: Sequence[str]) -> None:
    """Labels at the right edge near the heights wanted, moved apart where they would overlap."""
    room = (1 - axes.get_position().x1) * axes.figure.get_figwidth() * DPI - 30
    labels = fitted(labels, room)
    height = axes.get_position().height * axes.figure.get_figheight() * DPI
    px = 1 / (axes.get_position().width * axes.figure.get_figwidth() * DPI)
    gap = min((SMALL + 1.5) / height, 1 / max(len(labels), 1))
    at_L = np.maximum.accumulate(wanted_L - gap * np.arange(len(labels))) + gap * np.arange(len(labels))
    over = max(at_L[-1] - (1 - gap / 2), 0)
    at_L = np.minimum(at_L, 1 - gap / 2 - gap * np.arange(len(labels))[::-1]) if over else at_L
    for layer, (label, wanted, at) in enumerate(zip(labels, wanted_L, at_L)):
        colour = LAYERS[layer % len(LAYERS)]
        axes.plot(
            (1, 1 + 9 * px, 1 + 18 * px),
            (wanted, at, at),
            transform=axes.transAxes,
            color=colour,
            lw=1.6,
            clip_on=False,
        )
        axes.text(
            1 + 24 * px, at, label, transform=axes.transAxes, va="center", fontsize=SMALL, color=INK, parse_math=False
        )


def queue(axes: Axes, row: dict, names: Sequence[str]) -> None:
    """Priorities of one row, highest first, each as its four terms (log units) side by side, their sum as a point.

    The band term counts from the lowest one here: a constant added to every priority changes no share.
    """
    order = by_priority(row, names)
    lowest = min(row[f"triage/priority_band/{name}"] for name in order)
    for place, name in enumerate(order):
        ends = {+1: 0.0, -1: 0.0}
        for term, (colour, _) in TERMS.items():
            value = row[f"triage/priority_{term}/{name}"] - (lowest if term == "band" else 0)
            side = 1 if value >= 0 else -1
            axes.barh(place, value, 0.62, left=ends[side], color=colour, lw=0)
            ends[side] += value
        axes.plot(sum(ends.values()), place, "D", color=INK, ms=5, mec=CARD, mew=0.9, clip_on=False)
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.use_sticky_edges = False
    left_names(axes, order, TEXT)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LINE, lw=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def by_priority(row: dict, names: Sequence[str]) -> list[str]:
    """The domains that have all four terms in this row and a share, highest priority first."""

    def terms(name: str) -> list:
        return [row.get(f"triage/priority_{term}/{name}") for term in TERMS]

    here = [name for name in names if None not in terms(name) and row.get(f"triage/share/{name}") != 0]
    return sorted(here, key=lambda name: -sum(terms(name)))


def heat(
    axes: Axes, rows: Sequence[dict], names: Sequence[str], key: str, least: float = 1e-9, marks: str = ""
) -> float:
    """One line a domain, the darker the larger `key`/<domain>; crosses where `marks`/<domain> is set.

    Full colour is the largest value, or `least` where all are smaller; it is returned.

    An image of one hue whose opacity is the value, so that it reads on light and dark.
    """
    value_KD = np.stack([column(rows, f"{key}/{name}")[1] for name in names], axis=1)
    value_KD = np.where(np.stack([trained_now(rows, name) for name in names], axis=1), value_KD, math.nan)
    start = np.unique(np.linspace(0, len(rows), min(COLUMNS, len(rows)), endpoint=False).astype(int))
    largest_KD = np.fmax.reduceat(value_KD, start)  # a rare long wait must not be averaged away
    top = max(float(np.fmax.reduce(largest_KD, axis=None, initial=0.0)), least)
    rgba = np.zeros((len(names), len(start), 4))
    rgba[..., :3] = colors.to_rgb("#3a8fd0")
    rgba[..., 3] = np.nan_to_num(np.clip(largest_KD / top, 0, 1)).T
    first, last = rows[0]["step"], rows[-1]["step"]
    axes.imshow(rgba, aspect="auto", interpolation="none", extent=(first - 1, last, len(names) - 0.5, -0.5), zorder=1)
    for line, name in enumerate(names):
        step_K, flag_K = column(rows, f"{marks}/{name}")
        at = step_K[np.nan_to_num(flag_K) > 0]
        axes.plot(at, np.full(len(at), line), "X", color=SHARE, ms=6, mec=CARD, mew=0.8, zorder=3)
    left_names(axes, names)
    steps(axes, rows)
    axes.set_xlim(first - 1, last)
    axes.grid(False)
    for line in range(len(names) + 1):
        axes.axhline(line - 0.5, color=LINE, lw=0.6)
    return top


# ---- what the whole run did


def curve(axes: Axes, rows: Sequence[dict], key: str, colour: str = HELD) -> None:
    """One number over time; from 60 steps on every step faint, a running mean over a twentieth of the run strong."""
    step_K, value_K = column(rows, key)
    known = ~np.isnan(value_K)
    step_K, value_K = step_K[known], value_K[known]
    window = len(value_K) // 20
    if window >= 3:
        axes.plot(step_K, value_K, color=colour, lw=0.8, alpha=0.35)
        weight_K = np.convolve(np.ones(len(value_K)), np.ones(window), "same")
        value_K = np.convolve(value_K, np.ones(window), "same") / weight_K
    axes.plot(step_K, value_K, "o-" if len(value_K) <= 12 else "-", color=colour, lw=1.5, ms=3.6)
    steps(axes, rows)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.margins(y=0.08)


def grade_bars(axes: Axes, fractions: dict[str, Sequence[np.ndarray]]) -> None:
    """Grades 1 to 4 of each domain as parts of a bar: fails left of zero, passes right of it.

    Args:
      fractions: by domain, f64[4] for each evaluation to compare, one bar each, the first above.
    """
    for place, parts in enumerate(fractions.values()):
        height = 0.8 / len(parts)
        for side, part in enumerate(parts):
            at, left = place + (side - (len(parts) - 1) / 2) * (height + 0.04), -part[0] - part[1]
            for grade, width in enumerate(part):
                axes.barh(at, width, height - 0.04, left=left, color=GRADES[grade], lw=0)
                left += width
        axes.axhline(place + 0.5, color=LINE, lw=0.6)
    axes.axvline(0, color=INK, lw=0.9)
    left_names(axes, list(fractions), TEXT)
    axes.set_xlim(-1.02, 1.02)
    axes.set_xticks((-1, -0.5, 0, 0.5, 1), ("all fail", "half", "", "half", "all pass"))
    axes.grid(axis="y", visible=False)


def grade_history(axes: Axes, at: Sequence[int], fraction_K4: np.ndarray) -> None:
    """Grades 1 to 4 over the evaluations, as parts of the whole."""
    low_K = np.zeros(len(at))
    for grade in range(4):
        high_K = low_K + fraction_K4[:, grade]
        axes.fill_between(at, low_K, high_K, color=GRADES[grade], lw=0)
        axes.plot(at, high_K, color=CARD, lw=0.8)
        low_K = high_K
    steps(axes, [{"step": at[0]}, {"step": at[-1]}])
    axes.set_ylim(0, 1)
    axes.set_yticks((0, 0.5, 1), ("0", ".5", "1"))


def seconds(axes: Axes, rows: Sequence[dict]) -> None:
    """Wall time of each step by phase, one on the other; compilation is inside the phase that waited for it."""
    rows = [row for row in rows if row["step"] > 0]
    if not rows:
        return
    phase_KF = np.nan_to_num(np.stack([column(rows, f"time/{phase}_s")[1] for phase in PHASES], axis=1))
    start, phase_KF = binned(phase_KF)
    edges = np.append(column(rows, "step")[0][start] - 1, rows[-1]["step"])
    low_K = np.zeros(len(start))
    for (_, colour), part_K in zip(PHASES.items(), phase_KF.T):
        axes.stairs(low_K + part_K, edges, baseline=low_K, fill=True, color=colour, lw=0)
        low_K = low_K + part_K
    usual = np.median(low_K)
    axes.set_ylim(0, min(low_K.max(), 6 * usual) * 1.05 or 1)  # the first step compiles for many times a step's time
    steps(axes, [{"step": 0}, rows[-1]])
    axes.yaxis.set_major_locator(MaxNLocator(3))
