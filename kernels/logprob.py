"""Log-probabilities and entropies of given tokens without the [B, T, V] logits.

The head is applied to a few positions of all rows at a time, in float32, inside jax.checkpoint: the backward pass
recomputes each chunk's logits, so memory holds one chunk, forward and backward. Chunks run along T, so that a batch
split over devices stays split.

    logp(y) = z_y - logsumexp(z),  H = logsumexp(z) - sum softmax(z) z,  z = logits / temperature
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

MAX_LOGITS = 2**27  # elements of one chunk's logits: 512 MiB in float32


def token_logp(
    unembed: Callable[[jax.Array], jax.Array],
    hidden_BTE: jax.Array,
    token_BT: jax.Array,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `token_BT` and entropy of the distribution it was drawn from.

    Args:
      unembed: hidden [..., E] -> float32 logits [..., V]; may close over parameters, gradients reach them.
      hidden_BTE: position t holds the state that predicts token_BT[:, t] (the caller shifts).
      temperature: > 0, divides the logits.
      max_logits: bound on the logits of one chunk, in elements.

    Returns:
      (logp_BT, entropy_BT), float32. No gradient flows through the entropy unless the caller uses it.
    """
    chex.assert_rank([hidden_BTE, token_BT], [3, 2])
    rows, length = token_BT.shape
    vocab = jax.eval_shape(unembed, hidden_BTE[:, :1]).shape[-1]
    chunk = min(length, max(1, max_logits // (rows * vocab)))
    chunks = -(-length // chunk)

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(hidden_and_token):
        hidden_BCE, token_BC = hidden_and_token
        logits_BCV = unembed(hidden_BCE).astype(jnp.float32) / temperature
        norm_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        chosen_BC = jnp.take_along_axis(logits_BCV, token_BC[..., None], axis=-1)[..., 0]
        mean_BC = jnp.sum(jnp.exp(logits_BCV - norm_BC[..., None]) * logits_BCV, axis=-1)
        return chosen_BC - norm_BC, norm_BC - mean_BC

    logp, entropy = jax.lax.map(one_chunk, (split(hidden_BTE), split(token_BT)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length] for x in (logp, entropy))
