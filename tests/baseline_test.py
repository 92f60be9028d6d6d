"""An upgrade on the smallest model, from its command to its continuation; what it measures of M0, what it refuses."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cli, limits
from curriculum import monitor
from infinite_jax import baseline, record, resume, run_folder, safety, session, upgrade

TABLE = (
    "domains:\n"
    "  - {{name: copy, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', {grader}}}\n"
    "  - {{name: seen, test: 'gen:copy,split=test,size=12,seed=1', eval_only: true, kl: 2.0}}\n"
    "  - {{name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=40', new: true, {grader}}}\n"
)


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> list[str]:
    """Two priors, one of them without prompts, and a new domain; graders that look random but are not."""
    folder = tmp_path_factory.mktemp("setting")
    (folder / "by_answer.py").write_text(
        "import zlib\n\n\ndef grade(reply, answer, meta):\n    return 1 + zlib.crc32((reply + answer).encode()) % 4\n"
    )
    text = (
        TABLE.format(grader=f"environment: {folder / 'by_answer.py'}")
        + "run: {steps: 4, eval_every: 2, checkpoint_every: 2, keep_last: 9}\n"
        "algorithm: {prompts: 10, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, learning_rate: 0.01,\n"
        "  kl_coef: 0.1, kl_type: loss}\n"
        "eval: {batch: 16, prompts: 5}\ncurriculum: {single_every: 3}\nrubric: {workers: 1}\n"
        "contamination: {stages: [exact]}\nupgrade: {ramp_steps: 4}\n"
    )
    return small_run(folder, text)


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory) -> tuple[Path, str]:
    """(run, what it printed): four steps without a stop."""
    folder, printed = tmp_path_factory.mktemp("runs") / "straight", pytest.MonkeyPatch()
    lines = []
    printed.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
    try:
        assert upgrade.main([*setting, f"run.dir={folder}"]) == 0
    finally:
        printed.undo()
    return folder, "\n".join(lines)


def rows_of(folder: Path) -> list[dict]:
    return record.read(folder / "metrics.jsonl")


def timeless(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows_of(folder)]


def saved(folder: Path, step: int):
    config = run_folder.load_config(folder, [])
    with session.open_session(config) as opened:
        abstract = run_folder.abstract(opened.state)
    return run_folder.checkpoints(folder).restore(abstract, step)[1]


def test_m0_is_measured_told_and_kept(straight):
    folder, printed = straight
    config = run_folder.load_config(folder, [])
    assert config.upgrade.active
    results = baseline.read(config, folder)
    sizes = {name: len(result.greedy_N) for name, result in results.items()}
    assert sizes == {"copy": 5, "seen": 12, "add": 20}  # four times five where the tests have them
    lines = [line.split("|") for line in printed.split("step 0/")[0].splitlines() if line.startswith("| ")]
    table = {cells[1].strip(): [cell.strip() for cell in cells[2:8]] for cells in lines}
    rate = float(np.mean(results["copy"].greedy_N >= 3))
    assert table["copy"] == ["prior", "7", f"{rate:.3f}", "5", "5", "none"]  # five prompts show no drop at all
    assert table["seen"][1] == "none, KL anchor only" and table["seen"][3:5] == ["12", "5"]
    assert table["add"][0] == "new" and table["add"][5] == "-"
    assert "fewer than 20 distinct test prompts, all taken for M0: copy, seen" in printed


def test_the_least_visible_drop_by_hand():
    """M0 passed 80 of 100, an evaluation has 50, two priors: z = 1.96, se = sqrt(p q (1/50 + 1/100)), p = 81 / 102."""
    config, verdicts = cli.compose_config("config", None, []), np.arange(100) < 80
    error = np.sqrt(81 / 102 * 21 / 102 * 0.03)
    assert baseline.least_drop(config, verdicts, 50, 2) == f"{(1.959964 + 0.841621) * error:.3f}"
    assert (
        baseline.least_drop(config, verdicts[:0], 50, 2) == "-"
        and baseline.least_drop(config, verdicts, 1, 2) == "none"
    )


def test_the_scheduler_begins_from_m0s_rates(straight):
    folder, _ = straight
    results = baseline.read(run_folder.load_config(folder, []), folder)
    rates = [np.mean(results[name].greedy_N >= 3) for name in ("copy", "seen", "add")]
    triage = saved(folder, 0).curriculum
    for leaf in (triage.acc_ema, triage.fast_acc, triage.ref_mean):
        np.testing.assert_allclose(leaf, rates, rtol=1e-6)
    bands = [0 if rate < 0.4 else 2 if rate > 0.8 else 1 for rate in rates]
    np.testing.assert_array_equal(triage.performance_band, bands)
    np.testing.assert_array_equal(triage.last_seen_step, [0, 0, -1])
    np.testing.assert_allclose(triage.new_share, 0.7, rtol=1e-6)


def test_queues_ramp_and_coefficients_are_logged_and_the_update_obeys_them(straight):
    rows = rows_of(straight[0])[1:]
    assert [row["curriculum/single_domain"] for row in rows] == [0, 0, 1, 0]
    for row in rows:
        np.testing.assert_allclose(row["upgrade/new_share"], 0.7, rtol=1e-6)
        np.testing.assert_allclose([row[f"triage/share/{name}"] for name in ("copy", "seen", "add")], [0.3, 0, 0.7])
        np.testing.assert_allclose(
            [row[f"upgrade/kl_coef/{name}"] for name in ("copy", "seen", "add")], [0.1, 0.2, 0.1]
        )
        assert row["upgrade/ramp/copy"] == 1
    ramp = [0.1, 0.325, 0.55, 0.775]  # .1 + .9 t / 4
    np.testing.assert_allclose([row["upgrade/ramp/add"] for row in rows], ramp, rtol=1e-6)
    warm_up = 0.01 * np.array([1, 2, 3, 4]) / 5  # a batch of the new domain alone takes a step of its ramp
    np.testing.assert_allclose([row["policy/learning_rate"] for row in rows], warm_up * [1, 1, 0.55, 1], rtol=1e-5)
    assert [row["time/compilations"] for row in rows][2:] == [0, 0]  # the first evaluation compiles the monitor


def test_two_steps_and_resume_equal_four(setting, straight, tmp_path):
    folder = tmp_path / "run"
    assert upgrade.main([*setting, f"run.dir={folder}", "run.steps=2"]) == 0
    measured = (folder / baseline.FILE).read_bytes()
    assert resume.main([str(folder), "run.steps=4"]) == 0
    assert timeless(folder) == timeless(straight[0]) and (folder / baseline.FILE).read_bytes() == measured
    for x, y in zip(jax.tree.leaves(saved(folder, 4)), jax.tree.leaves(saved(straight[0], 4)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_lost_baseline_and_an_added_domain_are_one_line(setting, straight, tmp_path, capsys):
    kept = (straight[0] / baseline.FILE).read_bytes()
    for contents in (b"", kept[:100]):
        (straight[0] / baseline.FILE).write_bytes(contents)
        with pytest.raises(SystemExit) as ended:
            resume.main([str(straight[0]), "run.steps=5"])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and "restore it from a backup" in error
    (straight[0] / baseline.FILE).write_bytes(kept)
    (tmp_path / "more.yaml").write_text("- {name: more, train: 'gen:sort', test: 'gen:sort,split=test'}\n")
    with pytest.raises(SystemExit):
        resume.main([str(straight[0]), "run.steps=5", f"add={tmp_path / 'more.yaml'}"])
    assert "export this run and upgrade that model" in capsys.readouterr().err


def test_help_and_an_approval_of_nothing(straight, capsys):
    with pytest.raises(SystemExit) as ended:
        upgrade.main(["--help"])
    assert ended.value.code == 0 and "--approve RUN_DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        upgrade.main(["--approve", str(straight[0]), "--by", "Ada", "--why", "because"])
    assert ended.value.code == 2 and "not halted" in capsys.readouterr().err


def test_what_the_monitor_asks_reaches_scheduler_and_kl(setting):
    """Tier 2: the boost, .6 instead of .7, every coefficient twice; without a monitor nothing moves."""
    config = cli.compose_config("small", setting[1], ["upgrade.active=true"])
    with session.open_session(config) as opened:
        assert safety.applied(config, bare := opened.state._replace(monitor=None)) is bare
        raised = monitor.init(config.upgrade.monitor, 3)._replace(tier=jnp.array(2), boost=jnp.array([0.5, 0, 0]))
        state = safety.applied(config, opened.state._replace(monitor=raised))
        np.testing.assert_allclose(state.curriculum.new_share, 0.6, rtol=1e-6)
        np.testing.assert_array_equal(state.curriculum.boost, np.float32([0.5, 0, 0]))
        np.testing.assert_allclose(opened.trainer.kl_coef(raised), [0.2, 0.4, 0.2], rtol=1e-6)
        np.testing.assert_allclose(opened.trainer.kl_coef(None), [0.1, 0.2, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        (["algorithm.kl_type=none"], ["algorithm.kl_type=none", "set algorithm.kl_type=reward or loss"]),
        (["algorithm.kl_coef=0.02"], ["0.02 x domains[0].kl=1", "at least 0.1", "copy", "set algorithm.kl_coef=0.1"]),
        ([{"kl": 0.25}], ["0.1 x domains[0].kl=0.25", "set algorithm.kl_coef=0.4"]),
        ([{"kl": 0.0}], ["domains[0].kl=0", "and domains[0].kl=1"]),
        ([{"kl": -1.0}], ["domains[0].kl=-1.0", "at least 0"]),
        ([{"new": True}, {"new": True}], ["every domain is new", "eval_only: true"]),
        ([{}, {}, {"new": False}], ["mark these with `new: true`"]),
        ([{}, {"new": True}], ["domains[1]: seen is new and eval_only", "`train` source"]),
        (["upgrade.new_floor=1"], ["upgrade.new_floor=1"]),
    ],
)
def test_an_upgrade_that_cannot_be_is_one_line(setting, changes, words):
    texts = [change for change in changes if isinstance(change, str)]
    with pytest.raises(ValueError) as caught:
        config = cli.compose_config("small", setting[1], ["upgrade.active=true", *texts])
        fields = [change for change in changes if isinstance(change, dict)]
        fields += [{}] * (len(config.domains) - len(fields))
        domains = tuple(dataclasses.replace(d, **f) for d, f in zip(config.domains, fields, strict=True))
        limits.validate(dataclasses.replace(config, domains=domains), 1)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_prompts_are_counted_once():
    """The results of an evaluator hold what `distinct` leaves: same tokens and same answer."""
    from infinite_jax.prompts import Prompt, distinct

    rows = [({"answer": "1"}, (1, 2)), ({"answer": "1", "key": "x"}, (1, 2)), ({"answer": "2"}, (1, 2)), ({}, (3,))]
    kept = distinct([Prompt(row, ids, 0) for row, ids in rows])
    assert [(prompt.row.get("answer"), prompt.ids) for prompt in kept] == [("1", (1, 2)), ("2", (1, 2)), (None, (3,))]
