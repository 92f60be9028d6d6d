"""What M0's own rehearsal yields: prompts by stage and source, and how often what it answers is right.

    python -m benchmarks.rehearsal [--config-name bench12] [--only copy,sort] [--out FILE] [key=value ...]

Every prior domain of the configuration is written for as if its training rows were lost. `asked`: kept rows that a
solver below, which knows the domain's prompts, can read; the others are no prompts of the domain's. `right`: the share
of those whose answer is the solver's. Solvers and generators are not used in writing.
"""

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from configs import cli
from curriculum.bench import DAYS
from infinite_jax import rehearsal
from infinite_jax.session import set_up_runtime


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _shift(by: str, letters: str) -> str:
    return " ".join(chr((ord(letter) - 97 + int(by)) % 26 + 97) for letter in letters.split())


def _kept(kind: str, limit: str, numbers: str) -> str:
    chosen = [n for n in _numbers(numbers) if (n > int(limit) if kind == "larger" else n < int(limit))]
    return ", ".join(map(str, chosen))


def _sum(text: str) -> str | None:
    terms = re.fullmatch(r"(\d+)\s*([+-])\s*(\d+)", text.strip())
    if not terms:
        return None
    a, sign, b = terms.groups()
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))


# Of each domain: the form of its prompts, and the answer from what the groups of the form hold.
SOLVERS = {
    "copy": (r"copy: (\w+)", lambda text: text),
    "largest": (r"largest: ([\d ]+)", lambda text: str(max(_numbers(text)))),
    "reverse": (r"reverse: ([\d ]+)", lambda text: " ".join(text.split()[::-1])),
    "sort": (r"sort: ([\d ]+)", lambda text: " ".join(sorted(text.split()))),
    "lookup": (r"get (\w): ([\w ]+)", lambda name, text: dict(pair for pair in text.split()[::-1]).get(name)),
    "add": (r"add: (\d+) \+ (\d+)", lambda a, b: str(int(a) + int(b))),
    "shift": (r"shift (\d+): ([a-z ]+)", _shift),
    "count": (r"count (\w): (\w+)", lambda letter, text: str(text.count(letter))),
    "gcd": (r"Find the Greatest Common Divisor.*?: (\d+), (\d+)\..*", lambda a, b: str(math.gcd(int(a), int(b)))),
    "products": (r".*?(\d+) \* (\d+).*", lambda a, b: str(int(a) * int(b))),
    "sums": (r".*?(\d+ [+-] \d+)\D*", _sum),
    "compare": (
        r".*(largest|smallest): ([\d, ]+)\?.*",
        lambda kind, text: str((max if kind == "largest" else min)(_numbers(text))),
    ),
    "sort_numbers": (
        r"Sort these numbers from smallest to largest: ([\d, ]+)\..*",
        lambda text: ", ".join(map(str, sorted(_numbers(text)))),
    ),
    "filter_numbers": (r".*numbers (larger|smaller) than (\d+) in this list: ([\d, ]+)\..*", _kept),
    "kth_letter": (
        r"What is the (\d+)\w\w letter of the word '(\w+)'\?.*",
        lambda k, word: word[int(k) - 1] if 0 < int(k) <= len(word) else None,
    ),
    "weekday": (
        rf"Today is ({'|'.join(DAYS)})\. Which day of the week is it in (\d+) days?\?.*",
        lambda day, ahead: DAYS[(DAYS.index(day) + int(ahead)) % 7],
    ),
}


def solve(name: str, prompt: str) -> str | None:
    """The right answer; None where the prompt has not the domain's form, or no answer."""
    if name not in SOLVERS:
        return None
    form, answer = SOLVERS[name]
    found = re.fullmatch(form, prompt)
    return answer(*found.groups()) if found else None


def right(name: str, rows: Sequence[dict]) -> tuple[int, int]:
    """(rows that the solver can read, of those the rows with the right answer)"""
    asked = [(solve(name, row["messages"][-1]["content"]), row["answer"]) for row in rows]
    known = [(truth, answer) for truth, answer in asked if truth is not None]
    return len(known), sum(_plain(truth) == _plain(answer) for truth, answer in known)


def _plain(answer: object) -> str:
    return re.sub(r"[\s.,\[\]]+", " ", str(answer)).strip().casefold()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("rehearsal", __doc__)
    cli.add_config_arguments(arguments)
    arguments.add_argument("--only", metavar="NAME,...")
    arguments.add_argument("--out", type=Path, metavar="FILE", help="JSON of the table and the report")
    given = arguments.parse_args(argv)
    with cli.bad_input():
        config = cli.compose_config(given.config_name, given.config_dir, given.overrides)
        set_up_runtime(config)
        names = given.only.split(",") if given.only else [d.name for d in config.domains if not d.new]
        began = time.perf_counter()
        kept, notes = rehearsal.write(config, names)
        seconds = time.perf_counter() - began
    print(rehearsal.table(kept, notes))
    print(f"\n{'domain':<14} {'rows':>5} {'answers':>7} {'agreement':>9} {'asked':>6} {'right':>6}")
    found = {}
    for name, each in kept.items():
        report, (asked, correct) = each.report(), right(name, each.rows)
        found[name] = report | {"asked": asked, "right": correct}
        share = f"{correct / asked:6.2f}" if asked else "     -"
        agreement = f"{report['agreement']:.2f}" if each.rows else "-"
        print(f"{name:<14} {len(each.rows):>5} {report['answers']:>7} {agreement:>9} {asked:>6} {share}")
    device = jax.devices()[0].device_kind
    print(f"\n{seconds:.0f} s on {jax.device_count()} x {device}, jax {jax.__version__}, model {config.model.path}")
    if given.out:
        contents = {"seconds": seconds, "device": device, "domains": found, "evaluation_only": notes}
        given.out.write_text(json.dumps(contents, indent=1, ensure_ascii=False), errors="backslashreplace")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
