"""The calibration table and the matrix of domains and rubrics, by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from infinite_jax import calibrate
from infinite_jax.heldout import DomainResult
from infinite_jax.page import calibration as page
from infinite_jax.page.run import CALIBRATION, Domain, Run, read
from rubric.calibration import Sample, Spread, cross, table, uncalibrated
from rubric.evaluator import Grades, RubricConfig, RubricEvaluator
from rubric.schema import load


def test_the_table_by_hand():
    grades = Grades(np.float32([4, 3, 1, 1, 2.5, 1]), np.zeros(6, np.float32), np.array([1, 1, 1, 0, 1, 0], bool))
    one, two, three = table(["a", "b", "c"], [0, 0, 0, 0, 1, 2], grades)
    assert one == Spread("a", 3, 1, 1 / 3, 0.0, 1 / 3, 1 / 3, 2 / 3, 8 / 3, pytest.approx(14 / 9))
    assert (two.n, two.mean, two.pass_rate, two.share_2) == (1, 2.5, 0.0, 1.0)
    assert (three.n, three.invalid) == (0, 1) and np.isnan(three.mean)


def test_every_domains_replies_under_every_rubric():
    names = ["facts", "words", "prose"]
    constraint = {"constraints": [{"kind": "lowercase"}, {"kind": "contains", "word": "paris"}]}
    samples = [
        Sample([{"answer": "Paris"}] * 2, ["Paris", "I like Paris a lot and so do you"]),
        Sample([{"answer": "Paris"}] * 2, ["paris", "Rome"]),
        Sample([{"answer": "-", "meta": constraint}], ["we like paris in spring"]),
    ]
    with RubricEvaluator(
        ["eq", "eq", "constraints"], RubricConfig("graded", 0, 1.0), [load("knowledge"), None, None]
    ) as evaluator:
        matrix = cross(evaluator, names, samples)
        with pytest.raises(ValueError, match="2 samples for 3 domains"):
            cross(evaluator, names, samples[:2])
    # facts: `Paris` 4, the long one 2 (a word of nine); eq: 4 and 1; constraints need what their rows do not hold
    np.testing.assert_array_equal(matrix.n_DD, [[2, 2, 0], [2, 2, 0], [1, 1, 1]])
    np.testing.assert_allclose(matrix.mean_DD, [[3, 2.5, np.nan], [3, 2, np.nan], [2, 1, 4]])
    np.testing.assert_allclose(matrix.pass_DD, [[0.5, 0.5, np.nan], [0.5, 0.5, np.nan], [0, 0, 1]])
    assert matrix.asked_D.tolist() == [2, 2, 1]
    assert uncalibrated(matrix, 0, 0.1) == [] and uncalibrated(matrix, 2, 0.1) == [("facts", -1.0), ("words", -1.0)]


def held_out(grades, rows, replies):
    return DomainResult(np.array(grades, np.float32), None, None, rows, replies)


def test_what_calibrate_writes_and_the_report_shows(tmp_path):
    """A number in a sentence passes under `number`, not under `eq`; a row without a number has no grade there."""
    results = {
        "exact": held_out([4, 1], ({"answer": "a"}, {"answer": "b"}), ("a", "x")),
        "sums<b>": held_out([3, 3, np.nan], ({"answer": "3"},) * 3, ("it is 3", "so 3", "3")),
    }
    with RubricEvaluator(["eq", "number"], RubricConfig("graded", 0, 1.0), [None, None]) as grader:
        found = calibrate.measure(SimpleNamespace(names=list(results), grader=grader), results)
    assert found["asked"] == [2, 3] and found["graded"] == [[2, 0], [3, 3]]
    assert found["passed"] == [[0.5, None], [pytest.approx(1 / 3), 1.0]]
    assert found["table"]["exact"]["share_4"] == 0.5 and found["table"]["sums<b>"]["invalid"] == 1
    assert page.unlike(found) == ["sums<b>'s replies pass 0.67 less often under exact's rubric"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / CALIBRATION).write_text(json.dumps({"step": 0} | found, allow_nan=False))
    body = page.calibrated(read(tmp_path)).body
    assert "--part:33%" in body and "sums&lt;b&gt;" in body and "sums<b>" not in body and "none of 2 graded" in body
    (tmp_path / CALIBRATION).write_text("{")
    with pytest.raises(ValueError, match="make it again, or remove it"):
        read(tmp_path)


def test_a_run_without_calibration_says_how_to_get_it(tmp_path):
    body = page.calibrated(Run(tmp_path, {}, [{"step": 0}], [Domain("a")], {}, [], [])).body
    assert f"python -m infinite_jax.calibrate {tmp_path}" in body
