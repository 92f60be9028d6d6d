"""From what was sampled and graded to what the gradient and the triage may see: pure functions of a step."""

import jax
import jax.numpy as jnp

from configs.schema import AlgorithmConfig
from curriculum.triage import DomainStats, statistics
from infinite_jax import grpo
from infinite_jax.types import Batch, Rollout
from rubric.evaluator import Grades


def prepare(
    config: AlgorithmConfig, logp_fn, params, reference, rollout: Rollout, grades: Grades, lr_scale_D: jax.Array
) -> Batch:
    """From what was sampled and graded to what the gradient may see. Pure and jitted.

    Rows without a valid grade have an empty mask.

    Args:
      lr_scale_D: f32[D], of each domain's learning rate.
    """
    groups = (-1, config.group_size)
    scored = (rollout.tokens_BT, rollout.loss_mask_BT)
    logp_old_BT = score(config, logp_fn, params, *scored)
    logp_ref_BT = logp_old_BT if config.kl_type == "none" else score(config, logp_fn, reference, *scored)
    valid_PG = grades.valid_B.reshape(groups)
    advantage_PG = grpo.group_advantage(grades.reward_B.reshape(groups), valid_PG, config.advantage)
    learnt_B = grades.valid_B
    if config.truncated == "mask":
        learnt_B &= rollout.done_B
    if config.zero_variance == "drop":
        learnt_B &= jnp.repeat(jnp.any(advantage_PG != 0, axis=1), config.group_size)
    if config.kl_type == "reward":
        # Its own centred term: inside the normalisation, a group whose replies are all right would have nothing but
        # the penalty's noise to divide, and that noise would come out as large as any advantage.
        penalty_B = grpo.kl_penalty(logp_old_BT, logp_ref_BT, rollout.loss_mask_BT, config.kl_estimator)
        advantage_PG -= config.kl_coef * grpo.group_advantage(penalty_B.reshape(groups), valid_PG, "none")
    mask_BT = rollout.loss_mask_BT & learnt_B[:, None]
    return Batch(
        tokens_BT=rollout.tokens_BT,
        loss_mask_BT=mask_BT,
        logp_beh_BT=rollout.logp_BT,
        logp_old_BT=logp_old_BT,
        logp_ref_BT=logp_ref_BT,
        advantage_BT=jnp.where(mask_BT, advantage_PG.reshape(-1, 1), 0.0),
        kl_coef_B=jnp.full(learnt_B.shape, config.kl_coef if config.kl_type == "loss" else 0.0, jnp.float32),
        lr_scale_B=lr_scale_D[rollout.domain_B],
    )


def tally(group: int, num_domains: int, domain_B: jax.Array, grades: Grades, cost_P: jax.Array) -> DomainStats:
    """What the triage may see of P prompts of `group` graded samples each. Pure and jitted."""
    groups = (-1, group)
    grade_PG, reward_PG, valid_PG = (jnp.reshape(x, groups) for x in (grades.grade_B, grades.reward_B, grades.valid_B))
    return statistics(jnp.reshape(domain_B, groups)[:, 0], grade_PG, reward_PG, valid_PG, cost_P, num_domains)


def score(config: AlgorithmConfig, logp_fn, params, tokens_BT, mask_BT) -> jax.Array:
    """logp_BT of the sampled tokens, float32, micro-batch by micro-batch."""
    parts = grpo.microbatches((tokens_BT, mask_BT), config.microbatches, config.group_size)
    logp = jax.lax.map(lambda part: logp_fn(params, *part)[0], parts)
    groups = logp.reshape(config.microbatches, -1, config.group_size, tokens_BT.shape[1])
    return jnp.swapaxes(groups, 0, 1).reshape(tokens_BT.shape)
