"""What all pictures of a run share: colours by role, rows as arrays, and axes with little ink.

Colours are the report page's light ones; the page replaces each by a variable of its style sheet, so that one picture
serves light and dark. Hues: blue against orange, and those of Okabe and Ito (2008) and of Tol (2021), told apart under
every colour blindness; no meaning rests on hue alone.

Figures are made without pyplot: nothing is kept in a global list, no display is asked for.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

DPI = 72  # 1 point = 1 pixel: sizes below are pixels of the page
INK, MUTED, LINE, CARD = "#1c2126", "#5b6571", "#d9dee4", "#fefefe"
HELD, SHARE = "#0b559f", "#b34700"  # held-out pass rate; share of the batch
TINTS = ("#f8d5bf", "#ebebe8", "#cee3f2")  # of the bands low, medium, high
GRADES = ("#b85304", "#f2bd93", "#a9cce9", "#0d5aa3")  # 1 to 4; a pass is blue
TERMS = {
    "band": ("#0072b2", "band"),
    "staleness": ("#e69f00", "staleness"),
    "uncertainty": ("#009e73", "uncertainty"),
    "base": ("#8d6fa8", "weight and boost"),
}
LAYERS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00")
PHASES = {"rollout": "#77aade", "grade": "#eedd89", "update": "#ee8867", "evaluate": "#45bb99"}
COLUMNS = 400  # steps that an area or a tint keeps apart; a picture has few more pixels
SMALL, TEXT = 10, 11  # pixels


def column(rows: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(step_K, value_K), f64: NaN where the key is absent or null."""
    values = [row.get(key) for row in rows]
    return (
        np.array([row["step"] for row in rows], np.float64),
        np.array([math.nan if value is None else value for value in values], np.float64),
    )


def logged(rows: Sequence[dict], key: str) -> bool:
    """Whether any row has a value under the key."""
    return any(row.get(key) is not None for row in rows)


def trained_now(rows: Sequence[dict], name: str) -> np.ndarray:
    """bool [K]: the domain had a share at the row's step; all True where shares are not logged."""
    if not logged(rows, f"triage/share/{name}"):
        return np.ones(len(rows), bool)
    return column(rows, f"triage/share/{name}")[1] > 0


def thinned(rows: Sequence[dict], most: int = 1200) -> list[dict]:
    """At most about `most` rows, evenly taken, and with them every evaluation and the last row."""
    every = max(1, -(-len(rows) // most))
    return [row for i, row in enumerate(rows) if i % every == 0 or "eval/macro" in row or i == len(rows) - 1]


def binned(values_KD: np.ndarray, most: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """(index of each bin's first row, means over the bin): at most `most` bins."""
    start = np.unique(np.linspace(0, len(values_KD), min(most, len(values_KD)), endpoint=False).astype(int))
    size = np.diff(np.append(start, len(values_KD)))
    return start, np.add.reduceat(values_KD, start) / size.reshape(-1, *[1] * (values_KD.ndim - 1))


def blank(width: float, height: float, left=34, right=10, top=8, bottom=22) -> tuple[Figure, Axes]:
    """A figure of so many pixels, its one axes inset by the margins."""
    figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    return figure, plain(axes)


def plain(axes: Axes) -> Axes:
    """Axes with little ink: no box, faint horizontal lines, whole steps below."""
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.spines["bottom"].set_linewidth(0.8)
    axes.tick_params(colors=MUTED, labelsize=SMALL, length=0, pad=4)
    axes.grid(axis="y", color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    return axes


def fitted(names: Sequence[str], room: float, size: float = SMALL) -> list[str]:
    """The names as they fit into so many pixels, the end of a long one cut off."""
    most = max(int(room / (0.62 * size)), 4)
    return [name if len(name) <= most else f"{name[: most - 1]}…" for name in names]


def left_names(axes: Axes, names: Sequence[str], size: float = SMALL) -> None:
    """Names of the lines 0, 1, ... at the left, cut to the margin."""
    room = axes.get_position().x0 * axes.figure.get_figwidth() * DPI - 8
    axes.set_yticks(range(len(names)), fitted(names, room, size), color=INK, fontsize=size, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)


def steps(axes: Axes, rows: Sequence[dict]) -> None:
    first, last = rows[0]["step"], rows[-1]["step"]
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def rates(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks((0, 0.5, 1), ("0", ".5", "1"))


def blocks(axes: Axes, spans: Iterable[tuple[float, float]], low: float, high: float, **style) -> None:
    """Rectangles over [start, end] x [low, high] as one path: a thousand of them stay small in a file."""
    corners = [xy for a, b in spans for xy in ((a, low), (a, high), (b, high), (b, low), (a, low))]
    if corners:
        codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
        axes.add_patch(PathPatch(Outline(corners, codes * (len(corners) // 5)), lw=0, **style))


def runs(flag_K: np.ndarray) -> list[tuple[int, int]]:
    """Stretches [first, end) where the flag holds."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flag_K.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
