"""From what was sampled and graded to what the gradient and the triage may see: pure functions of a step."""

import jax
import jax.numpy as jnp

from configs.schema import AlgorithmConfig
from curriculum.triage import DomainStats, statistics
from infinite_jax import gae, grpo
from infinite_jax.types import Batch, Judged, Rollout
from rubric.evaluator import Grades


def prepare(
    config: AlgorithmConfig,
    logp_fn,
    params,
    reference,
    rollout: Rollout,
    grades: Grades,
    lr_scale_D: jax.Array,
    kl_coef_D: jax.Array,
) -> Batch:
    """From what was sampled and graded to what the gradient may see. Pure and jitted.

    Rows without a valid grade have an empty mask.

    Args:
      params: the policy's, or types.Roles.
      lr_scale_D: f32[D], of each domain's learning rate. kl_coef_D: f32[D], weight of its KL, in reward or loss.
    """
    scored = (rollout.tokens_BT, rollout.loss_mask_BT)
    logp_old_BT, *value_BT = score(config, logp_fn, params, *scored)
    logp_ref_BT = logp_old_BT if config.kl_type == "none" else score(config, logp_fn, reference, *scored)[0]
    learnt_B, kl_coef_B = grades.valid_B, kl_coef_D[rollout.domain_B]
    if config.truncated == "mask":
        learnt_B &= rollout.done_B
    if value_BT:
        mask_BT = rollout.loss_mask_BT & learnt_B[:, None]
        advantage_BT, judged = judge(config, grades.reward_B, kl_coef_B, logp_old_BT, logp_ref_BT, *value_BT, mask_BT)
    else:
        advantage_B1, differs_B = against_group(
            config, grades, kl_coef_B, logp_old_BT, logp_ref_BT, rollout.loss_mask_BT
        )
        if config.zero_variance == "drop":
            learnt_B &= differs_B
        mask_BT = rollout.loss_mask_BT & learnt_B[:, None]
        advantage_BT, judged = jnp.where(mask_BT, advantage_B1, 0.0), None
    return Batch(
        tokens_BT=rollout.tokens_BT,
        loss_mask_BT=mask_BT,
        logp_beh_BT=rollout.logp_BT,
        logp_old_BT=logp_old_BT,
        logp_ref_BT=logp_ref_BT,
        advantage_BT=advantage_BT,
        kl_coef_B=kl_coef_B if config.kl_type == "loss" else jnp.zeros_like(kl_coef_B),
        lr_scale_B=lr_scale_D[rollout.domain_B],
        judged=judged,
    )


def against_group(config: AlgorithmConfig, grades: Grades, kl_coef_B, logp_BT, logp_ref_BT, mask_BT):
    """(advantage [B, 1], the same for all tokens of a row; bool [B], whether its group's rewards differ)."""
    groups = (-1, config.group_size)
    valid_PG = grades.valid_B.reshape(groups)
    advantage_PG = grpo.group_advantage(grades.reward_B.reshape(groups), valid_PG, config.advantage)
    differs_B = jnp.repeat(jnp.any(advantage_PG != 0, axis=1), config.group_size)
    if config.kl_type == "reward":
        # Its own centred term: inside the normalisation, a group whose replies are all right would have nothing but
        # the penalty's noise to divide, and that noise would come out as large as any advantage.
        penalty_B = grpo.kl_penalty(logp_BT, logp_ref_BT, mask_BT, config.kl_estimator)
        centred_PG = grpo.group_advantage(penalty_B.reshape(groups), valid_PG, "none")
        advantage_PG -= kl_coef_B.reshape(groups) * centred_PG
    return advantage_PG.reshape(-1, 1), differs_B


def judge(
    config: AlgorithmConfig, reward_B, kl_coef_B, logp_BT, logp_ref_BT, value_BT, mask_BT
) -> tuple[jax.Array, Judged]:
    """Advantages by a critic's values, whitened, and what the critic is to learn.

    The reward of a row stands on its last token. The KL in the reward is charged token by token: the penalty of a row
    is the sum that the group's advantage takes, and the critic learns to expect it.
    """
    last_BT = mask_BT & (jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1] == 1)
    reward_BT = jnp.where(last_BT, reward_B[:, None], 0.0)
    if config.kl_type == "reward":
        reward_BT -= kl_coef_B[:, None] * grpo.kl_estimate(logp_BT, logp_ref_BT, config.kl_estimator)
    advantage_BT, return_BT = gae.advantages(reward_BT, value_BT, mask_BT, config.gamma, config.gae_lambda)
    outcome_BT, _ = gae.advantages(reward_BT, jnp.zeros_like(value_BT), mask_BT, config.gamma, 1.0)
    judged = Judged(jnp.where(mask_BT, value_BT, 0.0), return_BT, outcome_BT)
    return gae.whiten(advantage_BT, mask_BT), judged


def value_drift(num_domains: int, made: Batch, domain_B: jax.Array) -> dict[str, jax.Array]:
    """How well the critic foresaw each domain's rewards, f32[D] by name; NaN where the batch has no row of it."""
    (value_BT, _, outcome_BT), mask_BT = made.judged, made.loss_mask_BT
    error_D, explained_D = gae.foresight(value_BT, outcome_BT, mask_BT, domain_B, num_domains)
    return {"drift/value": error_D, "drift/value_explained": explained_D}


def tally(group: int, num_domains: int, domain_B: jax.Array, grades: Grades, cost_P: jax.Array) -> DomainStats:
    """What the triage may see of P prompts of `group` graded samples each. Pure and jitted."""
    groups = (-1, group)
    grade_PG, reward_PG, valid_PG = (jnp.reshape(x, groups) for x in (grades.grade_B, grades.reward_B, grades.valid_B))
    return statistics(jnp.reshape(domain_B, groups)[:, 0], grade_PG, reward_PG, valid_PG, cost_P, num_domains)


def score(config: AlgorithmConfig, logp_fn, params, tokens_BT, mask_BT) -> list[jax.Array]:
    """[logp_BT] of the sampled tokens, and value_BT where params are both roles', float32, a micro-batch at a time."""
    parts = grpo.microbatches((tokens_BT, mask_BT), config.microbatches, config.group_size)

    def one(part):
        logp_BT, _, *value_BT = logp_fn(params, *part)
        return [logp_BT, *value_BT]

    def whole(x):
        groups = x.reshape(config.microbatches, -1, config.group_size, tokens_BT.shape[1])
        return jnp.swapaxes(groups, 0, 1).reshape(tokens_BT.shape)

    return list(map(whole, jax.lax.map(one, parts)))
