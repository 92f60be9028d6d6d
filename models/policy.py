"""The policy: one decoder-only transformer for every family of models/architectures.py, trained and sampled from.

    x <- x + W_o attention(rope(qkv(norm(x))))      x <- x + W_down(act(gate(norm(x))) * up(norm(x)))

Matrix products run in `config.dtype` with float32 accumulation; norms, rotary angles, softmax and logits are float32.
Parameters may be stored in another dtype and are cast where they are used; what is split over fsdp and seq is gathered
there, a layer at a time, and its gradient scattered. All layers are one `nn.scan`: their parameters are stacked on axis
0, which keeps compilation time independent of depth.

Dimensions beyond infinite_jax/types.py: Q = H / K query heads of one key/value head, S = Q + 2, C completion slots.
Parameters: embed [V, E], final_norm [E], head [E, V] unless tied, and `layers`, in which each has a leading L:

    attn_norm [E], qkv [E, K, S, D], qkv_bias [K, S, D], q_norm [D], k_norm [D], out [K, Q, D, E], post_attn_norm [E],
    mlp_norm [E], gate_up [E, 2, F], down [F, E], post_mlp_norm [E]      (qkv_bias, q, k, post norms: in some families)

S holds the Q queries of one key/value head, its key and its value: one product computes all three, and a split of K
over `tensor` splits them alike (where `tensor` does not divide K, this one product is replicated; the rest of attention
is then split over Q). Decoding a few rows is bound by the number of kernels, hence few and large products.

Decoding keeps the prompts' keys and values once a prompt (`prefill`) and the completions' in a second cache
(`empty_cache`); a step attends to both under one softmax (models/attention.py). Training runs a prompt once, too, and
whole completions behind it (`extend`). On a mesh with seq > 1 the tokens of `hidden`, `prefill` and `extend` are in
zigzag order (models/layout.py), and so is what they return: nothing but keys and values ever moves along a row;
decoding has no such mesh. Left out: dropout, biases beside qkv.
"""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import select
from kernels.block import Mask
from kernels.ring_attention import Part
from models.architectures import DecoderConfig
from models.attention import Cache, attention, decode_attention, rotate
from models.embedding import lookup
from models.layout import Layer, Shared, own_mask, padded, positions, prompt_mask, share
from sharding.rules import constrain, gathered, shards

