"""GRPO as pure functions: advantages, KL estimators, the clipped loss and the update; PPO's, where there is a critic.

    rho = exp(logp - logp_old),   L_t = -w_t min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
    loss = sum_t weight_t (L_t + kl_coef KL_t - entropy_coef H_t)

With ratio=sequence (GSPO, 2507.18071, eq. 5-7) every token of a row has the row's ratio, the geometric mean of its
tokens' rho; with seq_mean the loss is then the paper's.

Group-relative advantages and the clipped objective: DeepSeekMath (arXiv 2402.03300, eq. 3-4). `norm=none` and
`seq_sum_const`: Dr. GRPO (2503.20783). `token_mean` and a higher upper clip: DAPO (2503.14476). k1, k2, k3: Schulman,
"Approximating KL divergence" (2020). The truncated weight w = min(exp(logp_old - logp_beh), cap) corrects for a sampler
whose numerics differ from the trainer's.

With a critic (gae.py; PPO, 1707.06347) the mean value loss of the tokens is added. No parameter is in both losses, so
neither needs a weight against the other, and each role has its own moments, clip and learning rate.

lr_scale, a learning rate a row, multiplies A. Adam does not see a factor that all rows share, so A is multiplied by
lr_scale / max lr_scale, and what the optimizer makes of the gradient by that maximum.

Every denominator is global: `token_weights` is computed once from the whole batch, before micro-batches are cut, so a
split batch has the gradient of the whole.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from configs.schema import AlgorithmConfig
from curriculum.triage import ZERO_VARIANCE
from infinite_jax import gae
from infinite_jax.types import Batch, Critic, Params, Roles, TrainState, learning

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: a larger ratio is clipped anyway, and float32 stays finite
MAX_KL_GAP = 10.0  # exp(10): k3 of a larger gap only makes the loss overflow


def group_advantage(reward_PG: jax.Array, valid_PG: jax.Array, norm: str) -> jax.Array:
    """Advantage of each sample against its group's valid samples; 0 for invalid ones, float32 [P, G].

    norm: `std` (r - mean) / (std + 1e-6) with the population standard deviation, `none` r - mean, `loo` r minus the
    mean of the others, `global` (r - mean) / (std of that over the batch + 1e-6). A group whose rewards all agree
    (range below ZERO_VARIANCE) gets exactly 0, whatever float noise its mean carries.
    """
    chex.assert_rank([reward_PG, valid_PG], 2)
    valid = valid_PG.astype(jnp.float32)
    reward = jnp.where(valid_PG, reward_PG.astype(jnp.float32), 0.0)
    n_P1 = jnp.maximum(valid.sum(1, keepdims=True), 1.0)
    centred = (reward - reward.sum(1, keepdims=True) / n_P1) * valid
    spread = jnp.where(valid_PG, reward, -jnp.inf).max(1) - jnp.where(valid_PG, reward, jnp.inf).min(1)
    centred = jnp.where((spread > ZERO_VARIANCE)[:, None], centred, 0.0)
    if norm == "none":
        return centred
    if norm == "std":
        return centred / (jnp.sqrt((centred**2).sum(1, keepdims=True) / n_P1) + 1e-6)
    if norm == "loo":
        return centred * n_P1 / jnp.maximum(n_P1 - 1.0, 1.0)
    if norm == "global":
        return centred / (jnp.sqrt((centred**2).sum() / jnp.maximum(valid.sum(), 1.0)) + 1e-6)
    raise ValueError(f"algorithm.advantage={norm!r} is not one of std, none, loo, global")


def kl_estimate(logp: jax.Array, logp_ref: jax.Array, kind: str, ratio: jax.Array | float = 1.0) -> jax.Array:
    """Per-token estimate of KL(policy || reference) from tokens drawn by the policy; elementwise, float32.

    With d = logp_ref - logp: k1 = -d, k2 = d^2 / 2, k3 = expm1(d) - d >= 0, k3_is = ratio k3. As a *loss* k1 has zero
    expected gradient and k3 the gradient of the forward KL; k2 and k3_is (ratio differentiated) have the right one.
    """
    gap = logp_ref - logp
    if kind == "k1":
        return -gap
    if kind == "k2":
        return 0.5 * gap**2
    gap = jnp.clip(gap, -MAX_KL_GAP, MAX_KL_GAP)
    k3 = jnp.expm1(gap) - gap
    if kind == "k3":
        return k3
    if kind == "k3_is":
        return ratio * k3
    raise ValueError(f"algorithm.kl_estimator={kind!r} is not one of k1, k2, k3, k3_is")


def token_weights(mask_BT: jax.Array, kind: str, max_new_tokens: int) -> jax.Array:
    """Weight of each token in the loss, float32 [B, T], from the masks of the WHOLE batch.

    token_mean 1 / sum m; seq_mean 1 / (rows x tokens of the row); seq_sum_const 1 / (rows x max_new_tokens). Rows
    without a masked token count nowhere; a batch without any gives 0, not NaN.
    """
    mask = mask_BT.astype(jnp.float32)
    tokens_B1 = mask.sum(1, keepdims=True)
    rows = jnp.maximum((tokens_B1 > 0).sum(), 1)
    if kind == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if kind == "seq_mean":
        return mask / (rows * jnp.maximum(tokens_B1, 1.0))
    if kind == "seq_sum_const":
        return mask / (rows * max_new_tokens)
    raise ValueError(f"algorithm.aggregation={kind!r} is not one of token_mean, seq_mean, seq_sum_const")


def kl_penalty(logp_BT, logp_ref_BT, mask_BT, kind: str) -> jax.Array:
    """KL as part of the reward: the estimates of a row's own tokens summed, float32 [B]."""
    return jnp.sum(jnp.where(mask_BT, kl_estimate(logp_BT, logp_ref_BT, kind), 0.0), axis=1)


