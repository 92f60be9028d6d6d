"""The contamination gate's page: the verdict, what each stage compared, each domain, the matches side by side."""

from collections import Counter

from infinite_jax.page.pieces import absent, card, esc, line, number, table

SHOWN = 200  # matches on the page; report.json has all
CUT = 600  # characters of a text on the page


def parts(report: dict) -> dict[str, str]:
    """What template.html is filled with."""
    summary = report["summary"]
    sections = [
        ("stages", "Stages", "Cheapest first; a training row found by one stage is not looked at by the next.",
         _stages(summary)),
        ("domains", "Domains", "Training rows that are an evaluation prompt of any domain, and the domain's own "
         "evaluation prompts that stand in any domain's training rows.", _domains(summary)),
        ("matches", "Matches", "The content of the last user message, untouched.", _matches(report["matches"])),
    ]  # fmt: skip
    if "memorised" in summary:
        lede = "Whether the model itself continues the first half of the evaluation prompts word for word, and its "
        lede += "log-probability of them, compared with that of twins in which a number or word is another."
        sections.append(("memorised", "Memorised", lede, _memorised(summary["memorised"])))
    return {
        "title": "Contamination · infinite_jax",
        "header": _header(report),
        "links": "".join(f'<a href="#{key}">{title}</a>' for key, title, _, _ in sections),
        "sections": "".join(
            f'<section id="{key}"><h2>{title}</h2><p class="lede">{lede}</p>{body}</section>'
            for key, title, lede, body in sections
        ),
        "footer": f"Configuration {esc(summary['config_hash'][:16])}, data "
        f"{esc(' '.join(f'{name} {digest[:12]}' for name, digest in summary['data_sha256'].items()))}.",
    }


def _header(report: dict) -> str:
    summary = report["summary"]
    verdict = "Passed" if summary["verdict"] == "passed" else "Halted"
    note = "" if verdict == "Passed" else f'<p class="note">{esc(summary["verdict"])}</p>'
    done = Counter(match["action"] for match in report["matches"])
    not_run = [stage["name"] for stage in summary["stages"] if stage["status"] == "NOT RUN"]
    tiles = [
        ("training rows", f"{summary['train_rows']:,}", f"{len(summary['domains'])} domains"),
        ("evaluation prompts", f"{summary['evaluation_rows']:,}", "of all domains, prior ones included"),
        (
            "matched",
            f"{summary['matched']:,}",
            esc(", ".join(f"{n:,} {action}" for action, n in done.items()) or "none"),
        ),
        ("stages not run", str(len(not_run)), esc(", ".join(not_run) or "all that were asked for ran")),
    ]
    shown = "".join(
        f'<div class="card tile"><p class="name">{name}</p><p class="big">{big}</p><p class="note">{small}</p></div>'
        for name, big, small in tiles
    )
    return (
        f'<p class="verb">infinite_jax contamination gate</p><h1>{verdict}</h1>'
        f'<p class="state">policy {esc(summary["policy"])}</p>{note}<div class="tiles">{shown}</div>'
    )


def _stages(summary: dict) -> str:
    lines = (
        line(stage["name"], [esc(stage["status"]), f"{stage['train']:,}", f"{stage['evaluation']:,}",
                             f"{stage['matched']:,}", f'<td class="wrap left">{esc(stage["note"])}</td>'])
        for stage in summary["stages"]
    )  # fmt: skip
    head = ("stage", "status", "training rows", "evaluation prompts", "matched", "note")
    return f'<div class="card">{table(head, lines, left=(5,))}</div>' if summary["stages"] else absent("No stage.")


def _domains(summary: dict) -> str:
    def shown(domain: dict) -> list[str]:
        interval = domain["interval"]
        share = number(100 * domain["share"], 2)
        if interval:
            share += f' <span class="range">[{number(100 * interval[0], 2)}, {number(100 * interval[1], 2)}]</span>'
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in domain["kinds"].items())
        leaked = f"{domain['evaluation_matched']:,} of {domain['evaluation']:,}"
        return [f"{domain['train']:,}", f"{domain['matched']:,}", share, leaked, f'<td class="left">{esc(kinds)}</td>']

    head = ("domain", "training rows", "matched", "share, %", "own evaluation prompts matched", "by")
    lines = (line(esc(name), shown(domain)) for name, domain in summary["domains"].items())
    return f'<div class="card">{table(head, lines, left=(5,))}</div>'


def _matches(matches: list[dict]) -> str:
    if not matches:
        return absent("No training row matched.")
    cards = []
    for match in matches[:SHOWN]:
        title = f"{esc(match['train_id'])} · {esc(match['kind'])}"
        pair = "".join(
            f'<div><p class="name">{name}</p><pre style="white-space:pre-wrap;overflow-wrap:anywhere;margin:0">'
            f"{_cut(match[key])}</pre></div>"
            for name, key in ((f"training, {esc(match['action'])}", "train_text"),
                              (f"evaluation, {esc(match['eval_id'])}", "eval_text"))
        )  # fmt: skip
        cards.append(card(title, f"score {number(match['score'])}", f'<div class="split">{pair}</div>'))
    more = len(matches) - SHOWN
    rest = absent(f"{more:,} more in report.json.") if more > 0 else ""
    return f'<div style="display:grid;gap:12px">{"".join(cards)}{rest}</div>'


def _cut(text: str) -> str:
    return esc(text) if len(text) <= CUT else f"{esc(text[:CUT])} … ({len(text):,} characters)"


def _memorised(memorised: dict) -> str:
    if memorised["status"] != "ran":
        return absent(f"{esc(memorised['status'])}: {esc(memorised['note'])}")

    def shown(domain: dict) -> list[str]:
        def with_range(key: str) -> str:
            low, high = domain[f"{key}_interval"] or (None, None)
            return f'{number(domain[key])} <span class="range">[{number(low)}, {number(high)}]</span>'

        return [f"{domain['prompts']:,}", with_range("completed"), with_range("gap")]

    head = ("domain", "prompts", "completed word for word", "log-prob gap to twins, nats a token")
    lines = (line(esc(name), shown(domain)) for name, domain in memorised["domains"].items())
    return f'<div class="card">{table(head, lines)}</div>'
