"""Conversations and rehearsal over several processes: they make the run that one process makes.

pytest -m slow -n 0 tests/pods_test.py, minutes
"""

import json
from pathlib import Path

import pytest
from multihost_test import assert_same_run, begin, end, mesh, run, timeless
from talking_test import CHATTER, chatting, often_ended

from infinite_jax import record

TALKS = ["run.steps=3", "run.check_every=1", "eval.samples=3", "algorithm.learning_rate=0.01"]


@pytest.fixture(scope="module")
def talk(small_run, tmp_path_factory) -> Path:
    """Three steps of conversations and single replies: one process with eight devices."""
    folder = tmp_path_factory.mktemp("talk")
    arguments = [*chatting(small_run, folder), *TALKS]
    run(["infinite_jax.train", *arguments, f"run.dir={folder / 'run'}", *mesh(2, 2, 1, 2)], 1, 8)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, devices, options",
    [
        (2, 4, mesh(2, 2, 1, 2)),
        (4, 1, mesh(2, 1, 1, 2)),  # each row on two of them, of which one asks its environment
    ],
)
def test_conversations_over_processes_are_those_of_one(talk, tmp_path, processes, devices, options):
    named = ["--config-dir", str(talk), "--config-name", "small", *TALKS]
    run(["infinite_jax.train", *named, f"run.dir={tmp_path / 'run'}", *options], processes, devices)
    assert_same_run(talk / "run", tmp_path / "run")
    rows = timeless(tmp_path / "run")
    assert max(row["rollout/turns/chat"] or 0 for row in rows[1:]) > 1.2 and 0 < rows[-1]["eval/pass_at_1/chat"] < 1
    compiled = [row["time/compilations"] for row in record.read(tmp_path / "run" / record.METRICS)[1:]]
    assert compiled[0] > 0 and compiled[1:] == [0, 0]
    shown = [row["reply"] for row in record.read(tmp_path / "run" / record.TRANSCRIPTS) if row["domain"] == "chat"]
    assert any("\n[tool] " in reply for reply in shown), shown


@pytest.mark.slow
def test_an_environment_that_dies_at_one_process_costs_the_rows_of_that_one(small_run, tmp_path):
    dies = 'import os\n\nif os.environ["JAX_PROCESS_ID"] == "1":\n    interact = lambda messages: os._exit(3)\n'
    named = [*chatting(small_run, tmp_path, f"{CHATTER}\n\n{dies}"), "run.steps=2"]
    first, second = run(["infinite_jax.train", *named, f"run.dir={tmp_path / 'run'}", *mesh(2, 1, 1, 1)], 2, 1)
    rows = timeless(tmp_path / "run")
    for row in rows[1:]:
        assert row["pass_rate/chat"] is None or (0.1 < row["rollout/invalid"] <= 0.5 and row["reward/mean"] > 0), row
    assert any(row["rollout/invalid"] for row in rows[1:]) and rows[-1]["eval/pass_rate/chat"] is not None
    line = "replies could not be graded: the environment's process died with status 3"
    assert line in first.err and line not in second.err


BROKEN = """
import os, sys
from infinite_jax import train
from rubric.environments.runner import Environments

def interact(self, *of):
    raise RuntimeError("out of order")

if os.environ["JAX_PROCESS_ID"] == "1":
    Environments.interact = interact
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_fails_between_turns_ends_all(small_run, tmp_path):
    (tmp_path / "script.py").write_text(BROKEN)
    named = [*chatting(small_run, tmp_path), f"run.dir={tmp_path / 'run'}", *mesh(2, 1, 1, 1)]
    found = end(begin([str(tmp_path / "script.py"), *named], 2, 1))
    assert [each.code for each in found] == [1, 1], found
    for each in found:
        (said,) = [text for text in each.err.splitlines() if text.startswith("error: ")]
        assert said == "error: process 1 failed: RuntimeError: out of order; nothing was saved yet"


UPGRADE = """
domains:
  - {name: copy, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', GRADER}
  - {name: old, test: 'gen:copy,split=test,size=12,seed=1', eval_only: true, form: 'copy: [a-z]{5}'}
  - {name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=5', new: true, GRADER}
run: {steps: 2, eval_every: 2, check_every: 1}
algorithm: {prompts: 8, group_size: 2, prompt_buckets: [32], max_new_tokens: 6, kl_coef: 0.1, kl_type: loss}
eval: {batch: 16}
rubric: {workers: 1}
contamination: {stages: [exact, near]}
upgrade: {rehearsal: self, writing: {prompts: 8, least: 4, tokens: 6, samples: 4, agreement: 0.25, reward: agreement}}
"""


@pytest.mark.slow
def test_what_m0_writes_in_two_processes_it_writes_in_one(small_run, tmp_path):
    named, folders = small_run(tmp_path, UPGRADE), [tmp_path / "one", tmp_path / "two"]
    often_ended(tmp_path)
    for processes, folder in enumerate(folders, 1):
        found = run(["infinite_jax.upgrade", *named, f"run.dir={folder}", *mesh(2, 1, 1, 1)], processes, 2 // processes)
        assert f"run: {folder}" in found[0].out and all("old" not in each.out for each in found[1:])
    assert_same_run(*folders)
    for name in ("old.jsonl", "report.json"):
        one, two = ((folder / "rehearsal" / name).read_text() for folder in folders)
        assert one == two
    written = json.loads(one)["domains"]["old"]
    assert written["rows"] == written["kept_by_agreement"] >= 4 and written["sources"]["prefix"]["written"] > 0
    assert timeless(folders[1])[-1]["triage/acc_ema/old"] is not None
