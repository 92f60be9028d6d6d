"""Log-probabilities and entropies of given tokens without the [B, T, V] logits.

The head is applied to a few positions of all rows at a time, in float32, inside jax.checkpoint: the backward pass
recomputes each chunk's logits, so memory holds one chunk, forward and backward.

    logp(y) = z_y - logsumexp(z),  H = logsumexp(z) - sum softmax(z) z,  z = logits / temperature

What devices split stays split. Chunks run along T, and where T is split every chunk has positions of all its shards.
z_y is a sum in which all but one term are 0, not a lookup, for which a split vocabulary would have to be brought
together: of each sum over it, devices exchange one number a position.
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
    shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `token_BT` and entropy of the distribution it was drawn from.

    Args:
      unembed: hidden [..., E] -> float32 logits [..., V]; may close over parameters, gradients reach them.
      hidden_BTE: position t holds the state that predicts token_BT[:, t] (the caller shifts).
      temperature: > 0, divides the logits.
      max_logits: bound on the logits of one chunk, in elements, on all devices together.
      shards: into so many equal parts T is split over devices; divides T.

    Returns:
      (logp_BT, entropy_BT), float32. No gradient flows through the entropy unless the caller uses it.
    """
    chex.assert_rank([hidden_BTE, token_BT], [3, 2])
    rows, length = token_BT.shape
    vocab = jax.eval_shape(unembed, hidden_BTE[:, :1]).shape[-1]
    local = length // shards
    chunk = min(local, max(1, max_logits // (rows * shards * vocab)))
    chunks = -(-local // chunk)

    def split(x):  # [B, T, ...] -> [chunks, B, shards, chunk, ...]
        parts = x.reshape(rows, shards, local, *x.shape[2:])
        padded = jnp.pad(parts, [(0, 0), (0, 0), (0, chunks * chunk - local)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, shards, chunks, chunk, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def one_chunk(hidden_and_token):
        hidden, token = hidden_and_token
        logits = unembed(hidden).astype(jnp.float32) / temperature
        norm = jax.nn.logsumexp(logits, axis=-1)
        mean = jnp.sum(jnp.exp(logits - norm[..., None]) * logits, axis=-1)
        return entry(logits, token) - norm, norm - mean

    def join(x):
        return jnp.moveaxis(x, 0, 2).reshape(rows, shards, -1)[:, :, :local].reshape(rows, length)

    logp, entropy = jax.lax.map(one_chunk, (split(hidden_BTE), split(token_BT)))
    return join(logp), join(entropy)


def entry(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[..., index] of x [..., V], where V may be split over devices."""
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == index[..., None], x, 0), axis=-1)
