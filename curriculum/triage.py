"""Triage: what the scheduler knows of every domain, and what one step's grades say of it.

Each domain carries moving averages of its pass rate (a pass is a grade of 3 or 4), of its grades' mean and variance, of
the share of groups without any difference in reward, and of the absolute advantage. The pass rate puts it into a band:
low (acc < 0.4), medium (0.4 <= acc <= 0.8) or high (acc > 0.8). One step is

    DomainStats = statistics(a shard's grades); psum over shards; state' = update(state, DomainStats)

with update in curriculum/feedback.py. All policies keep this one state, whether they read a leaf or not, so that all
log the same curves and a checkpoint of one is a checkpoint of any.

A domain comes with its `arrives` and goes with its `retires` step; `grow` appends domains to a state in use and leaves
every bit of the others alone. Where a grader is down, a domain is drawn and gives nothing. Staleness therefore counts
from the last *try*, and after f failed tries in a row the domain rests for min(2^f - 1, backoff_cap) steps.

Left out: ring buffers of grades (ragged scatters; moments merge exactly for any number of groups and add over shards).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from curriculum.config import BANDS, GRADE_MAX, GRADE_MIN, GRADE_PASS, CurriculumConfig

MAX_VARIANCE = ((GRADE_MAX - GRADE_MIN) / 2) ** 2  # 2.25, half the rows at each end
ZERO_VARIANCE = 1e-8  # rewards of a group closer than this are equal: the group has no advantage
KEY_IMPL = "threefry2x32"  # named, so that a checkpoint's key_data means the same under any jax_default_prng_impl
KEY_STREAM = 0x74726961  # "tria": keeps these keys off those a trainer folds from the same seed
ATTEMPTS = 0x61747470  # "attp", no step: keeps the keys of a second attempt off those of the first
NEVER = 2**31 - 1  # a step no run reaches


class Roster(NamedTuple):
    """What a run says about its domains, all [D]."""

    weight: jax.Array  # f32, relative to one another; a weight not above 0 makes the domain inactive
    size: jax.Array  # f32, training rows
    active: jax.Array  # bool, False: evaluated only, or a free slot
    is_new: jax.Array  # bool, to be added to a trained model
    arrives: jax.Array  # i32, first step that may train on it
    retires: jax.Array  # i32, first step that no longer trains on it
    level: jax.Array  # f32, difficulty at the start
    level_min: jax.Array  # f32, equal to level_max: the level is fixed
    level_max: jax.Array  # f32


def roster(num_domains: int, **given) -> Roster:
    """A Roster of `num_domains`; a field may be given as anything that broadcasts to [D]."""
    fields = dict(weight=1.0, size=1.0, active=True, is_new=False, arrives=0, retires=NEVER)
    fields |= dict(level=1.0, level_min=1.0, level_max=1.0)
    dtypes = dict(active=bool, is_new=bool, arrives=jnp.int32, retires=jnp.int32)
    if unknown := given.keys() - fields.keys():
        raise ValueError(f"roster({', '.join(sorted(unknown))}=...): known are {', '.join(fields)}")
    fields |= given
    return Roster(
        *(jnp.broadcast_to(jnp.asarray(v, dtypes.get(k, jnp.float32)), num_domains) for k, v in fields.items())
    )


class TriageState(NamedTuple):
    """What the scheduler knows; plain arrays, replicated over hosts. D is static, free slots are inactive."""

    step: jax.Array  # i32[], the step about to be drawn; keys the draw
    num_prompts: jax.Array  # i32[], prompts drawn at the last step; 0 before the first. Says how long a round takes
    key_data: jax.Array  # u32[2], root key, never advanced: a resumed run draws the same
    new_share: jax.Array  # f32[], part of a batch for all new domains; read in an upgrade only (curriculum/upgrade.py)
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
    n_samples: jax.Array  # i32[D], valid rows; `dump` explores by it
    fast_acc: jax.Array  # f32[D], pass rate as acc_ema with the weight fast_beta; `progress` compares the two
    norm_adv: jax.Array  # f32[D], mean |reward - mean| / deviation over about the last 2 / beta groups; `dump`
    value: jax.Array  # f32[D], the same with the weight value_rate a step; `sec`
    half_life: jax.Array  # f32[D], steps until half is forgotten; `spaced`
    cost_ema: jax.Array  # f32[D], cost of a prompt in the unit of capacity; 0 = not known yet
    level: jax.Array  # f32[D], difficulty; the data's side rounds it
    level_min: jax.Array  # f32[D]
    level_max: jax.Array  # f32[D]
    ref_mean: jax.Array  # f32[D], slow reference of the pass rate, for the drift detector (curriculum/drift.py)
    ref_variance: jax.Array  # f32[D], of a group's pass rate around it
    ref_visits: jax.Array  # i32[D], visits since the reference began
    cusum: jax.Array  # f32[D], cumulative sum of shortfalls
    drift_left: jax.Array  # i32[D], visits for which a flag still stands; 0 = no flag
    drift_goal: jax.Array  # f32[D], pass rate before the fall that was flagged
    base_log_w: jax.Array  # f32[D], log of the configured weight
    boost: jax.Array  # f32[D], added to the priority by a monitor; 0 without one
    size: jax.Array  # f32[D], training rows
    active: jax.Array  # bool[D], False: evaluated only, weight 0, or a free slot
    is_new: jax.Array  # bool[D], a domain being added to a trained model
    arrives: jax.Array  # i32[D], first step at which the domain may be drawn
    retires: jax.Array  # i32[D], first step at which it may no longer be

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names of performance_band, on the host."""
        return tuple(BANDS[int(band)] for band in jax.device_get(self.performance_band))

    @property
    def drift_flag(self) -> jax.Array:
        """bool[D], the pass rate has fallen and is not back yet."""
        return self.drift_left > 0


