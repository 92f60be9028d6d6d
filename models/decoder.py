"""The decoder of the policy as flax modules, and its parameters: the only file that knows flax.

    x <- x + W_o attention(rope(qkv(norm(x))))      x <- x + W_down(act(gate(norm(x))) * up(norm(x)))

Matrix products run in `config.dtype` with float32 accumulation; norms, rotary angles, softmax and logits are float32.
Parameters may be stored in another dtype and are cast where they are used; what is split over fsdp and seq is gathered
there, a layer at a time, and its gradient scattered. All layers are one `nn.scan`: their parameters are stacked on axis
0, which keeps compilation time independent of depth. Parameters may hold `layers_0`, `layers_1`, ... in place of
`layers`, each without the leading L: then there is no scan, which makes decoding faster on GPUs (models/policy.py:
apart) and compilation longer with every layer, about twice as long for 24 of them.

Dimensions beyond infinite_jax/types.py: Q = H / K query heads of one key/value head, S = Q + 2, C completion slots.
Parameters: embed [V, E], final_norm [E], head [E, V] unless tied, and `layers`, in which each has a leading L:

    attn_norm [E], qkv [E, K, S, D], qkv_bias [K, S, D], q_norm [D], k_norm [D], out [K, Q, D, E], post_attn_norm [E],
    mlp_norm [E], gate_up [E, 2, F], down [F, E], post_mlp_norm [E]      (qkv_bias, q, k, post norms: in some families)

Where `layers` hold factors of adapters, too, these are added to the products (models/lora.py).

S holds the Q queries of one key/value head, its key and its value: one product computes all three, and a split of K
over `tensor` splits them alike (where `tensor` does not divide K, this one product is replicated; the rest of attention
is then split over Q). Decoding a few rows is bound by the number of kernels, hence few and large products. Left out:
dropout, biases beside qkv.
"""

import dataclasses
import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import select
from kernels.block import Mask
from kernels.ring_attention import Part
from models import lora
from models.architectures import DecoderConfig
from models.attention import Cache, attention, decode_attention, rotate
from models.embedding import lookup
from models.layout import Layer, Shared, padded, share
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

    def adapted(self, y: jax.Array, leaf: str, x: jax.Array) -> jax.Array:
        """y, the product of x and a leaf, with what adapters add to it, where the parameters hold any."""
        factors = {
            name: gathered(self.get_variable("params", name), self.config.dtype, *lora.axes(name))
            for name in (f"{part}_{factor}" for part in lora.PARTS[leaf] for factor in "ab")
            if self.has_variable("params", name)
        }
        added = lora.change(self.config, leaf, factors, lambda a: jnp.tensordot(x, a, axes=a.ndim - 1))
        return y if added is None else y + added

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
        qkv = self.adapted(jnp.einsum("...E,EKSD->...KSD", x, weight), "qkv", x)
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
        return self.adapted(jnp.einsum("...KQD,KQDE->...E", heads, weight), "out", heads), cache, kv

    def mlp(self, x: jax.Array) -> jax.Array:
        c = self.config
        weight = self.weight("gate_up", (c.embed_dim, 2, c.mlp_dim), ("embed", None, "mlp"))
        gate_up = self.adapted(jnp.einsum("...E,EIF->...IF", x, weight), "gate_up", x)
        gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
        gate = nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)
        weight, gated = self.weight("down", (c.mlp_dim, c.embed_dim), ("mlp", "embed")), gate * up
        return self.adapted(jnp.einsum("...F,FE->...E", gated, weight), "down", gated)


class Decoder(nn.Module):
    """Embedding, Blocks, final norm."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens, shared: Shared, prefix: Cache | None = None, cache: Cache | None = None, keep=False):
        """Hidden [*tokens.shape, E], and the completion cache or, with `keep`, the row's own keys and values."""
        c = self.config
        embed = _param(self, "embed", (c.vocab_size, c.embed_dim), ("vocab", "embed"))
        if not c.tied_embeddings:
            _param(self, "head", (c.embed_dim, c.vocab_size), ("embed", "vocab"))  # read by `unembed`
        hidden = lookup(embed, tokens, c.dtype) * jnp.asarray(c.embed_scale, c.dtype)
        layer = Layer(np.arange(c.num_layers, dtype=np.int32), np.array(c.windows, np.int32), prefix)
        layers = self.one_by_one if self.has_variable("params", "layers_0") else self.scanned
        (hidden, cache), kv = layers(keep, (_constrain_hidden(hidden), cache), layer, shared)
        norm = _norm_param(self, "final_norm", c.embed_dim)
        return rms_norm(hidden, norm, c).astype(c.dtype), kv if keep else cache

    def scanned(self, keep: bool, carry, layer: Layer, shared: Shared):
        """The layers in one loop, over stacked parameters."""
        return nn.scan(
            _recomputed(self.config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, keep, name="layers")(carry, layer, shared)

    def one_by_one(self, keep: bool, carry, layer: Layer, shared: Shared):
        """The same for sampling, which has no gradient: no loop, and each layer has parameters of its own."""
        kept = []
        for i in range(self.config.num_layers):
            own = jax.tree.map(operator.itemgetter(i), layer)
            carry, kv = Block(self.config, keep, name=f"layers_{i}")(carry, own, shared)
            kept.append(kv)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *kept) if keep else None


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
