"""Sections of the report that show the scheduler: stability, shares, priorities, staleness, drift and other events."""

import functools

import numpy as np

from curriculum.triage import BANDS
from infinite_jax import panels
from infinite_jax.drawing import TERMS, column, logged, thinned, trained_now
from infinite_jax.page.pieces import (
    Section,
    absent,
    band,
    both_widths,
    card,
    esc,
    legend,
    line,
    number,
    picture,
    slug,
    table,
)
from infinite_jax.page.run import Run

EVENTS = 200  # of them in the table
ALARM = 8.0  # CUSUM at which a flag is raised, where config.yaml does not say


def stability(run: Run) -> Section:
    low, high = run.setting("curriculum.low") or 0.4, run.setting("curriculum.high") or 0.8
    rows = thinned(run.rows)
    cards = []
    for domain in run.domains:
        name, ema = domain.name, run.last.get(f"triage/acc_ema/{domain.name}")
        rate_K = column(rows, f"eval/pass_rate/{name}")[1]
        rate_K = rate_K[~np.isnan(rate_K)]
        ends = f"{number(rate_K[0], 2)} → {number(rate_K[-1], 2)}" if len(rate_K) else ""
        draw = functools.partial(panels.stability, rows=rows, name=name, thresholds=(low, high))
        label = f"{name}: pass rate over steps, held out {ends}, moving average now {number(ema)}"
        figure = picture(f"stability-{slug(name)}", label, draw, 260, 140, left=22, right=8)
        state = (
            '<span class="band medium">eval only</span>'
            if domain.eval_only
            else band(run.last.get(f"triage/band/{name}"))
        )
        cards.append(card(f"{esc(name)} {state}", ends, figure))
    key = legend(
        ("line", "var(--ink)", "training (moving average)"),
        ("dot", "var(--held)", "held out"),
        *(("", f"var(--band-{name})", f"band {name}") for name in BANDS),
    )
    lede = (
        "Pass rate of each domain. The line follows the prompts trained on, whose choice biases it; the points are the "
        f"held-out ones. Dotted: the limits of the bands, {low:g} and {high:g}. Gaps: the domain had no share."
    )
    return Section("stability", "Stability", lede, key + f'<div class="grid">{"".join(cards)}</div>')


def shares(run: Run) -> Section:
    lede = (
        "Share of the prompts that each domain is drawn with. Marks under the axis: steps whose whole batch was "
        "one domain."
    )
    names = run.logs("triage/share")
    if not names:
        return Section("shares", "Shares", lede, absent("Not recorded: this run logs no triage/share."))
    height = max(300, 14 * min(len(names), panels.MOST_LAYERS) + 60)
    now = ", ".join(f"{name} {number(run.last.get(f'triage/share/{name}'), 2)}" for name in names)
    drawn = both_widths(
        "shares",
        f"Shares of the prompts over steps, stacked; now {now}",
        functools.partial(panels.shares, rows=thinned(run.rows), names=names),
        {"width": 1150, "height": height, "right": 130},
        {"height": height, "left": 22, "right": 104},
    )
    return Section("shares", "Shares", lede, f'<div class="card">{drawn}</div>')


COLUMNS = {  # of the table beside the queue: key -> title, digits
    "triage/share": ("share", 3),
    "triage/acc_ema": ("pass (EMA)", 3),
    "triage/staleness": ("waited, steps", 0),
    "triage/uncertainty": ("uncertainty", 3),
    "triage/zvf_ema": ("groups without signal", 3),
    "forgetting": ("forgetting", 3),
}
OPTIONS = {  # columns of options that are off in most runs, where all domains have the same value
    "triage/level": ("level", 2),
    "triage/cost": ("cost of a prompt", 3),
    "triage/half_life": ("half-life, steps", 1),
    "triage/lr_scale": ("learning-rate scale", 2),
}