SHARED = ("step", "num_prompts", "key_data", "new_share")  # leaves that are not a domain's


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
    pass_sq_sum: jax.Array  # of the squared pass rates of the groups
    cost_sum: jax.Array  # cost of the prompts drawn, in the unit of capacity
    norm_adv_sum: jax.Array  # of the groups' mean |reward - group mean| / deviation, 0 where all are equal


def statistics(
    domain_P: jax.Array,
    grade_PG: jax.Array,
    reward_PG: jax.Array,
    valid_PG: jax.Array,
    cost_P: jax.Array,
    num_domains: int,
) -> DomainStats:
    """Sums a domain of P groups of G responses; an index outside [0, num_domains) is padding and dropped.

    Rows that are not valid, or not finite, take no part. A group with at least one valid row counts. With exactly one
    it has nothing to compare and gives no gradient, so it counts as zero variance; its pass rate counts like any other.
    abs_adv is r - mean(r), never divided by the deviation: the figure stays comparable whatever normalisation the loss
    uses, and falls to 0 with the signal. The bandit baselines read norm_adv, the advantage that GRPO divides.

    Args:
      domain_P: i32[P]. grade_PG: f32[P, G] in [1, 4]. reward_PG: f32[P, G]. valid_PG: bool[P, G].
      cost_P: f32[P], what the G responses of each prompt cost: ones, tokens or seconds.
      num_domains: D, static.
    """
    chex.assert_rank([domain_P, grade_PG, reward_PG, valid_PG, cost_P], [1, 2, 2, 2, 1])
    chex.assert_equal_shape([grade_PG, reward_PG, valid_PG])
    valid_PG = valid_PG & jnp.isfinite(grade_PG) & jnp.isfinite(reward_PG)  # one NaN would stay in an average forever
    one_PG = valid_PG.astype(jnp.float32)
    grade_PG = jnp.where(valid_PG, grade_PG, 0.0).astype(jnp.float32)
    reward_PG = jnp.where(valid_PG, reward_PG, 0.0).astype(jnp.float32)

    rows_P = one_PG.sum(1)
    group_P = (rows_P > 0).astype(jnp.float32)
    rows1_P = jnp.maximum(rows_P, 1.0)
    passed_P = jnp.sum(grade_PG >= GRADE_PASS, axis=1) / rows1_P
    centred_PG = (reward_PG - (reward_PG.sum(1) / rows1_P)[:, None]) * one_PG
    abs_adv_P = jnp.sum(jnp.abs(centred_PG), axis=1) / rows1_P
    highest_P = jnp.max(jnp.where(valid_PG, reward_PG, -jnp.inf), axis=1)
    lowest_P = jnp.min(jnp.where(valid_PG, reward_PG, jnp.inf), axis=1)
    equal_P = group_P * (highest_P - lowest_P < ZERO_VARIANCE)
    deviation_P = jnp.sqrt(jnp.sum(centred_PG**2, axis=1) / rows1_P)
    norm_adv_P = jnp.where((group_P > equal_P), abs_adv_P / jnp.maximum(deviation_P, ZERO_VARIANCE), 0.0)

    columns = (group_P, passed_P, grade_PG.sum(1), (grade_PG**2).sum(1), rows_P, equal_P, abs_adv_P)
    columns += (jnp.ones_like(rows_P), passed_P**2, cost_P, norm_adv_P)
    columns_PS = jnp.stack(columns, axis=1).astype(jnp.float32)
    # no scatter: on a GPU it adds in any order, and processes must come to the same bits
    of_DP = domain_P == jnp.arange(num_domains)[:, None]
    return DomainStats(*jnp.where(of_DP[:, None], columns_PS.T, 0.0).sum(2).T)


