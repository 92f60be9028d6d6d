"""The policy: one decoder-only transformer for every family of models/architectures.py, trained and sampled from.

    x <- x + W_o attention(rope(qkv(norm(x))))      x <- x + W_down(act(gate(norm(x))) * up(norm(x)))

Matrix products run in `config.dtype` with float32 accumulation; norms, rotary angles, softmax and logits are float32.
Parameters may be stored in another dtype and are cast where they are used. All layers are one `nn.scan`: their
parameters are stacked on axis 0, which keeps compilation time independent of depth.

Dimensions beyond infinite_jax/types.py: Q = H / K query heads of one key/value head, S = Q + 2, C completion slots.
Parameters: embed [V, E], final_norm [E], head [E, V] unless tied, and `layers`, in which each has a leading L:

    attn_norm [E], qkv [E, K, S, D], qkv_bias [K, S, D], q_norm [D], k_norm [D], out [K, Q, D, E], post_attn_norm [E],
    mlp_norm [E], gate_up [E, 2, F], down [F, E], post_mlp_norm [E]      (qkv_bias, q, k, post norms: in some families)

S holds the Q queries of one key/value head, its key and its value: one product computes all three, and a split of K
over `tensor` splits them alike (where `tensor` does not divide K, this one product is replicated; the rest of attention
is then split over Q). Decoding a few rows is bound by the number of kernels, hence few and large products.

Decoding keeps the prompts' keys and values once a prompt (`prefill`) and the completions' in a second cache
(`empty_cache`); a step attends to both under one softmax (models/attention.py). Training runs a prompt once, too, and
whole completions behind it (`extend`). Left out: dropout, biases beside qkv.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from models.architectures import DecoderConfig, rope_frequencies
from models.attention import Cache, attention, decode_attention, extend_attention, rotate
from sharding.rules import constrain


class _Layer(NamedTuple):
    """What differs from layer to layer; scanned."""

    number: jax.Array  # i32[L]
    window: jax.Array  # i32[L], 0 = none
    prefix: Cache | None  # the prompts', only in decoding and behind a prompt


class _Shared(NamedTuple):
    """What all layers see."""

    positions: jax.Array  # i32 [B or 1, T]; in decoding [N]
    cos_sin: jax.Array  # f32 [kinds of rope, 2, *positions.shape, D / 2], of global layers and, if it differs, of local
    step: jax.Array | None = None  # i32[], only in decoding: slot of the completion cache
    prefix_length_P: jax.Array | None = None  # i32, only in decoding and behind a prompt


def rms_norm(x: jax.Array, weight: jax.Array, config: DecoderConfig) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, float32 [...]."""
    x = x.astype(jnp.float32)
    scale = config.norm_offset + weight.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * scale


