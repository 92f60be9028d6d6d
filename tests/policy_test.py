"""The decoder without torch: decoding against the whole forward pass, gradients, precision, placement.

Agreement with transformers' models is tested in hf_test.py, and attention against numpy in attention_test.py.
"""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from models import policy
from models.architectures import from_hf

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
LLAMA = from_hf(transformers.LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **SMALL))
GEMMA = from_hf(
    transformers.Gemma3TextConfig(
        num_hidden_layers=3, sliding_window=5, sliding_window_pattern=3, query_pre_attn_scalar=8, **SMALL
    )
)


def random_params(config, seed=0):
    """Large enough to make attention sharp and every norm and bias matter."""
    leaves, tree = jax.tree.flatten(policy.abstract_params(config))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def random_tokens(rows, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (rows, length)), jnp.int32)


logits = jax.jit(policy.logits, static_argnums=0)
hidden = jax.jit(policy.hidden, static_argnums=0)
init = jax.jit(policy.init, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def decode_all(config, params, prompt_PT, length_P, completion_NC):
    """Logits after each completion token, [N, C, V], one decode step a token."""
    _, prefix = policy.prefill(config, params, prompt_PT)

    def step(cache, inputs):
        hidden_NE, cache = policy.decode(config, params, *inputs, prefix, length_P, cache)
        return cache, policy.unembed(config, params, hidden_NE)

    rows, slots = completion_NC.shape
    inputs = (completion_NC.T, jnp.arange(slots))
    return jax.lax.scan(step, policy.empty_cache(config, rows, slots), inputs)[1].swapaxes(0, 1)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.family)
def test_decode_equals_the_forward_pass(config):
    """Prompts of 9, 4 and 1 tokens; Gemma's window of 5 then lies in the prompt, across both caches, and beyond."""
    P, G, T, C = 3, 2, 9, 7
    lengths = np.array([9, 4, 1])
    params, prompts, completions = random_params(config), random_tokens(P, T), random_tokens(P * G, C, 1)
    decoded = decode_all(config, params, prompts, jnp.asarray(lengths), completions)
    whole = np.zeros((P * G, T + C), np.int32)
    for n in range(P * G):
        length = lengths[n // G]
        whole[n, :length] = prompts[n // G, :length]
        whole[n, length : length + C] = completions[n]
    forward = np.asarray(logits(config, params, whole))
    expected = np.stack([row[lengths[n // G] :][:C] for n, row in enumerate(forward)])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(decoded, expected, atol=3e-5)


@pytest.mark.parametrize("config, remat", [(LLAMA, "full"), (GEMMA, "none")], ids=["llama", "gemma3"])
def test_extend_equals_the_forward_pass_and_its_gradient(config, remat):
    """A prompt computed once for its completions, against whole rows: hidden states, and gradients of parameters."""
    config = dataclasses.replace(config, remat=remat)
    G, C, lengths = 2, 7, np.array([9, 4, 1])
    params, prompts, completions = random_params(config), random_tokens(3, 9), random_tokens(3 * G, C, 1)
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(3 * G, C, SMALL["hidden_size"])), jnp.float32)
    whole, slots = np.zeros((3 * G, 9 + C), np.int32), np.repeat(lengths, G)[:, None] + np.arange(C)
    for n in range(3 * G):
        whole[n, : slots[n, 0]], whole[n, slots[n]] = prompts[n // G, : slots[n, 0]], completions[n]

    def behind(params):
        _, prefix = policy.prefill(config, params, prompts)
        return policy.extend(config, params, completions, prefix, jnp.asarray(lengths))

    def rows(params):
        return jnp.take_along_axis(policy.hidden(config, params, whole), slots[..., None], axis=1)

    np.testing.assert_allclose(jax.jit(behind)(params), jax.jit(rows)(params), atol=2e-5)
    found, expected = (jax.jit(jax.grad(lambda p, f=f: (f(p) * weight).sum()))(params) for f in (behind, rows))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), found, expected)


def test_decode_updates_the_cache_in_place():
    """With the cache donated, a step needs less memory than half a cache: no layer copies all layers' cache."""
    config = dataclasses.replace(LLAMA, num_layers=8, windows=(0,) * 8)
    rows, slots = 8, 256
    cache = jax.eval_shape(lambda: policy.empty_cache(config, rows, slots))
    prefix = jax.eval_shape(lambda: policy.empty_cache(config, 4, 8))
    cache_bytes = 2 * cache.k.size * 4
    step = jax.jit(policy.decode, static_argnums=0, donate_argnums=6)
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    args = (config, policy.abstract_params(config), i32((rows,)), i32(()), prefix, i32((4,)), cache)
    memory = step.lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2


def test_decode_refuses_rows_that_are_no_multiple_of_prompts():
    params, cache = random_params(LLAMA), policy.empty_cache(LLAMA, 5, 4)
    with pytest.raises(ValueError, match="pass P prompts and P x G rows"):
        prefix = policy.empty_cache(LLAMA, 2, 4)
        policy.decode(LLAMA, params, jnp.zeros(5, jnp.int32), jnp.int32(0), prefix, jnp.ones(2, jnp.int32), cache)
    with pytest.raises(ValueError, match="pass P and P x G rows"):
        policy.extend(LLAMA, params, jnp.zeros((5, 3), jnp.int32), prefix, jnp.ones(2, jnp.int32))


def test_padding_after_a_row_changes_nothing_before_it():
    params, tokens = random_params(GEMMA), random_tokens(2, 8)
    padded = tokens.at[:, 5:].set(0)
    np.testing.assert_array_equal(logits(GEMMA, params, tokens)[:, :5], logits(GEMMA, params, padded)[:, :5])


def test_positions_carry_order_whatever_the_layout():
    params, tokens = random_params(GEMMA), random_tokens(1, 8)
    order = np.array([0, 1, 6, 7, 2, 3, 4, 5])  # as zigzag splits a row over two devices
    straight = hidden(GEMMA, params, tokens, jnp.arange(8)[None])
    shuffled = hidden(GEMMA, params, tokens[:, order], jnp.asarray(order)[None])
    np.testing.assert_allclose(shuffled, straight[:, order], atol=2e-5)


@pytest.mark.slow
def test_remat_saves_memory_and_leaves_gradients():
    deep = dataclasses.replace(LLAMA, num_layers=6, windows=(0,) * 6)
    params, tokens = random_params(deep), random_tokens(8, 32)

    def gradient(remat):
        config = dataclasses.replace(deep, remat=remat)

        def loss(params):
            return jax.nn.logsumexp(policy.logits(config, params, tokens), axis=-1).mean()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (none, most), (dots, less), (full, least) = (gradient(remat) for remat in ("none", "dots", "full"))
    assert least < less < most
    for other in (dots, full):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), none, other)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(none))


