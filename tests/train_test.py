"""The whole loop on a small random model: what it writes, exact resume, and that bad input is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import LlamaConfig

from infinite_jax import evaluate, export, record, resume, run_folder, session, train
from infinite_jax.lock import RunLock
from models import hf, policy, source
from models.architectures import from_hf

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> list[str]:
    """Arguments of a run of seconds: a policy of 17,000 parameters, one bucket, grades that look random but are not."""
    folder = tmp_path_factory.mktemp("setting")
    text = (
        "domains:\n"
        "  - {name: copy, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', GRADER}\n"
        "  - {name: seen, test: 'gen:copy,split=test,size=3,seed=1', eval_only: true}\n"
        "  - {name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=5', GRADER}\n"
        "run: {steps: 6, eval_every: 2, checkpoint_every: 2, keep_last: 9}\n"
        "algorithm: {prompts: 4, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, learning_rate: 0.01}\n"
        "eval: {batch: 8}\n"
        "curriculum: {single_every: 3}\n"
        "rubric: {workers: 1}\n"
    )
    return small_run(folder, text)


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory) -> Path:
    """Six steps without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train.main([*setting, f"run.dir={folder}"]) == 0
    return folder


def timeless(folder: Path) -> list[dict]:
    rows = record.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def final_state(folder: Path):
    config = run_folder.load_config(folder, [])
    opened = session.open_session(config)
    opened.close()
    return run_folder.checkpoints(folder).restore(run_folder.abstract(opened.state))[1]


