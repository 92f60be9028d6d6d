"""The monitor in a run: a collapse of a prior domain through all tiers, rollback, halt, refusal, approval, going on."""

import dataclasses
import hashlib
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.stats import norm

from configs import cli
from curriculum import monitor, triage
from curriculum.domains import DomainConfig
from infinite_jax import (
    baseline,
    checkpoint,
    heldout,
    record,
    report,
    resume,
    rollback,
    run_folder,
    safety,
    session,
    train,
    upgrade,
)
from infinite_jax.lock import RunLock
from infinite_jax.types import RunState
from sharding import exchange, multihost

PRIOR = ("add", "seen")


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> list[str]:
    """Arguments of an upgrade of seconds, evaluated after every step; grades look random but are not."""
    folder = tmp_path_factory.mktemp("setting")
    text = (
        "domains:\n"
        "  - {name: copy, new: true, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', GRADER}\n"
        "  - {name: seen, test: 'gen:copy,split=test,size=8,seed=1', eval_only: true, GRADER}\n"
        "  - {name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=8', GRADER}\n"
        "run: {steps: 9, eval_every: 1, checkpoint_every: 3, keep_last: 1, keep_best: 0}\n"
        "algorithm: {prompts: 4, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, learning_rate: 0.01, "
        "kl_coef: 0.1}\n"
        "eval: {batch: 32, canary: false}\n"
        "rubric: {workers: 1}\n"
        "upgrade: {active: true}\n"
    )
    return small_run(folder, text)


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
        if multihost.is_first():
            heldout.save(train.evaluation_file(run_dir, step), results)
        return metrics | {key: value for key, value in heldout.metrics(results).items()}, results


def begin(setting, folder: Path, *overrides) -> int:
    """The run from step 0, with M0's grades in their place: all prompts passed."""
    config = cli.compose_config(setting[3], setting[1], [f"run.dir={folder}", *overrides])
    with session.open_session(config) as opened:
        run_folder.claim(folder, config, opened.data_sha256)
        perfect = {name: heldout.DomainResult(np.full(32, 4.0, np.float32), None) for name in PRIOR}
        perfect["copy"] = heldout.DomainResult(np.full(20, 1.0, np.float32), None)
        if multihost.is_first():
            heldout.save(folder / baseline.FILE, perfect)
        exchange.barrier("test:baseline")
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
        with pytest.raises(SystemExit) as ended:
            upgrade.main(["--approve", str(folder), "--by", by, "--why", why])
        assert ended.value.code == 2 and words in capsys.readouterr().err
    why = "the suite was broken, it is mended"
    assert upgrade.main(["--approve", str(folder), "--by", " Ada ", "--why", why]) == 0
    assert "approved by Ada" in capsys.readouterr().out
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


def test_a_grader_that_m0_was_not_measured_with_is_refused_at_resume(halted, setting, tmp_path, capsys, monkeypatch):
    """And one with a remark more, another version that gives the same grades, is not."""
    folder, grader = shutil.copytree(halted, tmp_path / "run"), Path(setting[1]) / "checksum.py"
    rollback.approve(folder, "Ada", "the grader was wrong")
    monkeypatch.setattr(train, "evaluate", Injured(set()))
    before, was = {path: path.read_bytes() for path in folder.glob("*.json*")}, grader.read_text()
    try:
        grader.write_text(was.replace("1 + zlib.crc32(reply.encode()) % 4", "4 - zlib.crc32(reply.encode()) % 4"))
        with pytest.raises(SystemExit) as ended:
            resume.main([str(folder), "run.steps=2"])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and "put the old grader back" in error
        assert re.search(r"domain (seen|add): .* gives [1-9]\d* of \d+ anchors another grade", error)
        assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
        grader.write_text(was + "\n\ndef grade(reply, answer, meta):\n    raise ValueError('no')\n")
        with pytest.raises(SystemExit):
            resume.main([str(folder), "run.steps=2"])
        assert "and can grade no anchor, which" in capsys.readouterr().err
        grader.write_text(was + "# a remark\n")
        assert resume.main([str(folder), "run.steps=2"]) == 0
    finally:
        grader.write_text(was)


