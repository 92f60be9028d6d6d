"""GRPO against numbers worked by hand, a numpy reference, and properties that any implementation must have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.cli import compose_config
from infinite_jax import grpo
from infinite_jax.types import Batch, TrainState

CONFIG = dataclasses.replace(
    compose_config("config", None, []).algorithm,
    max_new_tokens=4, kl_type="loss", kl_estimator="k3", kl_coef=0.1, importance_cap=0.0, learning_rate=0.1,
    lr_warmup_steps=0, weight_decay=0.0,
)  # fmt: skip
ALL = jnp.ones((1, 4), bool)


def advantage(rewards, norm, valid=None):
    rewards = jnp.array([rewards], jnp.float32)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.array([valid])
    return np.asarray(grpo.group_advantage(rewards, valid, norm))[0]


def test_advantages_by_hand():
    # rewards 0, 1, 1, 2: mean 1, population variance (1 + 0 + 0 + 1) / 4 = 1/2
    np.testing.assert_allclose(advantage([0, 1, 1, 2], "none"), [-1, 0, 0, 1])
    np.testing.assert_allclose(advantage([0, 1, 1, 2], "std"), np.array([-1, 0, 0, 1]) * np.sqrt(2), rtol=3e-6)
    np.testing.assert_allclose(advantage([0, 1, 1, 2], "loo"), np.array([-1, 0, 0, 1]) * 4 / 3, rtol=1e-6)
    two = jnp.array([[0.0, 2.0], [0.0, 4.0]])  # centred -1 1 -2 2: batch variance 10 / 4
    found = grpo.group_advantage(two, jnp.ones((2, 2), bool), "global")
    np.testing.assert_allclose(found, np.array([[-1, 1], [-2, 2]]) / np.sqrt(2.5), rtol=3e-6)


@pytest.mark.parametrize("norm", ["std", "none", "loo", "global"])
def test_advantages_ignore_a_shift_invalid_rows_and_constant_groups(norm):
    base = advantage([0, 1, 3, 2], norm)
    np.testing.assert_allclose(advantage([5, 6, 8, 7], norm), base, atol=1e-5)
    assert (advantage([0.1, 0.1, 0.1, 0.1], norm) == 0).all()  # 0.1 is inexact: the mean carries noise
    with_invalid = advantage([0, 1, 99, 3, 2], norm, [True, True, False, True, True])
    assert with_invalid[2] == 0
    np.testing.assert_allclose(with_invalid[[0, 1, 3, 4]], base, rtol=1e-6)
    assert (advantage([7, 1, 2, 3], norm, [True, False, False, False]) == 0).all()  # nothing to compare with


def test_kl_estimators_by_hand_and_for_tiny_gaps():
    logp, ref = jnp.float32(np.log(0.5)), jnp.float32(np.log(0.25))  # d = -ln 2
    np.testing.assert_allclose(grpo.kl_estimate(logp, ref, "k1"), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grpo.kl_estimate(logp, ref, "k2"), np.log(2) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(grpo.kl_estimate(logp, ref, "k3"), 0.5 - 1 + np.log(2), rtol=1e-5)
    np.testing.assert_allclose(grpo.kl_estimate(logp, ref, "k3_is", 3.0), 3 * (np.log(2) - 0.5), rtol=1e-5)
    tiny = grpo.kl_estimate(jnp.float32(0), jnp.float32(1e-4), "k3")
    np.testing.assert_allclose(tiny, 5.00017e-9, rtol=0.1)  # exp(d) - 1 - d would give 1.7e-8 in float32
    assert np.isfinite(grpo.kl_estimate(jnp.float32(0), jnp.float32(200), "k3"))


def test_kl_losses_have_the_gradients_that_the_literature_says():
    """Exact expectation over a 6-token policy: k1 0, k2 and k3_is the reverse KL's gradient, k3 the forward KL's."""
    rng = np.random.default_rng(0)
    theta, ref = jnp.array(rng.normal(size=6)), jnp.array(jax.nn.log_softmax(rng.normal(size=6)))
    old = jax.nn.log_softmax(theta)

    def expected(theta, kind):
        logp = jax.nn.log_softmax(theta)
        ratio = jnp.exp(logp - old)
        return jnp.sum(jnp.exp(old) * grpo.kl_estimate(logp, ref, kind, ratio))

    def reverse(theta):
        logp = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(logp) * (logp - ref))

    def forward(theta):
        return jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(theta)))

    np.testing.assert_allclose(jax.grad(expected)(theta, "k1"), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(expected)(theta, "k2"), jax.grad(reverse)(theta), atol=1e-6)
    np.testing.assert_allclose(jax.grad(expected)(theta, "k3_is"), jax.grad(reverse)(theta), atol=1e-6)
    np.testing.assert_allclose(jax.grad(expected)(theta, "k3"), jax.grad(forward)(theta), atol=1e-6)


def test_token_weights_by_hand():
    mask = jnp.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    found = {
        kind: np.asarray(grpo.token_weights(mask, kind, 5)) for kind in ("token_mean", "seq_mean", "seq_sum_const")
    }
    np.testing.assert_allclose(found["token_mean"], np.asarray(mask) / 4)
    np.testing.assert_allclose(found["seq_mean"], np.asarray(mask) * [[1 / 6], [1 / 2], [0]], rtol=1e-6)
    np.testing.assert_allclose(found["seq_sum_const"], np.asarray(mask) / 10, rtol=1e-6)
    assert all((np.asarray(grpo.token_weights(mask[2:], kind, 5)) == 0).all() for kind in found)


def test_loss_by_hand():
    """One row: ratios 1.5, 0.5, 1; A = 1, 1, -1; clip 0.2: L = -(1.2), -(0.5), +1, mean 0.7 / -3; no KL."""
    logp = jnp.log(jnp.array([[0.5, 0.6, 0.2, 0.3]]))
    batch = make_batch(1, 4)._replace(
        loss_mask_BT=jnp.array([[False, True, True, True]]),
        logp_old_BT=jnp.log(jnp.array([[0.5, 0.4, 0.4, 0.3]])),
        logp_ref_BT=logp,
        advantage_BT=jnp.array([[9.0, 1.0, 1.0, -1.0]]),
        lr_scale_B=jnp.ones(1),
    )
    loss, means, _ = grpo.loss_and_grad(CONFIG, lambda p, *_: (logp + p, logp * 0), jnp.float32(0), batch)
    np.testing.assert_allclose(loss, (-1.2 - 0.5 + 1.0) / 3, rtol=1e-5)
    np.testing.assert_allclose(means["policy/clip_fraction"], 1 / 3, rtol=1e-5)


def make_batch(rows, length, seed=0, vocab=7):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, length)) < 0.6
    mask[:, 0] = False
    normal = lambda scale=0.3: jnp.asarray(rng.normal(size=(rows, length)) * scale, jnp.float32)  # noqa: E731
    return Batch(
        tokens_BT=jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32),
        loss_mask_BT=jnp.asarray(mask),
        logp_beh_BT=normal() - 2,
        logp_old_BT=normal() - 2,
        logp_ref_BT=normal() - 2,
        advantage_BT=normal(1.0),
        kl_coef_B=jnp.asarray(rng.random(rows), jnp.float32),
        lr_scale_B=jnp.asarray(rng.random(rows), jnp.float32),
    )


PARAMS = jnp.asarray(np.random.default_rng(1).normal(size=(7, 7)), jnp.float32)  # a bigram policy


def bigram(params, tokens_BT, _mask_BT):
    logp = jax.nn.log_softmax(params[tokens_BT[:, :-1]])
    chosen = jnp.take_along_axis(logp, tokens_BT[:, 1:, None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropy))


def numpy_loss(config, batch, logp, entropy):
    """The module's formula once more, with loops, in float64."""
    b = jax.tree.map(lambda x: np.asarray(x, np.float64), batch)
    rows = [n for n in range(len(logp)) if b.loss_mask_BT[n].any()]
    total = 0.0
    for n in rows:
        steps = np.flatnonzero(b.loss_mask_BT[n])
        gaps = logp[n, steps] - b.logp_old_BT[n, steps]
        for t, gap in zip(steps, gaps):
            ratio = np.exp(gap if config.ratio == "token" else gaps.mean())
            adv = b.advantage_BT[n, t] * b.lr_scale_B[n]
            gain = min(ratio * adv, np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * adv)
            if config.importance_cap:
                gain *= min(np.exp(b.logp_old_BT[n, t] - b.logp_beh_BT[n, t]), config.importance_cap)
            d = b.logp_ref_BT[n, t] - logp[n, t]
            k3 = np.exp(d) - 1 - d
            kl = {"k1": -d, "k2": d * d / 2, "k3": k3, "k3_is": np.exp(gap) * k3}[config.kl_estimator]
            loss = -gain + b.kl_coef_B[n] * kl - config.entropy_coef * entropy[n, t]
            total += (
                loss
                / {
                    "token_mean": b.loss_mask_BT.sum(),
                    "seq_mean": len(rows) * len(steps),
                    "seq_sum_const": len(rows) * config.max_new_tokens,
                }[config.aggregation]
            )
    return total


