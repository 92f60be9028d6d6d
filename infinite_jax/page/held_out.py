"""Sections of the report that come from held-out evaluations: change by domain, grades, retention."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from infinite_jax import panels, record, retention, statistics
from infinite_jax.drawing import logged
from infinite_jax.heldout import Results, passed
from infinite_jax.page.pieces import (
    GAP,
    Section,
    absent,
    both_widths,
    card,
    esc,
    legend,
    line,
    number,
    picture,
    signed,
    table,
)
from infinite_jax.page.run import Run


class Change(NamedTuple):
    """A greedy pass rate at two evaluations and what lies between them; None where it is not known."""

    before: statistics.Estimate | None
    after: statistics.Estimate | None
    change: statistics.Estimate | None  # paired by prompt
    prompts: int

    @property
    def kind(self) -> str:
        """up or down where the interval leaves out 0, else nothing."""
        if self.change is None or self.change.low <= 0 <= self.change.high:
            return ""
        return "up" if self.change.mean > 0 else "down"


class Changes(NamedTuple):
    domains: dict[str, Change]
    macro: Change  # over the domains that both evaluations have
    first: int  # steps
    last: int


def changes(run: Run) -> Changes | None:
    """From the first to the last evaluation whose prompts' grades were kept; None where there are not two."""
    steps = list(run.evaluations)
    if len(steps) < 2:
        return None
    first, last = (
        {name: passed(result.greedy_N)[:, None] for name, result in run.evaluations[step].items()}
        for step in (steps[0], steps[-1])
    )
    shared = [name for name, after in last.items() if name in first and len(first[name]) == len(after)]
    found = {
        name: Change(
            statistics.cluster_mean(first[name]) if name in first else None,
            statistics.cluster_mean(after),
            statistics.paired_difference([first[name]], [after]) if name in shared else None,
            len(after),
        )
        for name, after in last.items()
    }
    before, after = ([side[name] for name in shared] for side in (first, last))
    averages = statistics.macro_average(before), statistics.macro_average(after)
    macro = Change(*averages, statistics.paired_difference(before, after), sum(map(len, after)))
    return Changes(found, macro, steps[0], steps[-1])


def held_out(run: Run, found: Changes | None) -> Section:
    lede = (
        "Greedy pass rate on fixed test prompts. Intervals are 95 %, over the choice of prompts; a change is paired by "
        "prompt, and coloured where its interval leaves out 0. They say nothing about another training seed."
    )
    regraded = record.regraded(run.events)
    body = _rates(run) if found is None else f'<div class="card">{_changes_table(found)}{_regraded(regraded)}</div>'
    return Section("heldout", "Held out", lede, body)


def _regraded(steps: Mapping[str, int]) -> str:
    """A note on domains whose grader changed; nothing without any."""
    if not steps:
        return ""
    named = ", ".join(f"{esc(name)} (step {step:,})" for name, step in steps.items())
    return f'<p class="under">Another grader since: {named}. What changed there is not the policy\'s alone.</p>'


def macro_curve(run: Run) -> str:
    """The picture of the header; nothing without an evaluation."""
    if not logged(run.rows, "eval/macro"):
        return ""
    drawn = picture("macro", "Held-out macro average over steps", lambda a: panels.macro(a, run.rows), 360, 170)
    key = (("dot", "var(--held)", "greedy"), ("", "var(--share)", "pass@1, temperature 1"))
    both = legend(*key) if logged(run.rows, "eval/macro_pass_at_1") else ""
    return card("Macro average over steps", "", both + drawn)


def _changes_table(found: Changes) -> str:
    known = [c.change for c in (*found.domains.values(), found.macro) if c.change]
    reach = max((max(abs(c.low), abs(c.high)) for c in known), default=1) or 1
    lines = [_change(esc(name), change, reach) for name, change in found.domains.items()]
    lines.append(_change("macro average", found.macro, reach, "total "))
    steps = (f"step {found.first:,}", f"step {found.last:,}")
    return table(("domain", *steps, "change", "95 % interval", f"−{reach:.2f} to +{reach:.2f}", "prompts"), lines)


def _change(name: str, c: Change, reach: float, kind: str = "") -> str:
    cells = [_estimate(c.before), _estimate(c.after)]
    if c.change is None:
        return line(name, [*cells, GAP, "", "", f"{c.prompts:,}"], kind)
    low, middle, high = (50 + 48 * value / reach for value in (c.change.low, c.change.mean, c.change.high))
    dot = f'<b style="left:{middle:.1f}%"></b>'
    bar = f'<div class="bar"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>{dot}</div>'
    span = f'<span class="range">{signed(c.change.low)} to {signed(c.change.high)}</span>'
    return line(
        name, [*cells, f'<td class="change">{signed(c.change.mean)}</td>', span, bar, f"{c.prompts:,}"], kind + c.kind
    )


def _estimate(found: statistics.Estimate | None) -> str:
    if found is None:
        return GAP
    return f'{number(found.mean)} <span class="range spare">{number(found.low, 2)}–{number(found.high, 2)}</span>'


