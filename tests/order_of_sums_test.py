"""No sum of floats that enters a draw is scattered: a GPU adds those in any order, and processes must draw the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.cli import compose_config
from curriculum import policies, prompt_level, triage
from curriculum.config import PromptConfig
from infinite_jax import gae

D, P, G, T = 5, 8, 4, 6
WHERE = jax.tree.map(jnp.asarray, prompt_level.layout((30, 0, 7)))
PROMPT = PromptConfig(beta=0.3, low_weight=0.5, uncertainty_weight=2.0, staleness_weight=1.0, unseen=0.5)


def scattered(jaxpr) -> list[str]:
    """The equations that add floats at places that data names, those of the programs within too."""
    found = []
    for equation in jaxpr.eqns:
        floats = any(jnp.issubdtype(out.aval.dtype, jnp.inexact) for out in equation.outvars)
        found += [str(equation)] * (equation.primitive.name.startswith("scatter-") and floats)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            found += scattered(inner) if hasattr(inner, "eqns") else []
    return found


def traced(function, *given) -> list[str]:
    return scattered(jax.make_jaxpr(function)(*given).jaxpr)


def test_a_scattered_sum_is_found_wherever_it_stands():
    sums = jax.jit(lambda x, at: jax.ops.segment_sum(x, at, 3))
    at = np.zeros(4, np.int32)
    assert len(traced(lambda x: jax.lax.map(lambda y: sums(y, at), x), np.ones((2, 4), np.float32))) == 1
    assert not traced(lambda x: sums(x, at), np.ones(4, np.int32))  # whole numbers have one sum


@pytest.mark.parametrize("name", policies.NAMES)
def test_no_policy_draws_by_one(name):
    policy = policies.build(compose_config("config", None, [f"curriculum={name}"]).curriculum)
    state = jax.eval_shape(lambda: policy.init(0, triage.roster(D)))
    groups, rows = np.zeros(P, np.int32), np.zeros((P, G), np.float32)

    def step(state):
        p_D = policy.draw(state, P).p_D
        sums = triage.statistics(groups, rows, rows, rows > 0, groups * 1.0, D)
        return policy.update(state, sums), policy.metrics(state, p_D), policy.lr_scale(state)

    assert not traced(step, state)


def test_no_prompt_is_drawn_by_one():
    state = prompt_level.init(WHERE)
    slots = jnp.array([0, 2] * (P // 2), jnp.int32)
    assert not traced(lambda s: prompt_level.draw(PROMPT, WHERE, s, jax.random.key(0), slots), state)
    assert not traced(lambda s: prompt_level.update(PROMPT, s, slots, slots * 0.5, slots > 0), state)
    assert not traced(lambda s: prompt_level.metrics(WHERE, s), state)


def test_nor_is_the_critic_judged_by_one():
    value, mask, domain = np.zeros((P, T), np.float32), np.ones((P, T), bool), np.zeros(P, np.int32)
    assert not traced(lambda v: gae.foresight(v, v, mask, domain, D), value)