@pytest.mark.parametrize(
    "aggregation, kl, cap, high, ratio",
    [
        ("token_mean", "k1", 0.0, 0.2, "token"),
        ("seq_mean", "k2", 1.1, 0.28, "token"),
        ("seq_sum_const", "k3", 2.0, 0.2, "token"),
        ("token_mean", "k3_is", 1.1, 0.28, "token"),
        ("seq_mean", "k3_is", 0.0, 0.2, "sequence"),
    ],
)
def test_loss_agrees_with_numpy(aggregation, kl, cap, high, ratio):
    config = dataclasses.replace(
        CONFIG,
        aggregation=aggregation,
        kl_estimator=kl,
        importance_cap=cap,
        clip_high=high,
        ratio=ratio,
        entropy_coef=0.01,
    )
    batch = make_batch(6, 5)
    loss, _, _ = grpo.loss_and_grad(config, bigram, PARAMS, batch)
    expected = numpy_loss(config, batch, *(np.asarray(x, np.float64) for x in bigram(PARAMS, batch.tokens_BT, None)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "seq_sum_const"])
def test_microbatches_have_the_gradient_of_the_whole(aggregation):
    config = dataclasses.replace(CONFIG, aggregation=aggregation, group_size=2)
    batch = make_batch(8, 5)
    whole = grpo.loss_and_grad(config, bigram, PARAMS, batch)
    parts = grpo.loss_and_grad(dataclasses.replace(config, microbatches=4), bigram, PARAMS, batch)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_first_update_is_reinforce_and_a_second_one_clips():
    """At logp == logp_old the ratio is 1 and the gradient that of -A log pi; after a large step the clip acts."""
    batch = make_batch(6, 5)
    old = bigram(PARAMS, batch.tokens_BT, None)[0]
    batch = batch._replace(logp_old_BT=old, logp_beh_BT=old, kl_coef_B=jnp.zeros(6), lr_scale_B=jnp.ones(6))
    _, means, grad = grpo.loss_and_grad(CONFIG, bigram, PARAMS, batch)
    np.testing.assert_allclose(means["policy/ratio"], 1.0, rtol=1e-6)
    assert means["policy/clip_fraction"] == 0

    def reinforce(params):
        logp = bigram(params, batch.tokens_BT, None)[0]
        return -jnp.sum(jnp.where(batch.loss_mask_BT, batch.advantage_BT * logp, 0)) / batch.loss_mask_BT.sum()

    np.testing.assert_allclose(grad, jax.grad(reinforce)(PARAMS), rtol=1e-5, atol=1e-7)
    state = TrainState(PARAMS, grpo.optimizer(CONFIG).init(PARAMS), jnp.int32(0))
    state, _ = grpo.train_step(dataclasses.replace(CONFIG, learning_rate=1.0), bigram, state, batch)
    _, metrics = grpo.train_step(CONFIG, bigram, state, batch)
    assert metrics["policy/clip_fraction"] > 0.1


