"""Sampling with each layer's weights as arrays of their own: the rows of a stack, without a stack in a loop.

On eight devices: mesh_test.py. In conversations: conversation_test.py.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from append_test import GEMMA, LLAMA, random_params
from jax.sharding import NamedSharding, PartitionSpec

from configs.cli import compose_config
from infinite_jax import plan
from infinite_jax.planning import chips, programs
from infinite_jax.rollout import Sampling, _cast, generate, sync
from models import lora, policy, source
from models.architectures import LoraConfig
from sharding.mesh import build

SAMPLING = Sampling(1.0, 0, 1.0, 7, 3, (1,), 0)
PROMPT, LENGTH = np.array([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]], np.int32), np.array([5, 2], np.int32)


def unrolled(config, **changes):
    return dataclasses.replace(config, unrolled=True, **changes)


@functools.cache
def sampled(config):
    """(the rows, the compiled program) of parameters as they train."""
    arguments = random_params(config), PROMPT, LENGTH, jax.random.key(0)
    compiled = generate.lower(config, SAMPLING, *arguments).compile()
    return jax.device_get(compiled(*arguments)), compiled.as_text()


def stacks(config) -> set[str]:
    """Shapes of the layers' stacked matrices, as compiled programs write them."""
    layers = policy.abstract_params(config)["layers"]
    return {str(list(leaf.shape)).replace(" ", "") for leaf in layers.values() if leaf.ndim > 2}


def same(found, expected):
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    np.testing.assert_allclose(found.logp_BT, expected.logp_BT, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.family)
def test_rows_are_those_of_stacked_weights(config):
    expected = sampled(config)[0]
    assert len(set(expected.tokens_BT[expected.loss_mask_BT])) > 10
    same(sampled(unrolled(config))[0], expected)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.family)
def test_no_stack_of_weights_enters_a_loop(config):
    """Within a loop, a layer's weights would be copied out of it for every token."""

    def looped(config):
        loops = [line for line in sampled(config)[1].splitlines() if re.search(r" while\(", line)]
        assert loops
        return {shape for line in loops for shape in stacks(config) if shape in line}

    assert looped(config) == stacks(config) and looped(unrolled(config)) == set()


def test_a_step_slices_no_weights_and_writes_its_cache_in_place():
    """Whatever the backward pass, of which there is none, would recompute: layers stay known at compile time."""
    config = unrolled(LLAMA, num_layers=8, windows=(0,) * 8, remat="full")
    params = jax.eval_shape(functools.partial(policy.sampled, config), policy.abstract_params(config))
    cache, prefix = (jax.eval_shape(lambda n=n, s=s: policy.empty_cache(config, n, s)) for n, s in ((8, 256), (4, 8)))
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    step = jax.jit(policy.decode, static_argnums=0, donate_argnums=6)
    compiled = step.lower(config, params, i32((8,)), i32(()), prefix, i32((4,)), cache).compile()
    assert "dynamic-slice(" not in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * cache.k.size * 4 and memory.temp_size_in_bytes < cache.k.size * 4


def test_adapters_are_merged_without_a_merged_stack():
    """The copy for sampling needs little beside what it reads and what it makes."""
    config = unrolled(LLAMA, num_layers=16, windows=(0,) * 16, lora=LoraConfig(2, 4.0, ("q", "down")))
    joined = jax.eval_shape(
        functools.partial(lora.join, config), policy.abstract_params(config), lora.abstract_params(config)
    )
    mesh = build((1, 1, 1, 1))
    memory = _cast(config, mesh, mesh).lower(joined).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 4


def test_what_is_apart_stays_as_it_is():
    config, params = unrolled(GEMMA), random_params(GEMMA)
    found = policy.sampled(config, params)
    assert "layers" not in found and {f"layers_{i}" for i in range(3)} < found.keys()
    np.testing.assert_array_equal(found["layers_2"]["down"], params["layers"]["down"][2])
    again = policy.sampled(config, found)
    assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True))
    assert policy.sampled(GEMMA, params).keys() == params.keys()


def test_the_rollouts_copy_is_what_generate_and_plan_expect():
    """Merged, cast, apart, whatever of it there is to do; its programs are compiled once."""
    config, mesh = unrolled(LLAMA, lora=LoraConfig(2, 4.0, ("q", "down"))), build((1, 1, 1, 1))
    adapters = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), lora.abstract_params(config))
    base = jax.device_put(random_params(config), NamedSharding(mesh, PartitionSpec()))
    joined = jax.device_put(lora.join(config, base, adapters), NamedSharding(mesh, PartitionSpec()))

    def rows(config, joined):
        with jax.set_mesh(mesh):
            return generate(config, SAMPLING, sync(config, joined, mesh), PROMPT, LENGTH, jax.random.key(0))

    before = generate._cache_size()
    first, second = (rows(config, joined) for _ in range(2))
    assert generate._cache_size() == before + 1
    same(first, second)
    merged = policy.apart(config, jax.jit(lora.merge, static_argnums=0)(config, joined))
    jax.tree.map(np.testing.assert_array_equal, sync(config, joined, mesh), merged)
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(config, dtype=dtype)
        copy, planned = sync(config, joined, mesh), programs.rollout_params(config, mesh, mesh)
        assert about(copy) == about(planned) and copy["layers_1"]["down"].dtype == jnp.dtype(dtype)
    plain = dataclasses.replace(config, lora=None)
    assert about(sync(plain, base, mesh)) == about(programs.rollout_params(plain, mesh, mesh))
    stacked = dataclasses.replace(plain, unrolled=False, dtype="float32")
    assert sync(stacked, base, mesh) is base  # there is nothing to copy
    assert about(programs.rollout_params(stacked, mesh, mesh)) == about(base)


def about(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def test_gpus_alone_sample_so():
    config = compose_config("config", None, ["model=tiny"])
    platforms = {chip.name: plan.network(config, chip).unrolled for chip in chips.CHIPS}
    assert platforms["H200"] and platforms["T4"] and not platforms["v5e"] and not platforms["v4"]
    assert not source.network(config.model).unrolled  # this machine's CPU
