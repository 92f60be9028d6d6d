r"""Graders: pure functions `(reply, answer, meta) -> grade`, one an environment.

    4  right and in the asked form
    3  right, but not in the asked form: extra text, fences, spacing, case
    2  wrong but well-formed, or partly right
    1  anything else

A grade of 3 or more is a pass, so a grader never gives one to a wrong answer, nor to a reply that lists many answers
and leaves it to the grader to find the right one: each grader settles on one candidate before it looks at the answer.
A grader raises ValueError when `answer` or `meta` is not what it needs; the evaluator marks the row invalid then, not
wrong.

The graders in CHEAP take time linear in the reply and run inside the trainer; those that can hang (`orz`, computer
algebra; `python_tests` and `asserts`, model-written programs) or load packages of their own (`gym`, `ifeval`) run in
the evaluator's worker processes. A model as judge is a check of a rubric: rubric/judge.py.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from typing import NamedTuple

from rubric import sandbox
from rubric.asserts import asserts
from rubric.constraints import constraints
from rubric.gym import gym
from rubric.ifeval import ifeval
from rubric.reading import NUMBER, answers_of, boxed, items, json_objects, need, normalised, programs, tagged


def partly(guess: list[str] | str, right: list[str] | str) -> bool:
    """As long as the right answer, at least two positions long, and right in at least half of them."""
    return len(guess) == len(right) >= 2 and 2 * sum(g == r for g, r in zip(guess, right)) >= len(right)


def eq(reply: str, answer: object, meta: dict) -> int:
    """Normalised match of the last <answer>...</answer>, or of the whole reply when there is none.

    `answer` may be a list of right answers. 4 equal but for outer white space, 3 equal after `normalised`, 2 `partly`
    right by words (by characters when the answer is one word), 1 else.
    """
    inner = tagged(reply)
    text = (reply if inner is None else inner).strip()
    rights = answers_of(answer)
    if text in rights:
        return 4
    guess, grade = normalised(text), 1
    for right in map(normalised, rights):
        if guess == right and right:
            return 3
        words = right.split(" ")
        if partly(guess.split(" "), words) if len(words) > 1 else partly(guess, right):
            grade = 2
    return grade


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def number(reply: str, answer: object, meta: dict) -> int:
    """One number. 4 the reply is the answer as written; 3 all numbers of the reply are one number, the right one.

    Numbers are decimal, with or without sign, thousands commas and exponent, and stand free of letters. A reply with
    several different numbers never passes: it gets 2 when the last is right, else 1. One wrong number is 2, none 1.
    """
    right, *others = answers_of(answer)
    if others or not NUMBER.fullmatch(right):
        raise ValueError(f"answer {answer!r} is not one decimal number: environment 'orz' reads other expressions")
    if reply.strip() == right:
        return 4
    found = [_decimal(text) for text in NUMBER.findall(reply.replace("−", "-"))]
    if len(set(found)) == 1:
        return 3 if found[0] == _decimal(right) else 2
    return 2 if found and found[-1] == _decimal(right) else 1


def line(reply: str, answer: object, meta: dict) -> int:
    """The first line that is not blank; later lines are never searched.

    4 it is the whole reply and equal; 3 equal after `normalised`, or more lines follow; 2 wrong, but one of
    meta["choices"] (optional); 1 else.
    """
    rights, whole = answers_of(answer), reply.strip()
    if whole in rights:
        return 4
    guess = normalised(whole.split("\n", 1)[0])
    if guess and guess in map(normalised, rights):
        return 3
    return 2 if guess and guess in map(normalised, meta.get("choices") or ()) else 1


def list_(reply: str, answer: object, meta: dict) -> int:
    """Items in order, joined by meta["separator"] (", " unless given). 4 as written.

    3 the same items in order behind another separator, in brackets, quotes, before a full stop, or after a "label:";
    2 the same items in another order, or as many items with at least half of the places right; 1 else.
    """
    separator, rights, text = meta.get("separator") or ", ", answers_of(answer), reply.strip()
    if text in rights:
        return 4
    grade = 1
    for right in rights:
        bare = text if ":" in right else re.sub(r"\A[^:,;|\n]*:", "", text)
        guess, wanted = items(bare, separator), items(right, separator)
        if guess == wanted:
            return 3
        if Counter(guess) == Counter(wanted) or partly(guess, wanted):
            grade = 2
    return grade


def _same(a: object, b: object, lax: bool) -> bool:
    """Equal JSON values. Strict: of one type, too. Lax: 1, 1.0 and "1" are equal, and so are true and "true"."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key], lax) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y, lax) for x, y in zip(a, b))
    if type(a) is type(b):
        return a == b
    if not lax or not all(isinstance(value, bool | int | float | str) for value in (a, b)):
        return False
    if isinstance(a, bool) or isinstance(b, bool):
        return str(a).lower() == str(b).lower()
    texts = str(a).strip(), str(b).strip()
    return all(map(NUMBER.fullmatch, texts)) and _decimal(texts[0]) == _decimal(texts[1])


