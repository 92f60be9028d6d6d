"""Signs of reward hacking on records made by hand: each is flagged where it is planted, and nowhere else."""

import numpy as np
import pytest

from rubric import watch
from rubric.schema import load

MATH = load("math")  # correct (content, passed from .6), marked (form)
NAN = np.nan


def test_figures_of_a_step_by_hand():
    criteria = np.array([[1, 1], [1 / 3, 1], [1, 0], [0, 0], [NAN, 1]], np.float32)
    assert watch.form_only(MATH, criteria) == 1 / 4  # the second row; the last has no content
    assert watch.disagreement(MATH, criteria) == 2 / 4  # the second and the third
    lines = np.column_stack([[1, 0.5, 0.75, 0, NAN], criteria, [1, 0, 1, 0, NAN]]).astype(np.float32)
    assert watch.observe(MATH, lines, np.array([10, 20, 30, 40, 50]), "m") == {
        "watch/length/m": 30.0,
        "watch/form_only/m": 0.25,
        "watch/disagreement/m": 0.5,
        "score/m": 0.5625,
        "criterion_correct/m": pytest.approx(7 / 12),
        "criterion_marked/m": 0.6,
        "exact_match/m": 0.5,
    }
    assert watch.observe(None, lines[:0], np.zeros(0), "m") == {"watch/length/m": None}
    assert watch.form_only(MATH, np.zeros((0, 2), np.float32)) is None
    assert watch.disagreement(MATH, criteria[4:]) is None


def test_three_criteria_have_three_pairs():
    science = load("science")  # value, unit, option, marked
    criteria = np.array([[1, 0, NAN, 1]], np.float32)
    assert watch.disagreement(science, criteria) == pytest.approx(2 / 3)


def record(seed=0, steps=100, **planted):
    """Two quiet domains; planted: key -> slope a step, added to domain b's."""
    rng, rows = np.random.default_rng(seed), []
    for step in range(steps + 1):
        row = {"step": step}
        for name in ("a", "b"):
            more = {key: slope * step for key, slope in planted.items() if name == "b"}
            row[f"watch/length/{name}"] = 40 + rng.normal(0, 4) + more.get("length", 0)
            row[f"watch/form_only/{name}"] = float(np.clip(rng.normal(0.1, 0.05) + more.get("form_only", 0), 0, 1))
            row[f"watch/disagreement/{name}"] = float(np.clip(rng.normal(0.3, 0.1) + more.get("disagreement", 0), 0, 1))
            rate = 0.4 + 0.002 * step
            row[f"pass_rate/{name}"] = float(np.clip(rng.normal(rate, 0.05) + more.get("pass_rate", 0), 0, 1))
            if step % 20 == 0:
                row[f"eval/pass_rate/{name}"] = rate
        rows.append(row)
    return rows


def flags(rows):
    return watch.flags(rows, ["a", "b"], {"a": 256, "b": 256})


def test_a_quiet_run_has_no_flag():
    assert [flag for seed in range(20) for flag in flags(record(seed))] == []


@pytest.mark.parametrize(
    ("key", "slope", "kind"),
    [
        ("length", 0.5, "length"),
        ("length", -0.2, "length"),
        ("form_only", 0.005, "form_only"),
        ("disagreement", 0.004, "disagreement"),
        ("pass_rate", 0.004, "divergence"),
    ],
)
def test_what_is_planted_is_flagged_with_its_numbers(key, slope, kind):
    (flag,) = flags(record(**{key: slope}))
    assert (flag.kind, flag.domain, flag.step) == (kind, "b", 100) and abs(flag.z) > watch.Z
    if kind == "divergence":
        assert flag.before == pytest.approx(0.2) and flag.after == pytest.approx(0.2 + 80 * 0.004 - 0.04, abs=0.05)
    else:
        assert flag.after - flag.before == pytest.approx(81 * slope, abs=0.1 if key != "length" else 4)


def test_a_training_rate_that_rises_with_the_held_out_one_is_learning():
    rows = record(pass_rate=0.004)
    for row in rows:
        if "eval/pass_rate/b" in row:
            row["eval/pass_rate/b"] += 0.004 * row["step"]
    assert flags(rows) == []


def test_short_runs_and_gaps_are_passed_over():
    rows = record(length=2.0)
    assert flags(rows[: 2 * watch.WINDOW - 1]) == [] and flags([]) == []
    for row in rows[1::2]:
        row["watch/length/b"] = None
    (flag,) = flags(rows)
    assert flag.kind == "length" and flag.step == 100