def test_the_sequence_ratio_has_the_gradient_of_gspo():
    """Eq. 10 of the paper, inside the clip: (1 / B) sum_i s_i A_i (1 / |y_i|) sum_t grad log pi(y_it)."""
    config = dataclasses.replace(CONFIG, ratio="sequence", aggregation="seq_mean", kl_type="none", clip_low=1.0)
    config = dataclasses.replace(config, clip_high=1e9)
    batch = make_batch(6, 5, seed=2)._replace(lr_scale_B=jnp.ones(6))
    advantage_B = jnp.asarray(np.random.default_rng(5).normal(size=6), jnp.float32)
    batch = batch._replace(advantage_BT=jnp.broadcast_to(advantage_B[:, None], (6, 5)))
    mask = batch.loss_mask_BT
    count_B = mask.sum(1)
    s_B = jnp.exp(jnp.where(mask, bigram(PARAMS, batch.tokens_BT, None)[0] - batch.logp_old_BT, 0).sum(1) / count_B)

    def weighted(params):
        mean_B = jnp.where(mask, bigram(params, batch.tokens_BT, None)[0], 0).sum(1) / count_B
        return -jnp.mean(s_B * advantage_B * mean_B)

    assert (np.asarray(count_B) > 0).all()
    found = grpo.loss_and_grad(config, bigram, PARAMS, batch)[2]
    np.testing.assert_allclose(found, jax.grad(weighted)(PARAMS), rtol=1e-5, atol=1e-7)


