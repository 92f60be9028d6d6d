"""What passes from graded samples to the gradient and the triage, and the random streams of a run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.cli import compose_config
from curriculum import triage
from infinite_jax import batch, grpo, trainer
from infinite_jax.prompts import Prompt, Stream, pad
from infinite_jax.types import Rollout
from rubric.evaluator import Grades, Scored

CONFIG = dataclasses.replace(
    compose_config("config", None, []).algorithm, group_size=2, kl_type="none", advantage="none", microbatches=2
)
MASK = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 1]], bool)
ROLLOUT = Rollout(
    tokens_BT=jnp.arange(24, dtype=jnp.int32).reshape(8, 3),
    loss_mask_BT=jnp.asarray(MASK),
    logp_BT=jnp.where(MASK, -1.0, 0.0),
    domain_B=np.array([0, 0, 2, 2, 2, 2, 1, 1], np.int32),
    prompt_B=np.repeat(np.arange(4, dtype=np.int32), 2),
    done_B=jnp.ones(8, bool),
)
GRADES = Grades(
    grade_B=np.array([4, 1, 3, 3, 1, 4, 2, 2], np.float32),
    reward_B=np.array([1, 0, 2 / 3, 2 / 3, 0, 1, 1 / 3, 1 / 3], np.float32),
    valid_B=np.array([1, 1, 1, 1, 0, 1, 0, 0], bool),
)


def logp_fn(params, tokens_BT, mask_BT):
    """Minus the token id times the parameter: tells rows and parameters apart."""
    logp = jnp.where(mask_BT, -params * tokens_BT.astype(jnp.float32), 0.0)
    return logp, logp * 0


def prepared(rollout=ROLLOUT, kl_D=(1, 1, 1, 1), **changes):
    config, parameters = dataclasses.replace(CONFIG, **changes), (jnp.float32(0.1), jnp.float32(0.2))
    kl_coef_D = config.kl_coef * jnp.asarray(kl_D, jnp.float32)
    return batch.prepare(config, logp_fn, *parameters, rollout, GRADES, jnp.array([1, 1, 0.5, 1]), kl_coef_D)


STATS = batch.tally(2, 4, ROLLOUT.domain_B, GRADES, jnp.array([1.0, 2.0, 3.0, 4.0]))


def test_rows_without_a_valid_grade_reach_neither_gradient_nor_triage():
    np.testing.assert_array_equal(prepared().loss_mask_BT, MASK & GRADES.valid_B[:, None])
    np.testing.assert_array_equal(STATS.n_grades, [2, 0, 3, 0])
    np.testing.assert_array_equal(STATS.n_groups, [1, 0, 2, 0])
    np.testing.assert_array_equal(STATS.tried, [1, 1, 2, 0])
    np.testing.assert_allclose(STATS.pass_sum, [0.5, 0, 2, 0])  # the group with one valid row, a pass, counts as 1
    np.testing.assert_allclose(STATS.cost_sum, [1, 4, 5, 0])


def test_rows_cut_off_are_learnt_from_unless_masked_and_count_in_their_group_all_the_same():
    cut = ROLLOUT._replace(done_B=jnp.arange(8) != 0)
    kept, masked = prepared(cut), prepared(cut, truncated="mask")
    np.testing.assert_array_equal(kept.loss_mask_BT, prepared().loss_mask_BT)
    assert kept.loss_mask_BT[0].any() and not masked.loss_mask_BT[0].any()
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(masked), strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])


def test_the_learning_rate_of_a_row_is_its_domains():
    np.testing.assert_array_equal(prepared().lr_scale_B, [1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1])


def test_advantages_are_of_the_group_and_stand_on_the_generated_tokens():
    made = prepared()
    expected = np.array([0.5, -0.5, 0, 0, 0, 0, 0, 0])[:, None] * MASK
    np.testing.assert_allclose(made.advantage_BT, expected)


def test_groups_without_a_difference_leave_the_denominator_only_when_dropped():
    kept, dropped = prepared().loss_mask_BT, prepared(zero_variance="drop").loss_mask_BT
    assert kept[2:4].any() and not dropped[2:].any() and dropped[:2].any()
    np.testing.assert_array_equal(dropped[:2], MASK[:2])


def test_scores_keep_the_row_order_through_micro_batches_and_name_the_right_parameters():
    made = prepared(kl_type="loss", kl_coef=0.3)
    tokens = np.arange(24).reshape(8, 3)
    np.testing.assert_allclose(made.logp_old_BT, np.where(MASK, -0.1 * tokens, 0), rtol=1e-6)
    np.testing.assert_allclose(made.logp_ref_BT, np.where(MASK, -0.2 * tokens, 0), rtol=1e-6)
    np.testing.assert_allclose(made.logp_beh_BT, ROLLOUT.logp_BT)
    np.testing.assert_allclose(made.kl_coef_B, 0.3)


@pytest.mark.parametrize("kl_type", ["loss", "reward"])
def test_the_kl_of_a_row_is_its_domains(kl_type):
    """k1 of rows 2 and 3, domain 2: .1 x (7 + 8) and .1 x (10 + 11), centred -.3 and .3, times .2 x its factor 4."""
    changes = dict(kl_type=kl_type, kl_estimator="k1", kl_coef=0.2)
    made = prepared(kl_D=(1, 2, 4, 8), **changes)
    in_loss, in_reward = (1, 0) if kl_type == "loss" else (0, 1)
    np.testing.assert_allclose(made.kl_coef_B, np.array([0.2, 0.2, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4]) * in_loss, rtol=1e-6)
    np.testing.assert_allclose(made.advantage_BT[2:4, 1], np.array([0.24, -0.24]) * in_reward, rtol=1e-4)
    np.testing.assert_allclose(made.advantage_BT[:2], prepared(**changes).advantage_BT[:2])


def test_kl_in_the_reward_moves_the_advantage_and_not_the_triage():
    made = prepared(kl_type="reward", kl_estimator="k1", kl_coef=0.1)
    # k1 = logp - logp_ref = 0.1 x token; row 0 holds tokens 1, 2 and row 1 token 4: penalties .03 and .04
    rewards = np.array([1 - 0.1 * 0.3, 0 - 0.1 * 0.4])
    np.testing.assert_allclose(made.advantage_BT[0, 1], (rewards[0] - rewards[1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(made.kl_coef_B, 0)
    np.testing.assert_allclose(STATS.abs_adv_sum[0], 0.5)


def test_kl_in_the_reward_is_not_blown_up_where_the_task_rewards_agree():
    """Rows 2 and 3: rewards equal, penalties 0.1 x (7 + 8) and 0.1 x (10 + 11), centred -.3 and .3, times coef 1e-3."""
    changes = dict(kl_type="reward", kl_estimator="k1", kl_coef=1e-3, advantage="std")
    made = prepared(**changes)
    np.testing.assert_allclose(made.advantage_BT[2:4, 1], [3e-4, -3e-4], rtol=1e-4)
    assert not prepared(zero_variance="drop", **changes).loss_mask_BT[2:4].any()


class Scripted:
    """A trainer's sampling with grades from a script, one list a round: 4 groups of 2, pass or fail."""

    def __new__(cls, rounds: list[list[int]]):
        self = object.__new__(trainer.InfiniteGRPOTrainer)
        self.config, self.seed = dataclasses.replace(CONFIG, resample_rounds=3), 0
        self.curriculum = types.SimpleNamespace(resample=True)
        script = iter(enumerate(rounds))

        def take(domain_P, level_D, position):
            return [Prompt({"round": position}, (1,), d) for d in domain_P], position + 1

        def grade(chosen, replies, conversed):
            number, passes = next(script)
            passes, score_B = np.array(passes, np.float32), np.arange(8, dtype=np.float32) + 10 * number
            return Scored(Grades(1 + 3 * passes, passes, np.ones(8, bool)), score_B[:, None])

        def rollout(params, chosen, step, number, attempt):
            return ROLLOUT._replace(tokens_BT=ROLLOUT.tokens_BT + 100 * number), None

        self.stream = types.SimpleNamespace(take=take, learn=lambda position, chosen, grades: position)
        self.grade, self.rollout, self.read = grade, rollout, lambda rollout, conversed: [str(n) for n in range(8)]
        return self