def init(config: CurriculumConfig, seed, members: Roster) -> TriageState:
    """The state before step 0; `seed` is an int or i32[]."""
    chex.assert_rank(members.weight, 1)
    chex.assert_equal_shape(list(members))
    D = members.weight.shape[0]

    # every leaf is an array of its own, since a donated state may not hold one buffer twice
    members = Roster(*(jnp.array(field) for field in members))

    def full(value, dtype=jnp.float32):
        return jnp.full((D,), value, dtype)

    return TriageState(
        step=jnp.zeros((), jnp.int32),
        num_prompts=jnp.zeros((), jnp.int32),
        key_data=root_key(seed),
        new_share=jnp.zeros((), jnp.float32),
        acc_ema=full(config.acc_start),
        performance_band=band_of(config, full(config.acc_start)),
        last_seen_step=full(-1, jnp.int32),
        last_tried_step=full(-1, jnp.int32),
        failures=full(0, jnp.int32),
        grade_mean=full(config.grade_mean_start),
        grade_uncertainty=full(config.grade_variance_start),
        zvf_ema=full(0.0),  # a domain never sampled is taken to give signal
        adv_ema=full(1.0),  # the largest a reward in [0, 1] could suggest
        visits=full(0, jnp.int32),
        n_prompts=full(0, jnp.int32),
        n_samples=full(0, jnp.int32),
        fast_acc=full(config.acc_start),
        norm_adv=full(0.0),
        value=full(0.0),
        half_life=full(config.spaced.start),
        cost_ema=full(0.0),
        level=jnp.clip(members.level, members.level_min, members.level_max),
        level_min=members.level_min,
        level_max=members.level_max,
        ref_mean=full(config.acc_start),
        ref_variance=full(0.0),
        ref_visits=full(0, jnp.int32),
        cusum=full(0.0),
        drift_left=full(0, jnp.int32),
        drift_goal=full(config.acc_start),
        base_log_w=jnp.log(jnp.where(members.weight > 0, members.weight, 1.0)),
        boost=full(0.0),
        size=members.size,
        active=members.active & (members.weight > 0),
        is_new=members.is_new,
        arrives=members.arrives,
        retires=members.retires,
    )


def measured(config: CurriculumConfig, state: TriageState, rate_D: jax.Array) -> TriageState:
    """`state` before step 0, told pass rates; f32[D], NaN where there is none.

    A prior domain then counts as seen at step 0: nothing is owed to it yet. A new one is still to be tried.
    """
    known_D = ~jnp.isnan(rate_D)
    acc_D = jnp.where(known_D, rate_D, state.acc_ema)
    told = {name: jnp.array(acc_D) for name in ("acc_ema", "fast_acc", "ref_mean", "drift_goal")}
    seen_D = jnp.where(known_D & ~state.is_new, 0, state.last_seen_step)
    return state._replace(**told, performance_band=band_of(config, acc_D), last_seen_step=seen_D)


def root_key(seed, attempt: int = 0) -> jax.Array:
    """key_data of a run; attempt: how often the run has gone back to an earlier step so far."""
    key = jax.random.fold_in(jax.random.key(seed, impl=KEY_IMPL), KEY_STREAM)
    return jax.random.key_data(of_attempt(key, attempt))


def of_attempt(key: jax.Array, attempt: int) -> jax.Array:
    """`key` for the steps that are run again after so many ways back; itself at first."""
    return jax.random.fold_in(jax.random.fold_in(key, ATTEMPTS), attempt) if attempt else key


def grow(state: TriageState, config: CurriculumConfig, members: Roster) -> TriageState:
    """`state` with domains appended, as new ones start; step, key and the others' leaves bit for bit as before."""
    added = init(config, 0, members)
    return TriageState(
        *(
            old if name in SHARED else jnp.concatenate([old, new])
            for name, old, new in zip(state._fields, state, added, strict=True)
        )
    )


def band_of(config: CurriculumConfig, acc_D: jax.Array, beyond: float = 0.0) -> jax.Array:
    """i32[D] into BANDS, the thresholds raised by `beyond`; both thresholds themselves belong to medium."""
    return (acc_D >= config.low + beyond).astype(jnp.int32) + (acc_D > config.high + beyond).astype(jnp.int32)


def steps_waited(state: TriageState) -> jax.Array:
    """i32[D], whole steps since the domain was last tried, or since it could first have been: 0 right after a try."""
    since_D = jnp.maximum(jnp.maximum(state.last_seen_step, state.last_tried_step), state.arrives - 1)
    return jnp.maximum(state.step - since_D - 1, 0)


def never_tried(state: TriageState) -> jax.Array:
    """bool[D]"""
    return jnp.maximum(state.last_seen_step, state.last_tried_step) < 0


def drawable(config: CurriculumConfig, state: TriageState) -> jax.Array:
    """bool[D], the domains that may get prompts at this step: active, arrived, not retired, not resting after failures.

    If all that could be drawn are resting, none rests: a step is never without a domain. If no active domain has
    arrived, or all have retired (a configuration to refuse before a run), all active ones are drawable.
    """
    here_D = state.active & (state.step >= state.arrives) & (state.step < state.retires)
    doubled_D = jnp.left_shift(1, jnp.minimum(state.failures, 30))  # 2^31 is no i32
    rest_D = jnp.minimum(doubled_D - 1, config.backoff_cap)
    ready_D = here_D & (state.step - state.last_tried_step > rest_D)
    return jnp.where(ready_D.any(), ready_D, jnp.where(here_D.any(), here_D, state.active))
