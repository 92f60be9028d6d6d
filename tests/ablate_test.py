"""`python -m infinite_jax.ablate`: resumption, arithmetic of the table, verdicts, pictures, errors of one line."""

import csv

import numpy as np
import pytest

from configs import cli
from infinite_jax import ablate, statistics
from infinite_jax.retention import Evaluations
from infinite_jax.worlds import criteria, plots, simulated, table
from infinite_jax.worlds.criteria import verdict
from infinite_jax.worlds.table import ALL, Row, Runs

SMALL = ["sim.regimes=[plain]", "sim.steps=100", "arms=[uniform,faithful]", "pictures=[uniform,faithful]"]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        ablate.main(list(arguments))
    assert raised.value.code == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").strip()


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """A run of three seeds."""
    folder = tmp_path_factory.mktemp("ablation")
    assert ablate.main([*SMALL, "seeds=3", f"run.dir={folder}"]) == cli.DONE
    return folder


def lines(folder):
    with (folder / "ablate.csv").open() as file:
        return list(csv.DictReader(file))


def test_one_long_table_for_every_arm_and_seed(ablation):
    rows = lines(ablation)
    assert tuple(rows[0]) == ("world", "regime", "arm", "seed", "metric", "value", "reason")
    units = {(row["world"], row["regime"], row["arm"], row["seed"]) for row in rows}
    assert units == {("simulated", "plain", arm, str(s)) for arm in ("uniform", "faithful") for s in range(3)}
    for row in rows:
        assert (row["value"] == "") == (row["reason"] != "")  # undefined is empty with a reason, never 0
    bwt = [row for row in rows if row["metric"] == "bwt"]
    assert len(bwt) == 6 and all(row["value"] == "" and "one phase" in row["reason"] for row in bwt)
    assert {float(row["value"]) for row in rows if row["metric"] == "cost_rollouts"} == {100 * 64 * 8}


def test_what_is_finished_is_not_run_again(ablation, monkeypatch):
    before = (ablation / "ablate.csv").read_bytes()
    asked = []
    monkeypatch.setattr(simulated, "_job", lambda *job: asked.append(job))
    assert ablate.main([*SMALL, "seeds=3", f"run.dir={ablation}"]) == cli.DONE
    assert (ablation / "ablate.csv").read_bytes() == before and not asked


def test_more_seeds_are_added_from_the_first_on(ablation, tmp_path):
    for name in ("ablate.csv", "ablate.yaml"):
        (tmp_path / name).write_text((ablation / name).read_text())
    assert ablate.main([*SMALL, "first_seed=2", "seeds=2", f"run.dir={tmp_path}"]) == cli.DONE
    assert {row["seed"] for row in lines(tmp_path)} == {"0", "1", "2", "3"}
    assert lines(tmp_path)[: len(lines(ablation))] == lines(ablation)


def test_a_unit_cut_off_while_being_written_is_run_again(ablation, tmp_path, monkeypatch):
    whole = (ablation / "ablate.csv").read_text()
    for name in ("ablate.csv", "ablate.yaml"):
        (tmp_path / name).write_text((ablation / name).read_text())
    (tmp_path / "ablate.csv").write_text(whole[:-40])  # ends within a line of the last unit
    asked = []

    def job(settings, withheld, arm, program, units):
        asked.extend((arm, unit.name, unit.seed) for unit in units)
        return []

    monkeypatch.setattr(simulated, "_job", job)
    ablate.main([*SMALL, "seeds=4", f"run.dir={tmp_path}"])
    assert asked == [("uniform", "plain", 3), ("faithful", "plain", 2), ("faithful", "plain", 3)]
    assert whole.startswith((tmp_path / "ablate.csv").read_text())  # nothing but whole units is left


def test_rows_of_other_numbers_are_not_mixed(ablation, capsys):
    here = f"run.dir={ablation}"
    assert refused(capsys, *SMALL, "sim.steps=200", here).startswith(f"sim.steps=200: {ablation} has rows with 100")
    assert "rows of uniform with other numbers" in refused(capsys, *SMALL, "curriculum.beta=0.1", here)


