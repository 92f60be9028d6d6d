"""Turns on the device: rows that stand at different turns, each at its own slot of the cache, sampled in one program.

A row is a prompt and, behind it, its completion: what the policy samples and what its environment answers, in turns.
Slot 0 of a row holds the prompt's last token, slot 1 + i token i of the completion. The last token laid down is always
the next one to go through the model: its slot of the cache is not filled yet, those before it are. So sampling goes on
from a prompt, from a sampled token or from an environment's in the same way, and a row that waits repeats itself.

`go_on` first lays the environments' tokens behind the rows and fills the cache with them, a chunk of all rows at a time
in one forward pass, then samples. Rows leave the sampling when they sample a stop id, complete a stop string of their
environment (infinite_jax/stop_strings.py), or have no slot left. It returns when enough rows wait for the host, or none
is left; what a row samples depends on its number, its slots and its own tokens, and not on when the others wait.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from infinite_jax.rollout import Sampling, processed_logp
from infinite_jax.stop_strings import FOUND
from kernels.logprob import entry
from models import policy
from models.architectures import DecoderConfig
from models.attention import Cache
from sharding.rules import constrain, shards


class Context(NamedTuple):
    """What a batch of conversations begins with; read, never written."""

    params: dict  # in the dtypes and arrays that decoding reads
    prefix: Cache  # of the prompts, [L, P, K, T, D]
    ahead_P: jax.Array  # i32, tokens of each prompt before its last
    key: jax.Array


class Rows(NamedTuple):
    """Where B rows stand; S = 1 + max_new_tokens slots. Donated from call to call."""

    tokens_BS: jax.Array  # i32
    sampled_BS: jax.Array  # bool, tokens that the policy chose
    logp_BS: jax.Array  # f32, 0 where not sampled
    length_B: jax.Array  # i32, tokens of the completion so far
    match_B: jax.Array  # i32, state of stop_strings in the present turn
    ended_B: jax.Array  # bool, the last turn sampled was ended by the policy, not by the limit
    cache: Cache  # of the completions, [L, B, K, S - 1, D]


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def begin(
    config: DecoderConfig, sampling: Sampling, params, prompt_PT: jax.Array, length_P: jax.Array
) -> tuple[Cache, jax.Array, Rows]:
    """(the prompts' keys and values, ahead_P, rows before their first token), group_size rows a prompt.

    Args:
      prompt_PT: i32, left-aligned. length_P: i32 >= 1, tokens of each prompt.
    """
    chex.assert_rank([prompt_PT, length_P], [2, 1])
    if shards("seq") > 1:
        raise ValueError("begin: rows are whole in decoding: set a mesh with seq=1, such as make_rollout_mesh gives")
    rows, slots = prompt_PT.shape[0] * sampling.group_size, sampling.max_new_tokens
    _, prefix = policy.prefill(config, params, constrain(prompt_PT, "batch", "length"))
    ahead_P = length_P - 1
    last_P1 = jnp.take_along_axis(prompt_PT, ahead_P[:, None], axis=1)
    last_B1 = jnp.repeat(last_P1, sampling.group_size, axis=0)
    tokens_BS = jnp.pad(last_B1, ((0, 0), (0, slots)), constant_values=sampling.pad_id)
    zero_B, shape = jnp.zeros(rows, jnp.int32), (rows, slots + 1)
    cache = policy.empty_cache(config, rows, slots)
    start = Rows(tokens_BS, jnp.zeros(shape, bool), jnp.zeros(shape), zero_B, zero_B, zero_B > 0, cache)
    return prefix, ahead_P, _constrained(start)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "chunk"), donate_argnames="rows")
def go_on(
    config: DecoderConfig,
    sampling: Sampling,
    chunk: int,
    context: Context,
    rows: Rows,
    table_XV: jax.Array,
    start_B: jax.Array,
    added_BA: jax.Array,
    adds_B: jax.Array,
    active_B: jax.Array,
    waits_B: jax.Array,
    patience: jax.Array,
) -> tuple[Rows, jax.Array]:
    """Lays `added` behind the rows and samples on. Returns the rows and which of them are still active.

    Args:
      chunk: tokens a row of one forward pass over what is added.
      table_XV, start_B: of infinite_jax/stop_strings.py; a row's first state in each turn.
      added_BA, adds_B: i32, tokens of the environment and how many; a row with some begins a turn. They must leave a
        slot free.
      active_B: bool, rows to sample.
      waits_B: bool, rows for which the host has work once they stop. patience: i32[], so many of those end the call.
    """
    before_B = rows.length_B
    rows = _constrained(_laid(rows, start_B, added_BA, adds_B))
    decode = functools.partial(policy.decode, config, context.params)
    append = functools.partial(policy.append, config, context.params)

    def fill(number, cache):
        slot_B = before_B + number * chunk
        slot_BQ = slot_B[:, None] + jnp.arange(chunk)  # past a row's last token: fillers, overwritten before they count
        tokens_BQ = jnp.take_along_axis(rows.tokens_BS, slot_BQ, axis=1, mode="clip")
        return append(tokens_BQ, slot_B, context.prefix, context.ahead_P, cache)[1]

    cache = jax.lax.fori_loop(0, -(-jnp.max(adds_B) // chunk), fill, rows.cache)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(context.key, jnp.arange(len(before_B)))
    stops = jnp.array(sampling.stop_ids, jnp.int32)

    def body(loop):
        rows, active_B = loop
        token_B = jnp.take_along_axis(rows.tokens_BS, rows.length_B[:, None], axis=1)[:, 0]
        hidden_BE, cache = decode(token_B, rows.length_B, context.prefix, context.ahead_P, rows.cache)
        logits_BV = policy.unembed(config, context.params, hidden_BE)
        token_B, logp_B = _choose(logits_BV, row_keys, rows.length_B, sampling)
        match_B = table_XV[rows.match_B, token_B].astype(jnp.int32)
        ended_B = jnp.isin(token_B, stops) | (match_B == FOUND)
        rows = _sampled(rows._replace(cache=cache), active_B, token_B, logp_B, match_B, ended_B)
        return rows, active_B & ~rows.ended_B & (rows.length_B < sampling.max_new_tokens)

    def unfinished(loop):
        # Counted anew, both in one sum over the devices. A count kept up in the loop would be another on each device:
        # XLA on GPUs (jax 0.11.2) moves its sum behind the loop, though the condition reads it, and all wait for ever.
        _, left_B = loop
        left, waiting = jnp.sum(jnp.stack([left_B, active_B & ~left_B & waits_B]), axis=1)
        return (left > 0) & (waiting < patience)

    rows, active_B = jax.lax.while_loop(unfinished, body, (rows._replace(cache=cache), active_B))
    return _constrained(rows), active_B


def _laid(rows: Rows, start_B, added_BA, adds_B) -> Rows:
    """The rows with the environments' tokens behind them."""
    place_BS = jnp.arange(rows.tokens_BS.shape[1]) - 1 - rows.length_B[:, None]  # among what is added
    added_BS = jnp.take_along_axis(added_BA, jnp.clip(place_BS, 0, added_BA.shape[1] - 1), axis=1)
    new_BS = (place_BS >= 0) & (place_BS < adds_B[:, None])
    return rows._replace(
        tokens_BS=jnp.where(new_BS, added_BS, rows.tokens_BS),
        length_B=rows.length_B + adds_B,
        match_B=jnp.where((adds_B > 0) | (rows.length_B == 0), start_B, rows.match_B),
    )


def _sampled(rows: Rows, active_B, token_B, logp_B, match_B, ended_B) -> Rows:
    """The rows with one more token behind those that are active."""
    new_BS = active_B[:, None] & (jnp.arange(rows.tokens_BS.shape[1]) == rows.length_B[:, None] + 1)
    return rows._replace(
        tokens_BS=jnp.where(new_BS, token_B[:, None], rows.tokens_BS),
        sampled_BS=rows.sampled_BS | new_BS,
        logp_BS=jnp.where(new_BS, logp_B[:, None], rows.logp_BS),
        length_B=rows.length_B + active_B,
        match_B=jnp.where(active_B, match_B, rows.match_B),
        ended_B=jnp.where(active_B, ended_B, rows.ended_B),
    )


def _choose(logits_BV, row_keys, slot_B, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """As rollout.choose, with a key for each row and slot: a row's draws do not depend on the other rows."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), jnp.zeros(len(logits_BV), jnp.float32)
    logp_BV = processed_logp(logits_BV, sampling)
    keys = jax.vmap(jax.random.fold_in)(row_keys, slot_B)
    token_B = jax.vmap(jax.random.categorical)(keys, logp_BV).astype(jnp.int32)
    return token_B, entry(logp_BV, token_B)


def _constrained(rows: Rows) -> Rows:
    """One split from call to call, so that all calls are one program."""
    split = jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), rows._replace(cache=None))
    axes = ("layers", "batch", "kv_heads", None, "head_dim")
    return split._replace(cache=Cache(*(constrain(x, *axes) for x in rows.cache)))