def token_loss(config: AlgorithmConfig, logp_BT, entropy_BT, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of each token before weighting, and the per-token diagnostics, all float32 [B, T]."""
    log_ratio = jnp.clip(logp_BT - batch.logp_old_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = kl_estimate(logp_BT, batch.logp_ref_BT, config.kl_estimator, jnp.exp(log_ratio))
    if config.ratio == "sequence":
        mask = batch.loss_mask_BT
        total_B1 = jnp.sum(jnp.where(mask, log_ratio, 0.0), axis=1, keepdims=True)
        log_ratio = jnp.broadcast_to(total_B1 / jnp.maximum(mask.sum(1, keepdims=True), 1), mask.shape)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    advantage = batch.advantage_BT * batch.lr_scale_B[:, None]
    gain = jnp.minimum(ratio * advantage, clipped * advantage)
    sampler_gap = batch.logp_old_BT - batch.logp_beh_BT
    weight = jnp.minimum(jnp.exp(sampler_gap), config.importance_cap) if config.importance_cap > 0 else 1.0
    loss = -weight * gain - config.entropy_coef * entropy_BT
    if config.kl_type == "loss":
        loss = loss + batch.kl_coef_B[:, None] * kl
    diagnostics = {
        "policy/kl": kl_estimate(logp_BT, batch.logp_ref_BT, "k3"),
        "policy/entropy": entropy_BT,
        "policy/clip_fraction": (ratio * advantage > gain).astype(jnp.float32),
        "policy/ratio": ratio,
        "rollout/logp_gap": jnp.abs(sampler_gap),
    }
    return loss, jax.lax.stop_gradient(diagnostics)


def microbatches(batch, num: int, group: int):
    """Cuts axis 0 of every leaf into `num` parts of whole, interleaved groups, [B, ...] -> [num, B / num, ...].

    Interleaved, so that each part holds groups of every device and none moves between devices.
    """

    def cut(x):
        groups = jnp.swapaxes(x.reshape(-1, num, group, *x.shape[1:]), 0, 1)
        return groups.reshape(num, -1, *x.shape[1:])

    return jax.tree.map(cut, batch)


LogpFn = Callable[[Params | Roles, jax.Array, jax.Array], tuple[jax.Array, ...]]
# (params, tokens_BT, loss_mask_BT) -> (logp_BT, entropy_BT), and of Roles value_BT, too


def loss_and_grad(config: AlgorithmConfig, logp_fn: LogpFn, params: Params | Roles, batch: Batch):
    """Loss, diagnostics and gradient of the whole batch, accumulated over config.microbatches, gradient in float32."""
    chex.assert_type([batch.logp_old_BT, batch.logp_beh_BT, batch.advantage_BT], jnp.float32)
    weight_BT = token_weights(batch.loss_mask_BT, config.aggregation, config.max_new_tokens)
    mean_BT = token_weights(batch.loss_mask_BT, "token_mean", 1)

    def part(params, inputs):
        batch, weight_BT, mean_BT = inputs
        logp_BT, entropy_BT, *value_BT = logp_fn(params, batch.tokens_BT, batch.loss_mask_BT)
        loss_BT, diagnostics = token_loss(config, logp_BT, entropy_BT, batch)
        # where, not multiplication: a masked token may hold an infinity, and 0 x inf is NaN
        total = jnp.sum(jnp.where(weight_BT > 0, weight_BT * loss_BT, 0.0))
        if value_BT:
            judged = batch.judged
            diagnostics["value/loss"] = gae.value_loss(*value_BT, judged.value_BT, judged.return_BT, config.value_clip)
        means = {name: jnp.sum(jnp.where(mean_BT > 0, mean_BT * x, 0.0)) for name, x in diagnostics.items()}
        return total + means["value/loss"] if value_BT else total, means

    value_and_grad = jax.value_and_grad(part, has_aux=True)
    inputs = (batch, weight_BT, mean_BT)
    if config.microbatches == 1:
        (loss, means), grads = value_and_grad(params, inputs)
        return loss, means, grads

    def accumulate(total, inputs):
        return jax.tree.map(jnp.add, total, value_and_grad(params, inputs)), None

    parts = microbatches(inputs, config.microbatches, config.group_size)
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((loss, means), grads), _ = jax.lax.scan(accumulate, zeros, parts)
    return loss, means, grads


def learning_rate(config: AlgorithmConfig, step: jax.Array, peak: float | None = None) -> jax.Array:
    """Linear warm-up over lr_warmup_steps; then constant, or linear to 0 at lr_decay_steps. Absolute steps.

    peak: default the actor's.
    """
    warmup = jnp.minimum(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
    decay = jnp.clip(1.0 - step / config.lr_decay_steps, 0.0, 1.0) if config.lr_decay_steps else 1.0
    return (config.learning_rate if peak is None else peak) * warmup * decay


def optimizer(config: AlgorithmConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) up to the learning rate, which train_step applies from the absolute step."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay),
    )


def train_step(
    config: AlgorithmConfig, logp_fn: LogpFn, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. A non-finite loss, gradient or update, or a batch without a token to learn from, leaves parameters
    and moments untouched and counts as skipped. With a critic the actor's are, too, for the first freeze_steps."""
    scale, batch = shared_scale(batch)
    loss, metrics, grads = loss_and_grad(config, logp_fn, learning(state), batch)
    actor, critic = (state.params, state.opt_state), state.critic
    actor_grads, critic_grads = grads if critic else (grads, None)
    rate = scale * learning_rate(config, state.step)
    moved, grad_norm, finite = descend(config, actor_grads, *actor, rate)
    usable = finite & jnp.isfinite(loss) & jnp.any(batch.loss_mask_BT)
    if critic:
        critic_rate = learning_rate(config, state.step, config.critic_learning_rate)
        taught, critic_norm, finite = descend(config, critic_grads, *critic, critic_rate)
        usable &= finite
        critic = Critic(*kept(usable, taught, tuple(critic)))
        free = state.step >= config.freeze_steps
        moved, rate = kept(free, moved, actor), jnp.where(free, rate, 0.0)
        metrics |= {"value/grad_norm": critic_norm, "value/learning_rate": critic_rate}
    metrics |= {
        "loss": loss,
        "policy/grad_norm": grad_norm,
        "policy/learning_rate": rate,
        "policy/skipped": 1.0 - usable.astype(jnp.float32),
    }
    return TrainState(*kept(usable, moved, actor), state.step + 1, critic), metrics


def shared_scale(batch: Batch) -> tuple[jax.Array, Batch]:
    """(the largest lr_scale_B of the rows to learn from, f32[], and the batch with lr_scale_B relative to it)."""
    largest = jnp.max(jnp.where(batch.loss_mask_BT.any(axis=1), batch.lr_scale_B, 0.0))
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale, batch._replace(lr_scale_B=batch.lr_scale_B / scale)


def descend(config: AlgorithmConfig, grads, params: Params, opt_state, rate: jax.Array):
    """((params, opt_state) after one step of the optimizer, the gradient's norm, whether all of it is finite)."""
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer(config).update(grads, opt_state, params)
    finite = jnp.isfinite(norm) & jnp.isfinite(rate * optax.tree.norm(updates))
    return (jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates), opt_state), norm, finite


def kept(wanted: jax.Array, new, old):
    """`new` where `wanted`, bool[], else `old`, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(wanted, x, y), new, old)


def update(
    config: AlgorithmConfig, logp_fn: LogpFn, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """All updates of a batch: `epochs` times through it in a fresh order, in `minibatches` parts of whole groups.

    The key is consumed. Metrics are means over the updates.
    """
    updates = config.epochs * config.minibatches
    if updates == 1:
        return train_step(config, logp_fn, state, batch)
    groups = batch.tokens_BT.shape[0] // config.group_size
    order = jax.vmap(lambda key: jax.random.permutation(key, groups))(jax.random.split(key, config.epochs))

    def one(state, group_M):
        row = (group_M[:, None] * config.group_size + jnp.arange(config.group_size)).reshape(-1)
        return train_step(config, logp_fn, state, jax.tree.map(lambda x: x[row], batch))

    state, metrics = jax.lax.scan(one, state, order.reshape(updates, -1))
    return state, jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