def test_the_report_is_written(ablation, capsys):
    ablate.main([*SMALL, "seeds=3", f"run.dir={ablation}"])
    out = capsys.readouterr().out
    assert (
        "AURC % over uniform" in out.replace("\n", " ") and "faithful: AURC gain of at least 25 % over uniform" in out
    )
    assert "note: baseline sequential was not run" in out
    with (ablation / "simulated-paired.csv").open() as file:
        paired = {(row["regime"], row["comparison"]): row for row in csv.DictReader(file)}
    assert paired["plain", "aurc_gain_vs_uniform"]["seeds"] == "3"
    for name in ("simulated-plain", "simulated-aurc-vs-uniform", "simulated-worst-vs-uniform"):
        assert (ablation / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def values(**arms):
    return {
        ("plain", arm, metric): dict(enumerate(v)) for arm, metrics in arms.items() for metric, v in metrics.items()
    }


def test_paired_differences_by_hand():
    found = values(
        a=dict(aurc=[0.6, 0.5, 0.8], worst=[0.1, 0.2, 0.6]), b=dict(aurc=[0.5, 0.5, 0.5], worst=[0.1, 0.1, 0.1])
    )
    assert table.differences(found, ["plain"], "a", "b", "aurc") == pytest.approx([20, 0, 60])
    estimate = statistics.t_interval([0.0, 0.1, 0.5])
    # mean .2, sd .264575, t(2) = 4.302653: half = 4.302653 * .264575 / sqrt(3)
    assert estimate == pytest.approx((0.2, 0.2 - 0.657241, 0.2 + 0.657241), abs=1e-5)
    assert statistics.t_interval([0.3]) is None
    found["late", "a", "worst"], found["late", "b", "worst"] = {0: 0.5, 2: 0.2}, {0: 0.1, 1: 0.4, 2: 0.0}
    assert table.differences(found, ["plain", "late"], "a", "b", "worst") == pytest.approx([0.2, 0.35])  # seeds 0 and 2
    lines = table.paired(found, ["b"])
    assert [line.seeds for line in lines if line.metric == "worst" and line.regime in ("late", ALL)] == [2, 2]


@pytest.mark.parametrize(
    ("low", "high", "least", "expected"),
    [(26, 30, 25, "met"), (20, 24, 25, "not met"), (20, 30, 25, "open"), (0.01, 0.02, 0, "met"), (-1, 1, 0, "open")],
)
def test_verdicts(low, high, least, expected):
    assert verdict(table.Estimate((low + high) / 2, low, high), least) == expected
    assert verdict(None, least) == "not measured"


def test_criteria_by_hand():
    gains = [1.29, 1.30, 1.31]
    uniform = dict(aurc=[0.5] * 3, fwt_unseen=[0.1] * 3)
    found = values(
        uniform=uniform,
        size_proportional=uniform,
        recommended=dict(aurc=[0.5 * g for g in gains]),
        a3=dict(aurc=[0.5] * 3, fwt_unseen=[0.10, 0.10, 0.10]),
        full=dict(aurc=[0.5] * 3, fwt_unseen=[0.120, 0.121, 0.122]),
    )
    rows = {row.claim: row for row in criteria.criteria(found, ["recommended", "spaced"])}
    assert rows["recommended: AURC gain of at least 25 % over uniform"].verdict == "met"
    assert rows["recommended: AURC gain of at least 25 % over size_proportional"].measured.startswith("+30.0 ±2.5 %")
    assert rows["alternation helps on domains never trained on (full minus a3, fwt_unseen)"].verdict == "met"
    assert rows["alternation is worth 12 % of a3's fwt_unseen"].measured == "+21.0 ±2.5 %"
    harder = rows["alternation helps on held-out harder variants (full minus a3, harder)"]
    assert harder.verdict == "not measured" and "no metric harder" in harder.measured
    assert len(rows) == 5


def test_extra_metrics_and_costs_become_rows(tmp_path):
    evaluations = Evaluations(np.arange(3.0), np.full((3, 2), 0.5), np.zeros(2), np.array([True, False]))
    runs = Runs("plain", "a", np.array([7]), [evaluations], None, {"tokens": 5.0}, {"harder": np.array([0.25])})
    table.append(tmp_path / "t.csv", table.rows_of("compiled", runs))
    rows = table.load(tmp_path / "t.csv")
    assert Row("compiled", "plain", "a", 7, "harder", 0.25, "") in rows
    assert Row("compiled", "plain", "a", 7, "cost_tokens", 5.0, "") in rows
    assert Row("compiled", "plain", "a", 7, "acc", 0.5, "") in rows


def test_curves_of_seeds_that_come_one_by_one_are_kept_together(tmp_path):
    def runs(seed, rate, at):
        rate_KD = np.array([[0.2, 0.1], [rate, 0.1]])
        evaluations = Evaluations(np.array(at), rate_KD, np.zeros(2), np.array([True, False]))
        return Runs("plain", "a", np.array([seed]), [evaluations], None, {})

    plots.keep(tmp_path, runs(0, 0.6, [0.0, 10.0]))
    plots.keep(tmp_path, runs(1, 0.8, [0.0, 20.0]))
    plots.keep(tmp_path, runs(1, 0.8, [0.0, 20.0]))
    curve = plots.load(tmp_path, "plain", "a")
    np.testing.assert_array_equal(curve.seed_S, [0, 1])
    np.testing.assert_allclose(curve.macro_SK, [[0.2, 0.6], [0.2, 0.5]])  # the second at 10, halfway


def test_an_arm_is_a_preset_with_changes():
    arm = ablate.compose_arm("recommended,uncertainty_weight=3,band_capacity=[0.5,0.3,0.2]", "config", None, [])
    assert arm.config.curriculum.policy == "recommended" and arm.config.curriculum.uncertainty_weight == 3
    assert arm.config.curriculum.band_capacity == (0.5, 0.3, 0.2)
    assert arm.compose(["run.seed=5"]).run.seed == 5
    assert ablate.compose_arm("faithful,rubric.reward=pass", "config", None, []).config.rubric.reward == "pass"


def test_a_key_that_one_arm_reads_is_not_refused_for_the_others(capsys, tmp_path):
    arms = 'arms=[faithful,"faithful,algorithm.advantage=gae,algorithm.critic=head"]'
    given = [*SMALL, "pictures=[]", f"run.dir={tmp_path / 'x'}", "seeds=1"]
    assert ablate.main([*given, arms, "algorithm.gamma=0.9"]) == cli.DONE
    capsys.readouterr()
    unread = "algorithm.gamma=0.9: algorithm.advantage=std never reads it"
    assert refused(capsys, *given, "algorithm.gamma=0.9").startswith(unread)
    mine = 'arms=["faithful,algorithm.gamma=0.9","faithful,algorithm.advantage=gae,algorithm.critic=head"]'
    assert refused(capsys, *given, mine).startswith(unread)  # the first arm's own


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("arms=[uniform,recomended]", "arms: there is no curriculum 'recomended'; did you mean recommended?"),
        ("arms=[uniform,uniform]", "arms: uniform is named twice; leave one out"),
        ("arms=[]", "arms=[]: name at least one, such as arms=[faithful,uniform]"),
        ('arms=["a1,beta"]', "arms: 'a1,beta': expected key=value behind the comma, such as a1,beta=0.1"),
        ('arms=["a1,bta=1"]', "unknown key curriculum.bta=1: did you mean curriculum.beta?"),
        ("world=simulate", "world=simulate: did you mean simulated?"),
        ("seeds=0", "seeds=0: must be at least 1"),
        ("first_seed=-1", "first_seed=-1: must be at least 0"),
        ("seeds=few", "seeds='few': expected a whole number"),
        ("sim.step=10", "unknown key sim.step=10: did you mean sim.steps?"),
        ("sim.grid=ful", "sim.grid=ful: did you mean full?"),
        ("seds=3", "unknown key seds=3: did you mean seeds?"),
        ("curriculum=uniform", "argument 'curriculum=uniform': the arms choose the curriculum; set arms=[...]"),
    ],
)
def test_bad_input_is_one_line(argument, message, capsys, tmp_path):
    assert refused(capsys, argument, f"run.dir={tmp_path / 'x'}") == message
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert "is not empty and holds no ablation" in refused(capsys, *SMALL, f"run.dir={tmp_path}")