class Block(nn.Module):
    """One layer. Carry: hidden [B, T, E] or, in decoding, [N, E], and the completion cache of all layers or None."""

    config: DecoderConfig
    keep: bool  # return the keys and values

    @nn.compact
    def __call__(self, carry, layer: _Layer, shared: _Shared):
        hidden, cache = carry
        update, cache, kv = self.attend(self.norm("attn_norm", hidden), cache, layer, shared)
        hidden = self.add(hidden, "post_attn_norm", update)
        hidden = self.add(hidden, "post_mlp_norm", self.mlp(self.norm("mlp_norm", hidden)))
        return (hidden, cache), kv

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        return _param(self, name, shape, axes).astype(self.config.dtype)

    def norm(self, name: str, hidden: jax.Array) -> jax.Array:
        return rms_norm(hidden, _norm_param(self, name, hidden.shape[-1]), self.config).astype(self.config.dtype)

    def add(self, hidden: jax.Array, norm: str, update: jax.Array) -> jax.Array:
        update = self.norm(norm, update) if self.config.post_norms else update
        return _constrain_hidden(hidden + update)

    def attend(self, x, cache: Cache | None, layer: _Layer, shared: _Shared):
        """Projected attention output, the updated cache, and with `keep` the layer's keys and values [B, K, T, D]."""
        c = self.config
        queries = c.num_heads // c.num_kv_heads
        shape = (c.num_kv_heads, queries + 2, c.head_dim)
        weight = self.weight("qkv", (c.embed_dim, *shape), ("embed", "kv_heads", None, "head_dim"))
        qkv = jnp.einsum("...E,EKSD->...KSD", x, weight)
        if c.qkv_bias:
            qkv += self.weight("qkv_bias", shape, ("kv_heads", None, "head_dim"))
        qk, v = qkv[..., :-1, :].astype(jnp.float32), qkv[..., -1, :]
        if c.qk_norm:
            q_norm, k_norm = (_norm_param(self, name, c.head_dim) for name in ("q_norm", "k_norm"))
            qk = rms_norm(qk, jnp.stack([q_norm] * queries + [k_norm]), c)
        local = (layer.window > 0).astype(jnp.int32) if len(shared.cos_sin) > 1 else 0
        qk = rotate(qk, *shared.cos_sin[local]).astype(c.dtype)
        q, k = qk[..., :-1, :], qk[..., -1, :]
        window = layer.window if any(c.windows) else None
        kv = None
        if cache is None:
            q = constrain(q, "batch", "length", "kv_heads", "heads", "head_dim")
            if layer.prefix is None:
                heads = self.recomputed(attention, 5)(q, k, v, shared.positions, window, c.query_scale)
            else:
                behind = (layer.prefix, shared.prefix_length_P, window, c.query_scale)
                heads = self.recomputed(extend_attention, 6)(q, k, v, *behind)
            kv = Cache(k.swapaxes(1, 2), v.swapaxes(1, 2)) if self.keep else None
        else:
            cache = _write(cache, Cache(k, v), layer.number, shared.step)
            own = Cache(*(jax.lax.dynamic_index_in_dim(x, layer.number, keepdims=False) for x in cache))
            heads = decode_attention(q, layer.prefix, shared.prefix_length_P, own, shared.step, window, c.query_scale)
        axes = ("kv_heads", "heads", "head_dim", "embed")
        weight = self.weight("out", (c.num_kv_heads, queries, c.head_dim, c.embed_dim), axes)
        return jnp.einsum("...KQD,KQDE->...E", heads, weight), cache, kv

    def recomputed(self, attend, scale: int):
        """`attend` without its weights kept for the backward pass; `scale`: its static argument."""
        remat = self.config.remat == "none"  # else the whole block is recomputed
        return jax.checkpoint(attend, static_argnums=scale, prevent_cse=False) if remat else attend

    def mlp(self, x: jax.Array) -> jax.Array:
        c = self.config
        weight = self.weight("gate_up", (c.embed_dim, 2, c.mlp_dim), ("embed", None, "mlp"))
        gate_up = jnp.einsum("...E,EIF->...IF", x, weight)
        gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
        gate = nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)
        weight = self.weight("down", (c.mlp_dim, c.embed_dim), ("mlp", "embed"))
        return jnp.einsum("...F,FE->...E", gate * up, weight)


class Decoder(nn.Module):
    """Embedding, scanned Blocks, final norm."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens, shared: _Shared, prefix: Cache | None = None, cache: Cache | None = None, keep=False):
        """Hidden [*tokens.shape, E], and the completion cache or, with `keep`, the row's own keys and values."""
        c = self.config
        embed = _param(self, "embed", (c.vocab_size, c.embed_dim), ("vocab", "embed"))
        if not c.tied_embeddings:
            _param(self, "head", (c.embed_dim, c.vocab_size), ("embed", "vocab"))  # read by `unembed`
        rows = constrain(embed, "vocab", None)[tokens]  # else the lookup's output inherits the split of embed
        hidden = rows.astype(c.dtype) * jnp.asarray(c.embed_scale, c.dtype)
        block = Block
        if c.remat != "none":
            save = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            block = nn.remat(Block, policy=save, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, keep, name="layers")
        layer = _Layer(jnp.arange(c.num_layers), jnp.array(c.windows, jnp.int32), prefix)
        (hidden, cache), kv = layers((_constrain_hidden(hidden), cache), layer, shared)
        norm = _norm_param(self, "final_norm", c.embed_dim)
        return rms_norm(hidden, norm, c).astype(c.dtype), kv if keep else cache


def _param(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """A matrix or bias: normal with the families' own initial deviation 0.02, biases 0; float32."""
    start = nn.initializers.zeros if name.endswith("bias") else nn.initializers.normal(0.02)
    return module.param(name, nn.with_logical_partitioning(start, axes), shape)


def _norm_param(module: nn.Module, name: str, size: int) -> jax.Array:
    """A norm's weight, which starts where it multiplies by 1."""
    start = nn.initializers.constant(1.0 - module.config.norm_offset)
    return module.param(name, nn.with_logical_partitioning(start, (None,)), (size,))


def _write(cache: Cache, new: Cache, layer: jax.Array, slot: jax.Array) -> Cache:
    """Cache with `new` [N, K, D] at [layer, :, :, slot]: one slot for all rows, so that it is updated in place."""

    def write(old, x):
        old = jax.lax.dynamic_update_slice(old, x[None, :, :, None].astype(old.dtype), (layer, 0, 0, slot, 0))
        return constrain(old, "layers", "batch", "kv_heads", None, "head_dim")

    return Cache(*map(write, cache, new))


def _constrain_hidden(hidden: jax.Array) -> jax.Array:
    return constrain(hidden, *("batch", "length")[: hidden.ndim - 1], None)


def _share(config: DecoderConfig, positions: jax.Array, length: int, **decoding) -> _Shared:
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
    return _Shared(positions, jnp.stack(tables), **decoding)


def _boxed(config: DecoderConfig, key: jax.Array):
    positions = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, positions, _share(config, positions, 1))["params"]


