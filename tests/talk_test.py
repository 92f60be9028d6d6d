"""What the embedded model is shown of tools: the conversations, and that they are laid as a run lays them."""

import hashlib

import numpy as np
import pytest

from curriculum import sources
from models import tokenizer
from models.source import TINY
from models.tiny import talk
from rubric.environments.runner import Environments
from rubric.environments.search import SearchR1
from rubric.search_service import running
from rubric.world import years

TEXT = tokenizer.load(str(TINY))
ROW = {"messages": [{"role": "user", "content": "year: Kesa"}], "answer": ["1432"], "key": "year Kesa"}
GRADE = SearchR1(None, 1).grade


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("years")
    years.main(["--out", str(folder), "--train", "50", "--test", "20"])
    return folder


def test_a_right_search_is_laid_as_the_template_lays_it():
    turns = talk.search_for_year(np.random.default_rng(0), ROW, 0.0)
    ids, own = talk.ids_of(TEXT, ROW, turns, talk.TASKS["retrieval"].stops)
    assert TEXT.decode(ids) == (
        "<|user|>year: Kesa<|end|><|assistant|><search>Kesa</search><|end|>"
        "<|tool|><information>Doc 1(Title: Kesa) 1432</information><|end|><|assistant|><answer>1432</answer>"
    )
    said = TEXT.decode([token for token, own_token in zip(ids, own) if own_token])
    assert said == "<search>Kesa</search><answer>1432</answer>"  # the environment ends these turns, not a token
    assert len(ids) <= talk.TASKS["retrieval"].width


def test_the_calculator_s_turns_end_in_a_token_of_the_policy():
    row = {"messages": [{"role": "user", "content": "add: 47 + 85"}], "answer": "132"}
    turns = talk.sum_with_calculator(np.random.default_rng(0), row, 0.0)
    ids, own = talk.ids_of(TEXT, row, turns, talk.TASKS["calculator"].stops)
    said = TEXT.decode([token for token, own_token in zip(ids, own) if own_token])
    assert said == '<tool name="calculator">47 + 85</tool><|end|>132<|end|>'


def test_a_share_of_the_mixed_searches_is_right():
    rng, turns = np.random.default_rng(0), []
    for kind in np.linspace(0, 1, 2000):
        turns.append([{"role": role, "content": said} for role, said in talk.search_for_year(rng, ROW, kind)])
    passed = np.mean([GRADE(each, ROW["answer"]) >= 3 for each in turns])
    assert passed == pytest.approx(talk.RIGHT, abs=0.01)
    assert np.mean([len(each) == 1 for each in turns]) == pytest.approx(talk.BLIND, abs=0.01)
    asked = {each[0]["content"] for each in turns if len(each) > 1}
    assert "<search>Kesa</search>" in asked and len(asked) > 2


def test_names_are_on_one_side():
    sides = {side: {*years.names(side)} for side in ("train", "test", "shown")}
    assert len(set.union(*sides.values())) == sum(map(len, sides.values())) == (18 * 5) ** 2
    assert hashlib.sha256(b"Kesa").digest()[0] % 8 >= 3 and "Kesa" in sides["shown"]
    first, second = (years.questions("test", seed) for seed in (0, 1))
    assert first == years.questions("test", 0) and first != second
    assert {row["key"] for row in first} == {row["key"] for row in second} == {f"year {name}" for name in sides["test"]}
    shown = {row["key"].removeprefix("year ") for row in talk.TASKS["retrieval"].rows()}
    assert shown == sides["shown"]


def test_written_questions_are_answered_by_the_corpus(world):
    train, test = (sources.read(str(world / f"{name}.jsonl")) for name in ("train", "test"))
    assert len(train) == 50 and len(test) == 20
    corpus = (world / "corpus.jsonl").read_text().splitlines()
    assert len(corpus) == len(years.names("train")) + len(years.names("test"))


def test_what_is_shown_is_what_the_service_answers(world):
    """Every test question, and a name that the corpus does not have."""
    pytest.importorskip("bm25s", reason="needs: pip install bm25s")
    rows = [*years.questions("test", 0), ROW]
    rng = np.random.default_rng(0)
    shown = [talk.search_for_year(rng, row, 0.0) for row in rows[:-1]]
    shown.append([("assistant", "<search>Kesa</search>"), ("tool", "<information>nothing found</information>")])
    asked = [[{"role": "assistant", "content": turns[0][1]}] for turns in shown]
    with (
        running(str(world / "corpus.jsonl")) as url,
        Environments([f"searchr1,url={url},topk=1"]) as environments,
    ):
        answers = environments.interact([0] * len(rows), [{}] * len(rows), asked)
    for turns, (messages, reason) in zip(shown, answers):
        assert reason == "" and messages == [{"role": "tool", "content": turns[1][1]}]
