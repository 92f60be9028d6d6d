"""Which Hugging Face tensors make up which leaf of the parameter tree: ONE table, for reading and for writing.

A leaf's dimensions have letters, and a tensor's are groups of the same letters: rows KSD and columns E of q_proj are
the first Q places on dimension S of the leaf EKSD. So the part of a leaf that a device holds needs only the matching
rows and columns of the tensors.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from models.architectures import DecoderConfig

SHARED = "SI"  # dimensions that the parts of a leaf share: queries, key, value; gate, up


class Part(NamedTuple):
    """A Hugging Face tensor as a part of a leaf."""

    name: str  # with {} for the layer
    groups: tuple[str, ...]  # the letters in each of its dimensions
    start: int = 0  # first place on the leaf's shared dimension


class Leaf(NamedTuple):
    path: tuple[str, ...]  # in the parameter tree; ("layers", ...) is stacked over layers
    letters: str  # of its dimensions, that of the layers left out
    parts: tuple[Part, ...]

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"


class Tensor(NamedTuple):
    """A tensor of a checkpoint and its place."""

    name: str
    shape: tuple[int, ...]
    leaf: Leaf
    layer: int  # 0 outside the layers
    part: Part


def leaves(config: DecoderConfig) -> list[Leaf]:
    """The table."""
    queries = config.num_heads // config.num_kv_heads
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."

    def layer(leaf: str, letters: str, *parts: Part) -> Leaf:
        return Leaf(("layers", leaf), letters, parts)

    def norm(leaf: str, name: str) -> Leaf:
        return layer(leaf, "E", Part("model.layers.{}." + name + ".weight", ("E",)))

    def qkv(kind: str, *columns: str) -> tuple[Part, ...]:
        return (
            Part(f"{attention}q_proj.{kind}", ("KSD", *columns)),
            Part(f"{attention}k_proj.{kind}", ("KD", *columns), queries),
            Part(f"{attention}v_proj.{kind}", ("KD", *columns), queries + 1),
        )

    table = [
        Leaf(("embed",), "VE", (Part("model.embed_tokens.weight", ("V", "E")),)),
        norm("attn_norm", "input_layernorm"),
        layer("qkv", "EKSD", *qkv("weight", "E")),
        layer("out", "KQDE", Part(attention + "o_proj.weight", ("E", "KQD"))),
        norm("mlp_norm", "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"),
        layer("gate_up", "EIF", *(Part(f"{mlp}{x}_proj.weight", ("F", "E"), i) for i, x in enumerate(("gate", "up")))),
        layer("down", "FE", Part(mlp + "down_proj.weight", ("E", "F"))),
        Leaf(("final_norm",), "E", (Part("model.norm.weight", ("E",)),)),
    ]
    if config.qkv_bias:
        table.append(layer("qkv_bias", "KSD", *qkv("bias")))
    if config.qk_norm:
        table += [layer(f"{x}_norm", "D", Part(f"{attention}{x}_norm.weight", ("D",))) for x in "qk"]
    if config.post_norms:
        table.append(norm("post_attn_norm", "post_attention_layernorm"))
        table.append(norm("post_mlp_norm", "post_feedforward_layernorm"))
    if not config.tied_embeddings:
        table.append(Leaf(("head",), "EV", (Part("lm_head.weight", ("V", "E")),)))
    return table


def _sizes(config: DecoderConfig) -> dict[str, int]:
    """Sizes by letter; S is q_proj's share of its leaf's dimension S. k, v, gate and up hold one place of S or I."""
    queries = config.num_heads // config.num_kv_heads
    sizes = dict(V=config.vocab_size, E=config.embed_dim, F=config.mlp_dim, D=config.head_dim)
    return sizes | dict(K=config.num_kv_heads, Q=queries, S=queries)


def tensors(config: DecoderConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, leaf by leaf."""
    sizes = _sizes(config)
    for leaf in leaves(config):
        for layer, part in itertools.product(range(config.num_layers if leaf.stacked else 1), leaf.parts):
            shape = tuple(math.prod(sizes[letter] for letter in group) for group in part.groups)
            yield Tensor(part.name.format(layer), shape, leaf, layer, part)


def fill(
    config: DecoderConfig, leaf: Leaf, read: Callable[[str], Any], out: np.ndarray, index: tuple[range, ...]
) -> None:
    """out[...] = leaf[index], from the rows and columns that it needs of the tensors that `read` gives by name."""
    layers, index = (index[0], index[1:]) if leaf.stacked else (range(1), index)
    wanted, sizes = dict(zip(leaf.letters, index, strict=True)), _sizes(config)
    for (place, layer), part in itertools.product(enumerate(layers), leaf.parts):
        target, source = [slice(None)] * len(leaf.letters), dict(wanted)
        for axis, letter in enumerate(leaf.letters):
            if letter in SHARED:
                size = sizes[letter] if any(letter in group for group in part.groups) else 1
                first = max(wanted[letter].start, part.start)
                last = max(first, min(wanted[letter].stop, part.start + size))
                source[letter] = range(first - part.start, last - part.start)
                target[axis] = slice(first - wanted[letter].start, last - wanted[letter].start)
        if all(map(len, source.values())):
            block = _read_block(read(part.name.format(layer)), part, leaf.letters, source, sizes)
            (out[place] if leaf.stacked else out)[tuple(target)] = block


def _read_block(tensor, part: Part, letters: str, source: dict[str, range], sizes: dict[str, int]) -> np.ndarray:
    """tensor restricted to `source`, its dimensions in the leaf's order."""
    outer, split, inner = [], [], []
    for head, *rest in part.groups:  # a group's first letter is cut while reading, the others after the reshape
        stride = math.prod(sizes[letter] for letter in rest)
        outer.append(slice(source[head].start * stride, source[head].stop * stride))
        split += [len(source[head]), *(sizes[letter] for letter in rest)]
        inner += [slice(None), *(slice(source[letter].start, source[letter].stop) for letter in rest)]
    block = np.asarray(tensor[tuple(outer)]).reshape(split)[tuple(inner)]
    order = "".join(part.groups)
    block = block.transpose([order.index(letter) for letter in letters if letter in order])
    return np.expand_dims(block, [axis for axis, letter in enumerate(letters) if letter not in order])


def extract(config: DecoderConfig, array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The tensor out of its whole leaf `array`: the inverse of `fill`."""
    leaf, part, sizes = tensor.leaf, tensor.part, _sizes(config)
    order = "".join(part.groups)
    where = [slice(None)] * len(leaf.letters)
    for axis, letter in enumerate(leaf.letters):
        if letter in SHARED:
            where[axis] = slice(part.start, part.start + sizes[letter]) if letter in order else part.start
    kept = [letter for letter in leaf.letters if letter in order]
    block = (array[tensor.layer] if leaf.stacked else array)[tuple(where)]
    return np.ascontiguousarray(block.transpose([kept.index(letter) for letter in order])).reshape(tensor.shape)