def test_an_edited_review_is_refused(halted, tmp_path, capsys):
    folder = shutil.copytree(halted, tmp_path / "run")
    with RunLock() as lock, pytest.raises(ValueError, match="in use by process"):
        lock.take(folder)
        rollback.approve(folder, "Ada", "while the run puts itself away")
    rollback.approve(folder, "Ada", "looked at it")
    review = (folder / "review.json").read_text()
    (folder / "review.json").write_text(review.replace("looked at it", "ran all tests"))
    with pytest.raises(SystemExit) as ended:
        resume.main([str(folder)])
    assert ended.value.code == 2 and "not what Ada signed" in capsys.readouterr().err


def test_the_report_shows_tiers_of_all_attempts_and_what_happened(halted, tmp_path):
    report.main([str(halted), f"out={tmp_path / 'report.html'}"])
    text = re.sub(r"<svg.*?</svg>", "", (tmp_path / "report.html").read_text(), flags=re.S)
    text = html.unescape(" ".join(re.sub(r"<[^>]+>", " ", text[text.index('<section id="safety"') :]).split()))
    for words in (
        "z above 1.96",
        "halted, waits for approval",
        "attempts given up",
        "add prior",
        "0 2 violation add 1.000 → 0.000 on 8 prompts, z 6.32 > 1.96, hard",
        "0 4 tier 2 → 3",
        "1 4 rollback to step 1 add fell by 1.000",
        "1 4 tier 3 → 4",
        "2 4 halt to step 1",
    ):
        assert words in text, words
    order = [text.index(words) for words in ("0 2 violation", "1 4 rollback", "1 4 tier 3", "2 4 halt")]
    assert order == sorted(order)


# ---- one evaluation


def watching(*overrides, first=None) -> tuple[safety.Watch, RunState]:
    """A watch over three domains, the last of them new, and the state at its start; M0 passed 32 of 32 prompts."""
    names = ["a", "b", "c"]
    config = cli.compose_config("config", None, ["upgrade.active=true", *overrides])
    config = dataclasses.replace(config, domains=tuple(DomainConfig(n, "t", "t", new=n == "c") for n in names))
    opened = types.SimpleNamespace(config=config, names=names)
    mesh = jax.make_mesh((1,), ("data",))
    leaves = exchange.replicated(mesh, {"boost": np.zeros(3, np.float32), "step": np.int32(0)})
    curriculum = triage.init(config.curriculum, 0, triage.roster(3))._replace(**leaves)
    start = jax.device_get(monitor.init(config.upgrade.monitor, 3))
    before = dict.fromkeys(names, graded(32, 32))
    return safety.Watch(opened, before, first), RunState(None, curriculum, None, None, start)


def graded(passed: int, of: int) -> heldout.DomainResult:
    return heldout.DomainResult(np.array([4.0] * passed + [1.0] * (of - passed), np.float32), None)


GONE = {"a": graded(0, 8), "b": graded(8, 8), "c": graded(0, 8)}


def test_an_evaluation_moves_the_monitor_and_the_boost_of_the_prior_domain_that_fell():
    watch, state = watching()
    found = safety.judge(watch, 5, state, GONE, 5)
    assert int(found.state.monitor.tier) == 1 and not found.clean and found.back is None
    np.testing.assert_array_equal(found.state.curriculum.boost, [0.5, 0, 0])
    assert found.metrics["safety/violation/a"] == 1 and found.metrics["safety/violation/c"] == 0
    assert [event["what"] for event in found.events] == ["violation", "tier"]
    fine = safety.judge(watch, 10, found.state, GONE | {"a": graded(8, 8)}, 5)
    assert fine.clean and int(fine.state.monitor.last_good_step) == 10 and not fine.events
    silent = safety.judge(watch, 15, fine.state, {"a": graded(8, 8), "b": nothing(), "c": nothing()}, 5)
    assert not silent.clean and silent.metrics["safety/drop/b"] is None  # a grader that is down vouches for nothing


def nothing() -> heldout.DomainResult:
    return heldout.DomainResult(np.full(8, np.nan, np.float32), None)


def test_step_0_and_evaluations_outside_the_rhythm_are_read_only():
    watch, state = watching()
    for step, every in ((0, 5), (7, 5)):
        found = safety.judge(watch, step, state, GONE, every)
        assert found.state is state and found.metrics["safety/drop/a"] == 1 and found.metrics["safety/tier"] == 0
        assert not found.events and not found.clean
    assert safety.judge(None, 5, state, GONE, 5) == safety.Verdict(state, {})


