"""LoRA (Hu et al. 2021, arXiv 2106.09685): what a run learns is a product of two thin matrices beside frozen ones.

    y = x W + s (x A) B      s = alpha / rank,  A [in, rank] uniform in +-1 / sqrt(in),  B [rank, out] zeros

So a policy begins exactly as its base. Targets are the linear layers of the blocks, under the names of their Hugging
Face tensors: q, k, v, o, gate, up, down. Each has factors of its own, also where the decoder computes several in one
product, so that they are those of a peft adapter. Their dimensions are W's (models/decoder.py) and the rank R, all with
a leading L; S and I are the target's own places on W's dimension:

    q_a [E, R], q_b [R, K, S, D]     o_a [K, Q, D, R], o_b [R, E]     gate_a [E, R], gate_b [R, I, F]
    k, v as q, up as gate            down_a [F, R], down_b [R, E]

Three trees: the base; the adapters, which alone have gradients, moments and a place in checkpoints; and what `join`
makes of both, which every function of models/policy.py takes: it adds s (x A) B, and no gradient as large as W is ever
formed. `merge` makes W + s A B of it, a tree like the base's, to decode with at full speed and to export.

Left out: dropout on x (A B would differ between scoring and the loss), adapters of embedding and head, rank-stabilised
scales, DoRA.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.architectures import DecoderConfig

AXES = {
    "E": "embed", "K": "kv_heads", "Q": "heads", "S": None, "D": "head_dim", "F": "mlp", "I": None, "R": "rank",
}  # fmt: skip


class Target(NamedTuple):
    """A linear layer: the letters of its input's and its output's dimensions, and its name in Hugging Face folders."""

    into: str
    out: str
    module: str


TARGETS = {
    "q": Target("E", "KSD", "self_attn.q_proj"),
    "k": Target("E", "KSD", "self_attn.k_proj"),
    "v": Target("E", "KSD", "self_attn.v_proj"),
    "o": Target("KQD", "E", "self_attn.o_proj"),
    "gate": Target("E", "IF", "mlp.gate_proj"),
    "up": Target("E", "IF", "mlp.up_proj"),
    "down": Target("F", "E", "mlp.down_proj"),
}
# The decoder's parameters and the targets in each, in the order of their places on its last dimension but one.
PARTS = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
FACTORS = {f"{name}_{factor}" for name in TARGETS for factor in "ab"}


def places(config: DecoderConfig, name: str) -> int:
    """Of a target on the dimension that it shares with others."""
    return config.num_heads // config.num_kv_heads if name == "q" else 1


def _letters(config: DecoderConfig) -> dict[str, str]:
    """Of every factor of the configuration's targets."""
    chosen = {name: TARGETS[name] for name in TARGETS if name in config.lora.targets}
    factors = {}
    for name, target in chosen.items():
        factors |= {f"{name}_a": target.into + "R", f"{name}_b": "R" + target.out}
    return factors


def _shape(config: DecoderConfig, name: str, letters: str) -> tuple[int, ...]:
    """Of a factor, layers first."""
    sizes = dict(E=config.embed_dim, F=config.mlp_dim, K=config.num_kv_heads, D=config.head_dim, R=config.lora.rank)
    sizes |= dict(Q=config.num_heads // config.num_kv_heads, S=places(config, name[:-2]), I=1)
    return config.num_layers, *(sizes[letter] for letter in letters)


def abstract_params(config: DecoderConfig) -> dict:
    """Shapes of the adapters of config.lora, float32."""
    shapes = {name: _shape(config, name, letters) for name, letters in _letters(config).items()}
    return {"layers": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}


def logical_axes(config: DecoderConfig) -> dict:
    """The same tree with a tuple of logical axis names (sharding/rules.py) for each leaf."""
    return {"layers": {name: ("layers", *axes(name)) for name in _letters(config)}}


def axes(factor: str) -> tuple[str | None, ...]:
    """Logical axes of a factor of one layer: those of W's input or output, and of the rank."""
    target = TARGETS[factor[:-2]]
    return tuple(AXES[letter] for letter in (target.into + "R" if factor.endswith("_a") else "R" + target.out))


def init(config: DecoderConfig, key: jax.Array) -> dict:
    """Adapters that change nothing yet. Consumes `key`. Under jit with out_shardings they are born on them."""
    found = {}
    for number, (name, shape) in enumerate(abstract_params(config)["layers"].items()):
        if name.endswith("_b"):
            found[name] = jnp.zeros(shape.shape, shape.dtype)
        else:
            bound = 1 / math.sqrt(math.prod(shape.shape[1:-1]))  # as peft's: Kaiming's uniform with a = sqrt(5)
            key_A = jax.random.fold_in(key, number)
            found[name] = jax.random.uniform(key_A, shape.shape, shape.dtype, -bound, bound)
    return {"layers": found}


def join(config: DecoderConfig, base: dict | None, learnt: dict) -> dict:
    """What models/policy.py reads: base and adapters in one tree, the scale in B; no array of the base is copied.

    `learnt` as it is where there is no base, or where it is no adapter but a whole policy.
    """
    if base is None or "embed" in learnt:
        return learnt
    scale = config.lora.alpha / config.lora.rank
    scaled = {name: scale * x if name.endswith("_b") else x for name, x in learnt["layers"].items()}
    return base | {"layers": base["layers"] | scaled}


def adapted(params: dict) -> bool:
    """Whether a policy's parameters hold adapters."""
    return any(not FACTORS.isdisjoint(layers) for name, layers in params.items() if name.startswith("layers"))


def change(config: DecoderConfig, leaf: str, factors: dict[str, jax.Array], into: Callable) -> jax.Array | None:
    """What adapters add to a leaf's product, or to itself; None where it has none.

    factors: of one layer, scaled. into: from A to what is multiplied by B, x A [..., R] or A itself.
    """
    parts = {
        name: jnp.tensordot(into(factors[f"{name}_a"]), factors[f"{name}_b"], axes=1)
        for name in PARTS[leaf]
        if f"{name}_a" in factors
    }
    if not parts or len(PARTS[leaf]) == 1:
        return next(iter(parts.values()), None)
    some = next(iter(parts.values()))

    def zeros(name):
        return jnp.zeros((*some.shape[:-2], places(config, name), some.shape[-1]), some.dtype)

    return jnp.concatenate([parts[name] if name in parts else zeros(name) for name in PARTS[leaf]], axis=-2)


def merge(config: DecoderConfig, params: dict) -> dict:
    """W + s A B in W's dtype, summed in float32, a layer at a time; a tree without adapters as it is.

    Layers may be stacked or apart (models/policy.py).
    """
    if not adapted(params):
        return params

    def layer(weights, factors):
        with jax.default_matmul_precision("float32"):
            return {
                leaf: (w.astype(jnp.float32) + change(config, leaf, factors, lambda a: a)).astype(w.dtype)
                for leaf, w in weights.items()
            }

    def merged(layers, run):
        factors = {name: x for name, x in layers.items() if name in FACTORS}
        changed = {leaf: layers[leaf] for leaf in PARTS if any(f"{name}_a" in factors for name in PARTS[leaf])}
        return {name: x for name, x in layers.items() if name not in FACTORS} | run(changed, factors)

    if "layers" in params:
        return params | {"layers": merged(params["layers"], lambda *both: jax.lax.map(lambda x: layer(*x), both))}
    return params | {name: merged(leaf, layer) for name, leaf in params.items() if name.startswith("layers_")}
