"""What a person reads of an ablation: tables of paired differences as text, and the author's criteria with a verdict.

    AURC gain of at least 25 % over baseline GRPO      two rows: over size_proportional (GRPO on shuffled data draws
                                                       domains by their rows) and over uniform
    a benefit of alternation                           full minus a3, which differ in the single-domain steps alone:
                                                       fwt_unseen, and held-out harder variants (metric `harder`)
    12 % better generalisation through alternation     the same difference as a share of a3's

A verdict is about the 95 % interval: met if all of it fulfils the criterion, not met if none of it does, else open.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Column, Table

from infinite_jax import decay
from infinite_jax.progress import as_text, number
from infinite_jax.statistics import Estimate, t_interval
from infinite_jax.worlds.table import ALL, PROBE_DECAYED, PROBE_TIME, Values, differences, names

AURC_GAIN = 25.0  # per cent
ALTERNATION_GAIN = 12.0  # per cent
WITH, WITHOUT = "full", "a3"  # arms with and without single-domain steps
OTHERS = ("worst", "bwt", "ret")  # columns beside AURC; paired.csv has every metric


class Criterion(NamedTuple):
    claim: str
    measured: str
    verdict: str  # met | not met | open | not measured


def tables(found: Values, baselines: Sequence[str]) -> str:
    """A table a regime and one of the mean over regimes: arms against the baselines, intervals over paired seeds."""
    regimes, arms, _ = names(found)
    baselines = [name for name in baselines if name in arms]
    texts = []
    for regime in [*regimes, ALL]:
        if regime == ALL and len(regimes) < 2:
            continue
        chosen = regimes if regime == ALL else [regime]
        present = [arm for arm in arms if all(found.get((each, arm, "aurc")) for each in chosen)]
        table = Table(Column("arm", overflow="fold"), "AURC", box=box.MARKDOWN)
        for baseline in baselines:
            table.add_column(f"AURC % over {baseline}", overflow="fold")
        for metric in OTHERS if baselines else ():
            table.add_column(f"{metric}, points over {baselines[0]}", overflow="fold")
        for arm in present:
            levels = [value for each in chosen for value in found[each, arm, "aurc"].values()]
            cells = [_cell(found, chosen, arm, baseline, "aurc") for baseline in baselines]
            cells += [_cell(found, chosen, arm, baselines[0], metric) for metric in OTHERS if baselines]
            table.add_row(arm, number(sum(levels) / len(levels)), *cells)
        seeds = max(len(found[each, arm, "aurc"]) for each in chosen for arm in present)
        title = f"mean over {len(regimes)} regimes" if regime == ALL else regime
        texts.append(f"{title} ({seeds} seeds)\n{as_text(table).lstrip()}")
    return "\n\n".join(texts)


def _cell(found: Values, regimes: Sequence[str], arm: str, baseline: str, metric: str) -> str:
    if arm == baseline:
        return "0"
    scale = 1 if metric == "aurc" else 100
    return plus_minus(t_interval([scale * d for d in differences(found, regimes, arm, baseline, metric)]), 1)


def plus_minus(estimate: Estimate | None, digits: int) -> str:
    """A symmetric interval as mean and half its width."""
    if estimate is None:
        return "-"
    return f"{estimate.mean:+.{digits}f} ±{estimate.high - estimate.mean:.{digits}f}"


def probe_text(found: Values) -> str:
    """How long the withheld domain held, Kaplan-Meier median over seeds by regime and arm; "" without a probe."""
    table = Table("regime", "arm", "seeds", "decayed", "median time to decay", box=box.MARKDOWN)
    for regime, arm, metric in found:
        if metric == PROBE_TIME and (time_S := found[regime, arm, metric]):
            decayed_S = found[regime, arm, PROBE_DECAYED]
            median = decay.median([decay.Decay(time_S[seed], decayed_S[seed] > 0) for seed in time_S])
            longest = f"more than {max(time_S.values()):g}"
            cells = (str(len(time_S)), f"{sum(decayed_S.values()):g}", longest if median is None else f"{median:g}")
            table.add_row(regime, arm, *cells)
    return as_text(table) if table.row_count else ""


def criteria(found: Values, judged: Sequence[str]) -> list[Criterion]:
    """The author's criteria, those of AURC for each arm in `judged` that was run."""
    regimes, arms, _ = names(found)
    rows = []
    for arm in (arm for arm in judged if arm in arms):
        for baseline in ("size_proportional", "uniform"):
            claim = f"{arm}: AURC gain of at least {AURC_GAIN:g} % over {baseline}"
            if baseline not in arms:
                rows.append(Criterion(claim, f"arm {baseline} was not run", "not measured"))
                continue
            overall = t_interval(differences(found, regimes, arm, baseline, "aurc"))
            each = [t_interval(differences(found, [regime], arm, baseline, "aurc")) for regime in regimes]
            met = sum(estimate is not None and estimate.low >= AURC_GAIN for estimate in each)
            measured = f"{plus_minus(overall, 1)} %; met in {met} of {len(regimes)} regimes"
            rows.append(Criterion(claim, measured, verdict(overall, AURC_GAIN)))
    return rows + alternation(found)


def alternation(found: Values) -> list[Criterion]:
    """The rows on single-domain steps."""
    regimes, arms, metrics = names(found)
    rows = []
    for metric, what in (("fwt_unseen", "on domains never trained on"), ("harder", "on held-out harder variants")):
        claim = f"alternation helps {what} ({WITH} minus {WITHOUT}, {metric})"
        if absent := [arm for arm in (WITH, WITHOUT) if arm not in arms]:
            rows.append(Criterion(claim, f"arm {absent[0]} was not run", "not measured"))
            continue
        if metric not in metrics or not differences(found, regimes, WITH, WITHOUT, metric):
            rows.append(Criterion(claim, f"this world has no metric {metric}", "not measured"))
            continue
        estimate = t_interval(differences(found, regimes, WITH, WITHOUT, metric))
        rows.append(Criterion(claim, plus_minus(estimate, 4), verdict(estimate, 0.0)))
        level_S = [v for regime in regimes for v in found.get((regime, WITHOUT, metric), {}).values()]
        level = sum(level_S) / len(level_S)
        claim = f"alternation is worth {ALTERNATION_GAIN:g} % of {WITHOUT}'s {metric}"
        if estimate is None or level <= 0:
            rows.append(Criterion(claim, f"{WITHOUT} has {level:.4f}, no gain to compare with", "not measured"))
            continue
        share = Estimate(*(100 * end / level for end in estimate))
        rows.append(Criterion(claim, f"{plus_minus(share, 1)} %", verdict(share, ALTERNATION_GAIN)))
    return rows


def verdict(estimate: Estimate | None, least: float) -> str:
    """met | not met | open: whether the interval says that the quantity is at least `least` (above it, for 0)."""
    if estimate is None:
        return "not measured"
    if estimate.low >= least and estimate.low > 0:
        return "met"
    return "not met" if estimate.high < least or estimate.high <= 0 else "open"


def criteria_text(rows: Sequence[Criterion]) -> str:
    table = Table("criterion", "measured", "verdict", box=box.MARKDOWN)
    for row in rows:
        table.add_row(*row)
    return as_text(table).lstrip()
