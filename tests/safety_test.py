"""The monitor in a run: a collapse of a prior domain through all tiers, rollback, halt, refusal, approval, going on."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import cli
from infinite_jax import heldout, record, resume, rollback, run_folder, safety, session, train

PRIOR = ("add", "seen")


@pytest.fixture(scope="module")
def setting(save_small_model, tmp_path_factory) -> list[str]:
    """Arguments of an upgrade of seconds, evaluated after every step; grades look random but are not."""
    folder = tmp_path_factory.mktemp("setting")
    (folder / "checksum.py").write_text(
        "import zlib\n\n\ndef grade(reply, answer, meta):\n    return 1 + zlib.crc32(reply.encode()) % 4\n"
    )
    grader = f"environment: {folder / 'checksum.py'}"
    save_small_model(folder)
    (folder / "small.yaml").write_text(
        "defaults: [config, _self_]\n"
        f"model: {{path: {folder / 'model'}}}\n"
        "domains:\n"
        f"  - {{name: copy, new: true, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', {grader}}}\n"
        f"  - {{name: seen, test: 'gen:copy,split=test,size=8,seed=1', eval_only: true, {grader}}}\n"
        f"  - {{name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=8', {grader}}}\n"
        "run: {steps: 9, eval_every: 1, checkpoint_every: 3, keep_last: 1, keep_best: 0}\n"
        "algorithm: {prompts: 4, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, learning_rate: 0.01, "
        "kl_coef: 0.1}\n"
        "eval: {batch: 32, canary: false}\n"
        "rubric: {workers: 1}\n"
        "upgrade: {active: true}\n"
    )
    return ["--config-dir", str(folder), "--config-name", "small"]


class Injured:
    """Stands for train.evaluate: prior domains pass all prompts, but for `add` at (attempt, step) in `collapsed`."""

    def __init__(self, collapsed):
        self.collapsed, self.evaluate, self.seen = set(collapsed), train.evaluate, []

    def __call__(self, opened, run_dir, step, state):
        metrics, results = self.evaluate(opened, run_dir, step, state)
        attempt = int(state.monitor.attempt)
        self.seen.append((attempt, step))
        for name in PRIOR:
            grade = 1.0 if name == "add" and (attempt, step) in self.collapsed else 4.0
            results[name] = results[name]._replace(greedy_N=np.full_like(results[name].greedy_N, grade))
        heldout.save(train.evaluation_file(run_dir, step), results)
        return metrics | {key: value for key, value in heldout.metrics(results).items()}, results


def begin(setting, folder: Path, *overrides) -> int:
    """The run from step 0, with M0's grades in their place: all prompts passed."""
    config = cli.compose_config(setting[3], setting[1], [f"run.dir={folder}", *overrides])
    with session.open_session(config) as opened:
        run_folder.claim(folder, config, opened.data_sha256)
        perfect = {name: heldout.DomainResult(np.full(32, 4.0, np.float32), None) for name in PRIOR}
        perfect["copy"] = heldout.DomainResult(np.full(20, 1.0, np.float32), None)
        heldout.save(folder / safety.BASELINE, perfect)
        return train.train(opened._replace(state=None, baseline=None), folder, opened.state)


def rows(folder: Path, name: str = record.METRICS) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in record.read(folder / name)]


def tiers(folder: Path, name: str = record.METRICS) -> dict[int, int]:
    return {row["step"]: row["safety/tier"] for row in record.read(folder / name)}


HALTING = {(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)}


@pytest.fixture(scope="module")
def halted(setting, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "halted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", Injured(HALTING))
        assert begin(setting, folder) == 3
    return folder


def test_a_collapse_goes_through_the_tiers_back_once_and_to_a_halt(halted):
    given_up = [tiers(halted, f"metrics.attempt-{n}.jsonl") for n in (0, 1)]
    assert tiers(halted) == {0: 0, 1: 0}
    assert given_up == [{2: 1, 3: 2, 4: 3}, {2: 3, 3: 3, 4: 4}]  # the tier outlives the rollback
    entries = rollback.journal(halted)
    assert [(e["kind"], e["attempt"], e["at"], e["to"]) for e in entries] == [("rollback", 1, 4, 1), ("halt", 2, 4, 1)]
    fallen = entries[0]["numbers"]["fallen"]
    assert fallen.keys() == {"add"} and fallen["add"]["hard"]
    p = 32 / 40  # 32 of 32 and 0 of 8
    np.testing.assert_allclose(fallen["add"]["error"], (p * (1 - p) * (1 / 32 + 1 / 8)) ** 0.5, rtol=1e-5)
    assert [fallen["add"][key] for key in ("passed", "prompts", "M0_passed", "M0_prompts")] == [0, 8, 32, 32]
    last = record.read(halted / "metrics.attempt-1.jsonl")[-1]
    assert last["safety/halted"] == 1 and last["safety/attempt"] == 2 and last["safety/boost/add"] == 1.5
    assert last["safety/violation/add"] == 1 and last["safety/drop/seen"] == 0 and last["safety/violation/copy"] == 0


