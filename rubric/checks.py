"""Checks: what a criterion of a rubric asks of a reply, as a score in [0, 1] and measures worth logging.

A check is one of

    a grader of rubric/verify.py, or a .py file with grade(reply, answer, meta)      scores (grade - 1) / 3
    environment     the domain's own grader
    judge           a model's answer to `question` (rubric/judge.py)
    what CHECKS below names besides: functions (reply, answer, meta, options) -> (score, {measure: value})

A check raises ValueError where a row lacks what it reads: the row is invalid then, not wrong. Those that can hang, or
bring a heavy package with them, run in worker processes like the graders of that kind (rubric/pool.py).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from rubric import code_checks, ifeval, text_checks, tool_checks
from rubric.constraints import ARGUMENTS
from rubric.verify import CHEAP, GRADERS

PREFIX = "check:"  # of the keys that rubric/grading.py loads from here

Found = tuple[float, dict[str, float]]


class Checked(NamedTuple):
    """What became of one check of one row."""

    score: float | None  # in [0, 1]; None when there is a reason
    reason: str  # "" for a score
    measures: dict[str, float]


@dataclass(frozen=True)
class Check:
    name: str  # a key of CHECKS, or the absolute path of a .py file
    options: str  # JSON of a mapping, keys in order: hashable, and the same for the same options

    @property
    def key(self) -> str:
        """What a worker loads: the grader's own name, or the check with its options."""
        return self.name if plain(self.name) else PREFIX + json.dumps([self.name, self.options])

    def given(self) -> dict:
        """The options; keys are text, as in JSON."""
        return json.loads(self.options)


class Option(NamedTuple):
    kind: type | tuple[type, ...]
    expected: str  # in words
    required: bool = False
    choices: tuple[str, ...] = ()


class Kind(NamedTuple):
    run: Callable[[str, object, dict, dict], Found] | None  # None: the evaluator's own affair
    measures: tuple[str, ...] = ()
    options: Mapping[str, Option] = {}
    heavy: bool = False  # for a worker process


_TEXT, _NUMBER = "text", "a number"
_REQUIRED_TEXT = Option(str, _TEXT, required=True)
CONSTRAINT = {
    "kind": Option(str, _TEXT, True, tuple(ARGUMENTS)),
    "word": Option(str, _TEXT),
    "text": Option(str, _TEXT),
    "n": Option(int, "a whole number"),
}

CHECKS: dict[str, Kind] = {
    **{name: Kind(None, ("exact_match",), heavy=name not in CHEAP) for name in GRADERS},
    "environment": Kind(None, ("exact_match",)),
    "judge": Kind(
        None, ("judge_grade",), {"question": _REQUIRED_TEXT, "levels": Option(dict, "a mapping {1: ..., 4: ...}")}
    ),
    "match": Kind(
        text_checks.match, ("exact_match", "f1"), {"by": Option(str, _TEXT, True, ("exact", "f1", "contained"))}
    ),
    "choice": Kind(text_checks.choice, ("accuracy",)),
    "quantity": Kind(
        text_checks.quantity, ("within_tolerance",), {"tolerance": Option((int, float), _NUMBER, required=True)}
    ),
    "unit": Kind(text_checks.unit, ("unit_right",)),
    "marked": Kind(text_checks.marked, ("marked",), {"by": Option(str, _TEXT, True, ("boxed", "answer", "either"))}),
    "constraint": Kind(text_checks.constraint, (), CONSTRAINT),
    "constraints_held": Kind(text_checks.constraints_held, ("constraints_held", "all_held")),
    "no_repetition": Kind(text_checks.no_repetition),
    "variety": Kind(text_checks.variety, ("variety",), {"full": Option((int, float), _NUMBER, required=True)}),
    "cites": Kind(text_checks.cites, ("citation_precision", "citation_recall")),
    "supported": Kind(text_checks.supported, ("supported",)),
    "regex": Kind(text_checks.regex, (), {"pattern": _REQUIRED_TEXT}, heavy=True),
    "code_tests": Kind(code_checks.code_tests, ("tests_passed", "all_passed"), heavy=True),
    "code_only": Kind(code_checks.code_only, heavy=True),
    "schema": Kind(
        tool_checks.schema, ("json_valid", "schema_valid"), {"schema": Option(dict, "a JSON schema")}, heavy=True
    ),
    "tool_schema": Kind(tool_checks.tool_schema, ("json_valid", "schema_valid"), heavy=True),
    "instructions": Kind(
        ifeval.instructions,
        ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"),
        {"by": Option(str, _TEXT, True, ("strict", "loose"))},
        heavy=True,
    ),
}


def plain(name: str) -> bool:
    """Whether it is a grader: (reply, answer, meta) -> 1 to 4."""
    return name in GRADERS or name.endswith(".py")


def heavy(name: str) -> bool:
    """Whether a check of this name belongs into a worker process."""
    return name.endswith(".py") or CHECKS[name].heavy


def known_measures(check: Check) -> tuple[str, ...]:
    return ("exact_match",) if check.name.endswith(".py") else CHECKS[check.name].measures


def refuse(name: str, options: Mapping) -> tuple[str, str] | None:
    """(option, what is wrong with it) of the first option that the check cannot take, or None."""
    known = {} if name.endswith(".py") else CHECKS[name].options
    for key, value in options.items():
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'none'}"
            return key, f"is no key of a criterion and no option of check {name!r}: {hint}"
        if not isinstance(value, known[key].kind) or (isinstance(value, bool) and known[key].kind is not bool):
            return key, f"expected {known[key].expected}"
        if known[key].choices and value not in known[key].choices:
            return key, f"use one of {', '.join(known[key].choices)}"
    for key, option in known.items():
        if option.required and key not in options:
            return key, f"is missing: check {name!r} needs it, {option.expected}"
    if name == "constraint" and (needed := ARGUMENTS[options["kind"]]) and needed not in options:
        return needed, f"is missing: the constraint {options['kind']} needs it"
    if name == "regex":
        return _bad_pattern(options["pattern"])
    if name == "judge" and not set(options.get("levels", {})) <= {1, 2, 3, 4}:
        return "levels", "its keys are grades, 1 to 4"
    return None


def _bad_pattern(pattern: str) -> tuple[str, str] | None:
    try:
        text_checks.compiled(pattern)
    except ValueError as error:
        return "pattern", str(error)
    return None


def name_of(key: str) -> str:
    """The check of a key that begins with PREFIX."""
    return json.loads(key.removeprefix(PREFIX))[0]


def load(key: str) -> Callable[[str, object, dict], Found]:
    """The function of a `Check.key` that begins with PREFIX, its options bound."""
    name, options = json.loads(key.removeprefix(PREFIX))
    run, options = CHECKS[name].run, json.loads(options)
    return lambda reply, answer, meta: run(reply, answer, meta, options)


def of_grade(grade: float) -> Checked:
    """A grader's answer as a check's."""
    return Checked((grade - 1.0) / 3.0, "", {"exact_match": float(grade >= 3.0)})
