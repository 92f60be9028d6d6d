"""The rollout engine: one jitted program that prefills each prompt once and samples its G completions together.

The prompt's keys and values are computed and stored once per prompt and read by all its samples; completions have a
cache of their own that every row writes at the same slot. The loop ends when every row has ended its turn. Log-probs
are those of the distribution really sampled: after temperature, top-k and top-p.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels.logprob import entry
from models import lora, policy
from models.architectures import DecoderConfig
from models.layout import copies
from sharding.rules import constrain, shards, tree_shardings


class Sampling(NamedTuple):
    """Static sampling parameters; temperature 0 is greedy."""

    temperature: float
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    max_new_tokens: int
    group_size: int
    stop_ids: tuple[int, ...]
    pad_id: int


class Generated(NamedTuple):
    tokens_BT: jax.Array  # i32, left-aligned: prompt, completion, padding; T = prompt bucket + max_new_tokens
    loss_mask_BT: jax.Array  # bool, the generated tokens
    logp_BT: jax.Array  # f32, 0 outside the mask
    done_B: jax.Array  # bool, ended by a stop token


def processed_logp(logits_NV: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities of the sampled distribution, float32 [N, V]; -inf on tokens cut off by top-k or top-p.

    top-p keeps the smallest set of most probable tokens whose mass reaches top_p (Holtzman et al., 1904.09751); top-k
    is applied first. Tokens tied with the last one kept stay in.
    """
    logits = logits_NV.astype(jnp.float32) / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1.0:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(descending, axis=-1)
        needed = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p  # mass before the token is still too small
        last = jnp.min(jnp.where(needed, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def choose(logits_NV: jax.Array, key: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Next token and its log-probability, [N] each. Greedy has probability 1. The key is consumed."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_NV, axis=-1).astype(jnp.int32), jnp.zeros(logits_NV.shape[:1], jnp.float32)
    logp_NV = processed_logp(logits_NV, sampling)
    token_N = jax.random.categorical(key, logp_NV, axis=-1).astype(jnp.int32)
    return token_N, entry(logp_NV, token_N)


def sync(config: DecoderConfig, params, mesh: Mesh):
    """The parameters as sampling reads them, on the rollout's mesh: policy.sampled, split over `tensor` alone.

    `params` themselves where they are that already and hold no adapters, which are merged here. The copy lives as long
    as it is sampled from. Left out: a transfer a layer at a time, beside what still computes.
    """
    here = jax.tree.leaves(params)[0].sharding.mesh
    if not needs_copy(config, params, here, mesh):
        return params
    if list(here.devices.flat) == list(mesh.devices.flat):
        return _cast(config, here, mesh)(params)
    return jax.device_put(_cast(config, here, here)(params), _placement(config, mesh))


def needs_copy(config: DecoderConfig, params, here: Mesh, mesh: Mesh) -> bool:
    """Whether `sync` makes a copy of parameters, or of their shapes and dtypes, that lie on the mesh `here`."""
    if here != mesh or mesh.shape["fsdp"] * mesh.shape["seq"] > 1 or lora.adapted(params):
        return True
    if config.unrolled and "layers" in params:  # said without tracing every layer once a step
        return True
    dtypes = functools.partial(jax.tree.map, lambda leaf: leaf.dtype)
    return dtypes(params) != dtypes(jax.eval_shape(lambda params: policy.sampled(config, params), params))


@functools.cache
def _cast(config: DecoderConfig, here: Mesh, there: Mesh):
    """The compiled cast, and then the way from one split of the same devices to another: half the bytes move."""

    def cast(params):
        if config.unrolled:  # first, so that no merged stack is beside the layers
            params = policy.apart(config, params)
        merged = policy.sampled(config, lora.merge(config, params))
        return jax.lax.with_sharding_constraint(merged, _placement(config, here))

    return jax.jit(cast, out_shardings=_placement(config, there))


@functools.cache
def _placement(config: DecoderConfig, mesh: Mesh):
    shapes = jax.eval_shape(lambda params: policy.sampled(config, params), policy.abstract_params(config))
    return tree_shardings(mesh, policy.sampled_axes(config), shapes)


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def generate(
    config: DecoderConfig, sampling: Sampling, params, prompt_PT: jax.Array, length_P: jax.Array, key: jax.Array
) -> Generated:
    """Samples group_size completions of each prompt. The key is consumed: step t draws with fold_in(key, t).

    Args:
      params: as `sync` gives them; others are brought into that form by the program itself.
      prompt_PT: i32, left-aligned, padded with pad_id.
      length_P: i32 >= 1, tokens of each prompt.

    Returns:
      Rows in the order prompt 0 sample 0, prompt 0 sample 1, ...; B = P x group_size.
    """
    chex.assert_rank([prompt_PT, length_P], [2, 1])
    if shards("seq") > 1:
        raise ValueError("generate: rows are whole in decoding: set a mesh with seq=1, such as make_rollout_mesh gives")
    params = policy.sampled(config, params)
    repeats = copies(len(prompt_PT), len(prompt_PT) * sampling.group_size)
    prompt_PT, length_P = (jnp.repeat(x, repeats, axis=0) for x in (prompt_PT, length_P))
    sampling = sampling._replace(group_size=sampling.group_size // repeats)
    hidden_PTE, prefix = policy.prefill(config, params, constrain(prompt_PT, "batch", "length"))
    last_PE = jnp.take_along_axis(hidden_PTE, (length_P - 1)[:, None, None], axis=1)[:, 0]
    rows = prompt_PT.shape[0] * sampling.group_size
    stops = jnp.array(sampling.stop_ids, jnp.int32)

    def draw(hidden_NE, step):
        return choose(policy.unembed(config, params, hidden_NE), jax.random.fold_in(key, step), sampling)

    def record(state, step, token_N, logp_N):
        done_N, tokens_NC, logp_NC, count_N = state
        token_N = jnp.where(done_N, sampling.pad_id, token_N)
        tokens_NC = tokens_NC.at[:, step].set(token_N)
        logp_NC = logp_NC.at[:, step].set(jnp.where(done_N, 0.0, logp_N))
        count_N = count_N + ~done_N
        return token_N, (done_N | jnp.isin(token_N, stops), tokens_NC, logp_NC, count_N)

    def body(loop):
        step, token_N, cache, state = loop
        hidden_NE, cache = policy.decode(config, params, token_N, step, prefix, length_P, cache)
        token_N, state = record(state, step + 1, *draw(hidden_NE, step + 1))
        return step + 1, token_N, cache, state

    last = sampling.max_new_tokens - 1
    chunk = max(1, last // 32) if shards("data") > 1 else 1  # tokens between two questions whether all rows are done

    def unfinished(loop):
        step, _, _, (done_N, *_) = loop
        return (step < last) & ~jnp.all(done_N)

    def several(loop):  # the question is an all-reduce, which one device does not need
        until = jnp.minimum(loop[0] + chunk, last)
        return jax.lax.while_loop(lambda loop: loop[0] < until, body, loop) if chunk > 1 else body(loop)

    state = (
        jnp.zeros(rows, bool),
        jnp.full((rows, sampling.max_new_tokens), sampling.pad_id, jnp.int32),
        jnp.zeros((rows, sampling.max_new_tokens), jnp.float32),
        jnp.zeros(rows, jnp.int32),
    )
    first_NE = constrain(jnp.repeat(last_PE, sampling.group_size, axis=0), "batch", None)
    token_N, state = record(state, 0, *draw(first_NE, 0))
    cache = policy.empty_cache(config, rows, sampling.max_new_tokens)
    _, _, _, (done_N, tokens_NC, logp_NC, count_N) = jax.lax.while_loop(
        unfinished, several, (jnp.int32(0), token_N, cache, state)
    )
    return _join(sampling, prompt_PT, length_P, done_N, tokens_NC, logp_NC, count_N)


def _join(sampling, prompt_PT, length_P, done_N, tokens_NC, logp_NC, count_N) -> Generated:
    """Lays each completion right behind its prompt."""
    prompt_NT, length_N1 = (jnp.repeat(x, sampling.group_size, axis=0) for x in (prompt_PT, length_P[:, None]))
    total = prompt_PT.shape[1] + sampling.max_new_tokens
    position_NT = jnp.arange(total) - length_N1  # of each slot within the completion
    mask_NT = (position_NT >= 0) & (position_NT < count_N[:, None])
    slot_NT = jnp.clip(position_NT, 0, sampling.max_new_tokens - 1)
    prompt_NT = jnp.pad(prompt_NT, ((0, 0), (0, sampling.max_new_tokens)), constant_values=sampling.pad_id)
    tokens_NT = jnp.where(mask_NT, jnp.take_along_axis(tokens_NC, slot_NT, axis=1), prompt_NT)
    tokens_NT = jnp.where(mask_NT | (position_NT < 0), tokens_NT, sampling.pad_id)
    logp_NT = jnp.where(mask_NT, jnp.take_along_axis(logp_NC, slot_NT, axis=1), 0.0)
    return Generated(tokens_NT, mask_NT, logp_NT, done_N)
