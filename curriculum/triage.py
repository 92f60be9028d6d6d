"""Triage: what the scheduler knows of every domain, and how a step's grades change it.

Each domain carries moving averages of its pass rate (a pass is a grade of 3 or 4), of its grades' mean and variance, of
the share of groups without any difference in reward, and of the absolute advantage. The pass rate puts it into a band:
low (acc < 0.4), medium (0.4 <= acc <= 0.8) or high (acc > 0.8). One step is

    DomainStats = statistics(a shard's grades); psum over shards; state' = update(state, DomainStats)

With n groups of a domain in the step, m their mean pass rate, g and v the mean and variance of their grades:

    w    = 1 - (1 - beta)^n                    one group weighs beta, however many of a domain came together
    acc' = acc + w (m - acc)                   likewise zvf and adv
    mu'  = mu + w (g - mu),   var' = (1 - w) var + w v + w (1 - w) (g - mu)^2

which are the exact moments of the mixture (1 - w) old + w batch, so that var never leaves [0, (4 - mu)(mu - 1)]
(Bhatia and Davis 2000); that bound is also enforced, against rounding. A domain without a valid row in a step keeps
every leaf bit for bit, except last_tried_step and failures when it was drawn.

Where a grader is down, a domain is drawn and gives nothing. Staleness therefore counts from the last *try*, and after f
failed tries in a row the domain rests for min(2^f - 1, backoff_cap) steps.

Left out: ring buffers of grades (ragged scatters; the moments above merge exactly for any n and add over shards) and a
moving average by visit or by response (by group, every domain forgets at the same rate per prompt spent on it).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

BANDS = ("low", "medium", "high")
GRADE_MIN, GRADE_MAX, GRADE_PASS = 1.0, 4.0, 3.0
MAX_VARIANCE = ((GRADE_MAX - GRADE_MIN) / 2) ** 2  # 2.25, half the rows at each end
ZERO_VARIANCE = 1e-8  # rewards of a group closer than this are equal: the group has no advantage
KEY_IMPL = "threefry2x32"  # named, so that a checkpoint's key_data means the same under any jax_default_prng_impl
KEY_STREAM = 0x74726961  # "tria": keeps these keys off those a trainer folds from the same seed


@dataclass(frozen=True)
class TriageConfig:
    """Numbers of the scheduler, static under jit. Raises ValueError naming curriculum.<key> on an impossible value."""

    beta: float  # weight of one prompt group in the moving averages, in (0, 1]
    low: float  # band low is acc < low
    high: float  # band high is acc > high
    acc_start: float  # pass rate assumed of a domain never sampled
    grade_mean_start: float  # grade mean assumed of a domain never sampled, in [1, 4]
    grade_variance_start: float  # grade variance assumed of a domain never sampled, at most (4 - mean)(mean - 1)
    backoff_cap: int  # steps a domain rests at most after failed tries; 0 = no rest
    capacity: tuple[float, ...]  # shares of training of the bands low, medium, high; relative, an empty band drops out
    eta: float  # 1: a band's share is split among its members; 0: every domain has its band's weight; between: part-way
    strict: bool  # staleness and uncertainty shift shares inside a band only
    staleness_weight: float  # kappa_s: log of the largest gain from waiting
    staleness_steps: float  # tau_s: steps of waiting for 63 % of that gain
    uncertainty_weight: float  # kappa_u: log of the gain at the largest possible grade variance
    temperature: float  # of the softmax; other than 1 the bands no longer get exactly their capacity
    epsilon: float  # share spread as a floor over all drawable domains, in [0, 1)
    single_every: int  # every so many steps the whole batch is one domain; 0 = never

    def __post_init__(self):
        top = (GRADE_MAX - self.grade_mean_start) * (self.grade_mean_start - GRADE_MIN)
        positive = "must be a finite number above 0"
        checks = (
            ("beta", 0 < self.beta <= 1, "must be above 0 and at most 1, such as 0.05"),
            ("low", 0 <= self.low < self.high, f"must be at least 0 and below curriculum.high={self.high}"),
            ("high", self.low < self.high <= 1, f"must be above curriculum.low={self.low} and at most 1"),
            ("acc_start", 0 <= self.acc_start <= 1, "must be a pass rate, 0 to 1"),
            ("grade_mean_start", top >= 0, f"must be a grade, {GRADE_MIN:g} to {GRADE_MAX:g}"),
            (
                "grade_variance_start",
                0 <= self.grade_variance_start <= top,
                f"must be 0 to {top:g}, no grades vary more",
            ),
            ("backoff_cap", self.backoff_cap >= 0, "must be at least 0 steps (0 = no rest)"),
            ("capacity", len(self.capacity) == len(BANDS), "give three numbers, for low, medium and high"),
            ("capacity", all(0 < c < math.inf for c in self.capacity), "all three must be finite numbers above 0"),
            ("eta", 0 <= self.eta <= 1, "must be 0 to 1 (1 = bands get their capacity)"),
            ("staleness_weight", 0 <= self.staleness_weight < math.inf, "must be at least 0 (0 = off)"),
            ("staleness_steps", 0 < self.staleness_steps < math.inf, positive),
            ("uncertainty_weight", 0 <= self.uncertainty_weight < math.inf, "must be at least 0 (0 = off)"),
            ("temperature", 0 < self.temperature < math.inf, positive + " (1 = bands get their capacity)"),
            ("epsilon", 0 <= self.epsilon < 1, "must be at least 0 and below 1; it is shared by all domains"),
            ("single_every", self.single_every >= 0, "must be at least 0 steps (0 = never)"),
        )
        for key, possible, remedy in checks:
            if not possible:
                raise ValueError(f"curriculum.{key}={getattr(self, key)}: {remedy}")


class TriageState(NamedTuple):
    """What the scheduler knows; plain arrays, replicated over hosts. D is static, free slots are inactive."""

    step: jax.Array  # i32[], the step about to be drawn; keys the draw
    key_data: jax.Array  # u32[2], root key, never advanced: a resumed run draws the same
    acc_ema: jax.Array  # f32[D], pass rate in [0, 1]
    performance_band: jax.Array  # i32[D], index into BANDS
    last_seen_step: jax.Array  # i32[D], step of the last valid row; -1 = never
    last_tried_step: jax.Array  # i32[D], step of the last prompt drawn, graded or not; -1 = never
    failures: jax.Array  # i32[D], tries since the last valid row
    grade_mean: jax.Array  # f32[D], in [1, 4]
    grade_uncertainty: jax.Array  # f32[D], variance of the grades, in [0, 2.25]
    zvf_ema: jax.Array  # f32[D], share of groups whose rewards are all equal
    adv_ema: jax.Array  # f32[D], mean |reward - group mean|
    visits: jax.Array  # i32[D], steps with a valid row
    n_prompts: jax.Array  # i32[D], groups with a valid row; an integer, since f32 stops adding 1 at 2^24
    base_log_w: jax.Array  # f32[D], log of the configured weight
    boost: jax.Array  # f32[D], added to the priority by a monitor; 0 without one
    active: jax.Array  # bool[D], False: evaluated only, weight 0, or a free slot
    is_new: jax.Array  # bool[D], a domain being added to a trained model
    arrives: jax.Array  # i32[D], first step at which the domain may be drawn

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names of performance_band, on the host."""
        return tuple(BANDS[int(band)] for band in jax.device_get(self.performance_band))


