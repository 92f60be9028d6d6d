"""The shipped rubrics on replies graded by hand: good (4), in the wrong form (3), middling (2), bad (1)."""

import json

import numpy as np
import pytest

from rubric import scoring
from rubric.evaluator import RubricConfig, RubricEvaluator
from rubric.judge import SelfJudge
from rubric.schema import load, shipped

TOOLS = [
    {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
]
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
NUMBER = {"answer": "3/4"}
DOUBLE = {
    "answer": None,
    "meta": {"entry": "double", "tests": [{"args": [1], "expect": 2}, {"args": [2], "expect": 4}]},
}
SPEED = {"answer": "9.81", "meta": {"tolerance": 0.01, "unit": ["m/s^2", "m s^-2"]}}
OPTION = {"answer": "B", "meta": {"choices": ["A", "B", "C", "D"]}}
CAPITAL = {"answer": ["Paris", "Paris, France"]}
HAIKU = {"meta": {"constraints": [{"kind": "contains", "word": "moon"}, {"kind": "lowercase"}]}, "answer": "moon"}
TITLE = {
    "answer": "-",
    "meta": {
        "instruction_id_list": ["detectable_format:title", "punctuation:no_comma"],
        "kwargs": [{}, {}],
    },
}
WIKI = {
    "answer": "Ada Lovelace",
    "meta": {
        "passages": [
            {"id": "d1", "title": "Engine", "text": "The Analytical Engine was designed by Charles Babbage."},
            {"id": "d2", "text": "Ada Lovelace wrote the first program for the engine."},
        ],
        "gold": ["d2"],
    },
}

# rubric: (row, reply, grade, {criterion: score})
CASES = {
    "math": [
        (NUMBER, "So it is \\boxed{\\frac{3}{4}}.", 4, {"correct": 1, "marked": 1}),
        (NUMBER, "0.75", 3, {"correct": 2 / 3, "marked": 0}),
        (NUMBER, "It is \\boxed{2/3}", 2, {"correct": 1 / 3, "marked": 1}),
        (NUMBER, "I cannot say", 1, {"correct": 0, "marked": 0}),
    ],
    "code": [
        (DOUBLE, "def double(x):\n    return 2 * x", 4, {"tests": 1, "only_code": 1}),
        (DOUBLE, "Sure:\n```python\ndef double(x):\n    return 2 * x\n```", 3, {"tests": 1, "only_code": 0}),
        (DOUBLE, "def double(x):\n    return 2", 2, {"tests": 0.5, "only_code": 1}),
        (DOUBLE, "def double(x):\n    return 3", 1, {"tests": 0, "only_code": 1}),
        (DOUBLE, "I would multiply by two.", 1, {"tests": 0, "only_code": 0}),
    ],
    "science": [
        (SPEED, "g = <answer>9.8 m/s²</answer>", 4, {"value": 1, "unit": 1, "marked": 1, "option": np.nan}),
        (SPEED, "About 0.98 \\times 10^{1} m/s^2", 3, {"value": 1, "unit": 1, "marked": 0}),
        (SPEED, "\\boxed{9.81}", 3, {"value": 1, "unit": 0.5, "marked": 1}),
        (SPEED, "\\boxed{9.81 \\text{ km}}", 2, {"value": 1, "unit": 0, "marked": 1}),
        (SPEED, "\\boxed{98.1 m/s^2}", 2, {"value": 0, "unit": 1, "marked": 1}),
        (SPEED, "It falls quickly.", 1, {"value": 0, "unit": 0, "marked": 0}),
        (OPTION, "\\boxed{B}", 4, {"option": 1, "marked": 1, "value": np.nan}),
        (OPTION, "Not A, so the answer is (B).", 3, {"option": 1, "marked": 0}),
        (OPTION, "<answer>C</answer>", 2, {"option": 0, "marked": 1}),
        (OPTION, "A good question", 1, {"option": 0, "marked": 0}),
    ],
    "knowledge": [
        (CAPITAL, "Paris.", 4, {"named": 1, "brief": 1, "settled": 1}),
        (CAPITAL, "The capital of France is Paris", 3, {"named": 1, "brief": 4 / 7, "settled": 1}),
        (CAPITAL, "Paris or Lyon", 2, {"named": 1, "brief": 0.5, "settled": 0}),
        (CAPITAL, "Rome, Lyon, Paris, Berlin, Madrid, Lisbon, Vienna", 2, {"named": 1, "brief": 0.25, "settled": 1}),
        (CAPITAL, "Lyon", 2, {"named": 0, "brief": 0, "settled": 1}),
        (CAPITAL, "Lyon or Rome", 1, {"named": 0, "brief": 0, "settled": 0}),
    ],
    "creative": [
        (HAIKU, "the moon lies broken in the rain", 4, {"constraints": 1, "attempt": 1, "varied": 1}),
        (HAIKU, "the moon the rain the night the moon over the sea the end", 3, {"constraints": 1, "attempt": 1}),
        (HAIKU, "The moon lies broken in the rain", 2, {"constraints": 0.5, "attempt": 1, "varied": 1}),
        (HAIKU, "moon moon moon moon", 1, {"constraints": 0, "attempt": 0}),
    ],
    "tools": [
        (
            {"answer": ADD, "meta": {"tools": TOOLS}},
            '{"name": "add", "arguments": {"a": 1, "b": 2}}',
            4,
            {"call": 1, "schema": 1},
        ),
        (
            {"answer": ADD, "meta": {"tools": TOOLS}},
            'Yes: {"name": "add", "arguments": {"a": 1, "b": 2}}',
            3,
            {"call": 2 / 3, "schema": 1},
        ),
        (
            {"answer": ADD, "meta": {"tools": TOOLS}},
            '{"name": "add", "arguments": {"a": 1, "b": "2"}}',
            3,
            {"call": 2 / 3, "schema": 1 / 3},
        ),
        (
            {"answer": ADD, "meta": {"tools": [{"type": "function", "function": TOOLS[0]}]}},
            '{"name": "add", "arguments": {"a": 1, "b": 3}}',
            2,
            {"call": 1 / 3, "schema": 1},
        ),
        ({"answer": ADD, "meta": {"tools": TOOLS}}, '{"name": "sub"}', 1, {"call": 0, "schema": 1 / 3}),
    ],
    "instructions": [
        (TITLE, "<<A night>>\nThe moon rose over the sea.", 4, {"followed": 1, "to_the_letter": 1, "attempt": 1}),
        (TITLE, "Sure, here:\n<<A night>>\nThe moon rose over it.", 3, {"followed": 1, "to_the_letter": 0.5}),
        (TITLE, "<<A night>>, a poem\nThe moon rose, and set.", 2, {"followed": 0.5, "to_the_letter": 0.5}),
        (TITLE, "A night, the moon rose", 1, {"followed": 0, "to_the_letter": 0}),
        (TITLE, "<<moon>> moon moon moon", 1, {"followed": 1, "attempt": 0}),
    ],
    "retrieval": [
        (
            WIKI,
            "[d2] says so: <answer>Ada Lovelace</answer>",
            4,
            {"correct": 1, "cited": 1, "supported": 1, "marked": 1},
        ),
        (WIKI, "<answer>Ada Lovelace</answer>", 3, {"correct": 1, "cited": 0, "supported": 1, "marked": 1}),
        (WIKI, "[d1] <answer>Charles Babbage</answer>", 2, {"correct": 0, "cited": 0, "supported": 1, "marked": 1}),
        (WIKI, "Nobody knows", 1, {"correct": 0, "cited": 0, "supported": 0, "marked": 0}),
    ],
}


@pytest.fixture(scope="module")
def evaluator():
    rubrics = [load(name) for name in CASES]
    with RubricEvaluator(["eq"] * len(rubrics), RubricConfig("graded", 2, 20.0), rubrics) as made:
        yield made


def test_every_shipped_rubric_is_graded_by_hand_on_all_four_levels():
    assert {*CASES, "creative_judged"} == set(shipped())
    for name, cases in CASES.items():
        assert {grade for _, _, grade, _ in cases} == {1, 2, 3, 4}, name


def test_grades_and_criterion_scores_by_hand(evaluator):
    flat = [(domain, *case) for domain, cases in enumerate(CASES.values()) for case in cases]
    domains = np.array([case[0] for case in flat])
    scored = evaluator.score(domains, [case[1] for case in flat], [case[2] for case in flat])
    assert scored.grades.valid_B.all(), evaluator.failures
    wrong = []
    for place, (domain, _, reply, grade, criteria) in enumerate(flat):
        rubric = evaluator.rubrics[domain]
        (row,) = scoring.of_domain(rubric, scored.scores_BK[[place]]).criteria_NC
        got = dict(zip((each.name for each in rubric.criteria), row))
        if (given := scored.grades.grade_B[place]) != grade:
            wrong.append(f"{rubric.name} {reply!r}: {given}, not {grade}: {got}")
        for name, score in criteria.items():
            same = np.isclose(got[name], score, atol=1e-6, equal_nan=True)
            wrong += [] if same else [f"{rubric.name}.{name} {reply!r}: {got[name]}, not {score}"]
    assert not wrong, "\n".join(wrong)
    np.testing.assert_allclose(scored.grades.reward_B, (scored.grades.grade_B - 1) / 3, rtol=1e-6)


def test_the_judged_rubric_asks_about_attempts_only():
    asked = []

    def judge(chats):
        asked.extend(chats)
        return [json.dumps({"reason": "-", "grade": 1 if "sea sea" in chat[1]["content"] else 4}) for chat in chats]

    rows = [{**HAIKU, "messages": [{"role": "user", "content": "write about the moon"}]}] * 4
    replies = ["the moon lies broken", "moon moon moon", "The moon lies broken", "the moon and the sea sea"]
    config = RubricConfig("graded", 0, 1.0)
    with RubricEvaluator(["eq"], config, [load("creative_judged")], SelfJudge(judge)) as evaluator:
        scored = evaluator.score([0] * 4, rows, replies)
    np.testing.assert_array_equal(scored.grades.grade_B, [4, 1, 2, 2])
    assert scored.grades.valid_B.all() and len(asked) == 3
    assert "write about the moon" in asked[0][1]["content"] and "a pleasure to read" in asked[0][1]["content"]
    measures_NM = scoring.of_domain(evaluator.rubrics[0], scored.scores_BK).measures_NM
    np.testing.assert_array_equal(measures_NM[:, 2], [4, np.nan, 4, 1])
