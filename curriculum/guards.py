"""What keeps the band capacities from being spent badly; off in `faithful`, on in `recommended`.

    learnability   g_i = clip((1 - zvf_i) / .25, .05, 1) in the low band, else 1:  c_b <- c_b max g,  w_i <- w_i g_i
    monotone       r_b = c_b / N_b pooled over neighbours, weighted by N_b, until r_low >= r_medium >= r_high

A domain nothing of which is ever solved has no variance in its groups and so no gradient, yet the low band holds 60 %
of training for it. The first guard gives a wholly dead low band 5 % of its claim; one member that still learns keeps
the band's claim and takes it. High bands are left alone, since no variance means mastery there. The floor goes on
probing, so a domain that wakes up is found.

The second is isotonic regression by pooling adjacent violators (Ayer et al. 1955), for three bands in closed form:
without it the only medium domain gets 30 % while eighteen low ones share 60 %.
"""

import jax
import jax.numpy as jnp

from curriculum.config import BANDS
from curriculum.triage import TriageState

SIGNAL = 0.25  # share of groups with a difference at which a domain counts as learnable in full
LEAST = 0.05


def learnability(state: TriageState) -> jax.Array:
    """g_D in [.05, 1]: how much of its claim a domain keeps."""
    low_D = state.performance_band == BANDS.index("low")
    return jnp.where(low_D, jnp.clip((1 - state.zvf_ema) / SIGNAL, LEAST, 1.0), 1.0)


def monotone(ratio_3: jax.Array, weight_3: jax.Array) -> jax.Array:
    """The non-increasing r_3 nearest to ratio_3 in squares weighted by weight_3; without weight it means nothing.

    r_k = max over j >= k of min over i <= k of the mean of bands i..j, so that sum(weight r) is kept.
    """
    num = len(BANDS)

    def mean(i, j):
        weight = weight_3[i : j + 1]
        return jnp.sum(weight * ratio_3[i : j + 1]) / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)

    means = {(i, j): mean(i, j) for i in range(num) for j in range(i, num)}
    # an interval may end in an empty band: its mean is that of the interval without it, which is compared as well
    return jnp.stack(
        [
            jnp.max(jnp.stack([jnp.min(jnp.stack([means[i, j] for i in range(k + 1)])) for j in range(k, num)]))
            for k in range(num)
        ]
    )
