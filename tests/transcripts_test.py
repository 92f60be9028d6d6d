"""Which rows are kept as transcripts, that they stay small, and that a resumed run keeps the same ones."""

import json

import numpy as np

from infinite_jax import transcripts
from infinite_jax.prompts import Prompt
from rubric.evaluator import Grades

NAMES = ["a", "b", "c"]


def prompt(domain: int, asked: str = "?", answer="1") -> Prompt:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "example"},
        {"role": "assistant", "content": "shown"},
        {"role": "user", "content": asked},
    ]
    return Prompt({"messages": messages, "answer": answer}, (1, 2), domain)


def graded(reward_B, valid_B=None) -> Grades:
    reward_B = np.array(reward_B, np.float32)
    valid_B = np.ones(len(reward_B), bool) if valid_B is None else np.array(valid_B)
    return Grades(1 + 3 * reward_B, reward_B, valid_B)


def picked(step, chosen, reward_B, valid_B=None, k=2):
    replies = [f"reply {b}" for b in range(len(reward_B))]
    return transcripts.pick(step, chosen, replies, graded(reward_B, valid_B), NAMES, k)


def test_the_best_and_the_worst_rows_by_reward():
    rows = picked(4, [prompt(0, "first"), prompt(2, "second", [1, {"x": 2}])], [0.5, 1.0, 0.25, 0.0])
    assert [(row["kind"], row["reply"]) for row in rows] == [
        ("best", "reply 1"),
        ("best", "reply 0"),
        ("worst", "reply 3"),
        ("worst", "reply 2"),
    ]
    assert rows[0] == {
        "step": 4, "kind": "best", "domain": "a", "prompt": "first", "reply": "reply 1", "answer": "1", "grade": 4.0,
        "reward": 1.0,
    }  # fmt: skip
    assert rows[2]["domain"] == "c" and rows[2]["prompt"] == "second" and json.loads(rows[2]["answer"]) == [1, {"x": 2}]


def test_ties_go_to_domains_not_shown_yet_and_the_order_moves_on_with_the_step():
    chosen = [prompt(0), prompt(0), prompt(1), prompt(2)]  # two replies each, all equal
    domains = [[row["domain"] for row in picked(step, chosen, [1.0] * 8)] for step in (0, 1, 2)]
    assert [row[:2] for row in domains] == [["a", "b"], ["b", "c"], ["c", "a"]]
    assert picked(1, chosen, [1.0] * 8) == picked(1, chosen, [1.0] * 8)


def test_no_row_is_both_and_ungraded_rows_are_left_out():
    rows = picked(1, [prompt(0), prompt(1)], [1.0, 0.0, 0.5, 0.0], valid_B=[False, True, True, True], k=3)
    assert [row["reply"] for row in rows] == ["reply 2", "reply 1", "reply 3"]
    assert picked(1, [prompt(0)], [0.0, 0.0], valid_B=[False, False]) == []


def test_text_is_bounded():
    rows = transcripts.pick(1, [prompt(0, "q" * 9000)], ["r" * 5000, "s"], graded([1, 0]), NAMES, 1)
    assert len(rows[0]["reply"]) < transcripts.LIMIT + 40 and "3000 more characters" in rows[0]["reply"]
    assert "7000 more characters" in rows[0]["prompt"] and rows[1]["reply"] == "s"


def test_equal_rows_of_one_domain_are_of_different_prompts():
    rows = picked(1, [prompt(0, "x"), prompt(0, "y"), prompt(0, "z"), prompt(0, "w")], [1.0] * 8, k=4)
    assert {row["prompt"] for row in rows if row["kind"] == "best"} == {"x", "y", "z", "w"}


def test_the_steps_that_are_kept():
    assert [step for step in range(1, 13) if transcripts.due(step, 5)] == [1, 6, 11]
