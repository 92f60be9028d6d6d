"""reasoning_gym as domains: rows by name and parameters, graded by the data sets' own scorers."""

import json

import numpy as np
import pytest
import reasoning_gym

from curriculum import domains, sources
from curriculum.domains import DomainConfig
from curriculum.generators import side
from rubric.evaluator import RubricConfig, RubricEvaluator
from rubric.gym import gym

NAMES = (
    "basic_arithmetic",
    "countdown",
    "n_queens",
    "propositional_logic",
    "word_sorting",
    "figlet_font",
    "rotate_matrix",
)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_data_sets_own_and_its_oracle_gets_full_marks(name):
    rows = sources.read(f"gym:{name},size=4,seed=3,split=test")
    assert len(rows) == 4 and rows == sources.read(f"gym:{name},size=4,seed=3,split=test")
    for row in rows:
        json.dumps(row)
        made = row["meta"]["gym"]
        entry = reasoning_gym.create_dataset(name, seed=3, size=made["size"])[made["index"]]
        assert row["messages"] == [{"role": "user", "content": entry["question"]}] and side(row["key"]) == "test"
        if name != "propositional_logic":  # whose entries come without an answer: any valid conclusion is right
            assert gym(entry["answer"], None, row["meta"]) == 4
        assert gym("", None, row["meta"]) == 1


def test_four_levels_of_a_sum():
    (row,) = sources.read("gym:chain_sum,size=1,min_terms=2,max_terms=2,min_digits=1,max_digits=1,split=train")
    right = row["answer"]
    assert gym(f" {right}\n", None, row["meta"]) == 4
    assert gym(f"I add them.\n{right}", None, row["meta"]) == 3
    assert gym(f"So <answer>{right}</answer> it is.", None, row["meta"]) == 3
    assert gym(f"= {right}", None, row["meta"]) == 2  # the scorer's own part marks for an answer among other text
    assert gym("many", None, row["meta"]) == 1


def test_a_scorer_decides_where_many_answers_are_right():
    (row,) = sources.read("gym:countdown,size=1,split=test")
    entry = reasoning_gym.create_dataset("countdown", seed=0, size=20)[row["meta"]["gym"]["index"]]
    assert gym(f"({entry['answer']})", None, row["meta"]) == 4  # not the oracle's text, and right
    assert gym("1 + 1", None, row["meta"]) == 1


def test_train_and_test_share_no_question_and_nothing_comes_twice():
    train = sources.read("gym:gcd,size=200,min_value=2,max_value=20")
    test = sources.read("gym:gcd,size=200,min_value=2,max_value=20,split=test,seed=9")
    questions = [row["key"] for row in train + test]
    assert len(set(questions)) == len(questions) and len(train) > 50 and len(test) > 50


def test_parameters_may_be_lists_and_truths():
    (row,) = sources.read("gym:basic_arithmetic,size=1,operators=+,allow_negation=true".replace("=+", "=+;+"))
    assert row["meta"]["gym"]["config"] == {"operators": ["+", "+"], "allow_negation": True}
    assert gym(row["answer"], None, row["meta"]) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gym:gdc", "reasoning_gym has no data set 'gdc'; known: "),
        ("gym:composite", "reasoning_gym has no data set 'composite'"),
        ("gym:gcd,max_valu=3", "gcd has no parameter 'max_valu'; known: split, size, seed, min_numbers"),
        ("gym:gcd,split=all", "split='all'; expected train or test"),
        ("gym:gcd,size=0", "size=0; expected a whole number from 1"),
        ("gym:gcd,size", "'size'; expected parameter=value"),
        ("gym:gcd,min_value=30,max_value=2", "gcd refuses"),
        ("gym:gcd,min_value=[", "min_value='['; expected a number"),
    ],
)
def test_what_cannot_be_read_is_one_line(source, message):
    with pytest.raises(ValueError) as caught:
        sources.read(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_domain_of_it_in_the_evaluators_workers():
    config = DomainConfig("sum", "gym:chain_sum,size=3", "gym:chain_sum,size=3,split=test", "gym")
    (loaded,) = domains.load([config])
    rows = [*loaded.train_rows, *loaded.test_rows]
    with RubricEvaluator(["gym"], RubricConfig("graded", 1, 20.0)) as evaluator:
        grades = evaluator.grade(np.zeros(7, int), [*rows, {"answer": "1"}], [row["answer"] for row in rows] + ["1"])
        assert grades.grade_B.tolist() == [4] * 6 + [1] and grades.valid_B.tolist() == [True] * 6 + [False]
        assert "meta.gym is missing" in next(iter(evaluator.failures))[1]
    with pytest.raises(ValueError, match=r"rows of gym:chain_sum,size=3 are made for gym, set environment: gym"):
        domains.check([DomainConfig("sum", "gym:chain_sum,size=3", "gym:chain_sum,size=3,split=test")])
