"""Checks of a rubric on replies worked out by hand, rows that lack what they read, and the time they take."""

import time

import pytest

from rubric import checks
from rubric.checks import CHECKS, Check
from rubric.grading import Task, checked

PASSAGES = {"passages": [{"id": 1, "text": "The sea is blue."}, {"id": "b", "title": "Moon", "text": "It is grey."}]}
CITED = PASSAGES | {"gold": ["1", "b"]}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TESTS = {"entry": "f", "tests": [{"args": [1], "expect": 1}, {"args": [2], "expect": 4}, {"args": [3], "expect": 9}]}
TOOLS = {"tools": [{"name": "go", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}]}
SPEED = {"tolerance": 0.05, "unit": "km/h"}

# check: options, (reply, answer, meta, score), ...
CASES = {
    "match": [
        ({"by": "exact"}, "The <answer>a Red,  car!</answer>", "red car", {}, 1),
        ({"by": "exact"}, "red cars", "red car", {}, 0),
        ({"by": "f1"}, "a big red car", ["red car", "truck"], {}, 0.8),
        ({"by": "f1"}, "", "red", {}, 0),
        ({"by": "contained"}, "It was the red car.", "red car", {}, 1),
        ({"by": "contained"}, "A redcar", "red car", {}, 0),
    ],
    "choice": [
        ({}, "B", "B", {}, 1),
        ({}, "(b) because", "B", {}, 1),
        ({}, "A good one. The answer is: C", "C", {}, 1),
        ({}, "Answer: A. No, the answer is B.", "B", {}, 1),
        ({}, "A good one", "A", {}, 0),
        ({}, "I think so", "I", {}, 0),
        ({}, "\\boxed{D}", "(D)", {}, 1),
        ({}, "", "A", {}, 0),
    ],
    "quantity": [
        ({"tolerance": 0.01}, "v = 3 = 99.5", "100", {}, 1),
        ({"tolerance": 0.01}, "v = 98", "100", {}, 0),
        ({"tolerance": 0.01}, "v = 98", "100", SPEED, 1),
        ({"tolerance": 0.01}, "First 7,\nthen $3.0 \\times 10^{8}$ m/s", "3e8", {}, 1),
        ({"tolerance": 0.01}, "−1,234.5 J", "-1,234.5", {}, 1),
        ({"tolerance": 0.01}, "0", "0", {}, 1),
        ({"tolerance": 0.01}, "nothing", "0", {}, 0),
    ],
    "unit": [
        ({}, "100 km/h.", "100", SPEED, 1),
        ({}, "\\boxed{100\\ \\text{km/h}}", "100", SPEED, 1),
        ({}, "100", "100", SPEED, 0.5),
        ({}, "100 m/s", "100", SPEED, 0),
        ({}, "fast", "100", SPEED, 0),
    ],
    "marked": [
        ({"by": "either"}, "<answer>1</answer>", "1", {}, 1),
        ({"by": "either"}, "\\boxed{1} <answer>1</answer>", "1", {}, 0),
        ({"by": "boxed"}, "\\boxed{1} or \\boxed{2}", "1", {}, 0),
        ({"by": "answer"}, "<answer> </answer>", "1", {}, 0),
    ],
    "constraint": [
        ({"kind": "max_words", "n": 2}, "two words", "-", {}, 1),
        ({"kind": "max_words", "n": 2}, "  ", "-", {}, 0),
    ],
    "variety": [
        ({"full": 0.5}, "one two one two", "-", {}, 1),
        ({"full": 1.0}, "one two one two", "-", {}, 0.5),
        ({"full": 1.0}, "a b " * 25 + "c d e", "-", {}, 0.04),  # the three words at the end are passed over
        ({"full": 1.0}, "", "-", {}, 0),
    ],
    "cites": [
        ({}, "Blue [1] and grey [b].", "-", CITED, 1),
        ({}, "Blue [1, c].", "-", CITED, 0.5),
        ({}, "Blue.", "-", CITED, 0),
    ],
    "supported": [
        ({}, "<answer>The blue moon is loud</answer>", "-", PASSAGES, 0.75),  # the, blue, moon; not loud
        ({}, "[1]", "-", PASSAGES, 0),
    ],
    "regex": [({"pattern": "^a+$"}, "aaa", "-", {}, 1), ({"pattern": "^a+$"}, "ab", "-", {}, 0)],
    "code_tests": [
        ({}, "def f(x): return x * x", "-", TESTS, 1),
        ({}, "def f(x): return 1 if x == 1 else 4", "-", TESTS, 2 / 3),
        ({}, "def g(x): return x", "-", TESTS, 0),
    ],
    "code_only": [
        ({}, "# squares\ndef f(x): return x * x", "-", {}, 1),
        ({}, "```python\ndef f(x): return x * x\n```", "-", {}, 0.5),
        ({}, "Here:\n```python\ndef f(x): return x * x\n```", "-", {}, 0),
        ({}, "", "-", {}, 0),
    ],
    "schema": [
        ({"schema": SCHEMA}, '{"n": 1}', "-", {}, 1),
        ({}, '```json\n{"n": 1}\n```', "-", {"schema": SCHEMA}, 1),
        ({"schema": SCHEMA}, '{"n": "1"}', "-", {}, 1 / 3),
        ({"schema": SCHEMA}, '{"n": 1', "-", {}, 0),
        ({"schema": SCHEMA}, "[" * 100_000, "-", {}, 0),
    ],
    "tool_schema": [
        ({}, 'So {"name": "go", "arguments": {"to": "Rome"}}', "-", TOOLS, 1),
        ({}, '{"name": "go", "arguments": {"to": 1}}', "-", TOOLS, 1 / 3),
        ({}, '{"name": "go", "arguments": {"from": "Rome"}}', "-", TOOLS, 1 / 3),
        ({}, '{"name": "go", "arguments": []}', "-", TOOLS, 1 / 3),
        ({}, "go to Rome", "-", TOOLS, 0),
    ],
}