class DomainStats(NamedTuple):
    """Sums over one step's rows, all f32[D]: those of two shards add, so one psum makes them global."""

    n_groups: jax.Array  # groups with a valid row
    pass_sum: jax.Array  # of the groups' pass rates
    grade_sum: jax.Array  # over valid rows
    grade_sq_sum: jax.Array  # over valid rows
    n_grades: jax.Array  # valid rows
    zero_var_sum: jax.Array  # groups whose valid rewards are all equal
    abs_adv_sum: jax.Array  # of the groups' mean |reward - group mean|
    tried: jax.Array  # prompts drawn, graded or not


def statistics(
    domain_P: jax.Array, grade_PG: jax.Array, reward_PG: jax.Array, valid_PG: jax.Array, num_domains: int
) -> DomainStats:
    """Sums a domain of P groups of G responses; an index outside [0, num_domains) is padding and dropped.

    Rows that are not valid, or not finite, take no part. A group with at least one valid row counts. With exactly one
    it has nothing to compare and gives no gradient, so it counts as zero variance; its pass rate counts like any other.
    The advantage here is r - mean(r), never divided by the deviation: the figure stays comparable whatever
    normalisation the loss uses, and falls to 0 with the signal.

    Args:
      domain_P: i32[P]. grade_PG: f32[P, G] in [1, 4]. reward_PG: f32[P, G]. valid_PG: bool[P, G].
      num_domains: D, static.
    """
    chex.assert_rank([domain_P, grade_PG, reward_PG, valid_PG], [1, 2, 2, 2])
    chex.assert_equal_shape([grade_PG, reward_PG, valid_PG])
    valid_PG = valid_PG & jnp.isfinite(grade_PG) & jnp.isfinite(reward_PG)  # one NaN would stay in an average forever
    one_PG = valid_PG.astype(jnp.float32)
    grade_PG = jnp.where(valid_PG, grade_PG, 0.0).astype(jnp.float32)
    reward_PG = jnp.where(valid_PG, reward_PG, 0.0).astype(jnp.float32)

    rows_P = one_PG.sum(1)
    group_P = (rows_P > 0).astype(jnp.float32)
    rows1_P = jnp.maximum(rows_P, 1.0)
    passed_P = jnp.sum(grade_PG >= GRADE_PASS, axis=1) / rows1_P
    mean_P = reward_PG.sum(1) / rows1_P
    abs_adv_P = jnp.sum(jnp.abs(reward_PG - mean_P[:, None]) * one_PG, axis=1) / rows1_P
    highest_P = jnp.max(jnp.where(valid_PG, reward_PG, -jnp.inf), axis=1)
    lowest_P = jnp.min(jnp.where(valid_PG, reward_PG, jnp.inf), axis=1)
    equal_P = group_P * (highest_P - lowest_P < ZERO_VARIANCE)

    columns = (group_P, passed_P, grade_PG.sum(1), (grade_PG**2).sum(1), rows_P, equal_P, abs_adv_P)
    columns_PS = jnp.stack([*columns, jnp.ones_like(rows_P)], axis=1).astype(jnp.float32)
    sums_DS = jax.ops.segment_sum(columns_PS, domain_P, num_segments=num_domains)
    return DomainStats(*sums_DS.T)