def _fits(call: dict, tools: dict[str, dict]) -> bool:
    """A call of a known tool whose argument names are the schema's, none of the required ones missing."""
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        return False
    return set(tools[name].get("required", ())) <= arguments.keys() <= tools[name].get("properties", {}).keys()


def json_call(reply: str, answer: object, meta: dict) -> int:
    """One function call {"name": ..., "arguments": {...}}; meta["tools"] = [{"name": ..., "parameters": schema}, ...],
    each as it is or under "function".

    4 the reply is one JSON object equal to the answer, types included. 3 the only call in the reply (in prose, fences
    or <tool_call> tags) is equal, or equal when numbers may be strings, integers floats, booleans strings, and
    `arguments` a string that holds JSON. 2 every call in the reply is of a known tool with the schema's argument
    names; 1 else. A reply with two different calls never passes.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("arguments"), dict) or "name" not in answer:
        raise ValueError(f'answer {answer!r} is not a call: write {{"name": ..., "arguments": {{...}}}}')
    given = [tool.get("function", tool) for tool in need(meta, "tools", "json_call")]
    tools = {tool["name"]: tool.get("parameters") or {} for tool in given}
    calls = json_objects(reply)
    if not calls:
        return 1
    if len(calls) == 1 and _same(calls[0], answer, lax=False):
        text = reply.strip()
        return 4 if text[0] == "{" and json.JSONDecoder().raw_decode(text)[1] == len(text) else 3
    for call in calls:
        if isinstance(call.get("arguments"), str):
            call["arguments"] = next(iter(json_objects(call["arguments"])), None)
    if all(_same(call, answer, lax=True) for call in calls):
        return 3
    return 2 if all(_fits(call, tools) for call in calls) else 1


@cache
def _math_verify() -> tuple[Callable, Callable]:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("environment 'orz' needs the package math-verify: pip install math-verify") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody sets a time limit: the pool does
    return math_verify.parse, math_verify.verify


def _expression(text: str) -> list:
    """[sympy object, the text it was read from], or [] when nothing can be read."""
    found = _math_verify()[0](text, parsing_timeout=None)
    return [] if found and isinstance(found[0], str) else found


def _in_box(text: str) -> str:
    """A text that is one expression, in the form math-verify reads best: in a box, a percent sign being a unit."""
    return "\\boxed{" + re.sub(r"\\?%", "", text.strip().removesuffix(".").strip("$")) + "}"


# No two letters side by side but in a LaTeX command, no $: a reply of this kind is an expression, not a sentence.
_BARE = re.compile(r"(?:\\[A-Za-z]+|\\[^A-Za-z]|[^A-Za-z$\\\n]|[A-Za-z](?![A-Za-z])){1,200}")
_DIGITS = r"[+-]?[0-9][0-9,]*(?:\.[0-9]+)?"
_SPACING = re.compile(r"\\(?:left|right|text|mathrm|textbf|mathbf|displaystyle|boxed|quad|[,;: ])|[\s{}]|(?<=[0-9])°")
_PLAIN = re.compile(rf"{_DIGITS}\s*(?:\\?%|\^\s*\\circ|[A-Za-z.\s]*)")
_FRACTION = re.compile(rf"[+-]?\s*(?:{_DIGITS}/{_DIGITS}|\\[dt]?frac(?:\s*[0-9]\s*[0-9]|\s+{_DIGITS}\s+{_DIGITS}))")


def _worked_out(text: str, right: str) -> bool:
    """False for 12+7 where the answer is 19: the question, sent back, is equal to its answer but answers nothing."""

    def bare(part: str) -> str:
        part = part.replace("{,}", ",").replace("\\!", "").replace("\\$", "")
        return _SPACING.sub(" ", part).strip(" $()[]")

    right, text = bare(right), bare(text.rsplit("=", 1)[-1])
    if not _PLAIN.fullmatch(right) and not _FRACTION.fullmatch(right):
        return True  # the answer is an expression itself: any equal form will do
    whole = re.fullmatch(r"[+-]?[0-9,]+", right)
    return bool(_PLAIN.fullmatch(text) or (not whole and _FRACTION.fullmatch(text)))


def orz(reply: str, answer: object, meta: dict) -> int:
    r"""Equality by math-verify of the last \boxed{}, else the last <answer>, else the expression found in the reply.

    4 right and in \boxed{} or <answer>, 3 right elsewhere, 2 wrong but an expression, 1 nothing to parse. When the
    answer is a number the reply has to be worked out: 12+7 for 19, or 6/2 for 3, gets 2. When it is a longer
    expression, every equal form is right. Of a reply without \boxed{} and tags the last 2,000 characters are read.
    There is no time limit here (math-verify's own needs SIGALRM): the evaluator sets it.
    """
    reply = reply.strip().replace("−", "-")
    marked = boxed(reply)
    marked = tagged(reply) if marked is None else marked
    candidate = reply if marked is None and _BARE.fullmatch(reply) else marked
    found = _expression(reply[-2000:] if candidate is None else _in_box(candidate))
    for right in answers_of(answer):
        gold = _expression(right if "$" in right or "\\boxed" in right else _in_box(right))
        if not gold:
            raise ValueError(f"answer {right!r} is not an expression that math-verify can read")
        if found and _math_verify()[1](gold[0], found[0], timeout_seconds=None):
            if _worked_out(str(found[-1]) if candidate is None else candidate, right):
                return 3 if marked is None else 4
    return 2 if found else 1


def _returned(value: object, expect: object) -> bool:
    """Python's ==, except that tuples equal lists (JSON has one kind), and floats are close within 1e-9 relative."""
    if isinstance(expect, list | tuple):
        return isinstance(value, list) and len(value) == len(expect) and all(map(_returned, value, expect))
    if isinstance(expect, dict) and isinstance(value, dict):
        expect = {str(key): item for key, item in expect.items()}
        return value.keys() == expect.keys() and all(_returned(value[key], expect[key]) for key in value)
    if isinstance(expect, float) and isinstance(value, float):
        return math.isclose(value, expect, rel_tol=1e-9, abs_tol=1e-12) or (value != value and expect != expect)
    return value == expect


class TestsRun(NamedTuple):
    passed: tuple[bool, ...]  # of each test
    returned: bool  # at least one call did
    program: int  # index among rubric.reading.programs, 0 for the reply as it is; -1 for none


def tests_passed(reply: str, meta: dict) -> TestsRun:
    """Runs the function of a reply on meta["tests"]; see python_tests."""
    entry, tests = need(meta, "entry", "python_tests"), need(meta, "tests", "python_tests")
    ran = sandbox.run(programs(reply, entry), entry, [test["args"] for test in tests])
    if not ran.calls:
        return TestsRun((False,) * len(tests), False, ran.program)
    passed = tuple(call.returned and _returned(call.value, test["expect"]) for call, test in zip(ran.calls, tests))
    return TestsRun(passed, any(call.returned for call in ran.calls), ran.program)


def python_tests(reply: str, answer: object, meta: dict) -> int:
    """A Python function; meta = {"entry": its name, "tests": [{"args": [...], "expect": value}, ...]}, JSON values.

    4 every call returns what is expected and the reply is only code; 3 the same, but the code had to be taken from
    fences or prose; 2 at least one call returned; 1 else: no such function, an error in every call, a limit hit, an
    early exit. The expected values stay out of the child process, so that a program can only return them by computing
    them.
    """
    ran = tests_passed(reply, meta)
    if not ran.returned:
        return 1
    if all(ran.passed):
        return 4 if ran.program == 0 else 3
    return 2


GRADERS: dict[str, Callable[[str, object, dict], int]] = {
    "eq": eq,
    "orz": orz,
    "number": number,
    "line": line,
    "list": list_,
    "json_call": json_call,
    "constraints": constraints,
    "python_tests": python_tests,
    "asserts": asserts,
    "gym": gym,
    "ifeval": ifeval,
}
CHEAP = frozenset(GRADERS) - {"orz", "python_tests", "asserts", "gym", "ifeval"}
