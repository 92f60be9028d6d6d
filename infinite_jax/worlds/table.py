"""What every world gives back, RUN_DIR/ablate.csv, and paired differences of its rows.

    world, regime, arm, seed, metric, value, reason        one line a number; an empty value has its reason

Arms are compared on the same seeds of the same regime. With d_s the difference of seed s (for aurc: of the baseline's
value, in per cent), the estimate is mean d -+ t_{S-1} sd(d) / sqrt(S), a 95 % interval over seeds; for several regimes
d_s is the mean over them first. A seed counts where both arms have a number. Intervals are not corrected for how many
there are: of twenty comparisons without any difference one is expected to exclude 0.

Left out: tests across worlds, and anything but the mean over seeds.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.schema import Config
from infinite_jax.decay import Decay
from infinite_jax.retention import Evaluations, summary
from infinite_jax.statistics import Estimate, t_interval

COLUMNS = ("world", "regime", "arm", "seed", "metric", "value", "reason")
PROBE_TIME, PROBE_DECAYED = "probe_time", "probe_decayed"  # from the peak to decay or the end; 1 = it did decay
END = "end"  # metric of a unit's last line: a unit without it was cut off while being written


class Arm(NamedTuple):
    name: str  # as the user gave it: "recommended" or "recommended,uncertainty_weight=3"
    config: Config  # the run's configuration with the arm's curriculum
    compose: Callable[[Sequence[str]], Config]  # the same with more key=value, which come first
    compose: Callable[[Sequence[str]], Config] | None = None  # the same with further overrides


class Runs(NamedTuple):
    """S paired seeds of one arm in one regime."""

    world: str  # the regime
    arm: str
    seed_S: np.ndarray
    evaluations: list[Evaluations]  # one a seed
    share_STD: np.ndarray | None  # shares, at any thinned steps; for pictures
    cost: dict[str, float]  # of one run: "tokens", "seconds", "rollouts", where known
    extra_S: dict[str, np.ndarray] = {}  # noqa: RUF012  further metrics of this world, a number a seed: "harder"
    decay_S: tuple[Decay | None, ...] = ()  # with a probe: of the withheld domain, one a seed


class Probe(NamedTuple):
    """A domain that is withheld, so that its decay without practice shows; none where the name is empty."""

    domain: str  # its name; in world=simulated its number
    after: int  # step after which it is not trained on; 0 = half of the run

    def ends(self, steps: int, key: str) -> int:
        """The step after which it is withheld in a run of so many, whose key is `key`. Raises ValueError, one line."""
        after = self.after or steps // 2
        if after >= steps:
            raise ValueError(f"probe_after={after}: must be before the end, {key}={steps}")
        return after


NO_PROBE = Probe("", 0)


class Row(NamedTuple):
    world: str
    regime: str
    arm: str
    seed: int
    metric: str
    value: float | None
    reason: str


Values = dict[tuple[str, str, str], dict[int, float]]  # (regime, arm, metric) -> seed -> value


def rows_of(world: str, runs: Runs) -> list[Row]:
    """The lines of finished runs, each seed's closed by END."""
    rows = []
    for s, evaluations in enumerate(runs.evaluations):
        unit = (world, runs.world, runs.arm, int(runs.seed_S[s]))
        rows += [Row(*unit, name, found.value, found.reason) for name, found in summary(evaluations).items()]
        rows += [Row(*unit, name, float(value_S[s]), "") for name, value_S in runs.extra_S.items()]
        rows += [Row(*unit, f"cost_{name}", value, "") for name, value in runs.cost.items()]
        if runs.decay_S:
            found, never = runs.decay_S[s], "the withheld domain never passed once its practice had ended"
            rows.append(Row(*unit, PROBE_TIME, found.time if found else None, "" if found else never))
            rows.append(Row(*unit, PROBE_DECAYED, float(found.observed) if found else None, "" if found else never))
        rows.append(Row(*unit, END, 1.0, ""))
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds lines to the file, with its heading if it is new, and waits until they are on the disk."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(row._replace(value="" if row.value is None else repr(float(row.value))))
    with path.open("a", encoding="utf-8") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> list[Row]:
    """All lines of finished units; [] without a file. Units that were cut off are removed from the file as well.

    Raises ValueError, one line, where the file is not one that this module writes.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(f"{path}:1: not the heading of an ablation's table; name another run.dir")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            world, regime, arm, seed, metric, value, reason = line
            rows.append(Row(world, regime, arm, int(seed), metric, float(value) if value else None, reason))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of an ablation's table; restore the file") from error
    finished = {row[:4] for row in rows if row.metric == END}
    kept = [row for row in rows if row[:4] in finished]
    if len(kept) < len(rows) or whole != text:
        scratch = path.with_name(path.name + ".tmp")
        scratch.unlink(missing_ok=True)
        append(scratch, kept)
        os.replace(scratch, path)
    return kept


def values(rows: Iterable[Row], world: str) -> Values:
    """The numbers of one world's rows; undefined ones are absent."""
    found: Values = {}
    for row in rows:
        if row.world == world and row.metric != END:
            seeds = found.setdefault((row.regime, row.arm, row.metric), {})
            if row.value is not None:
                seeds[row.seed] = row.value
    return found


