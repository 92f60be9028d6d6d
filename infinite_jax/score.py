"""Log-probabilities and values of generated tokens, for training: the same policy code as the rollout.

A prompt goes through the model once for all its samples, as in the rollout; their gradients meet in its keys and
values. Only completions go through the vocabulary. Where prompts are long and completions short, either would
otherwise be most of the work.

A completion's row begins with the prompt's last token, which predicts its first; the prompt goes without it. So every
prediction lies where its own token belongs, and no hidden state moves between the devices that split a row.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np

from infinite_jax import critic
from infinite_jax.types import Roles
from models import lora, policy
from models.architectures import DecoderConfig
from models.layout import copies, padded, positions
from sharding.rules import constrain


@dataclass(frozen=True)
class Scorer:
    """The functions below with what is static bound: equal ones are equal to jit, so a second run compiles nothing."""

    decoder: DecoderConfig
    temperature: float
    span: int
    group: int

    def __call__(self, params, tokens_BT: jax.Array, loss_mask_BT: jax.Array) -> tuple[jax.Array, ...]:
        """(logp_BT, entropy_BT); with the parameters of both Roles value_BT, too."""
        score = judged_logp if isinstance(params, Roles) else completion_logp
        return score(self.decoder, params, tokens_BT, loss_mask_BT, self.temperature, self.span, self.group)

    def over(self, base):
        """The same as a function of the adapters of a frozen `base`, alone or as the actor of Roles; None: as it is."""
        if base is None:
            return self

        def scored(params, *rows):
            if isinstance(params, Roles):
                return self(params._replace(actor=lora.join(self.decoder, base, params.actor)), *rows)
            return self(lora.join(self.decoder, base, params), *rows)

        return scored


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
    hidden_BSE, target_BS, placed = _read(config, params, tokens_BT, loss_mask_BT, span, group)
    return tuple(map(placed, policy.token_logp(config, params, hidden_BSE, target_BS, temperature)))


def judged_logp(
    config: DecoderConfig,
    roles: Roles,
    tokens_BT: jax.Array,
    loss_mask_BT: jax.Array,
    temperature: float,
    span: int,
    group: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logp_BT, entropy_BT, value_BT): as completion_logp by the actor, and the critic's value before each token.

    A critic that is a head reads what the actor's pass leaves, and sends no gradient back.
    """
    read = (tokens_BT, loss_mask_BT, span, group)
    hidden_BSE, target_BS, placed = _read(config, roles.actor, *read)
    logp_BS, entropy_BS = policy.token_logp(config, roles.actor, hidden_BSE, target_BS, temperature)
    if "trunk" in roles.critic:
        hidden_BSE, _, _ = _read(critic.trunk_config(config), roles.critic["trunk"], *read)
    else:
        hidden_BSE = jax.lax.stop_gradient(hidden_BSE)
    return tuple(map(placed, (logp_BS, entropy_BS, critic.values(roles.critic["head"], hidden_BSE))))


def _read(config: DecoderConfig, params, tokens_BT, loss_mask_BT, span: int, group: int):
    """Of each prediction in a completion: the hidden state [B, S, E], its token [B, S], and a function from [B, S] to
    [B, T], 0 outside the mask."""
    chex.assert_equal_shape([tokens_BT, loss_mask_BT])
    rows, width = tokens_BT.shape[0], tokens_BT.shape[1] - span
    # a row without a mask, not graded, has its prompt's length from the others; a group of such rows counts nowhere
    length_P = jnp.maximum(jnp.argmax(loss_mask_BT, axis=1).reshape(-1, group).max(axis=1), 1)
    repeats = copies(len(length_P), rows)
    length_P, group = jnp.repeat(length_P, repeats), group // repeats
    length_B1 = jnp.repeat(length_P, group)[:, None]
    ahead_P = length_P - 1  # the last token of a prompt leads the completion, whose first token it predicts
    prompt_PT = jnp.pad(tokens_BT[::group, :width], ((0, 0), (0, padded(width) - width)))[:, positions(padded(width))]
    _, prefix = policy.prefill(config, params, constrain(prompt_PT, "batch", "length"))
    slot_BS = length_B1 + positions(padded(span))  # of each prediction's token; past the row's end where T is padded
    input_BS, target_BS = (jnp.take_along_axis(tokens_BT, slot_BS - back, axis=1, mode="clip") for back in (1, 0))
    hidden_BSE = policy.extend(config, params, constrain(input_BS, "batch", "length"), prefix, ahead_P)
    natural = np.argsort(positions(padded(span)))[:span]
    slot_BS = length_B1 + np.arange(span)
    chosen_BS = jnp.take_along_axis(loss_mask_BT, slot_BS, axis=1)

    empty_BT = jnp.zeros(tokens_BT.shape)

    def placed(x_BS):
        x_BS = constrain(x_BS[:, natural], "batch", None)
        # row by row, which tells the compiler that no row goes to another device
        return jax.vmap(lambda row, slot, x: row.at[slot].set(x))(empty_BT, slot_BS, jnp.where(chosen_BS, x_BS, 0.0))

    return hidden_BSE, constrain(target_BS, "batch", "length"), placed