def queue(run: Run) -> Section:
    lede = (
        "Who is next, and why. The priority is the sum of four terms in log units: one unit more is 2.7 times the "
        "capacity, before floors. Terms above 0 go right, those below go left, the diamond is their sum. The band term "
        "counts from the lowest here; a constant changes no share."
    )
    names = run.logs("triage/share") or run.logs("triage/acc_ema")
    if not names:
        return Section("queue", "Priority queue", lede, absent("Not recorded: this run logs no triage state."))
    row = next((row for row in reversed(run.rows) if panels.by_priority(row, names)), None)
    order = panels.by_priority(row, names) if row else []
    bars = _bars(row, names, order) if row else ""
    order = [*order, *sorted(set(names) - set(order), key=lambda n: (-(run.last.get(f"triage/share/{n}") or 0), n))]
    columns = {key: column for key, column in COLUMNS.items() if run.logs(key)}
    here = [name for name in names if run.last.get(f"triage/share/{name}") != 0]
    columns |= {k: column for k, column in OPTIONS.items() if len({run.last.get(f"{k}/{name}") for name in here}) > 1}
    shown = run.evaluated | run.last  # forgetting is of the last evaluation
    lines = [
        line(
            esc(name),
            [f'<td class="left">{band(run.last.get(f"triage/band/{name}"))}</td>']
            + [number(shown.get(f"{key}/{name}"), digits) for key, (_, digits) in columns.items()],
        )
        for name in order
    ]
    right = table(("domain", "band", *(title for title, _ in columns.values())), lines, left=(1,))
    right = card(f"State after step {run.last['step']:,}", "", right)
    if bars:
        return Section("queue", "Priority queue", lede, f'<div class="split queue">{bars}{right}</div>')
    why = "The terms (triage/priority_*) are not in this run: its policy has none, or it is older than they are."
    return Section("queue", "Priority queue", lede, right + absent(why))


def _bars(row: dict, names: list[str], order: list[str]) -> str:
    key = [("", f"var(--term-{term})", label) for term, (_, label) in TERMS.items()]
    total = {name: sum(row[f"triage/priority_{term}/{name}"] for term in TERMS) for name in order}
    height = 24 * len(order) + 34
    drawn = both_widths(
        "queue",
        f"Priorities at step {row['step']}: " + ", ".join(f"{name} {number(total[name], 2)}" for name in order),
        functools.partial(panels.queue, row=row, names=names),
        {"width": 520, "height": height, "left": 140},
        {"height": height, "left": 104},
    )
    key = legend(*key, ("diamond", "var(--ink)", "priority"))
    return card(f"Priorities after step {row['step']}", "log units", key + drawn)


def staleness(run: Run) -> Section:
    lede = (
        "Steps since a domain was last tried, the stronger the colour the longer. Where every step draws every domain, "
        "all is pale."
    )
    names = run.logs("triage/staleness")
    if not names:
        return Section("staleness", "Staleness", lede, absent("Not recorded: this run logs no triage/staleness."))
    longest = {name: _longest_wait(run, name) for name in names}
    worst = max(longest, key=longest.get)
    drawn = heat(run, names, "triage/staleness", least=panels.FULL_WAIT)
    most = f"{longest[worst]:.0f} step{'' if longest[worst] == 1 else 's'} ({esc(worst)})"
    caption = f'<p class="under">Longest wait: {most if longest[worst] else "none"}.</p>'
    return Section("staleness", "Staleness", lede, f'<div class="card">{drawn}{caption}</div>')


def _longest_wait(run: Run, name: str) -> float:
    """In steps, while the domain was trained on."""
    wait_K = column(run.rows, f"triage/staleness/{name}")[1]
    return float(np.nan_to_num(np.where(trained_now(run.rows, name), wait_K, 0)).max())


def heat(run: Run, names: list[str], key: str, **how) -> str:
    rows = [row for row in run.rows if row["step"] > 0]
    names = [name for name in names if trained_now(rows, name).any()] or names
    draw = functools.partial(panels.heat, rows=rows, names=names, key=key, **how)
    height = 17 * len(names) + 30
    broad = {"width": 1150, "height": height, "left": 130}
    return both_widths(slug(key), f"{key} of each domain over steps", draw, broad, {"height": height, "left": 104})


# ---- events