def sample(rounds):
    curriculum = types.SimpleNamespace(level=np.ones(3), step=5)
    state = types.SimpleNamespace(monitor=None, curriculum=curriculum, position=0)
    return Scripted(rounds).sample(state, None, np.array([0, 2, 2, 1]), trainer.Clock())


def test_dynamic_sampling_replaces_groups_without_a_difference():
    """Round 0: groups 1 and 3 differ. Round 1: group 2 does. Round 2: 0 and 1 do, of which one is needed."""
    rounds, made, position = sample([[1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0, 0]])
    assert len(rounds) == 3 and position == 3
    np.testing.assert_array_equal(made.grades.grade_B, [4, 1, 4, 1, 1, 4, 1, 4])
    assert [prompt.row["round"] for prompt in made.chosen] == [1, 0, 2, 0]
    assert [prompt.domain for prompt in made.chosen] == [2, 2, 0, 1]
    tokens = np.asarray(ROLLOUT.tokens_BT)
    np.testing.assert_array_equal(made.rollout.tokens_BT[0:2], tokens[4:6] + 100)
    np.testing.assert_array_equal(made.rollout.tokens_BT[4:6], tokens[0:2] + 200)
    np.testing.assert_array_equal(made.rollout.domain_B, ROLLOUT.domain_B[[4, 5, 2, 3, 0, 1, 6, 7]])
    np.testing.assert_array_equal(made.rollout.prompt_B, ROLLOUT.prompt_B)
    assert isinstance(made.rollout.domain_B, np.ndarray)  # as without a second round: what follows is compiled once
    assert made.replies == ["4", "5", "2", "3", "0", "1", "6", "7"]
    np.testing.assert_array_equal(made.scores_BK[:, 0], [14, 15, 2, 3, 20, 21, 6, 7])


