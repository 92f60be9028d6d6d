"""Whether a pass rate has fallen: the tests of the monitor, and the drops they can see.

Unpaired: M0 passed K of N prompts, the model k of n. With p = (K + k) / (N + n)

    drop = K/N - k/n        se = sqrt(p (1 - p) (1/N + 1/n))        z = drop / se

Paired, McNemar's test: n prompts that both answered, one verdict each. Of those whose verdicts differ, X ~ Bin(lost +
gained, 1/2) were lost if nothing has changed; z is the normal quantile of its one-sided p, exact or mid-p, and

    drop = (lost - gained) / n        se = sqrt(lost + gained - (lost - gained)^2 / n) / n

The prompt is what is independent. Several samples of one are not, so N and n count prompts; where the two proportions
come from the same prompts, they are correlated and the unpaired test errs on the side of no alarm.

Sources: McNemar 1947 (Psychometrika 12:153); Fagerland, Lydersen and Laake 2013 (BMC Med. Res. Methodol. 13:91) for
mid-p; Connor 1987 (Biometrics 43:207) for its numbers of prompts, here without his smaller error under the drop.

Left out: tests for few prompts with a pass rate near 0 or 1 (Fisher's, Boschloo's); there use the paired test.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.scipy.special import betainc, ndtri
from scipy.special import ndtri as ndtri_host


def threshold(alpha: float, num_prior: jax.Array) -> jax.Array:
    """z_a = Phi^-1(1 - alpha / D') f32[]; 0 where alpha / D' is above a half."""
    return -ndtri(jnp.minimum(alpha / jnp.maximum(num_prior, 1), 0.5))


def two_proportions(
    K_D: jax.Array, N_D: jax.Array, k_D: jax.Array, n_D: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(drop, se, z), all f32[D], from f32[D] passes and prompts of M0 and of the model; finite where N or n is 0."""
    N_D, n_D = jnp.maximum(N_D, 1e-6), jnp.maximum(n_D, 1e-6)
    drop_D, pooled_D = K_D / N_D - k_D / n_D, (K_D + k_D) / (N_D + n_D)
    error_D = jnp.sqrt(jnp.maximum(pooled_D * (1 - pooled_D), 0.0) * (1 / N_D + 1 / n_D))
    return drop_D, error_D, drop_D / jnp.maximum(error_D, 1e-6)  # no error, no drop: all passed, or none, in both


def paired(
    lost_D: jax.Array, gained_D: jax.Array, n_D: jax.Array, midp: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(drop, se, z), all f32[D], from [D] prompts; z is cut to what f32 holds, about -5 to 13."""
    lost_D, gained_D = jnp.asarray(lost_D, jnp.float32), jnp.asarray(gained_D, jnp.float32)
    n_D, net_D = jnp.maximum(n_D, 1.0), lost_D - gained_D
    error_D = jnp.sqrt(jnp.maximum(lost_D + gained_D - net_D**2 / n_D, 0.0)) / n_D
    info = jnp.finfo(jnp.float32)
    return net_D / n_D, error_D, -ndtri(jnp.clip(mcnemar(lost_D, gained_D, midp), info.tiny, 1 - info.eps))


def mcnemar(lost_D: jax.Array, gained_D: jax.Array, midp: bool) -> jax.Array:
    """f32[D]: P(X >= lost), X ~ Bin(lost + gained, 1/2); mid-p takes half of P(X = lost) off.

    P(X >= x) of m is the regularised incomplete beta function at 1/2 of (x, m - x + 1).
    """
    lost_D, gained_D = jnp.asarray(lost_D, jnp.float32), jnp.asarray(gained_D, jnp.float32)
    at_least_D = jnp.where(lost_D > 0, betainc(jnp.maximum(lost_D, 1.0), gained_D + 1, 0.5), 1.0)
    if not midp:
        return at_least_D
    more_D = jnp.where(gained_D > 0, betainc(lost_D + 1, jnp.maximum(gained_D, 1.0), 0.5), 0.0)
    return (at_least_D + more_D) / 2


def disagreements(
    domain_P: jax.Array, before_PS: jax.Array, now_PS: jax.Array, num_domains: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(n_D, lost_D, gained_D), i32: prompts with a verdict on both sides; those only M0, and only the model passed.

    Several samples of a prompt give one verdict, passed where at least half of the valid ones are. A domain outside
    [0, num_domains) is padding. Both sides need the same number of samples: a majority of many passes another share of
    the prompts than one sample does, which would read as a drop or hide one.

    Args:
      domain_P: i32[P]. before_PS, now_PS: f32[P, S], 1 passed, 0 failed, NaN no grade.
    """
    chex.assert_rank([domain_P, before_PS], [1, 2])
    chex.assert_equal_shape([before_PS, now_PS])

    def verdict(passed_PS):
        valid_PS = ~jnp.isnan(passed_PS)
        return 2 * jnp.where(valid_PS, passed_PS, 0).sum(1) >= valid_PS.sum(1), valid_PS.any(1)

    (before_P, valid0_P), (now_P, valid_P) = verdict(before_PS), verdict(now_PS)
    both_P = valid0_P & valid_P
    columns_P3 = jnp.stack([both_P, both_P & before_P & ~now_P, both_P & ~before_P & now_P], axis=1)
    return tuple(jax.ops.segment_sum(columns_P3.astype(jnp.int32), domain_P, num_segments=num_domains).T)


def detectable_drop(
    n: float, N: float, num_prior: int, alpha: float, delta: float, variance: float, power: float
) -> float:
    """The smallest drop that one evaluation calls a violation with probability `power`, by the normal approximation:

        max(delta, z_a se) + Phi^-1(power) se        se = sqrt(variance (1/n + 1/N))

    `variance` is that of one prompt's verdict, p (1 - p), at most 1/4. For McNemar's test give the share of prompts
    whose verdicts differ, and N = inf.
    """
    error = math.sqrt(variance * (1 / n + 1 / N))
    return max(delta, _quantile(alpha, num_prior) * error) + float(ndtri_host(power)) * error


def prompts_needed(
    drop: float, ratio: float, num_prior: int, alpha: float, delta: float, variance: float, power: float
) -> int:
    """The fewest prompts n, with N = ratio n for M0, for which detectable_drop is at most `drop`; power at least 1/2.

    Raises ValueError where `drop` is not above `delta`: no number of prompts makes it a violation.
    """
    if drop <= delta:
        raise ValueError(f"drop={drop}: at most delta={delta} is never a violation, ask for more than that")
    z = float(ndtri_host(power))
    error = min(drop / max(_quantile(alpha, num_prior) + z, 1e-9), (drop - delta) / max(z, 1e-9))
    return max(1, math.ceil(variance * (1 + 1 / ratio) / error**2 - 1e-6))  # rounding must not add a prompt


def _quantile(alpha: float, num_prior: int) -> float:
    return -float(ndtri_host(min(alpha / max(num_prior, 1), 0.5)))
