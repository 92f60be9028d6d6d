"""A run with a rubric: what it logs, and that a grader edited between train and resume is no fall of the policy."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from infinite_jax import record, report, resume, train
from infinite_jax.page import run as page_run

RUBRIC = """
about: Luck is worth all, the rest is only looked at.
grades: {2: 0.25, 3: 0.6, 4: 0.95}
criteria:
  lucky: {check: lucky.py}
  right: {check: eq, weight: 0, log: [exact_match]}
  short: {check: regex, pattern: '^.{0,2}$', weight: 0, part: form}
"""
ALWAYS = "def grade(reply, answer, meta):\n    return 4\n"
MOST = "import zlib\n\n\ndef grade(reply, answer, meta):\n    return 4 if zlib.crc32(reply.encode()) % 3 else 1\n"
BETA, PROMPTS = 0.05, 4


def lucky(reply: str) -> bool:
    return zlib.crc32(reply.encode()) % 3 != 0


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory) -> Path:
    """Two steps of a policy of 17,000 parameters under a grader that passes everything; shapes as in train_test.py."""
    folder = tmp_path_factory.mktemp("setting")
    (folder / "lucky.py").write_text(ALWAYS)
    (folder / "luck.yaml").write_text(RUBRIC)
    text = (
        "domains:\n"
        f"  - {{name: copy, train: 'gen:copy,size=20', test: 'gen:copy,split=test,size=5', "
        f"rubric: {folder / 'luck.yaml'}}}\n"
        "  - {name: seen, test: 'gen:copy,split=test,size=3,seed=1', eval_only: true}\n"
        "  - {name: add, test: 'gen:add,split=test,size=3', environment: number, eval_only: true}\n"
        "run: {steps: 2, eval_every: 2, checkpoint_every: 2}\n"
        f"algorithm: {{prompts: {PROMPTS}, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, "
        "learning_rate: 0.01}\n"
        "eval: {batch: 8, canary: false}\n"
        f"curriculum: {{beta: {BETA}, acc_start: 0.9}}\n"
        "rubric: {workers: 1}\n"
    )
    assert train.main([*small_run(folder, text), f"run.dir={folder / 'run'}"]) == 0
    return folder / "run"


def test_an_edited_grader_is_reported_and_the_average_moves_to_its_scale(run, capsys):
    rows = record.read(run / "metrics.jsonl")
    for row in (rows[0], rows[2]):
        assert row["eval/criterion_lucky/copy"] == row["eval/score/copy"] == row["eval/pass_rate/copy"] == 1
        assert row["eval/exact_match/copy"] == row["eval/criterion_right/copy"] == 0
        assert 0 <= row["eval/criterion_short/copy"] <= 1
        assert not any(key.startswith("eval/criterion") and key.endswith("/seen") for key in row)
    assert rows[1]["criterion_lucky/copy"] == rows[1]["score/copy"] == rows[1]["pass_rate/copy"] == 1
    assert rows[1]["watch/form_only/copy"] == pytest.approx(rows[1]["criterion_short/copy"])  # none is right
    assert 0 <= rows[1]["watch/length/copy"] <= 4 and rows[1]["watch/length/seen"] is None
    assert not record.read(run / "events.jsonl")

    (run.parent / "lucky.py").write_text(MOST)
    assert resume.main([str(run), "run.steps=4"]) == 0
    said = capsys.readouterr()
    assert "could not be graded" not in said.err
    assert (
        said.err.count("grader of domain copy has another version than the run had up to step 2: the first step tells")
        == 1
    )
    assert said.err.count("step 3: the grader of domain copy changed: the same ") == 1
    assert "grader of domain add" not in said.err and "grader of domain seen" not in said.err
    assert "| copy * " in said.out and "| macro average * " in said.out and "| seen " in said.out
    assert "* another grader since: copy (step 3): what changed there" in said.out
    assert "Another grader since: copy (step 3)." in report.page(page_run.read(run))
    (event,) = record.read(run / "events.jsonl")
    anchors = [entry for entry in record.read(run / "anchors.jsonl") if "reply" in entry]
    shift = np.mean([lucky(entry["reply"]) for entry in anchors if entry["domain"] == "copy"]) - 1
    assert (event["step"], event["kind"], event["domain"]) == (3, "grader_drift", "copy") and event["version_changed"]
    assert event["pass_shift"] == pytest.approx(shift) and shift < 0
    rows = record.read(run / "metrics.jsonl")
    kept = (1 - BETA) ** PROMPTS  # of the average, after the four groups of step 3
    moved = kept * (rows[2]["triage/acc_ema/copy"] + shift) + (1 - kept) * rows[3]["pass_rate/copy"]
    assert rows[3]["triage/acc_ema/copy"] == pytest.approx(moved, abs=1e-5) == rows[3]["drift/ref/copy"]
    assert 0 < moved < 1
    later = kept * rows[3]["triage/acc_ema/copy"] + (1 - kept) * rows[4]["pass_rate/copy"]
    assert rows[4]["triage/acc_ema/copy"] == pytest.approx(later, abs=1e-5)
    assert rows[4]["eval/criterion_lucky/copy"] == pytest.approx(rows[4]["eval/pass_rate/copy"])


def test_a_run_without_its_anchors_is_refused_in_one_line(run, capsys):
    (run / "anchors.jsonl").rename(run / "elsewhere")
    with pytest.raises(SystemExit) as ended:
        resume.main([str(run), "run.steps=6"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "anchors.jsonl: no such file" in error and error.count("\n") == 1