def test_bfloat16_is_close_to_float32_and_casting_once_is_casting_at_use():
    config = dataclasses.replace(GEMMA, dtype="bfloat16")
    params, tokens = init(GEMMA, jax.random.key(0)), random_tokens(2, 8)
    exact, rounded = np.asarray(logits(GEMMA, params, tokens)), logits(config, params, tokens)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 1.5e-2
    cast = policy.cast(config, params)
    assert cast["layers"]["qkv"].dtype == jnp.bfloat16 and cast["layers"]["q_norm"].dtype == jnp.float32
    np.testing.assert_array_equal(rounded, logits(config, cast, tokens))


def test_dynamic_rope_refuses_longer_rows_than_it_was_made_for():
    rope = dataclasses.replace(LLAMA.rope, kind="dynamic", scaling=(("factor", 2.0),))
    config = dataclasses.replace(LLAMA, rope=rope, rope_local=rope)
    assert jax.eval_shape(lambda: policy.hidden(config, random_params(config), random_tokens(1, 64))).shape[1] == 64
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        policy.hidden(config, random_params(config), random_tokens(1, 65))


@pytest.mark.parametrize(
    "hf_config, published",  # parameters, as counted by the models' own safetensors on the hub
    [
        (
            transformers.LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            ),
            134_515_008,  # SmolLM2-135M
        ),
        (
            transformers.Qwen2Config(
                vocab_size=151936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            494_032_768,  # Qwen2.5-0.5B
        ),
        (
            transformers.Gemma3TextConfig(
                vocab_size=262144,
                hidden_size=640,
                intermediate_size=2048,
                num_hidden_layers=18,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=256,
            ),
            268_098_176,  # gemma-3-270m
        ),
    ],
    ids=["smollm2", "qwen2.5", "gemma3"],
)
def test_parameter_count_is_the_published_one(hf_config, published):
    config = from_hf(hf_config)
    shapes = policy.abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published
    axes = policy.logical_axes(config)
    jax.tree.map(lambda names, leaf: [None for _ in zip(names, leaf.shape, strict=True)], axes, shapes, is_leaf=is_axes)
    assert axes["embed"] == ("vocab", "embed")
    assert axes["layers"]["qkv"] == ("layers", "embed", "kv_heads", None, "head_dim")


def is_axes(x):
    return type(x) is tuple


def test_init_starts_norms_at_one_and_is_drawn_from_the_key():
    params = init(GEMMA, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert np.all(params["final_norm"] == 0) and GEMMA.norm_offset == 1
    llama_norm = jax.jit(lambda key: policy.init(LLAMA, key)["layers"]["mlp_norm"])(jax.random.key(0))
    assert np.all(llama_norm == 1) and LLAMA.norm_offset == 0
    assert np.std(params["layers"]["qkv"]) == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(params["layers"]["qkv"][0], params["layers"]["qkv"][1])
    assert not np.array_equal(params["embed"], init(GEMMA, jax.random.key(1))["embed"])


MESH_SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from models import policy
from policy_test import LLAMA, decode_all, random_params, random_tokens
from sharding.mesh import build
from sharding.rules import sharding, tree_shardings

@jax.jit
@jax.grad
def gradient(params, tokens):
    return jax.nn.logsumexp(policy.logits(LLAMA, params, tokens), axis=-1).mean()

params, tokens = random_params(LLAMA), random_tokens(8, 8)
lengths, completions = jnp.arange(1, 9), random_tokens(16, 3, 1)
expected = gradient(params, tokens), decode_all(LLAMA, params, tokens, lengths, completions)
mesh = build((1, 4, 1, 2))
with jax.set_mesh(mesh):
    params = jax.device_put(params, tree_shardings(mesh, policy.logical_axes(LLAMA), params))
    tokens = jax.device_put(tokens, sharding(mesh, ("batch", None), tokens.shape))
    found = gradient(params, tokens), decode_all(LLAMA, params, tokens, lengths, completions)
assert params["layers"]["qkv"].sharding.shard_shape((2, 32, 2, 4, 8)) == (2, 8, 1, 4, 8)
for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """In a process of its own, since the number of CPU devices is fixed when jax starts."""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": ".:tests", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", MESH_SCRIPT], env=env, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr[-2000:]
    assert "rematerialization" not in done.stderr  # the partitioner found a way between all shardings
