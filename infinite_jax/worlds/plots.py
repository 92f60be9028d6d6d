"""Pictures of an ablation, PNG: stability curves, shares over time and retention of chosen arms, and gains of all arms.

Curves are those of the first seed, on which every arm met the same domains (a mean over seeds would mix domains that
have nothing in common but their number); thick lines are means over seeds. What a picture needs is kept in
RUN_DIR/curves/, so that arms which are not run again can be drawn again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infinite_jax.retention import curves
from infinite_jax.statistics import t_interval
from infinite_jax.worlds.table import Runs, Values, differences, names

COLOURS = matplotlib.colormaps["turbo"]
GAIN_COLOURS = matplotlib.colormaps["tab10"]
AXES = {"real": "generated tokens"}  # world -> axis of its evaluations; else the step


class Curve(NamedTuple):
    """What is kept of one arm in one regime."""

    at_K: np.ndarray  # of the first seed, and so are
    rate_KD: np.ndarray  # NaN before a domain arrives
    kept_KD: np.ndarray  # rate / highest so far
    trained_D: np.ndarray
    share_TD: np.ndarray  # [0, 0] where the world keeps none
    seed_S: np.ndarray
    macro_SK: np.ndarray  # mean over the trained domains that have arrived, at at_K
    worst_SK: np.ndarray  # the lowest of them


def keep(folder: Path, runs: Runs) -> None:
    """Writes the curves of finished runs, beside those of other seeds that are there already."""
    curve = load(folder, runs.world, runs.arm)
    for s, evaluations in enumerate(runs.evaluations):
        found = curves(evaluations)
        if curve is None:
            K = len(found.at_K)
            share_TD = np.zeros((0, 0)) if runs.share_STD is None else runs.share_STD[s]
            none = (np.zeros(0, int), np.zeros((0, K)), np.zeros((0, K)))
            curve = Curve(found.at_K, found.rate_KD, found.kept_KD, evaluations.trained_D, share_TD, *none)
        if runs.seed_S[s] in curve.seed_S:
            continue
        rate_KD = found.rate_KD[:, evaluations.trained_D]
        means = [np.interp(curve.at_K, found.at_K, f(rate_KD, axis=1)) for f in (np.nanmean, np.nanmin)]
        curve = curve._replace(
            seed_S=np.append(curve.seed_S, runs.seed_S[s]),
            macro_SK=np.vstack([curve.macro_SK, means[0]]),
            worst_SK=np.vstack([curve.worst_SK, means[1]]),
        )
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(_file(folder, runs.world, runs.arm), **curve._asdict())


def load(folder: Path, regime: str, arm: str) -> Curve | None:
    """The kept curves, None where there are none."""
    path = _file(folder, regime, arm)
    if not path.is_file():
        return None
    with np.load(path) as data:
        return Curve(**{name: data[name] for name in Curve._fields})


def _file(folder: Path, regime: str, arm: str) -> Path:
    return folder / f"{regime}-{arm}.npz".replace("/", "_")


def regime_figure(regime: str, kept: dict[str, Curve], axis: str) -> Figure:
    """A column an arm; rows: stability curves, shares over time, retention heat map."""
    figure = Figure(figsize=(1.2 + 3.9 * len(kept), 9), layout="constrained")
    axes_3A = figure.subplots(3, len(kept), squeeze=False, sharex="col", sharey="row")
    figure.suptitle(
        f"{regime}: the first seed, the same for every arm; thick: mean over seeds; dotted: evaluated only", fontsize=11
    )
    image = None
    for column, (arm, curve) in enumerate(kept.items()):
        top, middle, bottom = axes_3A[:, column]
        D = curve.rate_KD.shape[1]
        colour_D = COLOURS(np.linspace(0.05, 0.95, D))
        for d in range(D):
            top.plot(curve.at_K, curve.rate_KD[:, d], color=colour_D[d], lw=0.8, ls="-" if curve.trained_D[d] else ":")
        top.plot(curve.at_K, curve.macro_SK.mean(axis=0), color="black", lw=2.2, label="mean")
        top.plot(curve.at_K, curve.worst_SK.mean(axis=0), color="black", lw=2.2, ls="--", label="worst")
        top.set_title(arm, fontsize=10)
        top.set_ylim(0, 1)
        if curve.share_TD.size:
            T = len(curve.share_TD)
            at_T = curve.at_K[0] + (np.arange(T) + 0.5) * (curve.at_K[-1] - curve.at_K[0]) / T
            middle.stackplot(at_T, curve.share_TD.T, colors=colour_D, lw=0)
            middle.set_facecolor("0.85")  # what is left to 1: domains outside the metrics
        middle.set_ylim(0, 1)
        ends = (curve.at_K[0], curve.at_K[-1], D - 0.5, -0.5)
        image = bottom.imshow(
            curve.kept_KD.T, extent=ends, aspect="auto", vmin=0.5, vmax=1, cmap="viridis", interpolation="nearest"
        )
        bottom.set_xlabel(axis)
        bottom.xaxis.set_major_locator(MaxNLocator(4))
        bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    for row, label in enumerate(("held-out pass rate", "share of the batch\n(grey: not in the metrics)", "domain")):
        axes_3A[row, 0].set_ylabel(label)
    figure.legend(*axes_3A[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    figure.colorbar(image, ax=axes_3A[2, :].tolist(), label="rate / highest so far", extend="min")
    return figure


def gains_figure(found: Values, baseline: str, metric: str) -> Figure:
    """Every arm's paired difference to the baseline in each regime, with its 95 % interval."""
    regimes, arms, _ = names(found)
    arms = [arm for arm in arms if arm != baseline]
    columns = min(4, len(regimes))
    rows = -(-len(regimes) // columns)
    figure = Figure(figsize=(1.6 + 2.7 * columns, 1 + rows * (0.9 + 0.2 * len(arms))), layout="constrained")
    axes_R = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, regime in zip(axes_R, regimes):
        for y, arm in enumerate(arms):
            estimate = t_interval(differences(found, [regime], arm, baseline, metric))
            if estimate is not None:
                colour = GAIN_COLOURS(0 if estimate.low > 0 else 3 if estimate.high < 0 else 7)
                axes.plot(estimate[1:], [y, y], color=colour, lw=2)
                axes.plot(estimate.mean, y, "o", color=colour, ms=4)
        axes.axvline(0, color="0.5", lw=0.8)
        axes.set_title(regime, fontsize=9)
        axes.set_yticks(range(len(arms)), [arm.replace(",", ",\n") for arm in arms], fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylim(len(arms) - 0.5, -0.5)
    for axes in axes_R[len(regimes) :]:
        axes.set_visible(False)
    unit = "%" if metric == "aurc" else "difference"
    figure.suptitle(f"{metric} against {baseline}, {unit}, 95 % interval over paired seeds", fontsize=11)
    return figure


def save(run_dir: Path, world: str, found: Values, arms: Sequence[str], baselines: Sequence[str]) -> list[Path]:
    """Draws what there is; the PNG files written."""
    regimes, known, _ = names(found)
    figures = {}
    for regime in regimes:
        kept = {arm: load(run_dir / "curves" / world, regime, arm) for arm in arms}
        kept = {arm: curve for arm, curve in kept.items() if curve is not None}
        if kept:
            figures[f"{world}-{regime}"] = regime_figure(regime, kept, AXES.get(world, "step"))
    for baseline in baselines[:1]:
        for metric in ("aurc", "worst") if baseline in known and len(known) > 1 else ():
            figures[f"{world}-{metric}-vs-{baseline}"] = gains_figure(found, baseline, metric)
    written = []
    for name, figure in figures.items():
        written.append(run_dir / f"{name}.png")
        figure.savefig(written[-1], dpi=110)
    return written