def run(name, options, reply, answer, meta):
    return CHECKS[name].run(reply, answer, meta, options)


@pytest.mark.parametrize("name", CASES)
def test_scores_by_hand(name):
    wrong = []
    for options, reply, answer, meta, score in CASES[name]:
        got, measures = run(name, options, reply, answer, meta)
        assert measures.keys() == set(CHECKS[name].measures)
        if got != pytest.approx(score):
            wrong.append(f"{options} {reply[:60]!r}: {got}, not {score}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "options", "answer", "meta", "message"),
    [
        ("match", {"by": "exact"}, "", {}, "answer '' is empty"),
        ("quantity", {"tolerance": 0.1}, "many", {}, "answer 'many' is no number"),
        ("unit", {}, "1", {}, "meta.unit is missing"),
        ("cites", {}, "-", PASSAGES | {"gold": ["z"]}, r"meta.gold names \['z'\]"),
        ("cites", {}, "-", {"passages": ["text"], "gold": ["1"]}, "meta.passages: expected"),
        ("supported", {}, "-", {}, "meta.passages is missing"),
        ("constraints_held", {}, "-", {"constraints": [{"kind": "upper"}]}, "unknown kind 'upper'"),
        ("schema", {}, "-", {}, "meta.schema is missing"),
        ("schema", {"schema": {"type": "thing"}}, "-", {}, "the JSON schema is none"),
        ("schema", {"schema": {"$ref": "http://127.0.0.1:9/x"}}, "-", {}, "the JSON schema is none"),
        ("tool_schema", {}, "-", {}, "meta.tools is missing"),
        ("code_tests", {}, "-", {"entry": "f"}, "meta.tests is missing"),
    ],
)
def test_a_row_that_cannot_be_checked_raises(name, options, answer, meta, message):
    with pytest.raises(ValueError, match=message):
        run(name, options, "{}", answer, meta)


def test_a_check_is_found_by_its_key_with_its_options():
    check = Check("constraint", '{"kind": "max_words", "n": 2}')
    assert checks.name_of(check.key) == "constraint" and check.given() == {"kind": "max_words", "n": 2}
    found = checked(checks.load(check.key), Task(check.key, "one two three", None, {}))
    assert found == (0.0, "", {})
    assert Check("eq", "{}").key == "eq" and Check("/own.py", "{}").key == "/own.py"
    broken = checked(lambda reply, answer, meta: (1.5, {}), Task(check.key, "", None, {}))
    assert broken.score is None and broken.reason == "score 1.5 is outside the scale 0 to 1"


@pytest.mark.parametrize("name", sorted(name for name, kind in CHECKS.items() if kind.run and not kind.heavy))
def test_checks_that_run_in_the_trainer_take_linear_time(name):
    meta = CITED | SPEED | {"constraints": [{"kind": "lowercase"}]}
    options = CASES[name][0][0] if name in CASES else {}
    seeds = (
        "1",
        "a",
        " ",
        ".",
        ",",
        "=",
        "{",
        "[a,",
        "[",
        "\\boxed{",
        "<answer>",
        "x 10^",
        "answer ",
        "(",
        "A) ",
        "\n",
    )
    for seed in seeds:
        start = time.perf_counter()
        run(name, options, seed * (40_000 // len(seed)), "1", meta)
        assert time.perf_counter() - start < 1.0, repr(seed)