def test_dynamic_sampling_stops_when_every_group_differs():
    rounds, made, position = sample([[1, 0, 1, 0, 0, 1, 0, 1]])
    assert len(rounds) == 1 and position == 1 and made is rounds[0]


@pytest.mark.parametrize("capacity, expected", [("prompts", [1, 1, 2, 0]), ("tokens", [3, 3, 8, 0])])
def test_the_cost_of_a_domain_is_in_the_unit_of_capacity(capacity, expected):
    """Tokens generated: 2 + 1, 2 + 2, 2 + 2, 1 + 2 for the groups of domains 0, 2, 2, 1."""
    self = object.__new__(trainer.InfiniteGRPOTrainer)
    self.config, self.names, self.capacity = CONFIG, list("abcd"), capacity
    done = trainer.Round([Prompt({}, (1,) * 3, 0)] * 4, ROLLOUT, [], GRADES, np.zeros((8, 0)))
    seconds = {"time/rollout_s": 1.0, "time/update_s": 2.0, "time/grade_s": 0.4}
    np.testing.assert_allclose(self.statistics(done, seconds, 1).cost_sum, expected)
    self.capacity = "seconds"  # 3 s over 12 prompt and 14 generated tokens, 0.1 s of grading a prompt
    expected = [3 * 6 / 26 + 0.1, 3 * 6 / 26 + 0.1, 3 * 14 / 26 + 0.2, 0]
    np.testing.assert_allclose(self.statistics(done, seconds, 1).cost_sum, expected, rtol=1e-6)
    np.testing.assert_allclose(self.statistics(done, seconds, 2).cost_sum, np.array(expected) / 2, rtol=1e-6)
    assert not self.statistics(done, None, 1).cost_sum.any()  # the step compiled: not known, which the triage skips


def test_every_step_and_stream_has_a_key_of_its_own():
    keys = [trainer.stream_key(seed, step, stream) for seed in (0, 1) for step in range(3) for stream in (0, 1)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)
    again = trainer.stream_key(0, 2, 1)
    assert (jax.random.key_data(again) == jax.random.key_data(keys[5])).all()


def test_a_step_tried_again_has_keys_of_its_own():
    tried = [
        trainer.stream_key(0, step, stream, attempt) for attempt in range(3) for step in range(3) for stream in range(3)
    ]
    rounds = [jax.random.fold_in(key, number) for key in tried for number in range(1, 3)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in tried + rounds}) == 27 * 3
    roots = [triage.root_key(0, attempt) for attempt in range(3)]
    draws = [jax.random.fold_in(jax.random.wrap_key_data(root), step) for root in roots for step in range(3)]
    assert (
        len({tuple(np.asarray(jax.random.key_data(key))) for key in draws} | {tuple(map(int, r)) for r in roots}) == 12
    )


def make_stream():
    prompts = [{1: [Prompt({"n": n}, (1,) * (n + 1), d) for n in range(size)]} for d, size in enumerate((3, 0, 2))]
    return Stream(prompts, ["a", "unused", "c"], seed=0)


def test_the_position_in_the_data_is_the_cursor_and_the_epoch():
    stream, levels = make_stream(), np.ones(3)
    begin = stream.start()
    taken, position = stream.take(np.array([0, 0, 2, 0, 2, 2, 0]), levels, begin)
    np.testing.assert_array_equal(position.cursor_S, [1, 0, 1])
    np.testing.assert_array_equal(position.epoch_S, [1, 0, 1])
    np.testing.assert_array_equal(begin, 0)  # the caller's arrays are not touched
    firsts = [prompt.row["n"] for prompt in taken if prompt.domain == 0][:3]
    assert sorted(firsts) == [0, 1, 2]  # an epoch is a permutation
    once, position = stream.take(np.array([0, 0, 2]), levels, begin)
    rest, _ = make_stream().take(np.array([0, 2, 2, 0]), levels, position)
    assert [prompt.row for prompt in once + rest] == [prompt.row for prompt in taken]


@pytest.mark.parametrize("longest, bucket", [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_prompts_go_into_the_smallest_bucket_that_holds_them(longest, bucket):
    rows, lengths = pad([Prompt({}, (7,) * longest, 0), Prompt({}, (9,), 0)], (4, 8), pad_id=0)
    assert rows.shape == (2, bucket) and lengths.tolist() == [longest, 1]
    np.testing.assert_array_equal(rows[1], [9] + [0] * (bucket - 1))


def test_micro_batches_take_turns_through_the_rows():
    np.testing.assert_array_equal(grpo.microbatches(jnp.arange(6), 2, 1), [[0, 2, 4], [1, 3, 5]])


def test_micro_batches_hold_whole_groups():
    np.testing.assert_array_equal(grpo.microbatches(jnp.arange(8), 2, 2), [[0, 1, 4, 5], [2, 3, 6, 7]])
