"""Rows of a cache at slots of their own: decoded and appended in any mixture against whole forward passes; in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from models import policy
from models.architectures import from_hf

SHAPE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64,
)  # fmt: skip
LLAMA = from_hf(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **SHAPE))
GEMMA = from_hf(
    Gemma3TextConfig(
        num_hidden_layers=3, sliding_window=5, sliding_window_pattern=3, query_pre_attn_scalar=8, **SHAPE
    )
)  # fmt: skip
G, LENGTH_P, SLOTS, CHUNK = 2, np.array([9, 4, 0]), 11, 4  # the last rows see nothing of their prompt
prefill, decode, append, hidden = (
    jax.jit(f, static_argnums=0) for f in (policy.prefill, policy.decode, policy.append, policy.hidden)
)


def random_params(config):
    """Large enough to make attention sharp and every norm matter."""
    leaves, tree = jax.tree.flatten(policy.abstract_params(config))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.family)
def test_any_mixture_of_decoding_and_appending_equals_the_forward_pass(config):
    """Rows take 0 to 4 tokens a call, the rest of a chunk is noise, and those that wait repeat a token or bring noise.
    Gemma's window of 5 then lies in the prompt, across it and the completion, and within a chunk."""
    rng, rows = np.random.default_rng(1), len(LENGTH_P) * G
    params, length_B = random_params(config), np.repeat(LENGTH_P, G)
    prompt_PT, tokens_BC = rng.integers(0, 61, (len(LENGTH_P), 10)), rng.integers(0, 61, (rows, SLOTS))
    _, prefix = prefill(config, params, prompt_PT)
    cache, at_B = policy.empty_cache(config, rows, SLOTS), np.zeros(rows, np.int32)
    found = np.zeros((rows, SLOTS, config.embed_dim), np.float32)
    calls = 0
    while (at_B < SLOTS).any():
        if calls % 2:
            takes_B = rng.integers(0, 2, rows)
            token_B = tokens_BC[np.arange(rows), np.minimum(at_B, SLOTS - 1)]
            out, cache = decode(config, params, token_B, jnp.asarray(at_B), prefix, LENGTH_P, cache)
            out = out[:, None]
        else:
            takes_B, noise_BQ = rng.integers(0, CHUNK + 1, rows), rng.integers(0, 61, (rows, CHUNK))
            padded = np.pad(tokens_BC, ((0, 0), (0, CHUNK)))
            chunk_BQ = np.stack([padded[b, at : at + CHUNK] for b, at in enumerate(at_B)])
            chunk_BQ = np.where(np.arange(CHUNK) < takes_B[:, None], chunk_BQ, noise_BQ)
            out, cache = append(config, params, chunk_BQ, jnp.asarray(at_B), prefix, LENGTH_P, cache)
        for b, takes in enumerate(np.minimum(takes_B, SLOTS - at_B)):
            found[b, at_B[b] : at_B[b] + takes] = out[b, :takes]
            at_B[b] += takes
        calls += 1
    whole = np.zeros((rows, 10 + SLOTS), np.int32)
    for b, length in enumerate(length_B):
        whole[b, :length], whole[b, length : length + SLOTS] = prompt_PT[b // G, :length], tokens_BC[b]
    forward = np.asarray(hidden(config, params, whole))
    expected = np.stack([row[length : length + SLOTS] for row, length in zip(forward, length_B)])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_slot_a_row_is_written_in_place():
    """With the cache donated, neither way needs memory for half a cache."""
    config = dataclasses.replace(LLAMA, num_layers=8, windows=(0,) * 8)
    cache = jax.eval_shape(lambda: policy.empty_cache(config, 8, 256))
    prefix = jax.eval_shape(lambda: policy.empty_cache(config, 4, 8))
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    for function, shape in ((policy.decode, (8,)), (policy.append, (8, 2))):
        step = jax.jit(function, static_argnums=0, donate_argnums=6)
        args = (config, policy.abstract_params(config), i32(shape), i32((8,)), prefix, i32((4,)), cache)
        memory = step.lower(*args).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * cache.k.size * 4
        assert memory.temp_size_in_bytes < cache.k.size * 4
