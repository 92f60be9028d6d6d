import dataclasses
import functools

import hydra
import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from curriculum.policies import CurriculumConfig, Policy, build
from curriculum.triage import statistics

D = 4


@functools.cache
def config(name: str) -> CurriculumConfig:
    """The YAML group as a run composes it."""
    with hydra.initialize_config_module("configs", version_base=None):
        group = OmegaConf.to_container(hydra.compose(overrides=[f"+curriculum={name}"]).curriculum)
    return CurriculumConfig(**group | {"capacity": tuple(group["capacity"])})


@functools.cache
def compiled(name: str) -> Policy:
    policy = build(config(name))
    static = {"draw": {"static_argnums": 1}}
    return Policy(*(jax.jit(f, **static.get(field, {})) for field, f in policy._asdict().items()))


def start(policy, weights=(1, 1, 1, 1)):
    return policy.init(0, np.array(weights, np.float32), np.arange(D) < 3, np.zeros(D, bool), np.array([0, 0, 2, 0]))


def test_uniform_states_only_what_differs():
    faithful, uniform = dataclasses.asdict(config("faithful")), dataclasses.asdict(config("uniform"))
    assert {key: value for key, value in uniform.items() if value != faithful[key]} == {
        "policy": "uniform",
        "single_every": 0,
    }
    assert faithful["capacity"] == (0.6, 0.3, 0.1)


statistics_jit = jax.jit(statistics, static_argnums=4)


@pytest.mark.parametrize("name", ["faithful", "uniform"])
def test_policies_run_through_one_shape(name):
    policy = compiled(name)
    state, single = start(policy), []
    for step in range(10):
        draw = policy.draw(state, 8)
        np.testing.assert_allclose(draw.p_D, policy.probabilities(state), atol=1e-6)
        np.testing.assert_array_equal(np.bincount(draw.domain_P, minlength=D), draw.counts_D)
        assert draw.counts_D[3] == 0 and (step >= 2 or draw.counts_D[2] == 0)  # evaluated only; not arrived
        single.append(bool(draw.single))
        grade_PG = np.random.default_rng(step).integers(1, 5, (8, 2)).astype(np.float32)
        state = policy.update(state, statistics_jit(draw.domain_P, grade_PG, grade_PG, np.ones((8, 2), bool), D))
        assert all(np.isfinite(value).all() for value in policy.metrics(state, draw.p_D).values())
    assert single == [False] * 9 + [name == "faithful"]
    assert state.visits[3] == 0 and state.visits[:3].min() > 0


def test_uniform_ignores_all_but_weights_arrival_and_rest():
    policy = compiled("uniform")
    state = start(policy)._replace(performance_band=np.array([0, 2, 1, 0]), grade_uncertainty=np.arange(4.0))
    np.testing.assert_allclose(policy.probabilities(state), [1 / 2, 1 / 2, 0, 0])
    np.testing.assert_allclose(policy.probabilities(state._replace(step=2)), [1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(policy.probabilities(start(policy, (3, 1, 1, 1))), [3 / 4, 1 / 4, 0, 0])
    failed = state._replace(step=3, failures=np.array([3, 0, 0, 0]), last_tried_step=np.array([2, 2, 2, -1]))
    np.testing.assert_allclose(policy.probabilities(failed), [0, 1 / 2, 1 / 2, 0])


def test_faithful_prefers_the_low_band():
    policy = compiled("faithful")
    state = start(policy)._replace(performance_band=np.array([0, 2, 1, 0]))
    np.testing.assert_allclose(policy.probabilities(state), [6 / 7, 1 / 7, 0, 0], atol=1e-6)


def test_configuration_is_static_under_jit():
    assert hash(config("faithful")) == hash(config("faithful"))


@pytest.mark.parametrize(("name", "remedy"), [("fathful", "did you mean faithful?"), ("x", "known: faithful, uniform")])
def test_an_unknown_policy_is_refused(name, remedy):
    with pytest.raises(ValueError) as raised:
        dataclasses.replace(config("faithful"), policy=name)
    assert str(raised.value) == f"curriculum.policy={name}: {remedy}"
