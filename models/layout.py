"""What the layers share: the order of the tokens, rotary tables, masks.

On a mesh with seq > 1 rows lie in zigzag order (kernels/zigzag.py), padded to a multiple of 2 seq; on any other as they
are read. The caller brings tokens into that order, x[:, positions(T)], and log-probabilities back: hidden states never
move. Masks say the rest: tokens in their order take the kernels' causal mask, windows and other orders theirs by
position.

Dimensions as in models/decoder.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import zigzag
from kernels.block import Mask
from models.architectures import DecoderConfig, rope_frequencies
from models.attention import Cache
from sharding.rules import shards, split


class Layer(NamedTuple):
    """What differs from layer to layer, stacked; of one layer without L."""

    number: jax.Array | np.ndarray  # i32[L]
    window: jax.Array | np.ndarray  # i32[L], 0 = none
    prefix: Cache | None  # the prompts', only in decoding and behind a prompt


class Shared(NamedTuple):
    """What all layers see."""

    cos_sin: jax.Array  # f32 [kinds of rope, 2, *tokens.shape, D / 2], of global layers and, if it differs, of local
    masks: tuple[Mask, ...]  # of the row's own keys and, behind a prompt, of the prompt's; but for the window
    step: jax.Array | None  # i32[] or [rows], only behind a prompt: the first slot written of the completion cache
    prefix_length_P: jax.Array | None  # i32, only in decoding


def padded(length: int) -> int:
    """The next length that the current mesh splits."""
    return zigzag.padded(length, shards("seq")) if shards("seq") > 1 else length


def copies(prompts: int, rows: int) -> int:
    """How often each prompt of `rows` samples is to stand in a batch, so that devices split prompts as they split rows.

    Each then computes the prompts of its own rows and no others. Divides rows / prompts.
    """
    parts = split(("batch",), (rows,))
    return parts // math.gcd(prompts, parts)


def positions(length: int) -> np.ndarray:
    """i32 [length], the place of each token in its row: 0, 1, ... or in zigzag order. A `padded` length."""
    return zigzag.order(length, shards("seq")) if shards("seq") > 1 else np.arange(length, dtype=np.int32)


def share(
    config: DecoderConfig,
    positions: jax.Array,
    length: int,
    masks: tuple[Mask, ...],
    step: jax.Array | None = None,
    prefix_length_P: jax.Array | None = None,
) -> Shared:
    """Rotary tables at `positions`, computed once for all layers. `length`: the tokens a row may come to have."""
    ropes = [config.rope] if config.rope == config.rope_local else [config.rope, config.rope_local]
    if length > config.max_length and any(rope.kind == "dynamic" for rope in ropes):
        raise ValueError(
            f"rows of {length} tokens do not fit dynamic rotary scaling, whose frequencies hold up to "
            f"max_position_embeddings={config.max_length}: shorten the prompts and completions"
        )
    tables = []
    for rope in ropes:
        frequencies, factor = rope_frequencies(rope, config.head_dim)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        tables.append(jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * factor)
    return Shared(jnp.stack(tables), masks, step, prefix_length_P)


def own_mask(config: DecoderConfig, positions_BT: jax.Array, ordered: bool, segments_BT=None) -> Mask:
    """What a token sees of its own row. `ordered`: tokens lie in the order of their positions."""
    segments = None if segments_BT is None else (segments_BT, segments_BT)
    if ordered and not any(config.windows):
        return Mask(causal=True, segments=segments)
    return Mask(positions=(positions_BT, positions_BT), segments=segments)


def prompt_mask(config: DecoderConfig, positions_NC: jax.Array, width: int, length_P: jax.Array) -> Mask:
    """What a completion's token sees of its prompt of `width` padded tokens."""
    if not any(config.windows):
        return Mask(lengths_B=length_P)
    positions_PT = jnp.broadcast_to(positions(width), (len(length_P), width))
    return Mask(lengths_B=length_P, positions=(positions_NC, positions_PT))
