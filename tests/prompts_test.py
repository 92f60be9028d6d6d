"""The streams of training prompts: sets by domain and level, positions, priorities."""

import jax
import numpy as np
import pytest

from curriculum.config import PromptConfig
from curriculum.domains import shuffled
from infinite_jax.prompts import PriorityStream, Prompt, PromptSets, Stream, by_hash
from rubric.evaluator import Grades

NAMES = ["a", "seen", "b", "c"]
LEVELS = [{2: 4, 3: 5, 4: 6}, {1: 0}, {1: 7}, {1: 3, 2: 3}]  # set 0, 1, 2; 3; 4; 5, 6
CONFIG = PromptConfig(beta=0.3, low_weight=0.5, uncertainty_weight=2.0, staleness_weight=1.0, unseen=1.0)


def train(domains: int = 4) -> list[dict[int, list[Prompt]]]:
    return [
        {level: [Prompt({"n": (d, level, n)}, (1,), d) for n in range(size)] for level, size in LEVELS[d].items()}
        for d in range(domains)
    ]


def rows(prompts: list[Prompt]) -> list[tuple[int, int, int]]:
    return [prompt.row["n"] for prompt in prompts]


@pytest.mark.parametrize(
    "level,sets",
    [([2, 1, 1, 1], [0, 4, 5]), ([2.6, 1, 1, 1.4], [1, 4, 5]), ([9, 1, 3, 2], [2, 4, 6]), ([0, 0, 0, 0], [0, 4, 5])],
)
def test_a_domain_draws_from_the_set_of_its_rounded_level(level, sets):
    found = PromptSets(train())
    np.testing.assert_array_equal(found.of(np.array([0, 2, 3]), np.array(level, np.float32)), sets)
    np.testing.assert_array_equal(found.size_D, [15, 0, 7, 6])
    np.testing.assert_array_equal(found.sizes(2), [4, 5, 6, 0])
    np.testing.assert_array_equal(found.sizes(None), [4, 5, 6, 0, 7, 3, 3])


def test_every_level_has_a_position_of_its_own():
    stream = Stream(train(), NAMES, seed=3)
    taken, position = [], stream.start()
    for level in (2, 4, 2, 4, 2, 4, 2, 2):
        prompts, position = stream.take(np.array([0]), np.array([level, 1, 1, 1], np.float32), position)
        taken += rows(prompts)
    assert sorted(taken[0:7:2]) == [(0, 2, n) for n in range(4)]  # an epoch of level 2, then the next
    assert len(set(taken[1:6:2])) == 3 and all(level == 4 for _, level, _ in taken[1:6:2])
    np.testing.assert_array_equal(position.cursor_S, [1, 0, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(position.epoch_S, [1, 0, 0, 0, 0, 0, 0])


def test_a_domain_of_one_level_has_the_order_of_its_name():
    prompts, _ = (stream := Stream(train(), NAMES, seed=3)).take(np.array([2] * 9), np.ones(4), stream.start())
    order = shuffled(train()[2][1], 3, "b")
    assert rows(prompts) == rows([order[i] for i in range(9)])


def test_positions_grow_at_their_end():
    few, all_ = Stream(train(2), NAMES[:2], seed=3), Stream(train(), NAMES, seed=3)
    levels = np.array([3, 1], np.float32)
    _, position = few.take(np.array([0, 0, 0]), levels, few.start())
    grown = all_.grow(position)
    for old, new in zip(position, grown):
        np.testing.assert_array_equal(new, [*old, 0, 0, 0])
    for a, b in zip(all_.start(2), few.start()):
        np.testing.assert_array_equal(a, b)
    again = all_.take(np.array([0, 0]), np.array([3, 1, 1, 1], np.float32), grown)[0]
    assert rows(again) == rows(few.take(np.array([0, 0]), levels, position)[0])


def grades(pass_rates: list[float]) -> Grades:
    """Of four replies to each prompt."""
    passed = np.concatenate([[4.0] * round(4 * rate) + [1.0] * (4 - round(4 * rate)) for rate in pass_rates])
    return Grades(passed.astype(np.float32), (passed - 1) / 3, np.ones(len(passed), bool))


def test_priorities_draw_by_set_and_learn_from_grades():
    stream = PriorityStream(train(), 0, CONFIG)
    position, seen = stream.start(), []
    for _ in range(3):  # 2 of 6 at a time: an epoch of level 4
        prompts, position = stream.take(np.array([0, 0]), np.array([4, 1, 1, 1], np.float32), position)
        seen += rows(prompts)
    assert sorted(seen) == [(0, 4, n) for n in range(6)]
    prompts, position = stream.take(np.array([2, 3, 3]), np.ones(4, np.float32), position)
    assert [prompt.domain for prompt in prompts] == [2, 3, 3] and all(level == 1 for _, level, _ in rows(prompts))
    after = stream.learn(position, prompts, grades([0.25, 1.0, 0.0]))
    # the first group of a prompt weighs one half, the other half is the assumed 1/2
    np.testing.assert_allclose([after.acc_ema[prompt.number] for prompt in prompts], [0.375, 0.75, 0.25])
    others = np.setdiff1d(np.arange(28), [prompt.number for prompt in prompts])
    np.testing.assert_array_equal(after.acc_ema[others], position.acc_ema[others])
    unknown = grades([0.25, 1.0, 0.0])._replace(valid_B=np.zeros(12, bool))
    np.testing.assert_array_equal(stream.learn(position, prompts, unknown).acc_ema, position.acc_ema)
    shown = stream.metrics(after)
    np.testing.assert_allclose(shown["prompts/covered"], [6 / 15, np.nan, 1 / 7, 2 / 6])


def test_priorities_draw_again_what_their_position_says_and_grow_at_their_end():
    few, all_ = PriorityStream(train(2), 0, CONFIG), PriorityStream(train(), 0, CONFIG)
    levels = np.array([3, 1], np.float32)
    _, position = few.take(np.array([0, 0, 0]), levels, few.start())
    first, again = (few.take(np.array([0, 0]), levels, position)[0] for _ in range(2))
    assert first == again
    grown, fresh = all_.grow(position), all_.start()
    for old, new, start in zip(position, grown, fresh):
        expected = old if old.ndim == 0 else np.concatenate([old, start[len(old) :]])
        np.testing.assert_array_equal(new, expected)
    assert jax.tree.map(np.shape, all_.start(2)) == jax.tree.map(np.shape, few.start())


def test_the_first_by_hash_are_a_sample_of_all_whatever_their_order():
    easy_first = [Prompt({}, (int(n >= 400), n), 0) for n in range(2000)]
    chosen = by_hash(easy_first)[:500]
    assert abs(sum(prompt.ids[0] == 0 for prompt in chosen) / 500 - 0.2) < 0.06  # three standard errors
    assert by_hash(easy_first[::-1])[:500] == chosen
