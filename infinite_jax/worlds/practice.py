"""The start of a compiled run: a small transformer taught by examples, each domain only up to its target pass rate.

Reinforcement learning needs a model that can do a task but does not always. The same number of examples for every
domain would leave some at 0 and some at 1, since these skills come suddenly; so practice is a control loop. After every
round the pass rates are measured, and in the next one a domain is shown by what it lacks, at a learning rate that falls
with what all of them lack:

    lack_d = max(1 - rate_d / target_d, 0)      share_d ~ lack_d + FLOOR      learning rate ~ mean_d lack_d

Targets are spread evenly, in an order that the seed draws. What a domain learns from the others' examples may take it
above its target. A share HARDER of the examples are of the harder variant, so that it is neither known nor out of
reach. Loss: cross-entropy of the answer and its END; Adam.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from infinite_jax.types import Params
from infinite_jax.worlds import tasks
from infinite_jax.worlds.tasks import Rows
from kernels.logprob import token_logp
from models import policy
from models.architectures import DecoderConfig

FLOOR = 0.01  # of the share, against forgetting what has reached its target
HARDER = 0.25  # of the examples
LOW, HIGH, UNSEEN = 0.05, 0.65, 0.35  # targets: lowest and highest of the trained domains, that of the others


@dataclass(frozen=True)
class Plan:
    """How long and how; static."""

    rounds: int
    steps: int  # a round
    rows: int  # a step
    train_rows: int  # different examples a domain and variant
    test_rows: int  # rows a domain that a round's pass rates are measured on
    learning_rate: float  # while everything lacks


def targets(key: jax.Array, num_domains: int) -> jax.Array:
    """Pass rates to stop at, f32[D]: evenly spread over the trained domains in random order. Consumes `key`."""
    spread = jax.random.permutation(key, jnp.linspace(LOW, HIGH, tasks.TRAINED))
    return jnp.concatenate([spread, jnp.full(num_domains - tasks.TRAINED, UNSEEN)])


def joined(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Each answer laid right behind its prompt: tokens_NT and the mask of the answer's tokens, END included."""
    place_NT = jnp.arange(tasks.PROMPT + tasks.ANSWER) - rows.length_N[:, None]
    inside_NT = (place_NT >= 0) & (place_NT < tasks.ANSWER)
    answer_NT = jnp.take_along_axis(rows.answer_NC, jnp.clip(place_NT, 0, tasks.ANSWER - 1), axis=1)
    tokens_NT = jnp.where(inside_NT, answer_NT, jnp.pad(rows.prompt_NT, ((0, 0), (0, tasks.ANSWER))))
    return tokens_NT, inside_NT & (tokens_NT != tasks.PAD)


def loss(decoder: DecoderConfig, params: Params, rows: Rows) -> jax.Array:
    """Mean cross-entropy of the answers' tokens, f32[]."""
    tokens_NT, mask_NT = joined(rows)
    hidden_NTE = policy.hidden(decoder, params, tokens_NT)
    logp_NT, _ = token_logp(lambda x: policy.unembed(decoder, params, x), hidden_NTE[:, :-1], tokens_NT[:, 1:])
    return -jnp.sum(jnp.where(mask_NT[:, 1:], logp_NT, 0.0)) / mask_NT[:, 1:].sum()


def practise(
    decoder: DecoderConfig,
    plan: Plan,
    standard: Rows,
    harder: Rows,
    pass_rates: Callable[[Params, jax.Array], jax.Array],
    key: jax.Array,
) -> tuple[Params, jax.Array]:
    """Parameters at the targets, as far as `plan` gets there, and the pass rates measured on the way, f32[rounds, D].

    Args:
      standard, harder: rows to practise on, leaves [D, N, ...].
      pass_rates: (params, key) -> f32[D], sampled on other rows.
      key: consumed.
    """
    num_domains, num_rows = standard.length_N.shape
    key_init, key_target, key_rounds = jax.random.split(key, 3)
    target_D = targets(key_target, num_domains)
    tx = optax.scale_by_adam()

    def example(key, share_D):
        key_d, key_row, key_level = jax.random.split(key, 3)
        domain_N = jax.random.categorical(key_d, jnp.log(share_D), shape=(plan.rows,))
        row_N = jax.random.randint(key_row, (plan.rows,), 0, num_rows)
        hard_N = jax.random.bernoulli(key_level, HARDER, (plan.rows,))

        def pick(easy, hard):
            chosen = hard_N.reshape(-1, *[1] * (easy.ndim - 2))
            return jnp.where(chosen, hard[domain_N, row_N], easy[domain_N, row_N])

        return jax.tree.map(pick, standard, harder)

    def step(carry, key, lack_D):
        params, moments = carry
        grads = jax.grad(lambda params: loss(decoder, params, example(key, lack_D + FLOOR)))(params)
        updates, moments = tx.update(grads, moments)
        rate = plan.learning_rate * lack_D.mean()
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), moments), None

    def one_round(carry, number):
        key_rate, key_steps = jax.random.split(jax.random.fold_in(key_rounds, number))
        rate_D = pass_rates(carry[0], key_rate)
        lack_D = jnp.maximum(1.0 - rate_D / target_D, 0.0)
        keys = jax.random.split(key_steps, plan.steps)
        carry, _ = jax.lax.scan(lambda carry, key: step(carry, key, lack_D), carry, keys)
        return carry, rate_D

    params = policy.init(decoder, key_init)
    (params, _), rate_RD = jax.lax.scan(one_round, (params, tx.init(params)), jnp.arange(plan.rounds))
    return params, rate_RD
