"""One HTML page that shows a run: what it learned, what the scheduler did and why, what it cost, what it wrote.

    python -m infinite_jax.report RUN_DIR [out=FILE]          default: RUN_DIR/report.html

The page needs no network and no script; its pictures are SVG. It may be made at any time, also of a run in progress.
"""

import string
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from infinite_jax import atomic
from infinite_jax.drawing import logged
from infinite_jax.page import calibration, curriculum, hacking, held_out, safety, training
from infinite_jax.page import run as run_input
from infinite_jax.page.held_out import Changes
from infinite_jax.page.pieces import Section, duration, esc, number, signed
from infinite_jax.page.run import Run

FACTS = {  # of the header: title -> key
    "model": "model.path",
    "curriculum": "curriculum.policy",
    "prompts a step": "algorithm.prompts",
    "samples a prompt": "algorithm.group_size",
    "learning rate": "algorithm.learning_rate",
    "KL": "algorithm.kl_coef",
    "seed": "run.seed",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("report", __doc__)
    arguments.epilog = None  # no configuration is read here
    arguments.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    arguments.add_argument("overrides", nargs="*", metavar="out=FILE")
    given = arguments.parse_args(argv)
    with cli.bad_input():
        out = given.run_dir / "report.html"
        for override in given.overrides:
            key, _, value = override.partition("=")
            if key != "out" or not value:
                raise ValueError(f"argument {override!r}: expected out=FILE")
            out = Path(value)
        write(run_input.read(given.run_dir), out)
    print(f"report: {out}")
    return cli.DONE


def write(run: Run, out: Path) -> None:
    """The page as a file, whole or not at all."""
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: there is no folder {out.parent}")
    # a reply may hold half a surrogate pair: written as a character reference, which a browser shows as unknown
    atomic.replace(out, page(run), errors="xmlcharrefreplace")


def page(run: Run) -> str:
    """The page as HTML."""
    found, watched = held_out.changes(run), safety.watched(run)
    sections = [
        held_out.held_out(run, found),
        *([watched] if watched else []),
        curriculum.stability(run),
        curriculum.shares(run),
        curriculum.queue(run),
        curriculum.staleness(run),
        curriculum.events(run),
        hacking.hacked(run),
        held_out.grades(run),
        held_out.retained(run),
        calibration.calibrated(run),
        training.curves(run),
        training.cost(run),
        training.samples(run),
        training.settings(run),
    ]
    template = string.Template((Path(__file__).parent / "page" / "template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"{esc(run.name)} · infinite_jax",
        header=_header(run, found),
        links="".join(f'<a href="#{section.key}">{section.title}</a>' for section in sections),
        sections="".join(map(_section, sections)),
        footer=f"From {esc(run.folder)}: metrics.jsonl with {len(run.rows):,} rows, "
        f"{len(run.evaluations)} evaluations with the grades of every prompt, {len(run.events)} events, "
        f"{len(run.transcripts)} transcripts.",
    )


def _section(section: Section) -> str:
    head = f"<h2>{section.title}</h2><p class='lede'>{section.lede}</p>"
    return f'<section id="{section.key}">{head}{section.body}</section>'


def _header(run: Run, found: Changes | None) -> str:
    step, steps = run.last["step"], run.setting("run.steps")
    budget = run.setting("run.tokens") or 0
    ended = (steps is not None and step >= steps) or 0 < budget <= training.total_tokens(run)
    state = (
        f"{step:,} steps"
        if steps is None
        else f"all {step:,} steps done"
        if ended
        else f"{step:,} of {steps:,} steps so far"
    )
    facts = [(title, run.setting(key)) for title, key in FACTS.items()]
    only = sum(domain.eval_only for domain in run.domains)
    facts.insert(2, ("domains", f"{len(run.domains)}" + (f", {only} of them eval only" if only else "")))
    if run.setting("algorithm.kl_type") is not None:
        kind = run.setting("algorithm.kl_type")
        facts = [(t, "none" if kind == "none" else f"{v:g} in the {kind}") if t == "KL" else (t, v) for t, v in facts]
    shown = "".join(
        f"<div><dt>{title}</dt><dd>{esc(f'{value:g}' if isinstance(value, float) else value)}</dd></div>"
        for title, value in facts
        if value is not None
    )
    tiles = "".join((_moved_tile(found), _worst_tile(run), _cost_tile(run), _event_tile(run)))
    return (
        f'<div class="hero"><div><p class="verb">infinite_jax run</p><h1>{esc(run.name)}</h1>'
        f'<p class="state">{state}</p>{_headline(run, found)}<dl class="facts">{shown}</dl></div>'
        f'{held_out.macro_curve(run)}</div><div class="tiles">{tiles}</div>'
    )


def _tile(name: str, big: str, note: str) -> str:
    body = f'<p class="name">{name}</p><p class="big">{big}</p><p class="note">{note}</p>'
    return f'<div class="card tile">{body}</div>'


def _headline(run: Run, found: Changes | None) -> str:
    known = [row for row in run.rows if row.get("eval/macro") is not None]
    if found is not None and found.macro.change is not None:
        c = found.macro
        big = f"{number(c.before.mean)} → {number(c.after.mean)}"
        note = (
            f"<b>{signed(c.change.mean)}</b>, 95 % interval {signed(c.change.low)} to {signed(c.change.high)}, paired "
            f"over {c.prompts:,} prompts, from step {found.first:,} to {found.last:,}"
        )
    elif known:
        ends = [known[0], known[-1]] if len(known) > 1 else known
        big = " → ".join(number(row["eval/macro"]) for row in ends)
        steps = " and ".join(f"{row['step']:,}" for row in ends)
        note = f"at step {steps}; no interval, since the grades of the prompts are not in this folder"
    else:
        big, note = "no evaluation yet", ""
    return f'<p class="name">Held-out macro average</p><p class="head-number">{big}</p><p class="note">{note}</p>'


def _moved_tile(found: Changes | None) -> str:
    if found is None:
        return ""
    kinds = {kind: [name for name, c in found.domains.items() if c.kind == kind] for kind in ("up", "down", "")}
    fell = f"fell: {esc(', '.join(kinds['down']))}" if kinds["down"] else "none fell beyond its interval"
    big = f"{len(kinds['up'])} up, {len(kinds['down'])} down"
    return _tile("Domains", big, f"{fell}; {len(kinds[''])} within their interval")


def _worst_tile(run: Run) -> str:
    row = run.evaluated
    rates = {d.name: row.get(f"eval/pass_rate/{d.name}") for d in run.domains if not d.eval_only}
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    if not rates:
        return ""
    worst = min(rates, key=rates.get)
    return _tile("Worst trained domain", number(rates[worst]), f"{esc(worst)}, held out, step {row['step']}")


def _cost_tile(run: Run) -> str:
    timed = logged(run.rows, "time/step_s")
    took = f"in {duration(training.total_seconds(run))}, evaluations included" if timed else "time was not recorded"
    return _tile("Tokens generated", f"{training.total_tokens(run):,}", took)


def _event_tile(run: Run) -> str:
    flags = len(curriculum.drift_flags(run))
    if run.logs("drift/flag"):
        return _tile("Drift flags", str(flags), '<a href="#events">drift and safety</a>')
    skipped = sum(bool(row.get("policy/skipped")) for row in run.rows)
    if logged(run.rows, "policy/skipped"):
        return _tile("Skipped updates", str(skipped), "drift was not recorded")
    return ""


if __name__ == "__main__":
    sys.exit(main())
