"""The report's pictures of the scheduler as figures for TensorBoard, beside the scalars of the same run."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from infinite_jax import panels
from infinite_jax.drawing import DPI, INK, TERMS, TEXT, blank, logged, plain, thinned

SHARP = 110  # dots an inch of an image


def board_figures(rows: Sequence[dict], names: Sequence[str]) -> dict[str, Figure]:
    """Figures by tag, for SummaryWriter.add_figure; only those that the rows have data for.

    Args:
      rows: of metrics.jsonl so far, ascending. names: of the domains.
    """
    rows, found = thinned(rows), {}
    if not rows or not names:
        return found
    found["report/stability"] = _stability(rows, names)
    shared = [name for name in names if logged(rows, f"triage/share/{name}")]
    if shared:
        figure, axes = blank(860, 380, right=150)
        panels.shares(axes, rows, shared)
        found["report/shares"] = figure
    row = next((row for row in reversed(rows) if panels.by_priority(row, names)), None)
    if row:
        found["report/queue"] = _queue(row, names)
    waiting = [name for name in names if logged(rows, f"triage/staleness/{name}")]
    if waiting:
        figure, axes = blank(860, 60 + 18 * len(waiting), left=150, right=24, top=28)
        top = panels.heat(axes, rows, waiting, "triage/staleness", panels.FULL_WAIT)
        axes.set_title(f"steps since last tried; full colour: {top:.0f}", fontsize=TEXT, color=INK)
        found["report/staleness"] = figure
    for figure in found.values():
        figure.set_dpi(SHARP)
    return found


def _queue(row: dict, names: Sequence[str]) -> Figure:
    figure, axes = blank(700, 80 + 24 * len(panels.by_priority(row, names)), left=150, top=50)
    panels.queue(axes, row, names)
    axes.set_title(f"priority after step {row['step']}, log units", loc="left", fontsize=TEXT, color=INK, pad=24)
    handles = [Patch(color=colour, label=label) for colour, label in TERMS.values()]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), frameon=False, fontsize=TEXT
    )
    return figure


def _stability(rows: Sequence[dict], names: Sequence[str], columns: int = 4) -> Figure:
    lines = -(-len(names) // columns)
    figure = Figure((columns * 240 / DPI, lines * 160 / DPI), facecolor="white", layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, name in zip(grid.flat, names):
        panels.stability(plain(axes), rows, name)
        axes.set_title(name, loc="left", fontsize=TEXT, color=INK, parse_math=False)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    return figure