def test_a_watch_that_only_logs_sends_nobody_back():
    watch, state = watching("upgrade.watch=false")
    tiers = []
    for step in range(1, 8):
        found = safety.judge(watch, step, state, GONE, 1)
        state = found.state
        tiers.append(found.metrics["safety/tier"])
        assert found.back is None and not found.clean and int(state.monitor.attempt) == 0
        assert not np.any(state.curriculum.boost) and all(event["watch"] is False for event in found.events)
    assert tiers == [1, 2, 3, 3, 3, 4, 4]


def test_the_paired_test_compares_prompt_by_prompt():
    """Of 40 prompts 6 were lost and none gained: P(X >= 6 of 6) = 1/64, z 2.15 and above 1.96. Unpaired it is less."""
    first = {"a": graded(20, 40), "b": graded(20, 40), "c": graded(20, 40)}
    watch, state = watching("upgrade.monitor.test=exact", first=first)
    results = {"a": graded(14, 40), "b": graded(20, 40), "c": graded(14, 40)}
    found = safety.judge(watch, 1, state, results, 1)
    np.testing.assert_allclose(found.metrics["safety/z/a"], norm.isf(1 / 64), rtol=1e-4)
    np.testing.assert_allclose(found.metrics["safety/drop/a"], 6 / 40, rtol=1e-6)
    assert found.metrics["safety/violation/a"] == 1 and found.metrics["safety/violation/c"] == 0


# ---- killed on the way back


class Killed(BaseException):
    """No handler of the program sees it: what would have come next does not come."""