def band_of(config: TriageConfig, acc_D: jax.Array) -> jax.Array:
    """i32[D] into BANDS; both thresholds belong to medium."""
    return (acc_D >= config.low).astype(jnp.int32) + (acc_D > config.high).astype(jnp.int32)


def steps_waited(state: TriageState) -> jax.Array:
    """i32[D], whole steps since the domain was last tried, or since it could first have been: 0 right after a try."""
    since_D = jnp.maximum(jnp.maximum(state.last_seen_step, state.last_tried_step), state.arrives - 1)
    return jnp.maximum(state.step - since_D - 1, 0)


def drawable(config: TriageConfig, state: TriageState) -> jax.Array:
    """bool[D], the domains that may get prompts at this step: active, arrived, and not resting after failed tries.

    If all that have arrived are resting, none rests: a step is never without a domain. If no active domain has arrived
    (a configuration to refuse before a run) all active ones are drawable.
    """
    here_D = state.active & (state.step >= state.arrives)
    doubled_D = jnp.left_shift(1, jnp.minimum(state.failures, 30))  # 2^31 is no i32
    rest_D = jnp.minimum(doubled_D - 1, config.backoff_cap)
    ready_D = here_D & (state.step - state.last_tried_step > rest_D)
    return jnp.where(ready_D.any(), ready_D, jnp.where(here_D.any(), here_D, state.active))