def events(run: Run) -> Section:
    """What went wrong or changed: drift of policy and graders, skipped updates, ungraded replies, arrivals."""
    lede = "What the run noticed about itself. A check that was not recorded is not a check that passed."
    found, checks = [], []
    for title, key, listed in (
        ("drift flag", "drift/flag", drift_flags(run)),
        ("skipped update", "policy/skipped", _skipped(run)),
        ("ungraded replies", "rollout/invalid", _ungraded(run)),
        ("arrival, retirement", "triage/share", _moves(run)),
    ):
        recorded = logged(run.rows, key) or run.logs(key)
        said = (f"{len(listed):,}" if listed else "none") if recorded else f"not recorded (no {key} in this run)"
        checks.append(line(title, [f'<td class="left wrap">{said}</td>']))
        found += [(step, title, *rest) for step, *rest in listed]
    drifted = sum(event.get("kind") == "grader_drift" for event in run.events)
    said = "not recorded (anchors.each is 0, or not in this run)"
    if run.setting("anchors.each"):
        said = f"{drifted:,}" if drifted else "none"
    checks.append(line("grader drift", [f'<td class="left wrap">{said}</td>']))
    found += _told(run)
    head = ("check", f"in {run.last['step']:,} steps")
    body = f'<div class="card">{table(head, checks, left=(1,))}</div>'
    if found:
        found.sort(key=lambda event: event[0])
        wraps = ("", "", " wrap")
        lines = [
            line(f"{step:,}", [f'<td class="left{wrap}">{esc(cell)}</td>' for cell, wrap in zip(rest, wraps)])
            for step, *rest in found[-EVENTS:]
        ]
        more = f'<p class="under">{len(found) - EVENTS} earlier ones left out.</p>' if len(found) > EVENTS else ""
        body += (
            f'<div class="card tall">{table(("step", "event", "domain", "what"), lines, left=(1, 2, 3))}{more}</div>'
        )
        body = f'<div class="split events">{body}</div>'
    names = run.logs("drift/cusum")
    if names:
        alarm = run.setting("curriculum.drift.threshold") or ALARM
        drawn = heat(run, names, "drift/cusum", marks="drift/flag", least=alarm)
        body += card("Evidence of drift (CUSUM)", f"full colour: the alarm at {alarm:g}; crosses are flags", drawn)
    return Section("events", "Drift and safety", lede, body)


def drift_flags(run: Run) -> list[tuple]:
    found = []
    for name in run.names:
        before = 0
        for row in run.rows:
            flag = row.get(f"drift/flag/{name}") or 0
            if flag > 0 and not before > 0:
                ema, ref = (number(row.get(f"{key}/{name}")) for key in ("triage/acc_ema", "drift/ref"))
                found.append((row["step"], name, f"pass rate (EMA) {ema}, reference {ref}"))
            before = flag
    return found


def _told(run: Run) -> list[tuple]:
    """Of events.jsonl what the rows do not show already; a drift flag is one of those that they do."""
    return [
        (
            event["step"],
            str(event.get("kind")).replace("_", " "),
            event.get("domain", ""),
            ", ".join(
                f"{key} {_plain(value)}" for key, value in event.items() if key not in ("step", "kind", "domain")
            ),
        )
        for event in run.events
        if event.get("kind") not in ("drift", "safety")  # which has a section of its own
    ]


def _plain(value) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _skipped(run: Run) -> list[tuple]:
    what = "nothing to learn from, or a value was not finite: parameters left as they were"
    return [(row["step"], "", what) for row in run.rows if row.get("policy/skipped")]


def _ungraded(run: Run) -> list[tuple]:
    return [
        (row["step"], "", f"{row['rollout/invalid']:.1%} of the replies had no grade")
        for row in run.rows
        if row.get("rollout/invalid")
    ]


def _moves(run: Run) -> list[tuple]:
    """First share after the run began, and the last before a retirement that the configuration states."""
    found, begun = [], next((row["step"] for row in run.rows if row["step"] > 0), 0)
    for domain in run.domains:
        step_K, share_K = column(run.rows, f"triage/share/{domain.name}")
        trained_K = step_K[np.nan_to_num(share_K) > 0]
        if len(trained_K) and trained_K[0] > begun:
            found.append((int(trained_K[0]), domain.name, "first share: it arrived"))
        if domain.retires is not None and len(trained_K) and run.last["step"] > domain.retires:
            found.append((int(trained_K[-1]), domain.name, "last share: it retired"))
    return found
