"""What a block of attention is: the contract between kernels/ring_attention.py and the kernels that compute blocks.

    forward    s = scale q.k where seen,  lse = logsumexp_k s,  o = sum_k exp(s - lse) v
    backward   p = exp(s - lse),  dv = p^T do,  ds = p (do.v - delta) scale,  dq = ds k,  dk = ds^T q

The backward pass takes lse, o and delta = sum_d o do of the WHOLE row of keys, of which the block may be a part: summed
over its parts it is then exact (FlashAttention-2, arXiv 2307.08691; Ring Attention, 2310.01889).

Layouts: q, o, do [B, T, H, D]; k, v [B, S, K, D]; H = K x Q, the Q query heads of one key/value head adjacent; lse and
delta float32 [B, H, T]. Scores, softmax statistics and accumulators are float32, products run in the arrays' dtype. A
query that sees no key has o = 0, lse = MASKED and no gradient.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

MASKED = -1e30  # finite: a row that is masked as a whole must not turn into NaN


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lengths_B", "segments", "positions", "window"),
    meta_fields=("causal",),
)
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those that every field which is set allows. Integer arrays, without a gradient."""

    causal: bool = False  # query t sees keys s <= t; T = S. Not together with `positions`, which say it themselves
    lengths_B: jax.Array | None = None  # i32: key s of row b counts if s < lengths_B[b]; the rest is padding
    segments: tuple[jax.Array, jax.Array] | None = None  # i32 (q_BT, k_BS): seen where equal; packed rows
    positions: tuple[jax.Array, jax.Array] | None = None  # i32 (q_BT, k_BS): distance q - k >= 0 ...
    window: jax.Array | None = None  # ... and below this, i32[], 0 = no bound; only with `positions`


Forward = Callable[[jax.Array, jax.Array, jax.Array, Mask, float], tuple[jax.Array, jax.Array]]
# (q, k, v, mask, scale) -> o in q's dtype or float32, lse

Backward = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
# (q, k, v, o, lse, delta, do, mask, scale) -> dq, dk, dv, in their arrays' dtype or float32


class Block(NamedTuple):
    """A kernel. Hashable: a static argument."""

    name: str
    forward: Forward
    backward: Backward
