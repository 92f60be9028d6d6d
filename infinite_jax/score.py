"""Log-probabilities of generated tokens under given parameters, for training: the same policy code as the rollout.

A prompt goes through the model once for all its samples, as in the rollout; their gradients meet in its keys and
values. Only completions go through the vocabulary. Where prompts are long and completions short, either would
otherwise be most of the work.
"""

import functools
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp

from kernels.logprob import token_logp
from models import policy
from models.architectures import DecoderConfig
from sharding.rules import constrain


@dataclass(frozen=True)
class Scorer:
    """completion_logp with what is static bound: equal ones are equal to jit, so that a second run compiles nothing."""

    decoder: DecoderConfig
    temperature: float
    span: int
    group: int

    def __call__(self, params, tokens_BT: jax.Array, loss_mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        lengths = (self.temperature, self.span, self.group)
        return completion_logp(self.decoder, params, tokens_BT, loss_mask_BT, *lengths)


def completion_logp(
    config: DecoderConfig,
    params,
    tokens_BT: jax.Array,
    loss_mask_BT: jax.Array,
    temperature: float,
    span: int,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """(logp_BT, entropy_BT), float32; index t belongs to token t, 0 outside the mask.

    Args:
      tokens_BT: rows p x group .. p x group + group - 1 begin with the same prompt, of 1 to T - span tokens.
      loss_mask_BT: bool; the True positions of a row, if it has any, begin right behind the prompt and lie within
        `span` tokens of it.
      temperature: the sampler's.
      span, group: static: max_new_tokens and group_size.
    """
    chex.assert_equal_shape([tokens_BT, loss_mask_BT])
    width = tokens_BT.shape[1] - span
    tokens_BT = constrain(tokens_BT, "batch", "length")
    # a row without a mask, not graded, has its prompt's length from the others; a group of such rows counts nowhere
    length_P = jnp.maximum(jnp.argmax(loss_mask_BT, axis=1).reshape(-1, group).max(axis=1), 1)
    hidden_PTE, prefix = policy.prefill(config, params, constrain(tokens_BT[::group, :width], "batch", "length"))
    slot_BS = jnp.repeat(length_P, group)[:, None] + jnp.arange(span)
    target_BS = jnp.take_along_axis(tokens_BT, slot_BS, axis=1)
    hidden_BSE = policy.extend(config, params, constrain(target_BS, "batch", "length"), prefix, length_P)
    last_PE = jnp.take_along_axis(hidden_PTE, (length_P - 1)[:, None, None], axis=1)
    predictor_BSE = jnp.concatenate([jnp.repeat(last_PE, group, axis=0), hidden_BSE[:, :-1]], axis=1)
    unembed = functools.partial(policy.unembed, config, params)
    found = token_logp(unembed, predictor_BSE, target_BS, temperature)
    chosen_BS = jnp.take_along_axis(loss_mask_BT, slot_BS, axis=1)
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    return tuple(jnp.zeros(tokens_BT.shape).at[rows_B1, slot_BS].set(jnp.where(chosen_BS, x, 0.0)) for x in found)