def test_a_learning_rate_that_all_rows_share_is_one_of_the_update():
    """Adam's first step is g / (|g| + eps) of any size of g: without the factor on it, .1 and 1 would move alike.

    A mixed batch: A of the slower rows is scaled, the update is not. A batch of slow rows alone: the other way round.
    """
    batch, start = make_batch(6, 5), TrainState(PARAMS, grpo.optimizer(CONFIG).init(PARAMS), jnp.int32(0))
    step = jax.jit(grpo.train_step, static_argnums=(0, 1))

    def moved(scale, advantage_BT=batch.advantage_BT, mask_BT=batch.loss_mask_BT):
        given = batch._replace(
            lr_scale_B=jnp.asarray(scale, jnp.float32), advantage_BT=advantage_BT, loss_mask_BT=mask_BT
        )
        state, metrics = step(CONFIG, bigram, start, given)
        return np.asarray(state.params - PARAMS), float(metrics["policy/learning_rate"])

    full, rate = moved(np.ones(6))
    slow, slow_rate = moved(np.full(6, 0.1))
    assert np.abs(full).max() > 0.05
    np.testing.assert_allclose(slow, 0.1 * full, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose([rate, slow_rate], [0.1, 0.01], rtol=1e-6)

    scale = np.array([1, 0.2, 0.2, 1, 0.5, 0.5])
    np.testing.assert_allclose(moved(scale)[0], moved(np.ones(6), batch.advantage_BT * scale[:, None])[0], rtol=1e-5)
    half = moved(scale / 2)  # the largest is one half: relative to one another as before, the update half
    np.testing.assert_allclose(half[0], moved(scale)[0] / 2, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(half[1], 0.05, rtol=1e-6)

    learnt_BT = batch.loss_mask_BT & (scale < 0.4)[:, None]  # rows that are not learnt from do not set the scale
    alone = moved(scale, mask_BT=learnt_BT)
    np.testing.assert_allclose(alone[0], 0.2 * moved(np.ones(6), mask_BT=learnt_BT)[0], rtol=1e-4, atol=1e-7)


def test_updates_of_a_batch_go_through_every_group_once_an_epoch():
    config = dataclasses.replace(CONFIG, group_size=2, epochs=2, minibatches=2)
    batch, key = make_batch(8, 5), jax.random.key(3)
    start = TrainState(PARAMS, grpo.optimizer(config).init(PARAMS), jnp.int32(0))
    state, metrics = jax.jit(grpo.update, static_argnums=(0, 1))(config, bigram, start, batch, key)
    assert state.step == 4
    by_hand, losses, arrays = start, [], jax.tree.map(np.asarray, batch)
    for epoch_key in jax.random.split(key, 2):
        order = np.asarray(jax.random.permutation(epoch_key, 4))
        assert sorted(order) == [0, 1, 2, 3]
        for groups in (order[:2], order[2:]):
            rows = np.array([2 * g + i for g in groups for i in range(2)])
            by_hand, found = grpo.train_step(
                config, bigram, by_hand, jax.tree.map(lambda x, rows=rows: x[rows], arrays)
            )
            losses.append(float(found["loss"]))
    np.testing.assert_allclose(state.params, by_hand.params, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert len(set(losses)) == 4  # the parts differ, and the second epoch sees moved parameters


def test_masked_tokens_have_no_gradient():
    batch = make_batch(4, 5)
    logp = jnp.asarray(np.random.default_rng(3).normal(size=(4, 5)) - 2, jnp.float32)
    _, _, grad = grpo.loss_and_grad(CONFIG, lambda p, *_: (p, p * 0), logp, batch)
    assert (np.asarray(grad)[~np.asarray(batch.loss_mask_BT)] == 0).all()
    assert (np.asarray(grad)[np.asarray(batch.loss_mask_BT)] != 0).any()


def test_adamw_agrees_with_torch():
    import torch

    config = dataclasses.replace(CONFIG, weight_decay=0.1, learning_rate=0.01, max_grad_norm=0.05)
    batch = make_batch(6, 5)._replace(lr_scale_B=jnp.ones(6))
    theirs = torch.nn.Parameter(torch.tensor(np.array(PARAMS)))
    adam = torch.optim.AdamW(
        [theirs], lr=0.01, betas=(config.adam_b1, config.adam_b2), eps=config.adam_eps, weight_decay=0.1
    )
    state = TrainState(PARAMS, grpo.optimizer(config).init(PARAMS), jnp.int32(0))
    for _ in range(3):
        grad = grpo.loss_and_grad(config, bigram, state.params, batch)[2]
        theirs.grad = torch.tensor(np.array(grad))
        torch.nn.utils.clip_grad_norm_([theirs], 0.05)
        adam.step()
        state, _ = grpo.train_step(config, bigram, state, batch)
        np.testing.assert_allclose(state.params, theirs.detach().numpy(), atol=2e-6)


def test_learning_rate_is_a_function_of_the_absolute_step():
    config = dataclasses.replace(CONFIG, learning_rate=1.0, lr_warmup_steps=4, lr_decay_steps=10)
    found = [float(grpo.learning_rate(config, step)) for step in (0, 3, 5, 10, 20)]
    np.testing.assert_allclose(found, [0.25, 0.7, 0.5, 0, 0], rtol=1e-6)
    assert float(grpo.learning_rate(dataclasses.replace(config, lr_decay_steps=0), 1000)) == 1.0


def test_a_non_finite_step_is_skipped_and_counted():
    batch = make_batch(4, 5)
    bad = batch._replace(advantage_BT=jnp.where(batch.loss_mask_BT, jnp.nan, 0.0))
    state = TrainState(PARAMS, grpo.optimizer(CONFIG).init(PARAMS), jnp.int32(7))
    after, metrics = grpo.train_step(CONFIG, bigram, state, bad)
    assert metrics["policy/skipped"] == 1 and after.step == 8
    for a, b in zip(jax.tree.leaves(after[:2]), jax.tree.leaves(state[:2])):
        np.testing.assert_array_equal(a, b)
    empty = batch._replace(loss_mask_BT=jnp.zeros_like(batch.loss_mask_BT))
    after, metrics = grpo.train_step(dataclasses.replace(CONFIG, weight_decay=0.1), bigram, state, empty)
    assert metrics["policy/skipped"] == 1  # nothing to learn from: weight decay must not run either
    np.testing.assert_array_equal(after.params, PARAMS)
    after, metrics = grpo.train_step(dataclasses.replace(CONFIG, learning_rate=float("inf")), bigram, state, batch)
    assert metrics["policy/skipped"] == 1
    np.testing.assert_array_equal(after.params, PARAMS)
    after, metrics = grpo.train_step(CONFIG, bigram, state, batch)
    assert metrics["policy/skipped"] == 0 and optax.tree.norm(after.params - PARAMS) > 0


def test_kl_in_the_reward_by_hand():
    logp, ref = jnp.log(jnp.array([[1.0, 0.5, 0.5]])), jnp.log(jnp.array([[1.0, 0.25, 0.5]]))
    mask = jnp.array([[False, True, True]])
    np.testing.assert_allclose(grpo.kl_penalty(logp, ref, mask, "k1"), [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(grpo.kl_penalty(logp, ref, mask, "k2"), [np.log(2) ** 2 / 2], rtol=1e-6)
