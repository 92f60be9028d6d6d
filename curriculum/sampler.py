"""From the triage state to the domains of one batch: priorities, shares, and a draw.

    priority  z_i = [log c_b - eta log N_b] + [kappa_s S_i] + [kappa_u U_i] + [log w_i + boost_i]        b = band(i)
                     band                      staleness      uncertainty      base
    q = softmax(z / T) over drawable domains,   p_i = max(eps_i, lambda q_i)

with S_i = 1 - exp(-waited_i / tau_s) (1 if never tried), U_i = grade variance / 2.25, N_b = sum of w over band b (of
w e^(kappa_s S + kappa_u U) if `strict`) and eps_i = epsilon / number of drawable domains.

The method states two things that the plain sum of its terms inside a softmax cannot both keep: priority = band +
staleness + uncertainty + base, and 60 / 30 / 10 % of training for the bands. In log units they agree: where the
staleness and uncertainty terms are equal (or `strict`), eta = T = 1 and no floor binds, sum_{i in b} p_i = c_b / sum of
c over non-empty bands, exactly, however many domains a band has. The method's `softmax(priorities + epsilon)` adds a
constant that a softmax cancels; the floor is what the constant was for.

The draw is systematic sampling over a random order of the domains: n_i prompts with |n_i - P p_i| < 1 and E n_i = P p_i
(largest remainders would never draw a domain with P p_i < 1/2; multinomial counts have many times the variance).
Every `single_every`-th step the whole batch is the domain with the largest share, a domain whose last try failed only
if there is no other.

Shares are rounded to integers out of 2^30 and everything after is integer arithmetic. In float32 a cumulative sum is
neither monotone nor exact at its end, so repairs are needed and a domain of share 0 could be hit; here sums are exact
and it cannot. No sort is needed for the floor either (floor_project), which leaves the random order as the only cost
that grows faster than D; beyond MAX_SHUFFLED domains it is skipped. Rotating the order instead would change nothing:
the sampling points are evenly spaced on a circle and their phase is already uniform.

Left out: prompts inside a domain (a cursor over shuffled rows, the data's side) and bounds on the gap between two
visits (systematic sampling bounds the counts of a step, not gaps; the staleness term and the floor keep gaps finite).
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from curriculum.triage import (
    BANDS,
    KEY_IMPL,
    MAX_VARIANCE,
    TriageConfig,
    TriageState,
    drawable,
    steps_waited,
)

UNITS = 1 << 30  # share 1 in integer units: i32 keeps headroom for P^2 beside it
MAX_PROMPTS = 1 << 14
MAX_SHUFFLED = 4096  # domains; beyond, shuffling them costs more than all the rest of the draw


class Priorities(NamedTuple):
    """The terms of the priority, f32[D] in log units; those of a domain that is not drawable mean nothing."""

    total_D: jax.Array  # the sum of the four
    band_D: jax.Array
    staleness_D: jax.Array
    uncertainty_D: jax.Array
    base_D: jax.Array


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


def draw_domains(config: TriageConfig, state: TriageState, p_D: jax.Array, num_prompts: int) -> Draw:
    """The batch of state.step from shares p_D; the same for the same state, on every host.

    The only randomness is fold_in(state's root key, step), consumed here and nowhere else.
    """
    chex.assert_equal_shape([p_D, state.acc_ema])
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data, impl=KEY_IMPL), state.step)
    key_mixed, key_tie = jax.random.split(key)
    domain_P = systematic(key_mixed, p_D, num_prompts)
    single = jnp.array(False)
    if config.single_every:
        single = (state.step + 1) % config.single_every == 0  # step 0 is mixed
        graded_D = (p_D > 0) & (state.failures == 0)  # a whole batch is not staked on a failing grader
        score_D = jnp.where(graded_D | ~graded_D.any(), p_D, -1.0)
        tied_D = score_D >= score_D.max() * (1 - 1e-6)  # equal domains may differ in the last bit of exp
        chosen = jnp.argmax(jnp.where(tied_D, jax.random.uniform(key_tie, p_D.shape), -1.0))
        domain_P = jnp.where(single, chosen, domain_P)
    domain_P = domain_P.astype(jnp.int32)
    return Draw(domain_P, jnp.zeros(p_D.shape, jnp.int32).at[domain_P].add(1), p_D, single)


@dataclass(frozen=True)
class TriageSampler:
    """The faithful policy's shares and draw; pure, holds only the static configuration."""

    config: TriageConfig

    def priorities(self, state: TriageState) -> Priorities:
        """Terms of the priority of each domain, f32[D]; see the module's formula."""
        c = self.config
        can_D = drawable(c, state)
        never_D = jnp.maximum(state.last_seen_step, state.last_tried_step) < 0
        stale_D = jnp.where(never_D, 1.0, -jnp.expm1(-steps_waited(state) / c.staleness_steps))
        staleness_D = c.staleness_weight * stale_D
        uncertainty_D = c.uncertainty_weight * state.grade_uncertainty / MAX_VARIANCE

        claim_D = jnp.exp(state.base_log_w + (staleness_D + uncertainty_D if c.strict else 0.0))
        member_3D = jnp.arange(len(BANDS))[:, None] == state.performance_band
        claim_3 = jnp.sum(jnp.where(member_3D & can_D, claim_D, 0.0), axis=1)
        log_claim_3 = jnp.log(jnp.where(claim_3 > 0, claim_3, 1.0))  # an empty band's term is read by nobody
        band_D = (jnp.log(jnp.asarray(c.capacity)) - c.eta * log_claim_3)[state.performance_band]
        base_D = state.base_log_w + state.boost
        return Priorities(band_D + staleness_D + uncertainty_D + base_D, band_D, staleness_D, uncertainty_D, base_D)

    def probabilities(self, state: TriageState) -> jax.Array:
        """Shares p_D, f32[D]: sum 1, 0 where not drawable, else at least epsilon / drawable domains."""
        can_D = drawable(self.config, state)
        z_D = self.priorities(state).total_D / self.config.temperature
        q_D = jax.nn.softmax(z_D, where=can_D)
        return floor_project(q_D, can_D * (self.config.epsilon / jnp.maximum(can_D.sum(), 1)))

    def draw(self, state: TriageState, num_prompts: int) -> Draw:
        """The batch of state.step; `num_prompts` is static."""
        return draw_domains(self.config, state, self.probabilities(state), num_prompts)
