"""When a run is said to learn nothing, and which groups count."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from configs.cli import compose_config
from infinite_jax.equal_groups import STEPS, EqualGroups
from infinite_jax.step_metrics import differing
from rubric.evaluator import Grades


def test_groups_that_differ_by_hand():
    """Three replies a group: all alike; one other; the other one not graded; only one graded; none."""
    reward_B = np.array([1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0], np.float32)
    valid_B = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0], bool)
    done = SimpleNamespace(chosen=[None] * 5, grades=Grades(1 + 3 * reward_B, reward_B, valid_B))
    assert differing(done).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def config():
    return compose_config("config", None, ["rubric.reward=pass", "algorithm.group_size=6"])


def said(config, capsys, shares, reward=0.0):
    watch = EqualGroups(config)
    for share in shares:
        watch.after({"reward/differing": share, "reward/mean": reward})
    return capsys.readouterr().err


def test_it_is_said_once_after_the_first_steps_and_only_if_none_differed(config, capsys):
    assert not said(config, capsys, [0.0] * (STEPS - 1))
    assert said(config, capsys, [0.0] * 3 * STEPS).count("\n") == 1
    assert said(config, capsys, [None] + [0.0] * STEPS).count("\n") == 1
    assert not said(config, capsys, [0.0, 0.1] + [0.0] * STEPS) and not said(config, capsys, [None] * STEPS)


def test_what_to_try_depends_on_the_rewards(config, capsys):
    low, high = said(config, capsys, [0.0] * STEPS), said(config, capsys, [0.0] * STEPS, 1.0)
    assert "easier rows" in low and "harder rows" in high and "(mean reward 1.000)" in high
    assert "rubric.reward=graded" in low and "algorithm.group_size above 6" in low


def test_a_critic_needs_no_group(config, capsys):
    critic = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, advantage="gae"))
    assert not said(critic, capsys, [0.0] * STEPS)
