"""From shares to the domains of one batch.

The draw is systematic sampling over a random order of the domains: n_i prompts with |n_i - P p_i| < 1 and E n_i = P p_i
(largest remainders would never draw a domain with P p_i < 1/2; multinomial counts have many times the variance).
Every `single_every`-th step the whole batch is one domain, the one with the largest share (or one drawn by share); a
domain whose last try failed only if there is no other.

Shares are rounded to integers out of 2^30 and everything after is integer arithmetic. In float32 a cumulative sum is
neither monotone nor exact at its end, so repairs are needed and a domain of share 0 could be hit; here sums are exact
and it cannot. No sort is needed for the floor either (floor_project), which leaves the random order as the only cost
that grows faster than D; beyond MAX_SHUFFLED domains it is skipped. Rotating the order instead would change nothing:
the sampling points are evenly spaced on a circle and their phase is already uniform.

Systematic sampling bounds the counts of a step, not the gap between two visits. Reserved slots do: a domain never
tried, or not for `rounds` D / P + `steps` steps, gets a floor of one prompt, the longest waiting first, for at most
`share` of the batch. A share of 1 / P is a prompt for certain, so nothing but the shares changes, and counts still
follow them; a slot on top of the draw would give a domain of a large share one prompt more than its due.

Left out: prompts inside a domain (a cursor over shuffled rows, the data's side).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from curriculum.config import CurriculumConfig, ReservedConfig
from curriculum.triage import KEY_IMPL, TriageState, never_tried, steps_waited

UNITS = 1 << 30  # share 1 in integer units: i32 keeps headroom for P^2 beside it
MAX_PROMPTS = 1 << 14
MAX_SHUFFLED = 4096  # domains; beyond, shuffling them costs more than all the rest of the draw


class Draw(NamedTuple):
    domain_P: jax.Array  # i32[P], in random order, so that every slice of the batch is mixed
    counts_D: jax.Array  # i32[D], prompts of each domain
    p_D: jax.Array  # f32[D], the shares they were drawn from
    single: jax.Array  # bool[], the batch is one domain


def floor_project(q_D: jax.Array, floor_D: jax.Array) -> jax.Array:
    """p_i = max(floor_i, lambda q_i) with sum 1: the shares q, none below its floor; p = q if none is.

    Domains move to the floor in rounds, each with the lambda that the rest then needs (Michelot 1986 for the simplex).
    A round only lowers lambda, so no domain leaves the floor again and the rounds end: no sort, O(D) each.

    Args:
      q_D: f32[D], sums to 1. floor_D: f32[D], sums to less than 1; 0 where q must stay 0.
    """
    chex.assert_equal_shape([q_D, floor_D])

    def scale(low_D):
        rest = jnp.sum(jnp.where(low_D, 0.0, q_D))
        return (1.0 - jnp.sum(jnp.where(low_D, floor_D, 0.0))) / jnp.maximum(rest, jnp.finfo(jnp.float32).tiny)

    def move(carry):
        low_D, _ = carry
        next_D = low_D | (q_D * scale(low_D) < floor_D)
        return next_D, jnp.any(next_D != low_D)

    low_D, _ = jax.lax.while_loop(lambda carry: carry[1], move, (jnp.zeros(q_D.shape, bool), jnp.array(True)))
    return jnp.maximum(floor_D, q_D * jnp.where(low_D.any(), scale(low_D), 1.0))


def place(units_D: jax.Array, start: jax.Array, num_prompts: int) -> jax.Array:
    """i32[P], whose stretch each of P evenly spaced points falls on, the stretches laid end to end.

    Point k is floor((k total + start) / P) for total = sum of units: over all starts, domain i is hit exactly P units_i
    times. Exact integers, no overflow up to a total of UNITS and MAX_PROMPTS points.

    Args:
      units_D: i32[D], lengths of the stretches, 0 allowed. start: i32[] in [0, total), a larger one counts as the last.
    """
    ends_D = jnp.cumsum(units_D)
    total = ends_D[-1]
    quotient, remainder = total // num_prompts, total % num_prompts  # total = quotient P + remainder
    slot_P = jnp.arange(num_prompts)
    point_P = slot_P * quotient + (slot_P * remainder + jnp.minimum(start, total - 1)) // num_prompts
    return jnp.searchsorted(ends_D, point_P, side="right")


def systematic(key: jax.Array, p_D: jax.Array, num_prompts: int) -> jax.Array:
    """Domains of `num_prompts` slots, i32[P], with |n_i - P p_i| < 1 and E n_i = P p_i; 0 where p_i = 0.

    Both hold for the shares as rounded to 2^-30. `key` is consumed once. Raises ValueError beyond MAX_PROMPTS.
    """
    if not 1 <= num_prompts <= MAX_PROMPTS:
        raise ValueError(f"num_prompts={num_prompts}: a draw takes 1 to {MAX_PROMPTS} prompts; set algorithm.prompts")
    D = p_D.shape[0]
    shuffled = D if D <= MAX_SHUFFLED else 0
    bits = jax.random.bits(key, (1 + num_prompts + shuffled,))  # all that is random
    order_D = jnp.argsort(bits[1 + num_prompts :]) if shuffled else jnp.arange(D)
    units_D = jnp.round(p_D[order_D] * UNITS).astype(jnp.int32)
    start = ((bits[0] >> 8).astype(jnp.float32) * 2.0**-24 * units_D.sum()).astype(jnp.int32)  # float32 may round up
    place_P = jnp.minimum(place(units_D, start, num_prompts), D - 1)  # D only where every share is 0
    return order_D[place_P][jnp.argsort(bits[1 : 1 + num_prompts])]


def reserve(
    config: ReservedConfig, state: TriageState, p_D: jax.Array, can_D: jax.Array, num_prompts: int
) -> jax.Array:
    """p_D with at least one prompt for each of the longest waiting domains, as far as the reserved slots go."""
    rounds = can_D.sum() / num_prompts  # steps in which every domain could have had a prompt
    waited_D = steps_waited(state)
    due_D = can_D & (never_tried(state) | (waited_D > config.rounds * rounds + config.steps))
    cold = jnp.all(never_tried(state) | ~state.active)
    slots = jnp.where(cold, num_prompts - 1, min(int(config.share * num_prompts), num_prompts - 1))
    wait_D = jnp.where(due_D, jnp.where(never_tried(state), UNITS, waited_D), -1)
    least = jnp.sort(wait_D)[jnp.clip(wait_D.size - slots, 0, wait_D.size - 1)]  # wait of the last that gets a slot
    tied_D = wait_D == least
    room = slots - jnp.sum(wait_D > least)
    given_D = due_D & ((wait_D > least) | (tied_D & (jnp.cumsum(tied_D) <= room)))
    return floor_project(p_D, given_D * ((1 + 1e-5) / num_prompts))  # above 1 / P whatever is rounded


def draw_domains(
    config: CurriculumConfig, state: TriageState, p_D: jax.Array, can_D: jax.Array, num_prompts: int
) -> Draw:
    """The batch of state.step from shares p_D of the domains can_D; the same for the same state, on every host.

    The only randomness is fold_in(state's root key, step), consumed here and nowhere else.
    """
    chex.assert_equal_shape([p_D, state.acc_ema])
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data, impl=KEY_IMPL), state.step)
    key_mixed, key_tie = jax.random.split(key)
    if config.reserved.share > 0 and num_prompts > 1:
        p_D = reserve(config.reserved, state, p_D, can_D, num_prompts)
    domain_P = systematic(key_mixed, p_D, num_prompts)
    single = jnp.array(False)
    if config.single_every:
        single = (state.step + 1) % config.single_every == 0  # step 0 is mixed
        graded_D = (p_D > 0) & (state.failures == 0)  # a whole batch is not staked on a failing grader
        score_D = jnp.where(graded_D | ~graded_D.any(), p_D, -1.0)
        if config.single_rule == "argmax":
            tied_D = score_D >= score_D.max() * (1 - 1e-6)  # equal domains may differ in the last bit of exp
            chosen = jnp.argmax(jnp.where(tied_D, jax.random.uniform(key_tie, p_D.shape), -1.0))
        else:
            chosen = jax.random.categorical(key_tie, jnp.log(jnp.maximum(score_D, 0.0)))
        domain_P = jnp.where(single, chosen, domain_P)
    domain_P = domain_P.astype(jnp.int32)
    return Draw(domain_P, jnp.zeros(p_D.shape, jnp.int32).at[domain_P].add(1), p_D, single)
