"""The critic and PPO's update against torch and numpy, and what a head, a network and a frozen actor promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from configs.cli import compose_config
from infinite_jax import batch, critic, grpo, placement
from infinite_jax.score import Scorer
from infinite_jax.types import Batch, Critic, Judged, Roles, Rollout, TrainState
from models import policy
from models.architectures import from_hf
from rubric.evaluator import Grades
from sharding.mesh import build

CONFIG = dataclasses.replace(
    compose_config("config", None, ["algorithm=ppo"]).algorithm,
    group_size=1, minibatches=1, max_new_tokens=4, kl_type="reward", kl_estimator="k1", kl_coef=0.1,
    importance_cap=0.0, gamma=0.9, gae_lambda=0.8, learning_rate=0.1, critic_learning_rate=0.05, lr_warmup_steps=0,
    weight_decay=0.0,
)  # fmt: skip
V = 7
gradients = jax.jit(grpo.loss_and_grad, static_argnums=(0, 1))
step = jax.jit(grpo.train_step, static_argnums=(0, 1))
RNG = np.random.default_rng(1)
ROLES = Roles(
    jnp.asarray(RNG.normal(size=(V, V)), jnp.float32), jnp.asarray(RNG.normal(size=V), jnp.float32)
)  # a bigram policy, and a value for each token that stands before


def tables(params, tokens_BT, _mask_BT):
    actor = params.actor if isinstance(params, Roles) else params
    logp = jax.nn.log_softmax(actor[tokens_BT[:, :-1]])
    chosen = jnp.take_along_axis(logp, tokens_BT[:, 1:, None], -1)[..., 0]
    found = [chosen, -jnp.sum(jnp.exp(logp) * logp, -1)]
    if isinstance(params, Roles):
        found.append(params.critic[tokens_BT[:, :-1]])
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in found)


def made_batch(rows=8, length=6) -> Batch:
    rng = np.random.default_rng(2)

    def normal(scale=0.3):
        return jnp.asarray(rng.normal(size=(rows, length)) * scale, jnp.float32)

    mask = rng.random((rows, length)) < 0.6
    mask[:, 0], mask[2] = False, False
    tokens, judged = rng.integers(0, V, (rows, length)), Judged(normal(1.0), normal(1.0), normal())
    return Batch(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), normal() - 2, normal() - 2, normal() - 2, normal(1.0),
        jnp.zeros(rows), jnp.asarray(rng.random(rows), jnp.float32), judged,
    )  # fmt: skip


def started(config) -> TrainState:
    start = grpo.optimizer(config).init
    return TrainState(ROLES.actor, start(ROLES.actor), jnp.int32(0), Critic(ROLES.critic, start(ROLES.critic)))


def test_loss_gradients_and_update_are_those_of_a_torch_ppo():
    import torch

    made = made_batch()
    made = made._replace(lr_scale_B=made.lr_scale_B.at[0].set(1))  # the largest: the update itself is not scaled
    actor, values = (torch.tensor(np.array(x), requires_grad=True) for x in ROLES)
    tokens, mask = torch.tensor(np.array(made.tokens_BT), dtype=torch.long), torch.tensor(np.array(made.loss_mask_BT))
    scaled = made.advantage_BT * made.lr_scale_B[:, None]
    inputs = (made.logp_old_BT, scaled, made.judged.value_BT, made.judged.return_BT)
    old, advantage, value_old, target = (torch.tensor(np.array(x))[mask] for x in inputs)
    logp = torch.log_softmax(actor, -1)[tokens[:, :-1]].gather(-1, tokens[:, 1:, None])[..., 0][mask[:, 1:]]
    value = values[tokens[:, :-1]][mask[:, 1:]]
    ratio = torch.exp(logp - old)
    actor_loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    near = value_old + (value - value_old).clamp(-0.2, 0.2)
    value_loss = 0.5 * torch.max((value - target) ** 2, (near - target) ** 2).mean()
    rates = ((actor, 0.1), (values, 0.05))
    optimizers = [torch.optim.AdamW([x], lr=rate, betas=(0.9, 0.95), weight_decay=0) for x, rate in rates]
    (actor_loss + value_loss).backward()
    loss, means, grads = gradients(CONFIG, tables, ROLES, made)
    np.testing.assert_allclose(loss, (actor_loss + value_loss).item(), rtol=1e-5)
    np.testing.assert_allclose(means["value/loss"], value_loss.item(), rtol=1e-5)
    np.testing.assert_allclose(grads.actor, actor.grad, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads.critic, values.grad, rtol=1e-4, atol=1e-7)
    assert ((value - value_old).abs() > 0.2).any() and ((value - value_old).abs() < 0.2).any()
    for x, optimizer in zip((actor, values), optimizers):
        torch.nn.utils.clip_grad_norm_([x], CONFIG.max_grad_norm)  # each role by its own norm
        optimizer.step()
    state, metrics = step(CONFIG, tables, started(CONFIG), made)
    np.testing.assert_allclose(state.params, actor.detach(), atol=2e-6)
    np.testing.assert_allclose(state.critic.params, values.detach(), atol=2e-6)
    assert metrics["value/learning_rate"] == np.float32(0.05) and metrics["policy/skipped"] == 0


def test_advantages_and_returns_by_hand_from_rewards_and_kl():
    """Loops over the paper's sums: the reward on the last token, the KL on each, rows not graded nowhere."""
    rows, length = 5, 6
    mask = np.zeros((rows, length), bool)
    mask[0, 2:5] = mask[1, 1:] = mask[2, 3] = mask[3, 2:4] = mask[4, [1, 2, 4]] = True  # the last with a gap
    tokens = RNG.integers(0, V, (rows, length)).astype(np.int32)
    every = jnp.ones(rows, bool)
    rollout = Rollout(tokens, jnp.asarray(mask), jnp.zeros((rows, length)), np.arange(rows), np.arange(rows), every)
    grades = Grades(np.ones(rows), np.array([1, 0.5, 0, np.nan, 1], np.float32), np.array([1, 1, 1, 0, 1], bool))
    reference = jnp.asarray(RNG.normal(size=(V, V)), jnp.float32)
    prepare = jax.jit(batch.prepare, static_argnums=(0, 1))
    made = prepare(CONFIG, tables, ROLES, reference, rollout, grades, jnp.ones(rows), 0.1 * np.arange(1, rows + 1))
    logp, _, value = (np.asarray(x, np.float64) for x in tables(ROLES, tokens, None))
    kl = logp - np.asarray(tables(reference, tokens, None)[0], np.float64)
    advantage, outcome = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in (0, 1, 2, 4):
        steps = np.flatnonzero(mask[b])
        reward = [-0.1 * (b + 1) * kl[b, t] + (grades.reward_B[b] if t == steps[-1] else 0) for t in steps]
        values = [*value[b, steps], 0.0]
        delta = [reward[i] + 0.9 * values[i + 1] - values[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            advantage[b, t] = sum(0.72 ** (j - i) * delta[j] for j in range(i, len(steps)))
            outcome[b, t] = sum(0.9 ** (j - i) * reward[j] for j in range(i, len(steps)))
    kept = mask & grades.valid_B[:, None]
    np.testing.assert_array_equal(made.loss_mask_BT, kept)
    np.testing.assert_allclose(made.judged.value_BT, np.where(kept, value, 0), atol=1e-6)
    np.testing.assert_allclose(made.judged.return_BT, np.where(kept, advantage + value, 0), atol=1e-5)
    np.testing.assert_allclose(made.judged.outcome_BT, outcome, atol=1e-5)
    found = advantage[kept]
    np.testing.assert_allclose(made.advantage_BT[kept], (found - found.mean()) / found.std(), atol=1e-4)
    assert (np.asarray(made.advantage_BT)[~kept] == 0).all()


def test_microbatches_have_the_gradients_of_the_whole():
    made = made_batch()
    whole = gradients(CONFIG, tables, ROLES, made)
    parts = gradients(dataclasses.replace(CONFIG, microbatches=4), tables, ROLES, made)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_a_frozen_actor_is_bit_identical_while_the_critic_learns():
    config = dataclasses.replace(CONFIG, freeze_steps=3, epochs=2, minibatches=2, weight_decay=0.1)
    update = jax.jit(grpo.update, static_argnums=(0, 1))
    start, made = started(config), made_batch()._replace(lr_scale_B=jnp.ones(8))
    first, metrics = update(dataclasses.replace(config, freeze_steps=4), tables, start, made, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(first[:2]), jax.tree.leaves(start[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.step == 4 and metrics["policy/learning_rate"] == 0
    assert np.abs(first.critic.params - start.critic.params).min() > 1e-3
    thawed, metrics = update(config, tables, start, made, jax.random.key(0))  # the last of the four updates moves it
    assert np.abs(thawed.params - start.params).max() > 1e-3 and metrics["policy/learning_rate"] == np.float32(0.025)
    np.testing.assert_array_equal(thawed.critic.params, first.critic.params)


@pytest.mark.parametrize("broken", ["advantage_BT", "return_BT"])
def test_what_breaks_one_role_is_skipped_by_both(broken):
    made = made_batch()
    if broken == "return_BT":
        made = made._replace(judged=made.judged._replace(return_BT=made.judged.return_BT * jnp.inf))
    else:
        made = made._replace(advantage_BT=made.advantage_BT * jnp.nan)
    start = started(CONFIG)
    after, metrics = step(CONFIG, tables, start, made)
    assert metrics["policy/skipped"] == 1 and after.step == 1
    for a, b in zip(jax.tree.leaves(after._replace(step=start.step)), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- on a decoder


def decoder_of(tied: bool):
    return from_hf(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def init(decoder):
    return jax.jit(policy.init, static_argnums=0)(decoder, jax.random.key(0))


def rows_of(group: int):
    """Prompts of 3 and 2 tokens and completions of up to 4."""
    tokens = RNG.integers(2, 40, (2 * group, 8)).astype(np.int32)
    lengths = np.repeat([3, 2], group)
    slot = np.arange(8) - lengths[:, None]
    tokens = np.where(slot < 0, tokens[np.arange(2 * group) // group * group], tokens)
    return tokens, (slot >= 0) & (slot < RNG.integers(1, 5, (2 * group, 1)))


def random_critic(kind: str, decoder, params):
    """Of its own values, a head that tells states apart."""
    made, rng = critic.init(kind, decoder, params), np.random.default_rng(3)
    head = {"weight": jnp.asarray(rng.normal(size=decoder.embed_dim), jnp.float32), "bias": jnp.array([0.5])}
    moved = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1) * rng.normal(size=x.shape).astype(np.float32), made)
    return moved | {"head": head}


@pytest.mark.parametrize("kind, tied, group", [("head", True, 2), ("network", False, 1)])
def test_a_value_is_read_off_the_state_before_its_token_and_never_reaches_the_actor(kind, tied, group):
    """Against whole rows through `policy.hidden`; the policy's own log-probabilities are untouched."""
    decoder, (tokens, mask) = decoder_of(tied), rows_of(group)
    params = init(decoder)
    roles, scorer = Roles(params, random_critic(kind, decoder, params)), Scorer(decoder, 1.0, 4, group)
    trunk = params if kind == "head" else roles.critic["trunk"] | ({} if tied else {"head": params["head"]})

    @jax.jit
    def everything(roles, trunk):
        def squared(roles):
            found = scorer(roles, tokens, mask)
            return jnp.sum(found[2] ** 2), found

        grads, found = jax.grad(squared, has_aux=True)(roles)
        return grads, found, scorer(roles.actor, tokens, mask), policy.hidden(decoder, trunk, tokens)

    grads, (logp, entropy, value), alone, hidden = jax.device_get(everything(roles, trunk))
    np.testing.assert_allclose((logp, entropy), alone, atol=1e-6)
    expected = hidden[:, :-1] @ np.asarray(roles.critic["head"]["weight"]) + 0.5
    assert value.dtype == np.float32 and np.abs(value[mask]).max() > 0.5 and (value[~mask] == 0).all()
    np.testing.assert_allclose(value[:, 1:][mask[:, 1:]], expected[mask[:, 1:]], rtol=1e-4, atol=1e-5)
    assert all((x == 0).all() for x in jax.tree.leaves(grads.actor))
    assert all((x != 0).any() for x in jax.tree.leaves(grads.critic))


@pytest.mark.parametrize("tied", [True, False])
def test_a_network_begins_as_the_policy_without_an_unembedding_in_buffers_of_its_own(tied):
    decoder, mesh = decoder_of(tied), build((1, 1, 1, 1))
    abstract = placement.abstract_train_state(CONFIG, decoder, mesh)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), abstract.params)
    state = placement.initial_train_state(CONFIG, decoder, params, mesh)
    trunk = state.critic.params["trunk"]
    assert "head" not in trunk and trunk.keys() == params.keys() - {"head"}
    for name, leaves in trunk.items():
        for a, b in zip(jax.tree.leaves(leaves), jax.tree.leaves(params[name]), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()  # both are donated to the update
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(state.critic.params["head"]))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), state, abstract)
    assert all(jax.tree.leaves(same))


def test_without_a_critic_the_state_has_the_leaves_that_it_had():
    config, decoder, mesh = dataclasses.replace(CONFIG, critic="none"), decoder_of(True), build((1, 1, 1, 1))
    state = placement.abstract_train_state(config, decoder, mesh)
    assert state.critic is None and not any("critic" in str(path) for path, _ in jax.tree.leaves_with_path(state))
