"""Sections of the report that show training itself: curves, tokens and seconds, transcripts, the configuration."""

import functools

import numpy as np
import yaml

from infinite_jax import panels
from infinite_jax.drawing import PHASES, column, logged, thinned
from infinite_jax.page.pieces import (
    Section,
    absent,
    both_widths,
    card,
    duration,
    esc,
    legend,
    line,
    picture,
    slug,
    table,
)
from infinite_jax.page.run import Run

SHOWN = 8  # steps whose transcripts are on the page

CURVES = {
    "reward/mean": ("Reward", "mean of the batch"),
    "reward/grade": ("Grade", "mean of the batch, 1 to 4"),
    "policy/kl": ("KL to the reference", "nats a token"),
    "policy/entropy": ("Entropy", "nats a token"),
    "rollout/length": ("Length", "tokens a reply"),
    "rollout/truncated": ("Cut off", "part of the replies"),
    "policy/grad_norm": ("Gradient norm", "before clipping"),
    "loss": ("Loss", ""),
    "policy/clip_fraction": ("Clipped", "part of the tokens"),
    "rollout/logp_gap": ("Sampler against trainer", "nats a token"),
    "policy/learning_rate": ("Learning rate", ""),
    "value/loss": ("Value loss", "of the critic, mean of the tokens"),
    "value/grad_norm": ("Critic's gradient norm", "before clipping"),
    "canary/nll": ("Canary text", "nats a token"),
    "canary/kl": ("Canary KL to the start", "nats a token"),
}


def curves(run: Run) -> Section:
    lede = "One value a step; in runs of 60 steps and more faint, with a running mean over a twentieth of the run."
    rows, cards = thinned(run.rows), []
    for key, (title, unit) in CURVES.items():
        if logged(rows, key):
            value_K = column(rows, key)[1]
            last = value_K[~np.isnan(value_K)][-1]
            shown = f"{last:.3g}".replace("-", "−")
            draw = functools.partial(panels.curve, rows=rows, key=key)
            figure = picture(slug(key), f"{title}, {unit}: {last:.4g} at the end", draw, 260, 140, left=38)
            cards.append(card(title, f"{unit} · now {shown}" if unit else f"now {shown}", figure))
    body = f'<div class="grid">{"".join(cards)}</div>' if cards else absent("No step yet.")
    return Section("curves", "Training", lede, body)


def cost(run: Run) -> Section:
    lede = (
        "Where the time went. The first step compiles, for many times a step's own time; the picture is cut above six "
        "usual steps."
    )
    steps = [row for row in run.rows if row["step"] > 0]
    if not logged(run.rows, "time/step_s"):
        return Section("cost", "Tokens and seconds", lede, absent("No time was recorded yet."))
    lines, total = [], total_seconds(run)
    for phase in PHASES:
        second_K = column(run.rows, f"time/{phase}_s")[1]
        second_K = second_K[~np.isnan(second_K)]
        if len(second_K):
            part = f"{second_K.sum() / total:.0%}"
            lines.append(
                line(phase, [duration(second_K.sum()), part, f"{np.median(second_K):.3g} s", str(len(second_K))])
            )
    tokens = total_tokens(run)
    lines.append(line("all", [duration(total), "", "", ""], "total"))
    shown = table(("phase", "seconds in all", "part", "median", "times"), lines)
    rate = sum(row.get("time/rollout_s") or 0 for row in steps)
    facts = [f"{tokens:,} tokens generated"]
    facts += [f"{tokens / rate:,.0f} a second of rollout"] if rate else []
    compiled = [row["step"] for row in steps if row.get("time/compilations")]
    if compiled:
        count = sum(row.get("time/compilations") or 0 for row in steps)
        facts.append(f"{count} programs compiled, the last at step {compiled[-1]}")
    if logged(run.rows, "time/peak_memory_bytes"):
        peak = np.nanmax(column(run.rows, "time/peak_memory_bytes")[1])
        facts.append(f"peak memory {peak / 2**30:.1f} GiB")
    left = f'<div class="card">{shown}<p class="under">{"; ".join(facts)}.</p></div>'
    colours = dict(zip(PHASES, (0, 2, 1, 5)))
    key = legend(*(("", f"var(--layer-{colours[phase]})", phase) for phase in PHASES))
    draw = functools.partial(panels.seconds, rows=thinned(run.rows))
    drawn = both_widths(
        "seconds", "Seconds of each step by phase", draw, {"width": 520, "height": 260}, {"height": 200}
    )
    right = card("Seconds a step", "", key + drawn)
    return Section("cost", "Tokens and seconds", lede, f'<div class="split">{left}{right}</div>')


def total_seconds(run: Run) -> float:
    return sum((row.get("time/step_s") or 0) + (row.get("time/evaluate_s") or 0) for row in run.rows)


def total_tokens(run: Run) -> int:
    """Tokens generated in training."""
    return run.last.get("tokens/total") or sum(row.get("tokens/generated") or 0 for row in run.rows)


# ---- transcripts


def samples(run: Run) -> Section:
    lede = "Training replies with the highest and the lowest reward of a step, as the model wrote them."
    steps = sorted({row["step"] for row in run.transcripts})
    if not steps:
        return Section("transcripts", "Transcripts", lede, absent("Not recorded: no transcripts.jsonl in this run."))
    shown = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, min(SHOWN, len(steps))).round().astype(int)})
    if len(shown) < len(steps):
        lede += f" {len(shown)} of the {len(steps)} recorded steps; the others are in transcripts.jsonl."
    body = "".join(_step(run, step, step == shown[-1]) for step in reversed(shown))
    return Section("transcripts", "Transcripts", lede, body)


def _step(run: Run, step: int, unfolded: bool) -> str:
    rows = [row for row in run.transcripts if row["step"] == step]
    cards = "".join(_reply(row) for row in rows)
    counts = ", ".join(f"{sum(row['kind'] == kind for row in rows)} {kind}" for kind in ("best", "worst"))
    return (
        f"<details{' open' if unfolded else ''}><summary>Step {step} <span class='value'>{counts}</span></summary>"
        f'<div class="grid" style="--least:330px">{cards}</div></details>'
    )


def _reply(row: dict) -> str:
    graded = f"grade {row['grade']:.3g} · reward {row['reward']:.3g}"
    parts = "".join(
        f'<dt>{title}</dt><dd><pre dir="auto" tabindex="0">{esc(row[key]) or "<i>(empty)</i>"}</pre></dd>'
        for title, key in (("asked", "prompt"), ("replied", "reply"), ("answer", "answer"))
    )
    kind = "best" if row["kind"] == "best" else "worst"
    return (
        f'<div class="card talk {kind}"><div class="head"><h3>{esc(row["domain"])}</h3>'
        f'<span class="value">{kind} · {graded}</span></div><dl>{parts}</dl></div>'
    )


def settings(run: Run) -> Section:
    lede = "config.yaml of the run, all of it."
    if not run.config:
        return Section("config", "Configuration", lede, absent("No config.yaml in this folder."))
    text = esc(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100))
    body = f'<details><summary>Show</summary><div class="card"><pre>{text}</pre></div></details>'
    return Section("config", "Configuration", lede, body)
