"""The policy: one decoder-only transformer for every family of models/architectures.py, trained and sampled from.

The network and its parameters are models/decoder.py's, logits and log-probabilities models/head.py's; here is how rows
go through it. Decoding keeps the prompts' keys and values once a prompt (`prefill`) and the completions' in a second
cache (`empty_cache`); a step attends to both under one softmax (models/attention.py). Training runs a prompt once, too,
and whole completions behind it (`extend`). On a mesh with seq > 1 the tokens of `hidden`, `prefill` and `extend` are in
zigzag order (models/layout.py), and so is what they return: nothing but keys and values ever moves along a row;
decoding has no such mesh. Dimensions are models/decoder.py's.
"""

import chex
import jax
import jax.numpy as jnp

from kernels.block import Mask
from models.architectures import DecoderConfig
from models.attention import Cache
from models.decoder import Decoder, abstract_params, init, logical_axes
from models.head import token_logp, unembed
from models.layout import own_mask, positions, prompt_mask, share

__all__ = [
    "abstract_params", "apart", "append", "cast", "decode", "empty_cache", "extend", "hidden", "init", "logical_axes",
    "logits", "prefill", "sampled", "sampled_axes", "token_logp", "unembed",
]  # fmt: skip


def cast(config: DecoderConfig, params: dict) -> dict:
    """Matrices and biases in the compute dtype, norms as they are: what every use would cast to, cast once.

    For a decoding loop over parameters stored in float32; results are bit for bit those of `params`.
    """

    def cast(path, leaf):
        return leaf if path[-1].key.endswith("norm") else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def apart(config: DecoderConfig, params: dict) -> dict:
    """`layers_0`, `layers_1`, ... in place of `layers`: each layer's parameters as arrays of their own.

    For a decoding loop on GPUs: in a loop over a stack, XLA copies each layer's weights out of it for every token. To
    be done before the decoding loop: sliced within it, 24 layers did not compile in a minute. What is apart stays as it
    is.
    """
    if "layers" not in params:
        return params
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return rest | {
        f"layers_{i}": {name: leaf[i] for name, leaf in params["layers"].items()} for i in range(config.num_layers)
    }


def sampled(config: DecoderConfig, params: dict) -> dict:
    """The parameters as sampling reads them: cast, and apart where config.unrolled. What is both stays as it is.

    Apart first: compiled, each layer is then cast on its way out of the stack, and there is no stack of both dtypes.
    """
    return cast(config, apart(config, params) if config.unrolled else params)


def sampled_axes(config: DecoderConfig) -> dict:
    """`logical_axes` of what `sampled` returns."""
    axes = logical_axes(config)
    if not config.unrolled:
        return axes
    own = {name: names[1:] for name, names in axes.pop("layers").items()}
    return axes | {f"layers_{i}": own for i in range(config.num_layers)}


