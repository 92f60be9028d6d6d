"""Conversations within the loop: a small random model, an environment in a file of a user's, and one that is down.

pytest -m "slow or not slow" tests/talking_test.py runs the longer ones, too.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import cli, limits
from infinite_jax import prompts, record, resume, run_folder, session, train
from models import source
from rubric.environments.runner import Environments

CHATTER = """
import zlib


def interact(messages):
    said = zlib.crc32(messages[-1]["content"].encode())
    return [{"role": "tool", "content": "abcdefgh"[said % 8] * (1 + said % 3)}] * (said % 3 > 0)


def grade(messages, answer):
    return 1 + zlib.crc32(repr([m["content"] for m in messages[1:]]).encode()) % 4
"""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Programs here run few steps of a tiny model: compiled without optimisation they cost a third."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def chatting(small_run, folder: Path, chatter: str = CHATTER) -> list[str]:
    """Arguments of a run of seconds: a domain of conversations, one of single replies, and a step of each in turn."""
    (folder / "chatter.py").write_text(chatter)
    text = (
        "domains:\n"
        "  - name: chat\n    train: gen:copy,size=7\n    test: gen:copy,split=test,size=5\n"
        f"    environment: {folder / 'chatter.py'}\n"
        "  - {name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=5', environment: number}\n"
        "run: {steps: 6, eval_every: 2, checkpoint_every: 2, keep_last: 9}\n"
        "algorithm: {prompts: 4, group_size: 4, prompt_buckets: [32], max_new_tokens: 12, max_turns: 3, turn_chunk: 4}"
        "\n"
        "eval: {batch: 8, canary: false}\n"
        "anchors: {each: 4}\n"
        "curriculum: {single_every: 3}\n"
        "rubric: {workers: 1}\n"
    )
    arguments = small_run(folder, text)
    often_ended(folder)
    return arguments


def often_ended(folder: Path) -> None:
    """One token in four ends a turn of the model in the folder."""
    ends = json.dumps({"eos_token_id": [261, *range(160, 230)]})
    (folder / "model" / "generation_config.json").write_text(ends)


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> list[str]:
    return chatting(small_run, tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train.main([*setting, f"run.dir={folder}"]) == 0
    return folder


def timeless(folder: Path) -> list[dict]:
    rows = record.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_a_run_with_conversations_learns_from_them_and_from_single_replies(straight):
    rows = record.read(straight / "metrics.jsonl")
    assert all(row["rollout/invalid"] == 0 for row in rows[1:])
    assert sum(row["policy/grad_norm"] > 0 for row in rows[1:]) >= 3  # rows of `add` alone all get 1
    assert all(row["rollout/logp_gap"] < 2e-6 for row in rows[1:])  # rows with gaps are scored as they were sampled
    turns = [row["rollout/turns/chat"] for row in rows[1:] if row["rollout/turns/chat"] is not None]
    assert turns and 1.2 < np.mean(turns) < 3 and "rollout/turns/add" not in rows[1]
    for name in ("chat", "add"):
        assert all(row[f"eval/pass_rate/{name}"] is not None for row in rows if "eval/macro" in row)
    shown = [row["reply"] for row in record.read(straight / record.TRANSCRIPTS) if row["domain"] == "chat"]
    assert any(re.match(r"\[assistant\] (?s:.)*\n\[tool\] ([a-h])\1*\n\[assistant\] ", reply) for reply in shown), shown


def test_nothing_compiles_after_the_first_step(straight):
    compiled = [row["time/compilations"] for row in record.read(straight / "metrics.jsonl")[1:]]
    assert compiled[0] > 0 and compiled[1:] == [0] * 5, compiled


@pytest.mark.slow
def test_a_run_that_is_continued_is_the_same_run(setting, straight, tmp_path):
    folder = tmp_path / "run"
    assert train.main([*setting, f"run.dir={folder}", "run.steps=3"]) == 0
    assert resume.main([str(folder), "run.steps=6"]) == 0
    assert timeless(folder) == timeless(straight)
    assert record.read(folder / record.TRANSCRIPTS) == record.read(straight / record.TRANSCRIPTS)
    states = []
    for each in (folder, straight):
        with session.open_session(run_folder.load_config(each, [])) as opened:
            states.append(run_folder.checkpoints(each).restore(run_folder.abstract(opened.state))[1])
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_a_service_that_is_down_makes_rows_invalid_and_never_zero(setting, tmp_path, caplog):
    (tmp_path / "down.py").write_text(
        "def interact(messages):\n    raise ConnectionError('no service')\n\n\n"
        "def grade(messages, answer):\n    return 1\n"
    )
    folder = tmp_path / "run"
    (Path(setting[1]) / "down.yaml").write_text(
        "defaults: [small, _self_]\n"
        "domains:\n"
        "  - name: chat\n    train: gen:copy,size=7\n    test: gen:copy,split=test,size=5\n"
        f"    environment: {tmp_path / 'down.py'}\n"
    )
    assert train.main([*setting[:3], "down", f"run.dir={folder}", "run.steps=2"]) == 0
    rows = record.read(folder / "metrics.jsonl")
    for row in rows[1:]:
        assert row["rollout/invalid"] > 0.3
        assert row["reward/mean"] in (None, 0)  # of rows whose only turn was cut off, which no environment saw


def test_tools_stand_in_the_prompt_unless_the_domain_hides_them():
    shown, hidden = (Environments([f"calculator{option}"]) for option in ("", ",show=no"))
    rows = [{"messages": [{"role": "user", "content": "6*7?"}]}]
    text = source.load_tokenizer(
        source.ModelConfig("tiny", "float32", "none", True, "auto", source.LoraConfig(0, 1.0, ()))
    )
    made = [
        prompts.tokenise(text, rows, 0, "sums", 999, True, functools.partial(environments.tools, 0))[0].ids
        for environments in (shown, hidden)
    ]
    assert '"expression"' in text.decode(made[0]) and made[0][-len(made[1]) + 1 :] == made[1][1:]
    assert text.decode(made[1]) == "<|user|>6*7?<|end|><|assistant|>"
    rows[0]["tools"] = [{"description": "has no name"}]
    with pytest.raises(ValueError, match=r"^domain sums, row 0: row .* tools\[0\] has no name"):
        prompts.tokenise(text, rows, 0, "sums", 999, True, functools.partial(shown.tools, 0))


@pytest.mark.parametrize(
    "environment, message",
    [
        ("searchr1,topk=0", "domains[0].environment 'searchr1,topk=0': topk=0 is no positive whole number"),
        ("calculator,show=maybe", "show=maybe; expected yes or no"),
        ("calculater", "domains[0].environment 'calculater' is unknown"),
        ("nowhere.py", "domains[0].environment 'nowhere.py': there is no such file"),
    ],
)
def test_environments_that_cannot_be_made_are_refused_before_anything_is_read(environment, message):
    config = cli.compose_config("config", None, [])
    domains = (dataclasses.replace(config.domains[0], environment=environment),)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        limits.validate(dataclasses.replace(config, domains=domains), 1)
    assert message in str(error.value) and "\n" not in str(error.value)