@dataclass(frozen=True)
class TriageStateManager:
    """Makes the state and moves it on; pure, holds only the static configuration."""

    config: TriageConfig

    def init(self, seed, weights_D, active_D, is_new_D, arrives_D) -> TriageState:
        """The state before step 0.

        Args:
          seed: int or i32[]. weights_D: f32[D] relative to one another; a weight that is not above 0 makes the domain
          inactive. active_D: bool[D]. is_new_D: bool[D]. arrives_D: i32[D], steps.
        """
        weights_D, arrives_D = jnp.asarray(weights_D, jnp.float32), jnp.asarray(arrives_D, jnp.int32)
        active_D, is_new_D = jnp.asarray(active_D, bool), jnp.asarray(is_new_D, bool)
        chex.assert_rank(weights_D, 1)
        chex.assert_equal_shape([weights_D, active_D, is_new_D, arrives_D])
        D = weights_D.shape[0]
        root = jax.random.fold_in(jax.random.key(seed, impl=KEY_IMPL), KEY_STREAM)

        def full(value, dtype=jnp.float32):
            return jnp.full((D,), value, dtype)

        acc_D, never_D = full(self.config.acc_start), full(-1, jnp.int32)
        return TriageState(
            step=jnp.zeros((), jnp.int32),
            key_data=jax.random.key_data(root),
            acc_ema=acc_D,
            performance_band=band_of(self.config, acc_D),
            last_seen_step=never_D,
            last_tried_step=full(-1, jnp.int32),  # an array of its own: a donated state may not hold one buffer twice
            failures=full(0, jnp.int32),
            grade_mean=full(self.config.grade_mean_start),
            grade_uncertainty=full(self.config.grade_variance_start),
            zvf_ema=full(0.0),  # a domain never sampled is taken to give signal
            adv_ema=full(1.0),  # the largest a reward in [0, 1] could suggest
            visits=full(0, jnp.int32),
            n_prompts=full(0, jnp.int32),
            base_log_w=jnp.log(jnp.where(weights_D > 0, weights_D, 1.0)),
            boost=full(0.0),
            active=active_D & (weights_D > 0),
            is_new=is_new_D,
            arrives=arrives_D,
        )

    def update(self, state: TriageState, stats: DomainStats) -> TriageState:
        """The state after the step that was drawn at state.step; `stats` are already summed over all hosts."""
        chex.assert_equal_shape([state.acc_ema, *stats])
        chex.assert_type(stats, jnp.float32)
        seen_D = stats.n_groups > 0
        groups_D, grades_D = jnp.maximum(stats.n_groups, 1.0), jnp.maximum(stats.n_grades, 1.0)
        w_D = -jnp.expm1(groups_D * jnp.log1p(-self.config.beta))

        def ema(old_D, new_D, most=None):
            return jnp.where(seen_D, jnp.clip(old_D + w_D * (new_D - old_D), 0.0, most), old_D)

        acc_D = ema(state.acc_ema, stats.pass_sum / groups_D, 1.0)
        mean_D = stats.grade_sum / grades_D
        variance_D = jnp.maximum(stats.grade_sq_sum / grades_D - mean_D**2, 0.0)
        gap_D = mean_D - state.grade_mean
        mu_D = jnp.clip(state.grade_mean + w_D * gap_D, GRADE_MIN, GRADE_MAX)
        mixed_D = (1 - w_D) * state.grade_uncertainty + w_D * variance_D + w_D * (1 - w_D) * gap_D**2
        mixed_D = jnp.clip(mixed_D, 0.0, (GRADE_MAX - mu_D) * (mu_D - GRADE_MIN))
        tried_D = seen_D | (stats.tried > 0)
        return state._replace(
            step=state.step + 1,
            acc_ema=acc_D,
            performance_band=jnp.where(seen_D, band_of(self.config, acc_D), state.performance_band),
            last_seen_step=jnp.where(seen_D, state.step, state.last_seen_step),
            last_tried_step=jnp.where(tried_D, state.step, state.last_tried_step),
            failures=jnp.where(seen_D, 0, state.failures + tried_D),
            grade_mean=jnp.where(seen_D, mu_D, state.grade_mean),
            grade_uncertainty=jnp.where(seen_D, mixed_D, state.grade_uncertainty),
            zvf_ema=ema(state.zvf_ema, stats.zero_var_sum / groups_D, 1.0),
            adv_ema=ema(state.adv_ema, stats.abs_adv_sum / groups_D),
            visits=state.visits + seen_D,
            n_prompts=state.n_prompts + stats.n_groups.astype(jnp.int32),
        )

    def metrics(self, state: TriageState, p_D: jax.Array) -> dict[str, jax.Array]:
        """Per-domain arrays [D] for a log, all finite; `p_D` are the shares of the draw they stand beside."""
        return {
            "acc_ema": state.acc_ema,
            "share": p_D,
            "band": state.performance_band,
            "staleness": steps_waited(state),  # steps
            "uncertainty": state.grade_uncertainty / MAX_VARIANCE,  # in [0, 1]
            "zvf_ema": state.zvf_ema,
            "adv_ema": state.adv_ema,
        }
