"""Log-probabilities of generated tokens under given parameters, for training: the same policy code as the rollout.

Only the positions from a row's first generated token on, `span` of them, go through the vocabulary: with long prompts
and short completions the head would otherwise be most of the work.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.logprob import token_logp
from models import policy
from models.architectures import DecoderConfig
from sharding.rules import constrain


def completion_logp(
    config: DecoderConfig, params, tokens_BT: jax.Array, loss_mask_BT: jax.Array, temperature: float, span: int
) -> tuple[jax.Array, jax.Array]:
    """(logp_BT, entropy_BT), float32; index t belongs to token t, 0 outside the mask.

    Args:
      loss_mask_BT: bool; its True positions of a row lie within `span` tokens of the first, and token 0 is never one.
      temperature: the sampler's.
      span: static, e.g. max_new_tokens.
    """
    length = tokens_BT.shape[1]
    tokens_BT = constrain(tokens_BT, "batch", "length")
    hidden_BTE = policy.hidden(config, params, tokens_BT)
    first_B1 = jnp.maximum(jnp.argmax(loss_mask_BT, axis=1, keepdims=True), 1)
    slot_BS = first_B1 + jnp.arange(min(span, length - 1))
    inside_BS = slot_BS < length
    slot_BS = jnp.minimum(slot_BS, length - 1)
    predictor_BSE = jnp.take_along_axis(hidden_BTE, (slot_BS - 1)[..., None], axis=1)
    target_BS = jnp.take_along_axis(tokens_BT, slot_BS, axis=1)
    chosen_BS = inside_BS & jnp.take_along_axis(loss_mask_BT, slot_BS, axis=1)
    unembed = functools.partial(policy.unembed, config, params)
    found = token_logp(unembed, predictor_BSE, target_BS, temperature)
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    # add, not set: slots beyond the row were clipped onto the last one and carry 0
    return tuple(jnp.zeros(tokens_BT.shape).at[rows_B1, slot_BS].add(jnp.where(chosen_BS, x, 0.0)) for x in found)
