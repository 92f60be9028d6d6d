"""benchmarks/alike.py against differences by hand."""

import json

import pytest

from benchmarks import alike


def run(folder, losses):
    folder.mkdir()
    rows = [{"step": step, "loss": loss} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return alike.values(folder, ["loss", "eval/macro"])


def test_differences_are_those_of_common_steps(tmp_path):
    one = run(tmp_path / "one", {0: None, 1: 1.0, 2: 2.0, 3: 4.0})
    noise = run(tmp_path / "noise", {1: 1.5, 2: 2.0, 3: 3.5})
    late = run(tmp_path / "late", {2: 3.0, 3: 5.0, 4: 9.0})
    rows = alike.compare({"one": one, "noise": noise, "late": late}, ["loss", "eval/macro"])
    assert rows[0] == ["loss", "one", pytest.approx(7 / 3), None, None, None, 3]
    assert rows[1] == ["loss", "noise", pytest.approx(7 / 3), 0.5, pytest.approx(1 / 3), 1.0, 3]
    assert rows[2] == ["loss", "late", 4.0, 1.0, 1.0, pytest.approx(3.0), 2] and len(rows) == 3


def test_a_folder_without_metrics_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["alike", f"one={tmp_path}"])
    with pytest.raises(SystemExit, match=r"there is no metrics\.jsonl in it"):
        alike.main()