KEPT = ("attention_out", "attention_lse")  # names of what remat=dots keeps beside products with weights


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
    def __call__(self, carry, layer: Layer, shared: Shared):
        hidden, cache = carry
        update, cache, kv = self.attend(self.norm("attn_norm", hidden), cache, layer, shared)
        hidden = self.add(hidden, "post_attn_norm", update)
        hidden = self.add(hidden, "post_mlp_norm", self.mlp(self.norm("mlp_norm", hidden)))
        return (hidden, cache), kv

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        return gathered(_param(self, name, shape, axes), self.config.dtype, *axes)

    def norm(self, name: str, hidden: jax.Array) -> jax.Array:
        return rms_norm(hidden, _norm_param(self, name, hidden.shape[-1]), self.config).astype(self.config.dtype)

    def add(self, hidden: jax.Array, norm: str, update: jax.Array) -> jax.Array:
        update = self.norm(norm, update) if self.config.post_norms else update
        return _constrain_hidden(hidden + update)

    def attend(self, x, cache: Cache | None, layer: Layer, shared: Shared):
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
        if cache is not None:
            cache = _write(cache, Cache(k, v), layer.number, shared.step)
            own = Cache(*(jax.lax.dynamic_index_in_dim(x, layer.number, keepdims=False) for x in cache))
        if cache is None or shared.masks:
            q = constrain(q, "batch", "length", "kv_heads", "heads", "head_dim")
            own = (k, v) if cache is None else tuple(x.swapaxes(1, 2) for x in own)
            keys = [own] + ([tuple(x.swapaxes(1, 2) for x in layer.prefix)] if layer.prefix else [])
            masks = (dataclasses.replace(mask, window=mask.positions and window) for mask in shared.masks)
            parts = tuple(Part(*pair, mask) for pair, mask in zip(keys, masks, strict=True))
            kernel = c.attention if cache is None else "xla"  # the only one for which every cache has the right length
            heads = attention(q, parts, c.query_scale, select.block(kernel))
            kv = Cache(_constrain_keys(k.swapaxes(1, 2)), _constrain_keys(v.swapaxes(1, 2))) if self.keep else None
        else:
            heads = decode_attention(q, layer.prefix, shared.prefix_length_P, own, shared.step, window, c.query_scale)
        axes = ("kv_heads", "heads", "head_dim", "embed")
        weight = self.weight("out", (c.num_kv_heads, queries, c.head_dim, c.embed_dim), axes)
        return jnp.einsum("...KQD,KQDE->...E", heads, weight), cache, kv

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
    def __call__(self, tokens, shared: Shared, prefix: Cache | None = None, cache: Cache | None = None, keep=False):
        """Hidden [*tokens.shape, E], and the completion cache or, with `keep`, the row's own keys and values."""
        c = self.config
        embed = _param(self, "embed", (c.vocab_size, c.embed_dim), ("vocab", "embed"))
        if not c.tied_embeddings:
            _param(self, "head", (c.embed_dim, c.vocab_size), ("embed", "vocab"))  # read by `unembed`
        hidden = lookup(embed, tokens, c.dtype) * jnp.asarray(c.embed_scale, c.dtype)
        layers = nn.scan(
            _recomputed(c.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, keep, name="layers")
        layer = Layer(jnp.arange(c.num_layers), jnp.array(c.windows, jnp.int32), prefix)
        (hidden, cache), kv = layers((_constrain_hidden(hidden), cache), layer, shared)
        norm = _norm_param(self, "final_norm", c.embed_dim)
        return rms_norm(hidden, norm, c).astype(c.dtype), kv if keep else cache


def _recomputed(remat: str) -> type[nn.Module]:
    """Block that keeps for its backward pass what `remat` says; nowhere the parameters that it gathered."""
    policies = jax.checkpoint_policies
    match remat:
        case "none" if shards("fsdp") * shards("seq") == 1:
            return Block
        case "none":
            keep = _but_gathered
        case "dots":
            weights = policies.dots_with_no_batch_dims_saveable
            keep = policies.save_from_both_policies(weights, policies.save_only_these_names(*KEPT))
        case _:
            keep = None
    return nn.remat(Block, policy=keep, prevent_cse=False)


def _but_gathered(primitive, *_, **__) -> bool:
    """A remat policy: everything but constraints, which gather parameters, and the casts before them."""
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def _param(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """A matrix or bias: normal with the families' own initial deviation 0.02, biases 0; float32."""
    start = nn.initializers.zeros if name.endswith("bias") else nn.initializers.normal(0.02)
    return module.param(name, nn.with_logical_partitioning(start, axes), shape)


def _norm_param(module: nn.Module, name: str, size: int) -> jax.Array:
    """A norm's weight, which starts where it multiplies by 1."""
    start = nn.initializers.constant(1.0 - module.config.norm_offset)
    return module.param(name, nn.with_logical_partitioning(start, (None,)), (size,))


def _write(cache: Cache, new: Cache, layer: jax.Array, slot: jax.Array) -> Cache:
    """Cache with `new` [N, K, D] at [layer, :, :, slot], in place: one slot for all rows, or each row's own, i32[N].

    Or several tokens a row, `new` [N, C, K, D] at the slots i32[N, C]. What falls behind the last slot is dropped.
    """

    def write(old, x):
        x = x.astype(old.dtype)
        if slot.ndim:
            at = jnp.stack([jnp.broadcast_to(layer, slot.shape), slot], axis=-1)
            old = jax.lax.scatter(old, at, x, _SLOTS[slot.ndim], unique_indices=True, mode="drop")
        else:
            old = jax.lax.dynamic_update_slice(old, x[None, :, :, None], (layer, 0, 0, slot, 0))
        return constrain(old, "layers", "batch", "kv_heads", None, "head_dim")

    return Cache(*map(write, cache, new))


# Rows of cache, slots and new entries belong together one by one: nothing moves between the devices that split them.
_SLOTS = {
    rank: jax.lax.ScatterDimensionNumbers(
        update_window_dims=(rank, rank + 1),
        inserted_window_dims=(0, 3),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    for rank in (1, 2)
}


def _constrain_hidden(hidden: jax.Array) -> jax.Array:
    return constrain(hidden, *("batch", "length")[: hidden.ndim - 1], None)


def _constrain_keys(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", "kv_heads", "length", "head_dim")


def _boxed(config: DecoderConfig, key: jax.Array):
    tokens = jnp.zeros((1, padded(1)), jnp.int32)
    return Decoder(config).init(key, tokens, share(config, tokens, 1, (Mask(causal=True),)))["params"]


def init(config: DecoderConfig, key: jax.Array) -> dict:
    """Random parameters, float32. Consumes `key`. Under jit with out_shardings they are born on their shardings."""
    return nn.unbox(_boxed(config, key))


@functools.cache
def _abstract(config: DecoderConfig):
    return jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))


def abstract_params(config: DecoderConfig) -> dict:
    """The parameters' shapes and dtypes, without any array and of no mesh."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nn.unbox(_abstract(config)))


def logical_axes(config: DecoderConfig) -> dict:
    """The parameters' tree with a tuple of logical axis names (sharding/rules.py) for each leaf."""
    return jax.tree.map(
        lambda box: tuple(box.names), _abstract(config), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def cast(config: DecoderConfig, params: dict) -> dict:
    """Matrices and biases in the compute dtype, norms as they are: what every use would cast to, cast once.

    For a decoding loop over parameters stored in float32; results are bit for bit those of `params`.
    """

    def cast(path, leaf):
        return leaf if path[-1].key.endswith("norm") else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


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


def unembed(config: DecoderConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [N, E], [B, T, E] or [B, shards of T, tokens, E].

    `params` may be `head(config, params)`, gathered once for several calls.
    """
    hidden = hidden.astype(config.dtype)
    equation, weight = (
        ("...E,VE->...V", params["embed"]) if config.tied_embeddings else ("...E,EV->...V", params["head"])
    )
    logits = jnp.einsum(equation, hidden, weight.astype(config.dtype), preferred_element_type=jnp.float32)
    logits = constrain(logits, *("batch", "length", None)[: logits.ndim - 1], "vocab")
    return config.final_softcap * jnp.tanh(logits / config.final_softcap) if config.final_softcap else logits


def head(config: DecoderConfig, params: dict) -> dict:
    """The one parameter that `unembed` reads, gathered over what splits its embed axis, in the dtype it is stored in:
    gradients of several calls then add up in it."""
    name, axes = ("embed", ("vocab", "embed")) if config.tied_embeddings else ("head", ("embed", "vocab"))
    return {name: gathered(params[name], params[name].dtype, *axes)}


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