ONCE = {(0, 4), (0, 6), (0, 8)}  # evaluated every second step: back from 8 to 2, and no further fall
SHORT = ["run.steps=10", "run.eval_every=2"]


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory) -> Path:
    """A run that goes back and is never killed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", Injured(ONCE))
        assert begin(setting, folder, *SHORT) == 0
    return folder


@pytest.fixture(scope="module")
def brink(setting, tmp_path_factory) -> Path:
    """The same run, killed when it was about to write that it goes back."""
    folder = tmp_path_factory.mktemp("runs") / "brink"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "evaluate", Injured(ONCE))
        die_before(patch, rollback, "write")
        begin(setting, folder, *SHORT)
    return folder


def die_before(patch, owner, name: str, nth: int = 0) -> None:
    """The process ends where it would call owner.name for the nth time, counted from 0."""
    real, calls = getattr(owner, name), []

    def dying(*arguments, **named):
        calls.append(arguments)
        if len(calls) > nth:
            raise Killed
        return real(*arguments, **named)

    patch.setattr(owner, name, dying)


def assert_equal_runs(a: Path, b: Path) -> None:
    names = {path.name for path in b.glob("*.json*")}
    assert {path.name for path in a.glob("*.json*")} == names >= {"safety.json", "metrics.attempt-0.jsonl"}
    for name in names - {"safety.json", "anchors.jsonl"}:  # the graders are asked anew by every process
        assert rows(a, name) == rows(b, name), name
    assert rollback.journal(a) == rollback.journal(b)
    for folder in ("evaluations", "evaluations/attempt-0"):
        assert {path.name for path in (a / folder).iterdir()} == {path.name for path in (b / folder).iterdir()}
    for x, y in zip(jax.tree.leaves(final_state(a)), jax.tree.leaves(final_state(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def final_state(folder: Path):
    with session.open_session(run_folder.load_config(folder, [])) as opened:
        return run_folder.checkpoints(folder).restore(run_folder.abstract(opened.state))


STAGES = {
    "after the journal": (rollback, "go_back", 0),
    "before newer checkpoints are moved": (checkpoint.Checkpointer, "retreat", 0),
    "before anything is moved": (rollback, "_put_away", 0),
    "amid the evaluations": (rollback, "_move", 1),
    **{f"before file {n} of the rows": (record, "replace", n) for n in range(6)},
    "before the state is complete": (rollback, "returned", 1),  # resume has called it once before
    "before the next attempt": (train, "attempt", 1),
    "in the next attempt, with a row and no checkpoint": (train, "save", 0),
    "after its first checkpoint": (train, "save", 1),
}


@pytest.mark.slow
def test_going_back_sets_back_all_but_the_monitor(straight):
    """pytest -m slow tests/safety_test.py"""
    assert tiers_evaluated(straight) == {0: 0, 2: 0, 4: 3, 6: 3, 8: 2, 10: 2}
    given_up = record.read(straight / "metrics.attempt-0.jsonl")
    assert [row["step"] for row in given_up] == [3, 4, 5, 6, 7, 8]
    again = record.read(straight / "metrics.jsonl")[3]
    assert (
        again["tokens/total"] - again["tokens/generated"]
        == given_up[0]["tokens/total"] - given_up[0]["tokens/generated"]
    )
    assert all(row["time/compilations"] == 0 for row in record.read(straight / "metrics.jsonl")[3:])
    assert int(final_state(straight)[1].monitor.attempt) == 1


def tiers_evaluated(folder: Path) -> dict[int, int]:
    return {row["step"]: row["safety/tier"] for row in record.read(folder / "metrics.jsonl") if "safety/tier" in row}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_on_the_way_back_leads_to_the_same_run(straight, brink, tmp_path, stage):
    """pytest -m slow tests/safety_test.py"""
    folder = shutil.copytree(brink, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "evaluate", Injured(ONCE))
        die_before(patch, *STAGES[stage])
        resume.main([str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", Injured(ONCE))
        assert resume.main([str(folder)]) == 0
    assert_equal_runs(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["after the journal", "amid the evaluations", "before file 3 of the rows", "review"])
def test_a_kill_on_the_way_to_a_halt_leads_to_the_same_halt(setting, halted, tmp_path, capsys, stage):
    """pytest -m slow tests/safety_test.py"""
    stages = STAGES | {"after the journal": (rollback, "halted", 0), "review": (rollback, "_ask_for_review", 0)}
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "evaluate", Injured(HALTING))
        write = rollback.write

        def then_die(run_dir, entry):
            write(run_dir, entry)
            if entry["kind"] == "halt":
                die_before(patch, *stages[stage])

        patch.setattr(rollback, "write", then_die)
        begin(setting, folder)
    assert [entry["kind"] for entry in rollback.journal(folder)] == ["rollback", "halt"]
    assert resume.main([str(folder)]) == 3
    assert "halted at step 4" in capsys.readouterr().err
    assert {path.name for path in folder.glob("*.json*")} == {path.name for path in halted.glob("*.json*")}
    for path in halted.glob("*.jsonl"):
        assert rows(folder, path.name) == rows(halted, path.name)
    assert json.loads((folder / "review.json").read_text())["because"] == rollback.journal(halted)[1]["because"]


@pytest.mark.slow
def test_a_process_that_is_really_gone_leads_to_the_same_run(straight, brink, tmp_path):
    """No handler, no close, no flush. pytest -m slow tests/safety_test.py"""
    folder = shutil.copytree(brink, tmp_path / "run")
    script = (
        "import os, sys; sys.path.insert(0, 'tests'); import safety_test as t\n"
        "t.train.evaluate = t.Injured(t.ONCE)\n"
        "t.rollback.go_back = lambda *_: os._exit(9)\n"
        f"t.resume.main([{str(folder)!r}])\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, timeout=300).returncode == 9
    assert [entry["kind"] for entry in rollback.journal(folder)] == ["rollback"]
    assert not (folder / "metrics.attempt-0.jsonl").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", Injured(ONCE))
        assert resume.main([str(folder)]) == 0
    assert_equal_runs(folder, straight)


TWO = """
import sys
sys.path.insert(0, "tests")
import safety_test as t
t.train.evaluate = t.Injured(t.HALTING)
t.multihost.initialize(t.multihost.Given())
code = t.begin(sys.argv[2:], t.Path(sys.argv[1]), "run.check_every=1")
t.multihost.shutdown()
sys.exit(code)
"""


@pytest.mark.slow
def test_two_processes_decide_alike_and_go_back_together(setting, halted, tmp_path):
    """pytest -m slow tests/safety_test.py"""
    folder, root = tmp_path / "run", Path(__file__).resolve().parent.parent
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
    environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_COORDINATOR_ADDRESS": address}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, folder, *setting], cwd=root, env=environment | {"JAX_PROCESS_ID": str(p)}
        )
        for p in range(2)
    ]
    try:
        assert [process.wait(timeout=540) for process in started] == [3, 3]
    finally:
        for process in started:
            process.kill()
    assert rollback.journal(folder) == rollback.journal(halted)
    for name in ("metrics.jsonl", "metrics.attempt-0.jsonl", "metrics.attempt-1.jsonl"):
        assert tiers(folder, name) == tiers(halted, name)
    assert resume.main([str(folder)]) == 3
