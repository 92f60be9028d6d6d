"""How a step's grades change what the scheduler knows.

With n groups of a domain in the step, m their mean pass rate, g and v the mean and variance of their grades:

    w    = 1 - (1 - beta)^n                    one group weighs beta, however many of a domain came together
    acc' = acc + w (m - acc)                   likewise zvf and adv
    mu'  = mu + w (g - mu),   var' = (1 - w) var + w v + w (1 - w) (g - mu)^2

which are the exact moments of the mixture (1 - w) old + w batch, so that var never leaves [0, (4 - mu)(mu - 1)]
(Bhatia and Davis 2000); that bound is also enforced, against rounding. A domain without a valid row in a step keeps
every leaf bit for bit, except last_tried_step, failures and the cost, which change when it was drawn.

A band is left only `hysteresis` beyond its threshold. A prompt's cost is averaged over all prompts drawn, the first
observation standing alone. Under difficulty=adaptive a domain whose level_min < level_max moves

    level' = clip(level + clip(rate n (m - 1/2), -1, 1), level_min, level_max)

which is stochastic approximation (Robbins and Monro 1951) of the level passed half the time, where a group says most;
the gain stays constant, since the learner moves too. A new rounded level is another task, so the drift detector starts
anew there.

The half-life of a domain's memory follows spaced repetition (Leitner's doubling and halving; half-life regression,
Settles and Meeder 2016, has recall 2^(-gap / half_life)). Ours: a review is a step with the domain in it, passed where
m reaches the bar, and one that came early teaches in proportion,

    passed: h' = h (1 + (growth - 1) min(1, gap / h))        lapse: h' = max(1, shrink h)

because a domain practised at every step would else reach the longest half-life within a few.

Left out: averages by visit or by response (by group, every domain forgets at the same rate per prompt spent on it).
"""

import chex
import jax
import jax.numpy as jnp

from curriculum import drift
from curriculum.config import GRADE_MAX, GRADE_MIN, CurriculumConfig
from curriculum.triage import DomainStats, TriageState, band_of

COUNTERS = ("last_seen_step", "visits", "n_prompts", "n_samples")  # leaves that say how much was seen, not what


def update(
    config: CurriculumConfig, state: TriageState, stats: DomainStats, mute_D: jax.Array | None = None
) -> TriageState:
    """The state after the step that was drawn at state.step; `stats` are already summed over all hosts.

    mute_D: bool[D], domains whose grades say nothing: they count as seen, and their averages stay.
    """
    chex.assert_equal_shape([state.acc_ema, *stats])
    chex.assert_type(list(stats), jnp.float32)
    seen_D = stats.n_groups > 0
    groups_D = jnp.maximum(stats.n_groups, 1.0)
    rate_D = stats.pass_sum / groups_D
    tried_D = seen_D | (stats.tried > 0)
    heard_D = seen_D if mute_D is None else seen_D & ~mute_D
    seen = {
        name: jnp.where(seen_D if name in COUNTERS else heard_D, new_D, getattr(state, name))
        for name, new_D in _seen(config, state, stats, rate_D, groups_D).items()
    }
    moved = state._replace(**seen)
    moved = drift.update(config.drift, moved, heard_D, rate_D, stats.pass_sq_sum / groups_D, groups_D)
    moved = drift.restart(moved, jnp.round(moved.level) != jnp.round(state.level))
    cost_D = stats.cost_sum / jnp.maximum(stats.tried, 1.0)
    known_D = jnp.where(state.cost_ema > 0, _average(config.beta, state.cost_ema, cost_D, stats.tried, None), cost_D)
    return moved._replace(
        step=state.step + 1,
        num_prompts=stats.tried.sum().astype(jnp.int32),
        last_tried_step=jnp.where(tried_D, state.step, state.last_tried_step),
        failures=jnp.where(seen_D, 0, state.failures + tried_D),
        cost_ema=jnp.where((stats.tried > 0) & (cost_D > 0) & jnp.isfinite(cost_D), known_D, state.cost_ema),
    )