def hidden(
    config: DecoderConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Last hidden states after the final norm, [B, T, E] in the compute dtype.

    Args:
      positions_BT: for rotary embedding, causality and windows; default: models/layout.py's. Without segments any order
        of the tokens will do; with them, positions count within a segment, in the order of the tokens.
      segments_BT: i32, of packed rows: a token sees those of its own segment only.
    """
    return _forward(config, params, tokens_BT, positions_BT, segments_BT, keep=False)[0]


def _forward(config, params, tokens_BT, positions_BT, segments_BT, keep: bool):
    chex.assert_rank(tokens_BT, 2)
    rows, length = tokens_BT.shape
    ordered = positions_BT is None or segments_BT is not None
    positions_BT = positions(length)[None] if positions_BT is None else positions_BT
    mask = own_mask(config, jnp.broadcast_to(positions_BT, (rows, length)), ordered, segments_BT)
    shared = share(config, positions_BT, length, (mask,))
    return Decoder(config).apply({"params": params}, tokens_BT, shared, keep=keep)


def logits(config: DecoderConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]; index t predicts token t + 1. For whole batches prefer `hidden` and a chunked loss."""
    return unembed(config, params, hidden(config, params, tokens_BT))


def prefill(config: DecoderConfig, params: dict, tokens_PT: jax.Array) -> tuple[jax.Array, Cache]:
    """Hidden states [P, T, E] and the keys and values of right-padded prompts, once a prompt."""
    return _forward(config, params, tokens_PT, None, None, keep=True)


def extend(
    config: DecoderConfig, params: dict, tokens_NC: jax.Array, prefix: Cache, prefix_length_P: jax.Array
) -> jax.Array:
    """Hidden states [N, C, E] of completions behind prompts of which `prefill` gave the keys and values.

    Row n continues prompt n // (N / P): its token c stands at position prefix_length_P[p] + c and sees the prompt's
    first prefix_length_P[p] tokens, which may be none, and its own up to c. Differentiable, into the prefix too: a
    prompt is computed once for all its completions and gets the sum of their gradients.
    """
    chex.assert_rank([tokens_NC, prefix_length_P], [2, 1])
    (rows, slots), prompts, width = tokens_NC.shape, len(prefix_length_P), prefix.k.shape[3]
    if rows % prompts or prefix.k.shape[1] != prompts:
        raise ValueError(
            f"extend: {rows} rows, {prompts} prompt lengths, keys of {prefix.k.shape[1]} prompts: pass P and P x G rows"
        )
    positions_NC = jnp.repeat(prefix_length_P, rows // prompts)[:, None] + positions(slots)
    own, behind = own_mask(config, positions_NC, True), prompt_mask(config, positions_NC, width, prefix_length_P)
    shared = share(config, positions_NC, width + slots, (own, behind))
    return Decoder(config).apply({"params": params}, tokens_NC, shared, prefix)[0]


def empty_cache(config: DecoderConfig, rows: int, length: int) -> Cache:
    """Completion cache of `length` slots a row."""
    shape = (config.num_layers, rows, config.num_kv_heads, length, config.head_dim)
    return Cache(*(jnp.zeros(shape, config.dtype) for _ in Cache._fields))


def decode(
    config: DecoderConfig,
    params: dict,
    token_N: jax.Array,
    step: jax.Array,
    prefix: Cache,
    prefix_length_P: jax.Array,
    completion: Cache,
) -> tuple[jax.Array, Cache]:
    """Hidden states [N, E] after completion token number `step` of each row, and the cache with its slot written.

    Row n continues prompt n // (N / P). Its token stands at position prefix_length_P[p] + step; it sees the prompt's
    first prefix_length_P[p] tokens and completion slots 0..step. `step` is of all rows, i32[], or each row's own,
    i32[N]. `completion` should be carried by the loop (or donated): it is updated in place.
    """
    chex.assert_rank([token_N, step, prefix_length_P], [1, {0, 1}, 1])
    rows, prompts, length = len(token_N), len(prefix_length_P), prefix.k.shape[3] + completion.k.shape[3]
    if rows % prompts or prefix.k.shape[1] != prompts or completion.k.shape[1] != rows:
        raise ValueError(
            f"decode: {rows} tokens, {prompts} prompt lengths, caches of {prefix.k.shape[1]} and "
            f"{completion.k.shape[1]} rows: pass P prompts and P x G rows"
        )
    positions_N = jnp.repeat(prefix_length_P, rows // prompts) + step
    shared = share(config, positions_N, length, (), step, prefix_length_P)
    return Decoder(config).apply({"params": params}, token_N, shared, prefix, completion)


def append(
    config: DecoderConfig,
    params: dict,
    tokens_NC: jax.Array,
    slot_N: jax.Array,
    prefix: Cache,
    prefix_length_P: jax.Array,
    completion: Cache,
) -> tuple[jax.Array, Cache]:
    """Several tokens a row at once, in slots slot_N .. slot_N + C - 1: hidden states [N, C, E] and the cache with them.

    Otherwise as `decode` with a slot a row. A row that has fewer tokens may bring anything behind them: a slot is
    written again before a token at or behind it sees it, and what falls behind the last slot is dropped.
    """
    chex.assert_rank([tokens_NC, slot_N, prefix_length_P], [2, 1, 1])
    (rows, chunk), prompts = tokens_NC.shape, len(prefix_length_P)
    width, slots = prefix.k.shape[3], completion.k.shape[3]
    length_N1 = jnp.repeat(prefix_length_P, rows // prompts)[:, None]
    slot_NC = slot_N[:, None] + jnp.arange(chunk)
    at_NC = length_N1 + slot_NC
    own = Mask(positions=(at_NC, length_N1 + jnp.arange(slots)))
    masks = (own, prompt_mask(config, at_NC, width, prefix_length_P))
    shared = share(config, at_NC, width + slots, masks, slot_NC)
    return Decoder(config).apply({"params": params}, tokens_NC, shared, prefix, completion)