def test_what_was_given_up_is_kept_and_the_good_checkpoint_is_the_newest(halted):
    newest = max(int(path.name) for path in (halted / "checkpoints").iterdir() if path.name.isdecimal())
    assert newest == 1 and (halted / "checkpoints" / "3.superseded").is_dir()  # of keep_last=1, after the save at 3
    for n in (0, 1):
        assert {path.name for path in (halted / "evaluations" / f"attempt-{n}").iterdir()} == {
            "2.npz",
            "3.npz",
            "4.npz",
        }
    assert {path.name for path in (halted / "evaluations").glob("*.npz")} == {"0.npz", "1.npz"}
    tier_events = [e for e in record.read(halted / "events.attempt-0.jsonl") if e["what"] == "tier"]
    assert [(e["tier_before"], e["tier"]) for e in tier_events] == [(0, 1), (1, 2), (2, 3)]
    assert all("add fell by 1.000" in e["because"] for e in tier_events)
    assert [(e["step"], e["what"], e["at"]) for e in record.read(halted / "events.jsonl")] == [
        (1, "rollback", 4),
        (1, "halt", 4),
    ]


def test_the_second_attempt_draws_and_answers_differently_from_the_same_state(halted):
    first, second = (rows(halted, f"metrics.attempt-{n}.jsonl")[0] for n in (0, 1))
    assert first["step"] == second["step"] == 2
    assert first["policy/grad_norm"] != second["policy/grad_norm"]
    assert rows(halted, "transcripts.attempt-0.jsonl") != rows(halted, "transcripts.attempt-1.jsonl")


def test_a_halted_run_is_refused_until_a_person_approves_and_goes_on_at_tier_3(halted, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(halted, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    assert resume.main([str(folder)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "halted at step 4: add fell by 1.000" in error and "--approve" in error
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
    for by, why, words in (("", "x", "--by ''"), ("Ada", " ", "--why ' '")):
        with pytest.raises(ValueError, match=words):
            rollback.approve(folder, by, why)
    assert "approved by Ada" in rollback.approve(folder, " Ada ", "the suite was broken, it is mended")
    review = json.loads((folder / "review.json").read_text())
    signed = review.pop("approved")
    text = json.dumps({"review": review} | {key: signed[key] for key in ("by", "why", "when")}, sort_keys=True)
    assert signed["sha256"] == hashlib.sha256(text.encode()).hexdigest() and signed["by"] == "Ada"
    with pytest.raises(ValueError, match="Ada approved it already"):
        rollback.approve(folder, "Bob", "again")
    monkeypatch.setattr(train, "evaluate", Injured(set()))
    assert resume.main([str(folder)]) == 0
    assert tiers(folder) == {0: 0, 1: 0, 2: 3, 3: 3, 4: 2, 5: 2, 6: 2, 7: 1, 8: 1, 9: 1}
    assert {row["safety/attempt"] for row in record.read(folder / "metrics.jsonl") if row["step"] > 1} == {2}
    assert [e["what"] for e in record.read(folder / "events.jsonl")][:3] == ["rollback", "halt", "approval"]
    with pytest.raises(ValueError, match="approved it already"):
        rollback.approve(folder, "Bob", "again")


def test_an_edited_review_is_refused(halted, tmp_path, capsys):
    folder = shutil.copytree(halted, tmp_path / "run")
    rollback.approve(folder, "Ada", "looked at it")
    review = (folder / "review.json").read_text()
    (folder / "review.json").write_text(review.replace("looked at it", "ran all tests"))
    with pytest.raises(SystemExit) as ended:
        resume.main([str(folder)])
    assert ended.value.code == 2 and "not what Ada signed" in capsys.readouterr().err
