"""Every impossible number of the group `curriculum` is one line with key, value and remedy."""

import dataclasses
import math

import pytest

from configs.cli import compose_config

FAITHFUL = compose_config("config", None, ["curriculum=faithful"]).curriculum


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("beta", 0.0, "above 0 and at most 1"),
        ("beta", 1.5, "above 0 and at most 1"),
        ("beta", math.nan, "above 0 and at most 1"),
        ("low", 0.8, "below curriculum.high=0.8"),
        ("high", 1.1, "at most 1"),
        ("hysteresis", 0.2, "below 0.2"),
        ("acc_start", -0.1, "0 to 1"),
        ("grade_mean_start", 5.0, "1 to 4"),
        ("grade_variance_start", 3.0, "0 to 2.25"),
        ("backoff_cap", -1, "at least 0"),
        ("capacity", "token", "prompts, tokens, seconds"),
        ("band_capacity", (0.6, 0.4), "three numbers"),
        ("band_capacity", (0.6, 0.4, 0.0), "above 0"),
        ("eta", 2.0, "0 to 1"),
        ("staleness_weight", -1.0, "at least 0"),
        ("staleness_steps", 0.0, "above 0"),
        ("staleness_rounds", math.inf, "at least 0"),
        ("uncertainty_weight", math.inf, "at least 0"),
        ("temperature", 0.0, "above 0"),
        ("epsilon", 1.0, "below 1"),
        ("floor", "mixed", "project, mix"),
        ("single_every", -10, "at least 0"),
        ("single_rule", "max", "argmax, sampled"),
        ("difficulty", "hard", "fixed, adaptive"),
        ("difficulty_rate", 0.0, "above 0"),
        ("phase_steps", -1, "at least 0"),
        ("value_rate", 0.0, "above 0"),
        ("fast_beta", 2.0, "at most 1"),
        ("reserved.share", 1.5, "0 (none reserved) to 1"),
        ("reserved.rounds", -1.0, "at least 0"),
        ("reserved.steps", math.nan, "at least 0"),
        ("drift.threshold", 0.0, "such as 8"),
        ("drift.margin", 2.0, "0 to 1"),
        ("drift.patience", 0, "at least 1"),
        ("drift.boost", -1.0, "at least 0"),
        ("drift.lr_scale", 0.0, "above 0"),
        ("spaced.bar", 0.0, "above 0"),
        ("spaced.start", 0.0, "at least 1"),
        ("spaced.growth", 0.5, "at least 1"),
        ("spaced.shrink", 1.5, "at most 1"),
        ("spaced.longest", 0.5, "at least start=1.0"),
        ("policy", "fathful", "did you mean faithful?"),
        ("policy", "x", "known: faithful, recommended"),
        ("policy", "a1", "that is not a1; choose the file, curriculum=a1"),
        ("policy", "recommended", "every guard is off, that is not recommended; choose the file"),
    ],
)
def test_impossible_numbers_name_key_value_and_remedy(key, value, remedy):
    section, _, name = key.rpartition(".")
    owner = getattr(FAITHFUL, section) if section else FAITHFUL
    with pytest.raises(ValueError) as raised:
        dataclasses.replace(owner, **{name: value})
    line = str(raised.value)
    assert line.startswith("curriculum.") and remedy in line and "\n" not in line
    if remedy[:4] != "that":
        assert line.startswith(f"curriculum.{key}={value}: ")