def _seen(
    config: CurriculumConfig, state: TriageState, stats: DomainStats, rate_D: jax.Array, groups_D: jax.Array
) -> dict[str, jax.Array]:
    """What the leaves of a domain become that was seen. groups_D: its groups, 1 where there is none."""
    mean_D, variance_D = _grade_moments(config, state, stats)
    acc_D = _average(config.beta, state.acc_ema, rate_D, groups_D)
    norm_adv_D = stats.norm_adv_sum / groups_D
    return dict(
        acc_ema=acc_D,
        performance_band=jnp.clip(
            state.performance_band,
            band_of(config, acc_D, config.hysteresis),
            band_of(config, acc_D, -config.hysteresis),
        ),
        last_seen_step=jnp.broadcast_to(state.step, rate_D.shape),
        grade_mean=mean_D,
        grade_uncertainty=variance_D,
        zvf_ema=_average(config.beta, state.zvf_ema, stats.zero_var_sum / groups_D, groups_D),
        adv_ema=_average(config.beta, state.adv_ema, stats.abs_adv_sum / groups_D, groups_D, None),
        visits=state.visits + 1,
        n_prompts=state.n_prompts + stats.n_groups.astype(jnp.int32),
        n_samples=state.n_samples + stats.n_grades.astype(jnp.int32),
        fast_acc=_average(config.fast_beta, state.fast_acc, rate_D, groups_D),
        norm_adv=_window(config.beta, state.norm_adv, norm_adv_D, groups_D, state.n_prompts),
        value=state.value + config.value_rate * (norm_adv_D - state.value),
        half_life=_half_life(config, state, rate_D),
        level=_level(config, state, rate_D, groups_D),
    )


def _average(beta: float, old_D: jax.Array, new_D: jax.Array, n_D: jax.Array, most: float | None = 1.0) -> jax.Array:
    """Moving average in which each of the n groups behind new_D weighs beta; kept within [0, most]."""
    return jnp.clip(old_D - jnp.expm1(n_D * jnp.log1p(-beta)) * (new_D - old_D), 0.0, most)


def _window(beta: float, old_D: jax.Array, new_D: jax.Array, n_D: jax.Array, before_D: jax.Array) -> jax.Array:
    """The plain mean of the first groups, then the moving average: a sliding window's memory without its buffer."""
    w_D = jnp.maximum(-jnp.expm1(n_D * jnp.log1p(-beta)), n_D / (n_D + before_D))
    return old_D + w_D * (new_D - old_D)


def _grade_moments(config: CurriculumConfig, state: TriageState, stats: DomainStats) -> tuple[jax.Array, jax.Array]:
    """(mean, variance) of the mixture of old grades and this step's."""
    grades_D = jnp.maximum(stats.n_grades, 1.0)
    w_D = -jnp.expm1(jnp.maximum(stats.n_groups, 1.0) * jnp.log1p(-config.beta))
    mean_D = stats.grade_sum / grades_D
    variance_D = jnp.maximum(stats.grade_sq_sum / grades_D - mean_D**2, 0.0)
    gap_D = mean_D - state.grade_mean
    mu_D = jnp.clip(state.grade_mean + w_D * gap_D, GRADE_MIN, GRADE_MAX)
    mixed_D = (1 - w_D) * state.grade_uncertainty + w_D * variance_D + w_D * (1 - w_D) * gap_D**2
    return mu_D, jnp.clip(mixed_D, 0.0, (GRADE_MAX - mu_D) * (mu_D - GRADE_MIN))


def _half_life(config: CurriculumConfig, state: TriageState, rate_D: jax.Array) -> jax.Array:
    c, half_D = config.spaced, state.half_life
    gap_D = state.step - jnp.maximum(state.last_seen_step, state.arrives - 1)
    grown_D = half_D * (1 + (c.growth - 1) * jnp.minimum(gap_D / half_D, 1.0))
    return jnp.clip(jnp.where(rate_D >= c.bar, grown_D, half_D * c.shrink), 1.0, c.longest)


def _level(config: CurriculumConfig, state: TriageState, rate_D: jax.Array, groups_D: jax.Array) -> jax.Array:
    if config.difficulty == "fixed":
        return state.level
    move_D = jnp.clip(config.difficulty_rate * groups_D * (rate_D - 0.5), -1.0, 1.0)
    return jnp.clip(state.level + move_D, state.level_min, state.level_max)