def test_a_damaged_table_is_named(ablation, tmp_path, capsys):
    (tmp_path / "ablate.yaml").write_text((ablation / "ablate.yaml").read_text())
    (tmp_path / "ablate.csv").write_text("world,regime\n")
    assert "ablate.csv:1: not the heading" in refused(capsys, *SMALL, f"run.dir={tmp_path}")


def test_help_names_the_keys(capsys):
    with pytest.raises(SystemExit) as raised:
        ablate.main(["--help"])
    assert raised.value.code == 0 and "arms=" in capsys.readouterr().out


def test_a_withheld_domain_is_measured_from_the_end_of_its_practice(tmp_path, capsys):
    """Domain 2 of four simulated learners that forget fast: its share is 0 after step 50, and it decays."""
    given = ["arms=[uniform]", "baselines=[uniform]", "pictures=[]", "seeds=4", "sim.regimes=[fast]", "sim.steps=300"]
    assert ablate.main([*given, "probe=2", "probe_after=50", f"run.dir={tmp_path / 'run'}"]) == 0
    assert "decay of 2 without practice" in capsys.readouterr().out
    found = table.values(table.load(tmp_path / "run" / "ablate.csv"), "simulated")
    decayed = found["fast", "uniform", table.PROBE_DECAYED]
    assert set(decayed) == {0, 1, 2, 3} and sum(decayed.values()) >= 3
    assert all(0 < time <= 250 for time in found["fast", "uniform", table.PROBE_TIME].values())
    for arguments, words in (
        (["probe=99"], "probe=99: in world=simulated a domain is a number, 0 to 17"),
        (["probe=2", "probe_after=300"], "probe_after=300: must be before the end"),
        (["probe=3"], "probe='3' after 0:"),
    ):
        with pytest.raises(SystemExit) as ended:
            ablate.main([*given, *arguments, f"run.dir={tmp_path / ('run' if words[6] == chr(39) else 'new')}"])
        assert ended.value.code == 2 and words in capsys.readouterr().err