def init(config: DecoderConfig, key: jax.Array) -> dict:
    """Random parameters, float32. Consumes `key`. Under jit with out_shardings they are born on their shardings."""
    return nn.unbox(_boxed(config, key))


def abstract_params(config: DecoderConfig) -> dict:
    """The parameters' shapes and dtypes, without any array."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def logical_axes(config: DecoderConfig) -> dict:
    """The parameters' tree with a tuple of logical axis names (sharding/rules.py) for each leaf."""
    boxed = jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def cast(config: DecoderConfig, params: dict) -> dict:
    """Matrices and biases in the compute dtype, norms as they are: what every use would cast to, cast once.

    For a decoding loop over parameters stored in float32; results are bit for bit those of `params`.
    """

    def cast(path, leaf):
        return leaf if path[-1].key.endswith("norm") else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def hidden(config: DecoderConfig, params: dict, tokens_BT: jax.Array, positions_BT: jax.Array | None = None):
    """Last hidden states after the final norm, [B, T, E] in the compute dtype.

    positions_BT (default 0..T-1) serve rotary embedding, causality and windows, whatever the order of the tokens.
    """
    return _forward(config, params, tokens_BT, positions_BT, keep=False)[0]


def _forward(config: DecoderConfig, params: dict, tokens_BT: jax.Array, positions_BT: jax.Array | None, keep: bool):
    chex.assert_rank(tokens_BT, 2)
    length = tokens_BT.shape[1]
    positions_BT = jnp.arange(length)[None] if positions_BT is None else positions_BT
    shared = _share(config, positions_BT, length)
    return Decoder(config).apply({"params": params}, tokens_BT, shared, keep=keep)


def unembed(config: DecoderConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., E]."""
    hidden = hidden.astype(config.dtype)
    equation, weight = (
        ("...E,VE->...V", params["embed"]) if config.tied_embeddings else ("...E,EV->...V", params["head"])
    )
    logits = jnp.einsum(equation, hidden, weight.astype(config.dtype), preferred_element_type=jnp.float32)
    return config.final_softcap * jnp.tanh(logits / config.final_softcap) if config.final_softcap else logits


def logits(config: DecoderConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]; index t predicts token t + 1. For whole batches prefer `hidden` and a chunked loss."""
    return unembed(config, params, hidden(config, params, tokens_BT))


def prefill(config: DecoderConfig, params: dict, tokens_PT: jax.Array) -> tuple[jax.Array, Cache]:
    """Hidden states [P, T, E] and the keys and values of right-padded prompts, once a prompt."""
    return _forward(config, params, tokens_PT, None, keep=True)


def extend(
    config: DecoderConfig, params: dict, tokens_NC: jax.Array, prefix: Cache, prefix_length_P: jax.Array
) -> jax.Array:
    """Hidden states [N, C, E] of completions behind prompts of which `prefill` gave the keys and values.

    Row n continues prompt n // (N / P): its token c stands at position prefix_length_P[p] + c and sees the prompt's
    first prefix_length_P[p] tokens and its own up to c. Differentiable, into the prefix too: a prompt is computed once
    for all its completions and gets the sum of their gradients.
    """
    chex.assert_rank([tokens_NC, prefix_length_P], [2, 1])
    (rows, slots), prompts = tokens_NC.shape, len(prefix_length_P)
    if rows % prompts or prefix.k.shape[1] != prompts:
        raise ValueError(
            f"extend: {rows} rows, {prompts} prompt lengths, keys of {prefix.k.shape[1]} prompts: pass P and P x G rows"
        )
    positions_NC = jnp.repeat(prefix_length_P, rows // prompts)[:, None] + jnp.arange(slots)
    shared = _share(config, positions_NC, prefix.k.shape[3] + slots, prefix_length_P=prefix_length_P)
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
    first prefix_length_P[p] tokens and completion slots 0..step. `completion` should be carried by the loop (or
    donated): it is updated in place.
    """
    chex.assert_rank([token_N, step, prefix_length_P], [1, 0, 1])
    rows, prompts, length = len(token_N), len(prefix_length_P), prefix.k.shape[3] + completion.k.shape[3]
    if rows % prompts or prefix.k.shape[1] != prompts or completion.k.shape[1] != rows:
        raise ValueError(
            f"decode: {rows} tokens, {prompts} prompt lengths, caches of {prefix.k.shape[1]} and "
            f"{completion.k.shape[1]} rows: pass P prompts and P x G rows"
        )
    positions_N = jnp.repeat(prefix_length_P + step, rows // prompts)
    shared = _share(config, positions_N, length, step=step, prefix_length_P=prefix_length_P)
    return Decoder(config).apply({"params": params}, token_N, shared, prefix, completion)
