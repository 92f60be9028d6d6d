"""The invented world: its files are what the script writes, its questions have one answer and can be found."""

import json
from pathlib import Path

import pytest

from curriculum import sources
from rubric.environments.runner import Environments
from rubric.environments.search import normalised_answer
from rubric.search_service import running
from rubric.world import make


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_committed_files_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make", "--out", str(tmp_path)])
    make.main()
    names = ["corpus.jsonl", "test.jsonl", "train.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (make.FOLDER / name).read_bytes(), name
    assert sum(path.stat().st_size for path in make.FOLDER.iterdir() if path.is_file()) < 300_000


def test_another_seed_is_another_world():
    names = [{entity.name for entity in make.world(seed)} for seed in (0, 0, 1)]
    assert names[0] == names[1] and len(names[0] & names[2]) < len(names[0]) / 4
    assert len(names[0]) == len(make.world(0))  # no two share a name


def test_questions_are_rows_with_one_answer_each():
    rows = make.questions(make.world(0))
    keys = [row["key"] for row in rows]
    assert len({*keys}) == len(keys) > 2000
    for row in rows:
        assert row["messages"][0]["content"].endswith("?") and all(map(normalised_answer, row["answer"]))
        for doubled in ("the town the", "the river the", "river river"):
            assert doubled not in row["messages"][0]["content"]
    train, test = make.split(rows, 0, len(rows), len(rows))
    assert len(train) + len(test) == len(rows) and 0.2 < len(test) / len(rows) < 0.3
    for name, side in (("train", train), ("test", test)):
        read = sources.read(str(make.FOLDER / f"{name}.jsonl"))
        assert read == side[: len(read)] and len(read) == {"train": 320, "test": 96}[name]


def test_a_searching_policy_finds_the_answers():
    """Questions of one fact: the name as the query, the fact read off the first document."""
    pytest.importorskip("bm25s", reason="needs: pip install bm25s")
    entities = make.world(0)[::3]
    with (
        running(str(make.FOLDER / "corpus.jsonl")) as url,
        Environments([f"searchr1,url={url},topk=1"]) as environments,
    ):
        asked = [[{"role": "assistant", "content": f"<search>{entity.name}</search>"}] for entity in entities]
        turns = environments.interact([0] * len(entities), [{}] * len(entities), asked)
        for entity, (messages, reason) in zip(entities, turns):
            assert reason == ""
            assert f"Doc 1(Title: {entity.name}) {entity.text}" in messages[0]["content"]
            for fact in entity.facts:
                assert any(answer in messages[0]["content"] for answer in fact.answers)
