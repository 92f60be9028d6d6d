"""The rules that triage is compared with. Each gives log-shares up to a constant; weights multiply the shares in all.

    uniform            equal shares
    size_proportional  by training rows: plain training on a shuffled mixture of all data
    sequential         one domain after another, in order of arrival, then of the list
    single_signal      softmax(tau (1 - acc)): the method's later one-line plan; tau = 1 / temperature, floor mixed in
    p1p                p (1 - p): the variance of a pass, largest at one half
    sec                softmax(Q / T), Q <- a |A| + (1 - a) Q: Self-Evolving Curriculum, arXiv 2505.14970
    dump               softmax((|A| + sqrt(2 ln(N + 1) / (n + 1))) / T): DUMP, arXiv 2504.09710
    progress           |fast - slow average of the pass rate|: Teacher-Student Curriculum Learning, arXiv 1707.00183
    spaced             1 - 2^(-gap / half_life): what spaced repetition expects to be forgotten
    dynamic            equal shares, groups without a difference drawn again: DAPO, arXiv 2503.14476

What is theirs and what is ours. SEC: a bandit over categories with the mean absolute advantage of the step as reward,
a TD(0) update and a Boltzmann choice, Q = 0 at the start, are theirs; that a step's batch is apportioned by the shares
rather than drawn prompt by prompt is ours, as are the values of a and T in its file. DUMP: |A| normalised by the
group's deviation, averaged over the last 300 responses, the bonus counting responses, T = 0.1, are theirs (their code);
in place of the window stands an average with the memory of 39 groups (312 responses at eight a group). Teacher-Student:
choosing by the absolute slope of the learning curve, so that forgetting attracts practice too, is theirs; as slope they
use regressions or differences of returns, we the difference of two averages, and shares in proportion to it. DAPO: the
filter is the trainer's (Policy.resample), which charges what it throws away. spaced: see curriculum/feedback.py.

The advantage in sec and dump is GRPO's, divided by the deviation, up to 2 sqrt(p (1 - p)) for passes: on domains that
are all dead or all solved it is 0, on one whose reward is a coin it is 1 forever.
"""

import jax
import jax.numpy as jnp

from curriculum.config import CurriculumConfig
from curriculum.priorities import Priorities, summed
from curriculum.triage import TriageState

LEAST = 1e-6  # of a quantity that shares are proportional to, so that its logarithm stays finite


def base(config: CurriculumConfig, state: TriageState, score_D: jax.Array) -> Priorities:
    """A priority with no parts: shares w e^(score / temperature), times e^boost where a monitor gives one."""
    zero_D = jnp.zeros_like(score_D)
    return summed(zero_D, zero_D, zero_D, config.temperature * (state.base_log_w + state.boost) + score_D)


def uniform(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    return base(config, state, jnp.zeros_like(state.base_log_w))


def size_proportional(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    return base(config, state, jnp.log(jnp.maximum(state.size, LEAST)))


def in_turn(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> jax.Array:
    """bool[D], who is trained in this phase: the domain of the phase's rank, or the nearest rank that may be drawn.

    After the last phase the last domain stays. With phase_steps = 0, all that share the latest arrival.
    """
    if config.phase_steps == 0:
        return can_D & (state.arrives == jnp.max(jnp.where(can_D, state.arrives, -1)))
    index_D = jnp.arange(can_D.size)
    order_D = jnp.lexsort((index_D, state.arrives, ~state.active))  # eval-only domains last: they have no phase
    rank_D = jnp.zeros_like(index_D).at[order_D].set(index_D)
    away_D = jnp.abs(rank_D - state.step // config.phase_steps)
    return index_D == jnp.argmin(jnp.where(can_D, away_D, can_D.size + state.step))


def single_signal(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    return base(config, state, 1.0 - state.acc_ema)


def p1p(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    return base(config, state, jnp.log(state.acc_ema * (1 - state.acc_ema) + LEAST))


def sec(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    return base(config, state, state.value)


def dump(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    n_D = state.n_samples.astype(jnp.float32)
    return base(config, state, state.norm_adv + jnp.sqrt(2 * jnp.log1p(jnp.sum(n_D)) / (n_D + 1)))


def progress(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    return base(config, state, jnp.log(jnp.abs(state.fast_acc - state.acc_ema) + LEAST))


def spaced(config: CurriculumConfig, state: TriageState, can_D: jax.Array) -> Priorities:
    gap_D = state.step - state.last_seen_step
    forgotten_D = jnp.where(state.last_seen_step < 0, 1.0, -jnp.expm1(-jnp.log(2.0) * gap_D / state.half_life))
    return base(config, state, jnp.log(forgotten_D + LEAST))
