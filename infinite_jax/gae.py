"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438) and the critic's loss (1707.06347), pure.

    delta_t = r_t + discount V(s_t+1) - V(s_t),   A_t = delta_t + discount lambda A_t+1,   R_t = A_t + V(s_t)
    value loss = 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

Steps are the tokens that the policy generated: what the environment wrote between two of them belongs to the state. A
row ends after its last token, where V is 0; a row cut off at its limit ends there too.
"""

import chex
import jax
import jax.numpy as jnp

LEAST_SPREAD = 1e-4  # variance of rewards that are not all equal: a KL in the reward alone spreads them by less


def advantages(
    reward_BT: jax.Array, value_BT: jax.Array, mask_BT: jax.Array, discount: float, trace: float
) -> tuple[jax.Array, jax.Array]:
    """(advantage_BT, return_BT), float32; 0 outside the mask.

    Args:
      reward_BT: of a token; read inside the mask only.
      value_BT: V(s_t) before token t is written.
      mask_BT: bool, the tokens the policy generated.
      discount, trace: gamma and lambda, 0 to 1.
    """
    chex.assert_equal_shape([reward_BT, value_BT, mask_BT])

    def back(later, now):
        next_value_B, next_advantage_B = later
        reward_B, value_B, mask_B = now
        delta_B = reward_B + discount * next_value_B - value_B
        advantage_B = delta_B + discount * trace * next_advantage_B
        kept = jnp.where(mask_B, value_B, next_value_B), jnp.where(mask_B, advantage_B, next_advantage_B)
        return kept, jnp.where(mask_B, advantage_B, 0.0)

    zero_B = jnp.zeros(len(mask_BT), jnp.float32)
    steps = (reward_BT.astype(jnp.float32).T, value_BT.astype(jnp.float32).T, mask_BT.T)
    _, advantage_TB = jax.lax.scan(back, (zero_B, zero_B), steps, reverse=True)
    return advantage_TB.T, jnp.where(mask_BT, advantage_TB.T + value_BT, 0.0)


def whiten(advantage_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean 0 and deviation 1 over the masked tokens of the whole batch, float32; 0 outside."""
    weight_BT = mask_BT / jnp.maximum(mask_BT.sum(), 1)
    centred_BT = jnp.where(mask_BT, advantage_BT - jnp.sum(weight_BT * advantage_BT), 0.0)
    return centred_BT / (jnp.sqrt(jnp.sum(weight_BT * centred_BT**2)) + 1e-6)


def foresight(
    value_BT: jax.Array, outcome_BT: jax.Array, mask_BT: jax.Array, domain_B: jax.Array, num_domains: int
) -> tuple[jax.Array, jax.Array]:
    """Of each domain's tokens, f32[D]: sqrt(mean (G - V)^2), and the explained variance 1 - Var(G - V) / Var(G).

    G are the discounted rewards that came, which no value enters. 1 is a critic that knows them, 0 one that might as
    well be constant; NaN where the domain has no token, the second also where its rewards agree to a
    hundredth.
    """
    of_DB = domain_B == jnp.arange(num_domains)[:, None]

    def mean(x_BT):
        total_B, tokens_B = jnp.where(mask_BT, x_BT, 0.0).sum(1), mask_BT.sum(1)
        return jnp.where(of_DB, total_B, 0.0).sum(1) / jnp.where(of_DB, tokens_B, 0).sum(1)

    def variance(x_BT):
        return mean((x_BT - jnp.take(mean(x_BT), domain_B, mode="clip")[:, None]) ** 2)

    gap_BT, spread_D = outcome_BT - value_BT, variance(outcome_BT)
    return jnp.sqrt(mean(gap_BT**2)), 1 - variance(gap_BT) / jnp.where(spread_D > LEAST_SPREAD, spread_D, jnp.nan)


def value_loss(value_BT: jax.Array, old_BT: jax.Array, return_BT: jax.Array, clip: float) -> jax.Array:
    """Loss of each token, float32; clip in units of the return, 0 = not clipped."""
    loss_BT = (value_BT - return_BT) ** 2
    if clip > 0:
        near_BT = jnp.clip(value_BT, old_BT - clip, old_BT + clip)
        loss_BT = jnp.maximum(loss_BT, (near_BT - return_BT) ** 2)
    return 0.5 * loss_BT