def differences(found: Values, regimes: Sequence[str], arm: str, baseline: str, metric: str) -> list[float]:
    """A seed's difference, mean over the regimes; in per cent of the baseline for aurc. Seeds that both arms have."""
    each = []
    for regime in regimes:
        ours, theirs = found.get((regime, arm, metric), {}), found.get((regime, baseline, metric), {})
        both = ours.keys() & theirs.keys()
        if metric == "aurc":
            each.append({seed: 100 * (ours[seed] / theirs[seed] - 1) for seed in both if theirs[seed] > 0})
        else:
            each.append({seed: ours[seed] - theirs[seed] for seed in both})
    shared = sorted(set.intersection(*map(set, each))) if each else []
    return [float(np.mean([one[seed] for one in each])) for seed in shared]


class Paired(NamedTuple):
    """One line of RUN_DIR/paired.csv."""

    regime: str  # ALL: the mean over regimes
    arm: str
    baseline: str
    metric: str
    unit: str  # per cent of the baseline, or difference
    seeds: int
    estimate: Estimate | None


ALL = "(all)"


def names(found: Values) -> tuple[list[str], list[str], list[str]]:
    """(regimes, arms, metrics) in order of appearance."""
    return tuple(list(dict.fromkeys(key[i] for key in found)) for i in range(3))


def paired(found: Values, baselines: Sequence[str]) -> list[Paired]:
    """Every arm against every baseline, every metric, every regime and their mean."""
    regimes, arms, metrics = names(found)
    lines = []
    for baseline in baselines:
        for metric in metrics:
            unit = "percent" if metric == "aurc" else "difference"
            for regime in [*regimes, ALL]:
                for arm in arms:
                    if arm == baseline:
                        continue
                    d_S = differences(found, regimes if regime == ALL else [regime], arm, baseline, metric)
                    lines.append(Paired(regime, arm, baseline, metric, unit, len(d_S), t_interval(d_S)))
    return lines


def save_paired(path: Path, lines: Sequence[Paired]) -> None:
    """paired.csv: regime, arm, metric with its baseline in the name (aurc_gain_vs_uniform), mean, low, high."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("regime", "arm", "comparison", "unit", "seeds", "mean", "low", "high"))
        for line in lines:
            ends = [f"{end:.6g}" for end in line.estimate] if line.estimate else ["", "", ""]
            name = f"{line.metric}_{'gain' if line.unit == 'percent' else 'difference'}_vs_{line.baseline}"
            writer.writerow((line.regime, line.arm, name, line.unit, line.seeds, *ends))
