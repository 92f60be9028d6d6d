"""ablate world=real on the embedded model: equal tokens, what is finished is not run again, regimes."""

import json
import shutil

import numpy as np
import pytest

from configs import cli
from infinite_jax import ablate, record
from infinite_jax.worlds import real, table
from infinite_jax.worlds.table import Arm

SMALL = [
    "run.steps=9", "run.tokens=120", "run.eval_every=1", "algorithm.prompts=4", "algorithm.group_size=2",
    "algorithm.prompt_buckets=[64]", "algorithm.max_new_tokens=8", "eval.prompts=2", "eval.batch=16",
    "eval.canary=false", "rubric.workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation") / "real"
    given = ["world=real", "arms=[uniform,faithful]", "seeds=1", f"run.dir={folder}", *SMALL]
    assert ablate.main(given) == 0
    return folder, given


@pytest.mark.slow
def test_every_run_ends_with_the_step_that_reaches_the_bound(finished):
    for arm in ("uniform", "faithful"):
        rows = record.read(finished[0] / "real" / "own" / arm / "0" / "metrics.jsonl")
        assert rows[-2].get("tokens/total", 0) < 120 <= rows[-1]["tokens/total"] or rows[-1]["step"] == 9
        assert "eval/macro" in rows[-1]


@pytest.mark.slow
def test_the_table_has_a_unit_a_run_and_its_measures_are_over_tokens(finished):
    found = table.values(table.load(finished[0] / "ablate.csv"), "real")
    assert set(found["own", "uniform", "aurc"]) == set(found["own", "faithful", "aurc"]) == {0}
    rows = record.read(finished[0] / "real" / "own" / "faithful" / "0" / "metrics.jsonl")
    at = np.array([row.get("tokens/total", 0) for row in rows], float)
    macro = np.array([row["eval/macro"] for row in rows])
    area = ((macro[1:] + macro[:-1]) / 2 * np.diff(at)).sum() / at[-1]
    assert found["own", "faithful", "aurc"][0] == pytest.approx(area, abs=1e-6)
    assert found["own", "faithful", "cost_tokens"][0] == at[-1]


@pytest.mark.slow
def test_what_is_finished_is_read_and_not_run(finished, monkeypatch):
    folder, given = finished
    monkeypatch.setattr(real, "once", lambda *_: pytest.fail("it was run again"))
    before = table.load(folder / "ablate.csv")
    assert ablate.main(given) == 0
    (folder / "ablate.csv").unlink()
    shutil.rmtree(folder / "curves", ignore_errors=True)
    assert ablate.main(given) == 0  # from the runs' own files
    assert sorted(map(str, table.load(folder / "ablate.csv"))) == sorted(map(str, before))


@pytest.mark.slow
def test_a_finished_run_of_other_settings_is_refused(finished, capsys):
    folder, given = finished
    path = folder / "real" / "own" / "uniform" / "0" / "config.yaml"
    text = path.read_text()
    (folder / "ablate.csv").unlink()
    path.write_text(text.replace("beta: 0.05", "beta: 0.06"))
    with pytest.raises(SystemExit) as ended:
        ablate.main(given)
    path.write_text(text)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1
    assert f"{path}: curriculum.beta=0.06, wanted 0.05: remove the folder" in message


@pytest.mark.slow
def test_a_run_cut_short_does_not_count(finished, tmp_path):
    config = real.in_regime(ablate.compose_arm("faithful", "config", None, SMALL), real.OWN)
    rows = record.read(finished[0] / "real" / "own" / "faithful" / "0" / "metrics.jsonl")
    for kept, expected in ((rows, True), (rows[:-1], False), ([], False)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        assert real.finished(tmp_path, config) == expected


def test_a_regime_is_a_file_of_domains():
    arm = ablate.compose_arm("dump", "bench12", None, [])
    late, unequal = (real.in_regime(arm, name).domains for name in ("bench12_arrivals", "bench12_zipf"))
    assert sorted({domain.arrives for domain in late}) == [0, 15, 30] and len(late) == len(unequal) == 14
    assert [domain.name for domain in late if domain.eval_only] == ["tool_call_harder", "code_output_harder"]
    assert {domain.name for domain in unequal} >= {"spell_backwards", "capitals"}
    assert real.in_regime(arm, "bench12_zipf").curriculum.policy == "dump"
    with pytest.raises(ValueError, match="domains=bench21: no such option; did you mean bench12"):
        real.in_regime(arm, "bench21")


def test_no_run_begins_after_the_time_is_over(tmp_path):
    arm = Arm("uniform", cli.compose_config("config", None, SMALL))
    assert list(real.run(real.Settings((), 1e-9), [arm], lambda *_: [0], tmp_path)) == []


def test_a_probe_retires_its_domain_in_the_midst():
    arm = ablate.compose_arm("uniform", "config", None, ["run.steps=20"])
    config = real.withhold(arm.config, table.Probe("shift", 0))
    assert {domain.name: domain.retires for domain in config.domains if domain.retires is not None} == {"shift": 10}
    assert real.withhold(arm.config, table.NO_PROBE) == arm.config
    with pytest.raises(ValueError, match="probe=shirt: not a domain that is trained on; did you mean shift"):
        real.withhold(arm.config, table.Probe("shirt", 0))
    with pytest.raises(ValueError, match="probe_after=20: must be before the end"):
        real.withhold(arm.config, table.Probe("shift", 20))
