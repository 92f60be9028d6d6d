"""Section of the report that shows an upgrade's monitor: its tier over the steps, prior domains beside M0, events.

Attempts that were given up are drawn too, faintly: their rows are kept beside the run's (infinite_jax/rollback.py).
"""

import functools

import numpy as np
from matplotlib.axes import Axes

from infinite_jax.drawing import INK, MUTED, column, logged, steps
from infinite_jax.page.pieces import Section, absent, both_widths, card, esc, legend, line, number, signed, table
from infinite_jax.page.run import Run

TIERS = ("watching", "boost", "KL", "share", "halt")
TURNS = ("rollback", "halt", "approval")  # events that begin another attempt, or let it begin
EVENTS = 200  # in the table


def watched(run: Run) -> Section | None:
    """None where the run is no upgrade."""
    if not logged(run.rows, "safety/tier"):
        return None
    threshold = next(row["safety/threshold"] for row in reversed(run.rows) if row.get("safety/threshold") is not None)
    lede = (
        "Whether prior domains fell below M0, and what was done. A violation is a drop beyond "
        f"{run.setting('upgrade.monitor.delta') or 0:g} with z above {number(threshold, 2)}. Each tier adds to those "
        "below it: 1 boosts the domains that fell and the prior share, 2 multiplies the KL coefficient, 3 cuts the new "
        "domains' share, 4 halts until a person approves."
    )
    acts = run.setting("upgrade.watch") is not False
    note = "" if acts else absent("Logged only (upgrade.watch=false): no tier had an effect.")
    turns = [event["what"] for event in run.events if event.get("what") in TURNS]
    now = "halted, waits for approval" if turns[-1:] == ["halt"] else f"now {_last(run, 'safety/tier'):.0f}"
    shown = card("Tier", now, _key(run) + _picture(run))
    body = note + f'<div class="split">{shown}{card("At the last evaluation", "", _domains(run))}</div>'
    found = _events(run)
    return Section("safety", "Prior domains", lede, body + (found or absent("No violation at any evaluation.")))


def _last(run: Run, key: str) -> float:
    return next(row[key] for row in reversed(run.rows) if row.get(key) is not None)


def _key(run: Run) -> str:
    entries = [("line", "var(--ink)", "the run")]
    entries += [("line", "var(--muted)", "attempts given up")] if run.attempts else []
    return legend(*entries)


def _picture(run: Run) -> str:
    now = f"Tier of the monitor over steps, 0 to 4; now {_last(run, 'safety/tier'):.0f}"
    now += f"; {len(run.attempts)} attempts given up" if run.attempts else ""
    draw = functools.partial(tier, rows=run.rows, attempts=[rows for rows, _ in run.attempts])
    return both_widths("tier", now, draw, {"width": 520, "height": 180, "left": 74}, {"height": 180, "left": 74})


def tier(axes: Axes, rows: list[dict], attempts: list[list[dict]]) -> None:
    """Steps of the run's tier, and of the attempts' behind it."""
    for found, style in (
        *((attempt, dict(color=MUTED, lw=1.2, ls="--", marker="x", ms=4)) for attempt in attempts),
        (rows, dict(color=INK, lw=1.6, marker="o", ms=3)),
    ):
        step_K, tier_K = column(found, "safety/tier")
        known_K = ~np.isnan(tier_K)
        axes.plot(step_K[known_K], tier_K[known_K], drawstyle="steps-post", clip_on=False, **style)
    steps(axes, [rows[0], max([rows[-1], *(attempt[-1] for attempt in attempts)], key=lambda row: row["step"])])
    axes.set_ylim(-0.15, 4.15)
    axes.set_yticks(range(5), [f"{number} {name}" for number, name in enumerate(TIERS)])


def _domains(run: Run) -> str:
    new = {entry["name"] for entry in run.config.get("domains") or [] if entry.get("new")}
    row = next(row for row in reversed(run.rows) if row.get("safety/tier") is not None)
    every = [*(rows for rows, _ in run.attempts), run.rows]
    lines = []
    for name in sorted(run.names, key=lambda name: name in new):
        drop = row.get(f"safety/drop/{name}")
        times = sum(bool(each.get(f"safety/violation/{name}")) for rows in every for each in rows)
        kind = f'<td class="left">{"new" if name in new else "prior"}</td>'
        change = "–" if drop is None else signed(0.0 - drop)
        z, boost = row.get(f"safety/z/{name}"), row.get(f"safety/boost/{name}")
        lines.append(line(esc(name), [kind, change, number(z, 2), "" if name in new else f"{times}", number(boost, 1)]))
    return table(("domain", "kind", "change from M0", "z of a drop", "violations so far", "boost"), lines, left=(1,))


def _events(run: Run) -> str:
    """In the order in which they happened: an attempt's, then what ended it, then the next one's."""
    attempt_at = {row["step"]: row["safety/attempt"] for row in run.rows if row.get("safety/attempt") is not None}
    found = [(number, 1, event) for number, (_, events) in enumerate(run.attempts) for event in events]
    for event in run.events:
        turn = event.get("what") in TURNS
        found.append((event["attempt"] if turn else attempt_at.get(event["step"], 0), not turn, event))
    found = [(attempt, turn, event) for attempt, turn, event in found if event.get("kind") == "safety"]
    found.sort(key=lambda each: each[:2])  # stable: within an attempt as they were written
    lines = [
        line(
            str(attempt),
            [f"{event.get('at', event['step']):,}"]
            + [f'<td class="left{wrap}">{esc(cell)}</td>' for cell, wrap in zip(_said(event), ("", "", " wrap"))],
        )
        for attempt, _, event in found[-EVENTS:]
    ]
    if not lines:
        return ""
    return f'<div class="card tall">{table(("attempt", "step", "event", "domain", "why"), lines, left=(2, 3, 4))}</div>'


def _said(event: dict) -> tuple[str, str, str]:
    """(what, domain, why)"""
    what = event["what"]
    if what == "violation":
        rates = [event[f"{who}passed"] / max(event[f"{who}prompts"], 1) for who in ("M0_", "")]
        ends = f"{number(rates[0])} → {number(rates[1])} on {event['prompts']:,.0f} prompts"
        tested = f"z {number(event['z'], 2)} > {number(event['threshold'], 2)}" + (", hard" if event["hard"] else "")
        return "violation", event["domain"], f"{ends}, {tested}"
    if what == "tier":
        return f"tier {event['tier_before']} → {event['tier']}", "", event["because"]
    if what == "approval":
        return "approval", "", f"by {event['by']}, {event['when']}: {event['why']}"
    return f"{what} to step {event['step']:,}", "", event["because"]