def assert_equal_runs(a: Path, b: Path) -> None:
    assert timeless(a) == timeless(b)
    for name in (record.EVENTS, record.TRANSCRIPTS):
        assert record.read(a / name) == record.read(b / name)
    for x, y in zip(jax.tree.leaves(final_state(a)), jax.tree.leaves(final_state(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_writes_what_it_promises(straight):
    rows = record.read(straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval/macro" in row] == [0, 2, 4, 6]
    assert "reward/mean" not in rows[0]
    assert all(row["policy/grad_norm"] > 0 and row["policy/skipped"] == 0 for row in rows[1:])
    for name in ("copy", "add"):
        assert all(0 <= row[f"triage/acc_ema/{name}"] <= 1 for row in rows[1:])
    assert all(row["triage/share/seen"] == 0 and row["pass_rate/seen"] is None for row in rows[1:])
    assert "eval/pass_rate/seen" in rows[-1]
    assert [row["curriculum/single_domain"] for row in rows[1:]] == [0, 0, 1, 0, 0, 1]
    assert all(abs(sum(row[f"triage/share/{n}"] for n in ("copy", "seen", "add")) - 1) < 1e-5 for row in rows[1:])
    assert [row["step"] for row in rows if "canary/kl" in row] == [0, 2, 4, 6]
    assert rows[0]["canary/kl"] == 0 and rows[6]["canary/kl"] > 0 and rows[2]["forgetting/add"] is None
    rates = [rows[step]["eval/pass_rate/add"] for step in (2, 4, 6)]
    assert rows[6]["forgetting/add"] == max(rates[:2]) - rates[2]
    assert {row["step"] for row in record.read(straight / record.TRANSCRIPTS)} == {1, 3, 5}
    assert (straight / "config.yaml").is_file() and list((straight / "tb").iterdir())
    assert "NaN" not in (straight / "metrics.jsonl").read_text()
    assert not any(key.startswith("upgrade/") for key in rows[1]) and not (straight / "baseline.npz").exists()


def test_nothing_compiles_after_the_first_step(straight):
    compiled = [row["time/compilations"] for row in record.read(straight / "metrics.jsonl")[1:]]
    assert compiled[0] > 0 and compiled[1:] == [0] * 5, compiled


def test_the_sampler_and_the_trainer_agree_in_float32(straight):
    rows = record.read(straight / "metrics.jsonl")[1:]
    assert all(row["rollout/logp_gap"] < 2e-6 for row in rows)


def test_learning_rate_zero_leaves_the_policy_and_the_gap_alone(setting, straight, tmp_path):
    assert record.read(straight / "metrics.jsonl")[3]["policy/kl"] > 1e-5  # what the same steps do with a rate
    assert train.main([*setting, f"run.dir={tmp_path / 'run'}", "run.steps=3", "algorithm.learning_rate=0"]) == 0
    rows = record.read(tmp_path / "run" / "metrics.jsonl")[1:]
    assert all(row["policy/kl"] < 1e-6 and row["rollout/logp_gap"] < 2e-6 for row in rows)
    assert all(row["policy/grad_norm"] > 0 for row in rows)


def test_a_run_bound_by_tokens_is_the_same_run_up_to_there(setting, straight, tmp_path, capsys):
    """Bounded by what the fourth step brings; then continued without the bound to the six steps of the straight run."""
    folder = tmp_path / "run"
    rows = record.read(straight / "metrics.jsonl")
    assert rows[6]["tokens/total"] == sum(row["tokens/generated"] for row in rows[1:])
    bound = f"run.tokens={rows[4]['tokens/total']}"
    assert train.main([*setting, f"run.dir={folder}", bound]) == 0
    assert timeless(folder) == timeless(straight)[:5]
    with pytest.raises(SystemExit):
        resume.main([str(folder), "run.steps=6"])
    assert "already; give more" in capsys.readouterr().err
    assert resume.main([str(folder), "run.tokens=0"]) == 0
    assert_equal_runs(folder, straight)


def test_six_steps_equal_three_and_resume_to_six(setting, straight, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*setting, f"run.dir={folder}", "run.steps=3"]) == 0
    assert resume.main([str(folder), "run.steps=6"]) == 0
    assert_equal_runs(folder, straight)
    assert "continuing" in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(setting, straight, tmp_path, caplog):
    folder = tmp_path / "run"
    assert train.main([*setting, f"run.dir={folder}", "run.steps=4"]) == 0
    largest = max((folder / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    assert resume.main([str(folder), "run.steps=6"]) == 0
    assert any(str(largest.name) in message for message in caplog.messages)
    assert_equal_runs(folder, straight)
    assert (folder / "checkpoints" / "4.damaged").is_dir()


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill(process: subprocess.Popen) -> None:
    """kill -9."""
    process.kill()
    process.communicate()


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    path = folder / "metrics.jsonl"
    while not (path.is_file() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_killed_twice_equals_one_that_never_stopped(setting, straight, tmp_path):
    """pytest -m slow tests/train_test.py"""
    folder = tmp_path / "run"
    process = start(["infinite_jax.train", *setting, f"run.dir={folder}"])
    wait_for_rows(folder, 4, process)
    kill(process)
    process = start(["infinite_jax.resume", str(folder)])
    wait_for_rows(folder, 6, process)
    kill(process)
    assert resume.main([str(folder)]) == 0
    assert_equal_runs(folder, straight)


@pytest.mark.slow
def test_sigterm_saves_and_exits_75(setting, straight, tmp_path):
    """pytest -m slow tests/train_test.py"""
    folder = tmp_path / "run"
    process = start(["infinite_jax.train", *setting, f"run.dir={folder}", "run.checkpoint_every=100"])
    wait_for_rows(folder, 2, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal reached it")
    assert process.returncode == 75 and b"infinite_jax.resume" in out
    saved = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    assert saved == record.read(folder / "metrics.jsonl")[-1]["step"] > 0
    assert resume.main([str(folder), "run.checkpoint_every=2"]) == 0
    assert_equal_runs(folder, straight)


def test_evaluate_and_export_agree_with_the_run(straight, tmp_path, capsys):
    assert evaluate.main([str(straight)]) == 0
    table = capsys.readouterr().out
    last = record.read(straight / "metrics.jsonl")[-1]
    for name in ("copy", "seen", "add"):
        line = next(line for line in table.splitlines() if f"| {name} " in line)
        assert f"{last[f'eval/pass_rate/{name}']:.3f} [" in line
    assert export.main([str(straight), str(tmp_path / "out"), "step=best"]) == 0

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "copy: ab"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    theirs = model(torch.tensor([ids])).logits.detach().numpy()
    config, params = hf.load(tmp_path / "out", np.float32)
    np.testing.assert_allclose(policy.logits(config, params, np.array([ids])), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "verb, arguments, words",
    [
        (train, ["run.dir={run}"], ["run.dir={run}", "not empty", "resume"]),
        (train, ["run.dir={run}/metrics.jsonl"], ["run.dir={run}/metrics.jsonl is a file: name a folder"]),
        (train, ["run.dir=/proc/x"], ["run.dir=/proc/x cannot be written", "name another folder"]),
        (train, ["model.path=/nowhere/at/all"], ["/nowhere/at/all"]),
        (train, ["algorithm.prompt_buckets=[4]"], ["tokens", "algorithm.prompt_buckets", "raise it"]),
        (resume, ["{run}"], ["run.steps=6", "already"]),
        (resume, ["{run}", "algorithm.kl_coef=9"], ["algorithm.kl_coef=9.0", "the run has 0.02"]),
        (resume, ["{run}", "run.stepz=9"], ["run.stepz=9", "did you mean run.steps"]),
        (resume, ["/nowhere"], ["/nowhere", "no config.yaml"]),
        (export, ["{run}", "{run}"], ["{run}", "not empty"]),
        (export, ["{run}", "{run}/metrics.jsonl"], ["OUT {run}/metrics.jsonl is a file: name a folder"]),
        (export, ["{run}", "{run}/out", "step=x"], ["step=x", "best"]),
        (resume, ["{run}", "run.steps=["], ["parsing"]),
        (resume, ["{run}", "mesh=single"], ["mesh=single", "mesh.<name>"]),
        (evaluate, ["{run}", "algorithm.prompts=9"], ["algorithm.prompts=9", "the run has"]),
        (evaluate, ["{run}", "--config-name", "none"], ["--config-name none: {run} has a configuration of its own"]),
        (evaluate, ["{run}", "--config-dir", "none"], ["--config-dir none: {run} has a configuration of its own"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(setting, straight, capsys, verb, arguments, words):
    arguments = [argument.format(run=straight) for argument in arguments]
    before = (straight / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as ended:
        verb.main([*setting, *arguments] if verb is train else arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word.format(run=straight) in error for word in words), error
    assert (straight / "metrics.jsonl").read_text() == before  # nothing saved is lost


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_that_another_process_writes_in_is_refused(setting, straight, tmp_path, capsys):
    """Once with a run that is there, once with one that is about to be."""
    taken = (straight, lambda: resume.main([str(straight), "run.steps=8"])), (
        tmp_path / "run", lambda: train.main([*setting, f"run.dir={tmp_path / 'run'}"]),
    )  # fmt: skip
    for folder, begin in taken:
        with RunLock() as lock:
            lock.take(folder)
            before = contents(folder)
            with pytest.raises(SystemExit) as ended:
                begin()
            assert ended.value.code == 2 and contents(folder) == before
        error = capsys.readouterr().err
        assert error.startswith(f"error: {folder}: in use by process {os.getpid()} ") and error.count("\n") == 1


def test_a_folder_that_another_run_filled_meanwhile_is_refused(setting, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def finished(*arguments):
        folder.mkdir()
        (folder / "config.yaml").write_text("theirs")
        return open_session(*arguments)

    open_session = train.open_session
    monkeypatch.setattr(train, "open_session", finished)
    with pytest.raises(SystemExit) as ended:
        train.main([*setting, f"run.dir={folder}"])
    assert ended.value.code == 2 and "is not empty: continue it with" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == "theirs" and not (folder / "contamination").exists()


def test_what_an_export_lacks_is_its_folder_alone(capsys):
    with pytest.raises(SystemExit):
        export.main(["run"])
    assert capsys.readouterr().err.endswith("the following arguments are required: OUT\n")


def test_a_folder_that_was_tried_out_is_gone_again(tmp_path):
    run_folder.check_writable(tmp_path / "a" / "b", "run.dir=")
    (tmp_path / "c").mkdir()
    run_folder.check_writable(tmp_path / "c", "run.dir=")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"} and not (tmp_path / "a" / "b").exists()


def test_an_edited_config_and_a_changed_reference_are_refused(setting, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*setting, f"run.dir={folder}", "run.steps=1"]) == 0
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(SystemExit):
        resume.main([str(folder), "run.steps=2"])
    assert "edited" in capsys.readouterr().err
    (folder / "config.yaml").write_text("")
    with pytest.raises(SystemExit):
        resume.main([str(folder), "run.steps=2"])
    assert "not the file that a run writes" in capsys.readouterr().err
    stale = text.replace("reference_sha256: ", "reference_sha256: 00")
    (folder / "config.yaml").write_text(stale)
    with pytest.raises(SystemExit):
        resume.main([str(folder), "run.steps=2"])
    assert "not those the run began with" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_again(setting, straight, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*setting, f"run.dir={folder}", "run.steps=0"]) == 0
    shutil.rmtree(folder / "checkpoints")
    assert resume.main([str(folder), "run.steps=6"]) == 0
    assert "from its beginning" in capsys.readouterr().out
    assert_equal_runs(folder, straight)


def test_changed_data_and_a_foreign_tokenizer_are_refused(setting, tmp_path, capsys):
    data, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    row = {"messages": [{"role": "user", "content": "copy: a"}], "answer": "a"}
    data.write_text(json.dumps(row) + "\n")
    (tmp_path / "mine.yaml").write_text(
        (Path(setting[1]) / "small.yaml").read_text().replace("gen:copy,size=7", str(data))
    )
    mine = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    assert train.main([*mine, f"run.dir={folder}", "run.steps=1"]) == 0
    data.write_text(json.dumps(row | {"answer": "b"}) + "\n")
    with pytest.raises(SystemExit):
        resume.main([str(folder), "run.steps=2"])
    assert "the data of domain copy has changed" in capsys.readouterr().err
    model = tmp_path / "model"
    config = from_hf(
        LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    )
    hf.save(config, policy.init(config, jax.random.key(0)), model)
    source.load_tokenizer(
        source.ModelConfig("tiny", "float32", "none", True, "auto", source.LoraConfig(0, 1.0, ()))
    ).save_pretrained(model)
    with pytest.raises(SystemExit):
        train.main([*setting, f"model.path={model}", f"run.dir={tmp_path / 'other'}"])
    assert "the model knows 100" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()  # a refused run leaves no folder behind


@pytest.fixture
def graded_by(setting, tmp_path):
    """Arguments of the same run with a grader of this text."""

    def write(source: str) -> list[str]:
        broken = tmp_path / "broken.py"
        broken.write_text(source)
        text = (Path(setting[1]) / "small.yaml").read_text()
        (tmp_path / "mine.yaml").write_text(text.replace(str(Path(setting[1]) / "checksum.py"), str(broken)))
        return ["--config-dir", str(tmp_path), "--config-name", "mine", f"run.dir={tmp_path / 'run'}", "run.steps=1"]

    return write


@pytest.mark.parametrize(
    ("source", "said", "begun"),
    [
        (
            "import json\nimport nosuchmodule\ndef grade(reply, answer, meta): return 1\n",
            "broken.py:2: ModuleNotFoundError: No module named 'nosuchmodule': mend",
            False,
        ),
        (
            "def grade(reply, answer, meta): return meta['gold']\n",
            "domain copy: none of its 5 held-out replies could be graded (nor of add): KeyError: 'gold': mend",
            True,
        ),
        (
            "def grade(reply, answer, meta): return reply == answer\n",
            "the grader returned False, and grades are 1 to 4: for a reward from 0 to 1 return 1 + 3 * reward",
            True,
        ),
    ],
)
def test_a_run_without_grades_ends_before_its_first_step(graded_by, tmp_path, capsys, source, said, begun):
    with pytest.raises(SystemExit) as ended:
        train.main(graded_by(source))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and len(error) == 1 and said in error[0]
    assert (tmp_path / "run").exists() == begun and not (tmp_path / "run" / "checkpoints" / "0").exists()


def test_a_grader_that_gives_no_answer_is_named(graded_by, tmp_path, capsys):
    source = """
        calls = 0
        def grade(reply, answer, meta):  # by one worker: the ten held-out replies, and no other
            global calls
            calls += 1
            if calls > 10: raise RuntimeError("service is down")
            return 1
    """
    assert train.main(graded_by(textwrap.dedent(source))) == 0
    assert "warning: domain copy" in (error := capsys.readouterr().err) and "service is down" in error
    row = record.read(tmp_path / "run" / "metrics.jsonl")[1]
    assert row["rollout/invalid"] == 1 and row["policy/skipped"] == 1 and row["reward/mean"] is None


def test_a_run_whose_groups_never_differ_says_so_once(graded_by, straight, tmp_path, capsys):
    assert any(row["reward/differing"] > 0 for row in record.read(straight / "metrics.jsonl")[1:])
    assert train.main([*graded_by("def grade(reply, answer, meta): return 1\n"), "run.steps=6"]) == 0
    assert all(row["reward/differing"] == 0 for row in record.read(tmp_path / "run" / "metrics.jsonl")[1:])
    error = capsys.readouterr().err
    assert error.count("no group's replies were rewarded differently (mean reward 0.000)") == 1
    assert "easier rows" in error and "algorithm.group_size above 2" in error


@pytest.mark.parametrize("verb", ["train", "resume", "evaluate", "export"])
def test_every_verb_answers_help(verb, capsys):
    module = {"train": train, "resume": resume, "evaluate": evaluate, "export": export}[verb]
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and f"infinite_jax.{verb}" in capsys.readouterr().out


def test_rows_of_the_record_survive_a_cut_line(tmp_path):
    path, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    events.write_text('{"step": 1, "kind": "drift"}\n{"step": 2, "kind": "drift"}\n')
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "eval/macro": 2, "b": 3}\n{"step": 2}\n{"step": 3, "a"')
    record.truncate_after(tmp_path, 1, eval_every=2)
    assert record.read(events) == [{"step": 1, "kind": "drift"}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0, "a": 1}, {"step": 1, "b": 3}]
