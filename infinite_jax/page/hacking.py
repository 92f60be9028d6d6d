"""Section of the report that shows the reward-hacking watch: each flag of rubric/watch.py with its numbers."""

import math

from infinite_jax.page.pieces import Section, absent, esc, line, number, signed, table
from infinite_jax.page.run import Run
from rubric import watch

SIGNS = {  # kind -> what it says, digits of its figures
    "length": ("replies changed in length, tokens", 1),
    "form_only": ("form passed and content failed, share of rows", 3),
    "disagreement": ("criteria disagree, share of pairs", 3),
    "divergence": ("pass rate rose in training, not held out", 3),
}


def hacked(run: Run) -> Section:
    title = "Reward-hacking watch"
    lede = (
        f"Signs that the reward rises and the work does not: the first {watch.WINDOW} values of a domain against its "
        f"last {watch.WINDOW}, flagged beyond a threshold and {watch.Z:g} standard errors. A flag says where to read "
        "replies; it proves nothing."
    )
    if not run.logs("watch/length"):
        return Section("hacking", title, lede, absent("Not recorded: this run logs no watch/length."))
    tested = {name: len(result.greedy_N) for results in run.evaluations.values() for name, result in results.items()}
    found = watch.flags(run.rows, run.names, tested)
    long = [n for n in run.names if sum(row.get(f"watch/length/{n}") is not None for row in run.rows) >= watch.SPAN]
    if not long:
        return Section("hacking", title, lede, absent(f"Too early: no domain has {watch.SPAN} steps on record yet."))
    if not found:
        said = f"No flag, of {len(long)} domains with {watch.SPAN} or more steps on record."
        return Section("hacking", title, lede, absent(said))
    return Section("hacking", title, lede, f'<div class="card">{_table(found)}</div>')


def _table(found: list[watch.Flag]) -> str:
    lines = []
    for flag in found:
        said, digits = SIGNS[flag.kind]
        ends = [number(flag.before, digits), number(flag.after, digits)]
        if flag.kind == "divergence":
            ends = [f"{signed(flag.before)} held out", f"{signed(flag.after)} in training"]
        z = number(flag.z, 1) if math.isfinite(flag.z) else "no spread"
        cells = [f'<td class="left wrap">{said}</td>', *ends, z, f"{flag.step:,}"]
        lines.append(line(esc(flag.domain), cells))
    return table(("domain", "sign", "first", "last", "standard errors", "to step"), lines, left=(1,))