def _rates(run: Run) -> str:
    """First and last evaluation of the record, for a run without the prompts' own grades of both."""
    rows = [row for row in run.rows if "eval/macro" in row]
    if not rows:
        return absent("No evaluation yet.")
    ends = (rows[0], rows[-1]) if len(rows) > 1 else (rows[0],)
    names = run.logs("eval/pass_rate")
    lines = [line(esc(name), [number(row.get(f"eval/pass_rate/{name}")) for row in ends]) for name in names]
    lines.append(line("macro average", [number(row["eval/macro"]) for row in ends], "total"))
    why = "Without intervals: those need each prompt's grades at two evaluations (evaluations/STEP.npz)."
    shown = table(("domain", *(f"step {row['step']}" for row in ends)), lines)
    return f'<div class="card">{shown}<p class="under">{why}</p></div>'


# ---- grades


def fractions(results: Results, names: list[str]) -> dict[str, np.ndarray]:
    """f64[4] by domain: parts of the valid greedy replies graded 1, 2, 3 and 4; a grade between counts as the lower."""
    found = {}
    for name in names:
        grades = results[name].greedy_N if name in results else np.array([])
        grades = grades[~np.isnan(grades)]
        if grades.size:
            found[name] = np.bincount(np.clip(grades.astype(int), 1, 4) - 1, minlength=4) / grades.size
    return found


def grades(run: Run) -> Section:
    lede = "Held-out grades, 1 to 4; 3 and 4 pass. What moves inside a fail or inside a pass no pass rate shows."
    parts = {step: fractions(results, run.names) for step, results in run.evaluations.items()}
    parts = {step: found for step, found in parts.items() if found}
    if not parts:
        return Section("grades", "Grades", lede, absent("No grades of single prompts: no evaluations/STEP.npz here."))
    first, last = min(parts), max(parts)
    sides = [first, last] if first != last else [first]
    names = [name for name in parts[last] if all(name in parts[side] for side in sides)]
    key = legend(*(("", f"var(--grade-{g})", f"{g}, {'pass' if g > 2 else 'fail'}") for g in range(1, 5)))
    order = "upper bar: step {}, lower: step {}".format(*sides) if len(sides) > 1 else f"step {first}"
    height = (30 if len(sides) > 1 else 22) * len(names) + 32
    bars = both_widths(
        "grades",
        "Parts of the replies graded 1 to 4, by domain",
        lambda axes: panels.grade_bars(axes, {n: [parts[side][n] for side in sides] for n in names}),
        {"width": 520, "height": height, "left": 140, "right": 24},
        {"height": height, "left": 104, "right": 24},
    )
    body = card("By domain", order, key + bars)
    if len(parts) > 1:
        mean_K4 = np.stack(
            [np.mean([found[name] for name in names if name in found], axis=0) for found in parts.values()]
        )
        history = both_widths(
            "grade-history",
            f"Grades over the evaluations, mean of the domains: a fraction of {mean_K4[-1, 2:].sum():.2f} passes now",
            lambda axes: panels.grade_history(axes, list(parts), mean_K4),
            {"width": 520, "height": 280},
            {"height": 220},
        )
        body += card("Over time", "mean of the domains", key + history)
    return Section("grades", "Grades", lede, f'<div class="split">{body}</div>')


# ---- retention

MEANINGS = {
    "acc": "mean pass rate at the end, over the trained domains",
    "worst": "pass rate of the worst trained domain at the end",
    "macro": "mean over time since evaluation 0",
    "aurc": "area under the pass-rate curve since each domain's arrival, per step",
    "ret": "how much of its highest rate so far a domain kept, on average; 1 = nothing lost",
    "bwt": "backward transfer: change since the end of a domain's own phase",
    "fwt": "forward transfer: gain on a domain before its own phase",
    "fwt_unseen": "gain on domains that are never trained on",
    "forgetting": "highest rate before minus rate at the end; below 0 = still rising",
    "forgetting_median3": "the same from the highest median of three evaluations in a row",
    "forgetting_first": "fall since the end of a domain's own phase",
    "time_to_decay": "steps until an unpractised domain has lost a tenth of its peak",
}


def retained(run: Run) -> Section:
    lede = "What the run has learned and kept, from all held-out evaluations; definitions in infinite_jax/retention.py."
    if not run.logs("eval/pass_rate"):
        return Section("retention", "Retention", lede, absent("No evaluation yet."))
    found = retention.summary(retention.from_rows(run.rows, run.domains))
    lines = [
        line(
            esc(name),
            [
                number(measure.value) if measure.value is not None else '<span class="range">undefined</span>',
                f'<td class="left wrap">{esc(measure.reason or MEANINGS.get(name, ""))}</td>',
            ],
        )
        for name, measure in found.items()
    ]
    shown = table(("measure", "value", "meaning, or why it is undefined"), lines, left=(2,))
    return Section("retention", "Retention", lede, f'<div class="card">{shown}</div>')
