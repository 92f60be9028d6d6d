"""The same draw one level down: which of a domain's prompts, by what the policy makes of each.

A policy shares a batch among domains; by default a domain then gives its prompts in a shuffled order, each once an
epoch. Here every prompt has a priority of its own instead. With a_i the pass rate of prompt i and e_i the prompts drawn
from its stream since i was last one of them, as a fraction of the stream's size (epochs waited):

    z_i = kappa_l (1 - a_i) + kappa_u 4 a_i (1 - a_i) + kappa_s (1 - exp(-e_i))
    q_i = exp(z_i) / sum over the stream,      p_i = f [i never drawn] / m + (1 - f) q_i

with e_i infinite for a prompt never drawn. A stream is one set of training rows, a domain's or one difficulty level of
it. 4 a (1 - a) is the variance of a pass or fail, 1 at one half: where the group-relative advantage is largest. m is
the number of prompts never drawn and f = min(unseen, m / n) for n draws: at least that part of a stream's draws goes to
prompts it has not shown yet, so that one epoch is covered within about 1 / unseen epochs of draws, whatever the
priorities say; with unseen = 1 the first epoch is a plain one. z is bounded, so that a prompt's weight never falls
below e^-(kappa_l + kappa_u + kappa_s) of the largest: nothing is ever left out for good.

    a_i' = a_i + w (m - a_i),    w = max(1 - (1 - beta)^k, k / (visits_i + 1))        k groups with mean pass rate m

that is a running mean, in which the 1/2 assumed of a new prompt counts as one group, that turns into a moving average.

The draw is that of sampler.py: n_s evenly spaced points with one random start on the stream's shares laid end to end,
found by binary search, all streams in one pass and in integers: n_i is within 1 of n_s p_i, E n_i = n_s p_i, and the
n_s are those of the domain draw. The prompts keep their order in the file, so that a batch spreads over a file that is
sorted by kind. Related: prioritized level replay (Jiang et al. 2021) mixes a score with staleness and unseen levels in
this way; its ranks are left out, since sorting costs more than the rest of the draw.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from curriculum.config import PromptConfig
from curriculum.sampler import MAX_PROMPTS, UNITS

ACC_START = 0.5  # pass rate assumed of a prompt never graded: the most uncertain one


class Layout(NamedTuple):
    """Which prompts belong together: those of stream s stand at start_S[s] .. start_S[s] + size_S[s] - 1."""

    stream_N: np.ndarray  # i32[N], ascending
    start_S: np.ndarray  # i32[S]
    size_S: np.ndarray  # i32[S], 0 allowed: such a stream is never drawn


class PromptState(NamedTuple):
    """What is known of every training prompt; plain arrays, N prompts in S streams."""

    draws: jax.Array  # i32[], calls of `draw` so far; a caller derives the key of the next one from it
    acc_ema: jax.Array  # f32[N], pass rate in [0, 1]
    visits: jax.Array  # i32[N], times drawn
    last_seen: jax.Array  # i32[N], drawn_S of its stream when it was last drawn; -1 = never
    drawn_S: jax.Array  # i32[S], prompts drawn from the stream so far


def layout(sizes: Sequence[int]) -> Layout:
    """The layout of streams with so many prompts each."""
    size_S = np.asarray(sizes, np.int32)
    stream_N = np.repeat(np.arange(len(size_S), dtype=np.int32), size_S)
    return Layout(stream_N, (np.cumsum(size_S) - size_S).astype(np.int32), size_S)


def init(where: Layout) -> PromptState:
    N, S = len(where.stream_N), len(where.size_S)
    return PromptState(
        draws=jnp.zeros((), jnp.int32),
        acc_ema=jnp.full((N,), ACC_START, jnp.float32),
        visits=jnp.zeros((N,), jnp.int32),
        last_seen=jnp.full((N,), -1, jnp.int32),
        drawn_S=jnp.zeros((S,), jnp.int32),
    )


def grow(state: PromptState, where: Layout) -> PromptState:
    """`state` with the prompts that `where` has at its end beyond those of `state`; all others stay as they are."""
    fresh = init(where)

    def longer(old, new):
        return jnp.concatenate([jnp.asarray(old), new[len(old) :]]) if new.ndim else old

    return jax.tree.map(longer, state, fresh)


def probabilities(config: PromptConfig, where: Layout, state: PromptState, counts_S: jax.Array) -> jax.Array:
    """p_N, f32[N]: the share of each prompt among counts_S[s] draws from its stream; sums to 1 in every stream."""
    chex.assert_equal_shape([state.acc_ema, where.stream_N])
    size_S = jnp.maximum(jnp.asarray(where.size_S), 1)

    total = functools.partial(_totals, where)
    never_N = state.visits == 0
    waited_N = (state.drawn_S[where.stream_N] - state.last_seen) / size_S[where.stream_N]
    stale_N = jnp.where(never_N, 1.0, -jnp.expm1(-waited_N))
    acc_N = state.acc_ema
    below_N = (  # how far each term stays below its largest value, so that no weight exceeds 1
        config.low_weight * acc_N
        + config.uncertainty_weight * (1 - 4 * acc_N * (1 - acc_N))
        + config.staleness_weight * (1 - stale_N)
    )
    weight_N = jnp.exp(-below_N)
    unseen_S = total(never_N.astype(jnp.float32))
    first_S = jnp.minimum(config.unseen, unseen_S / jnp.maximum(counts_S, 1))
    rest_S = (1 - first_S) / jnp.maximum(total(weight_N), jnp.finfo(jnp.float32).tiny)
    each_S = first_S / jnp.maximum(unseen_S, 1)
    return jnp.where(never_N, each_S[where.stream_N], 0.0) + rest_S[where.stream_N] * weight_N


def draw(
    config: PromptConfig, where: Layout, state: PromptState, key: jax.Array, stream_P: jax.Array
) -> tuple[jax.Array, PromptState]:
    """One prompt for every slot of a batch, from the slot's stream, and the state that counts them as drawn.

    Args:
      key: consumed once. stream_P: i32[P], streams that have prompts.

    Returns:
      (index_P i32[P] into the prompts, state). Raises ValueError beyond MAX_PROMPTS slots.
    """
    P, N, S = stream_P.shape[0], state.acc_ema.shape[0], state.drawn_S.shape[0]
    if not 1 <= P <= MAX_PROMPTS:
        raise ValueError(f"{P} prompts: a draw takes 1 to {MAX_PROMPTS}; set algorithm.prompts")
    counts_S = jnp.zeros((S,), jnp.int32).at[stream_P].add(1)
    p_N = probabilities(config, where, state, counts_S)
    # size / N of all units to each stream: the resolution is the same for every prompt, and the total fits in an i32
    units_N = jnp.round(p_N * (jnp.asarray(where.size_S)[where.stream_N] * (UNITS / N))).astype(jnp.int32)
    ends_N = jnp.cumsum(units_N)
    before_S = jnp.where(where.start_S > 0, ends_N[jnp.maximum(where.start_S - 1, 0)], 0)
    total_S = ends_N[jnp.maximum(where.start_S + where.size_S - 1, 0)] - before_S
    phase_S = (jax.random.bits(key, (S,)) >> 8).astype(jnp.float32) * 2.0**-24
    start_S = jnp.minimum((phase_S * total_S).astype(jnp.int32), total_S - 1)  # float32 may round up

    order_P = jnp.argsort(stream_P)  # stable: slots of one stream keep their order
    first_S = jnp.cumsum(counts_S) - counts_S
    rank_P = jnp.zeros((P,), jnp.int32).at[order_P].set(jnp.arange(P, dtype=jnp.int32) - first_S[stream_P[order_P]])
    n_P, total_P = counts_S[stream_P], total_S[stream_P]
    # floor((rank total + start) / n) without the product, which would overflow
    point_P = rank_P * (total_P // n_P) + (rank_P * (total_P % n_P) + start_S[stream_P]) // n_P
    index_P = jnp.searchsorted(ends_N, before_S[stream_P] + point_P, side="right").astype(jnp.int32)

    drawn_S = state.drawn_S + counts_S
    return index_P, state._replace(
        draws=state.draws + 1,
        visits=state.visits.at[index_P].add(1),
        last_seen=state.last_seen.at[index_P].set(drawn_S[stream_P]),
        drawn_S=drawn_S,
    )


def update(
    config: PromptConfig, state: PromptState, index_P: jax.Array, pass_P: jax.Array, valid_P: jax.Array
) -> PromptState:
    """The state after the groups of the drawn prompts were graded; groups that are not valid change nothing.

    Args:
      index_P: i32[P] of draw, a prompt may be there twice. pass_P: f32[P], pass rate of the group. valid_P: bool[P].
    """
    chex.assert_equal_shape([index_P, pass_P, valid_P])
    valid_P = valid_P & jnp.isfinite(pass_P)
    groups_PP = (index_P[:, None] == index_P) & valid_P  # of a slot's prompt, in all slots
    graded_P = groups_PP.sum(1).astype(jnp.float32)
    sum_P = jnp.where(groups_PP, pass_P, 0.0).sum(1)
    moving_P = 1 - (1 - config.beta) ** graded_P  # not by a logarithm: beta = 1 and no group at all is 0
    w_P = jnp.maximum(moving_P, graded_P / (state.visits[index_P] + 1))
    old_P = state.acc_ema[index_P]
    new_P = jnp.clip(old_P + w_P * (sum_P / jnp.maximum(graded_P, 1) - old_P), 0.0, 1.0)
    return state._replace(acc_ema=state.acc_ema.at[index_P].set(new_P))  # the same value for every copy of a prompt


def metrics(where: Layout, state: PromptState) -> dict[str, jax.Array]:
    """Arrays [S]: `covered`, the part of the stream's prompts drawn at least once, and `uncertainty`, mean 4 a (1 - a).

    NaN for a stream without prompts.
    """

    def mean(x_N):
        return jnp.where(where.size_S > 0, _totals(where, x_N) / jnp.maximum(where.size_S, 1), jnp.nan)

    return {
        "covered": mean((state.visits > 0).astype(jnp.float32)),
        "uncertainty": mean(4 * state.acc_ema * (1 - state.acc_ema)),
    }


def _totals(where: Layout, x_N: jax.Array) -> jax.Array:
    """f32[S], the sum of each stream, by a tree of sums that begins anew where a stream does.

    Not by a scatter, which on a GPU adds in any order: processes must come to the same draw.
    """
    begins_N = jnp.diff(where.stream_N, prepend=-1) != 0

    def combine(before, after):
        (sum_a, begins_a), (sum_b, begins_b) = before, after
        return jnp.where(begins_b, sum_b, sum_a + sum_b), begins_a | begins_b

    sums_N, _ = jax.lax.associative_scan(combine, (x_N, begins_N))
    last_S = jnp.maximum(where.start_S + where.size_S - 1, 0)
    return jnp.where(where.size_S > 0, sums_N[last_S], 0.0)
