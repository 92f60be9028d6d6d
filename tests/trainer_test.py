"""What passes from graded samples to the gradient and the triage, and the random streams of a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.cli import compose_config
from infinite_jax import grpo, trainer
from infinite_jax.prompts import Prompt, Stream, pad
from infinite_jax.types import Rollout
from rubric.evaluator import Grades

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


def prepared(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return trainer.prepare(config, logp_fn, 4, jnp.float32(0.1), jnp.float32(0.2), ROLLOUT, GRADES)


def test_rows_without_a_valid_grade_reach_neither_gradient_nor_triage():
    batch, stats = prepared()
    np.testing.assert_array_equal(batch.loss_mask_BT, MASK & GRADES.valid_B[:, None])
    np.testing.assert_array_equal(stats.n_grades, [2, 0, 3, 0])
    np.testing.assert_array_equal(stats.n_groups, [1, 0, 2, 0])
    np.testing.assert_array_equal(stats.tried, [1, 1, 2, 0])
    np.testing.assert_allclose(stats.pass_sum, [0.5, 0, 2, 0])  # the group with one valid row, a pass, counts as 1


def test_advantages_are_of_the_group_and_stand_on_the_generated_tokens():
    batch, _ = prepared()
    expected = np.array([0.5, -0.5, 0, 0, 0, 0, 0, 0])[:, None] * MASK
    np.testing.assert_allclose(batch.advantage_BT, expected)


def test_groups_without_a_difference_leave_the_denominator_only_when_dropped():
    kept, dropped = prepared()[0].loss_mask_BT, prepared(zero_variance="drop")[0].loss_mask_BT
    assert kept[2:4].any() and not dropped[2:].any() and dropped[:2].any()
    np.testing.assert_array_equal(dropped[:2], MASK[:2])


def test_scores_keep_the_row_order_through_micro_batches_and_name_the_right_parameters():
    batch, _ = prepared(kl_type="loss", kl_coef=0.3)
    tokens = np.arange(24).reshape(8, 3)
    np.testing.assert_allclose(batch.logp_old_BT, np.where(MASK, -0.1 * tokens, 0), rtol=1e-6)
    np.testing.assert_allclose(batch.logp_ref_BT, np.where(MASK, -0.2 * tokens, 0), rtol=1e-6)
    np.testing.assert_allclose(batch.logp_beh_BT, ROLLOUT.logp_BT)
    np.testing.assert_allclose(batch.kl_coef_B, 0.3)


def test_kl_in_the_reward_moves_the_advantage_and_not_the_triage():
    batch, stats = prepared(kl_type="reward", kl_estimator="k1", kl_coef=0.1)
    # k1 = logp - logp_ref = 0.1 x token; row 0 holds tokens 1, 2 and row 1 token 4: penalties .03 and .04
    rewards = np.array([1 - 0.1 * 0.3, 0 - 0.1 * 0.4])
    np.testing.assert_allclose(batch.advantage_BT[0, 1], (rewards[0] - rewards[1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(batch.kl_coef_B, 0)
    np.testing.assert_allclose(stats.abs_adv_sum[0], 0.5)


def test_kl_in_the_reward_is_not_blown_up_where_the_task_rewards_agree():
    """Rows 2 and 3: rewards equal, penalties 0.1 x (7 + 8) and 0.1 x (10 + 11), centred -.3 and .3, times coef 1e-3."""
    changes = dict(kl_type="reward", kl_estimator="k1", kl_coef=1e-3, advantage="std")
    batch, _ = prepared(**changes)
    np.testing.assert_allclose(batch.advantage_BT[2:4, 1], [3e-4, -3e-4], rtol=1e-4)
    assert not prepared(zero_variance="drop", **changes)[0].loss_mask_BT[2:4].any()


def test_every_step_and_stream_has_a_key_of_its_own():
    keys = [trainer.stream_key(seed, step, stream) for seed in (0, 1) for step in range(3) for stream in (0, 1)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)
    again = trainer.stream_key(0, 2, 1)
    assert (jax.random.key_data(again) == jax.random.key_data(keys[5])).all()


def make_stream():
    prompts = [[Prompt({"n": n}, (1,) * (n + 1), d) for n in range(size)] for d, size in enumerate((3, 0, 2))]
    return Stream(prompts, ["a", "unused", "c"], seed=0)


def test_the_position_in_the_data_is_the_cursor_and_the_epoch():
    stream, zero = make_stream(), np.zeros(3, np.int32)
    taken, cursor, epoch = stream.take(np.array([0, 0, 2, 0, 2, 2, 0]), zero, zero)
    np.testing.assert_array_equal(cursor, [1, 0, 1])
    np.testing.assert_array_equal(epoch, [1, 0, 1])
    np.testing.assert_array_equal(zero, 0)  # the caller's arrays are not touched
    firsts = [prompt.row["n"] for prompt in taken if prompt.domain == 0][:3]
    assert sorted(firsts) == [0, 1, 2]  # an epoch is a permutation
    once, cursor, epoch = stream.take(np.array([0, 0, 2]), zero, zero)
    rest, _, _ = make_stream().take(np.array([0, 2, 2, 0]), cursor, epoch)
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
