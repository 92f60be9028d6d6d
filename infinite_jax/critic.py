"""The critic: V(s_t), what a row is expected to earn from token t on, before that token is written.

    V = <h, weight> + bias        float32; 0 at the start, where an advantage is then the reward

critic=head: h is the policy's last hidden state, the one that predicts token t. No gradient passes from the value into
the policy: the actor's gradient stays that of its own objective, the value loss needs no weight against it, and an
actor that freeze_steps holds still is exactly the one that was there.

critic=network: h is that of a decoder of its own, which begins with the policy's weights and learns all of them. Its
values do not depend on what the policy's last layer keeps for predicting tokens; it costs a second model, its moments
and its passes. It has no unembedding: one that the policy holds beside its embedding is left behind.
"""

import dataclasses

import jax
import jax.numpy as jnp

from infinite_jax.types import Params
from models import policy
from models.architectures import DecoderConfig

HEAD_AXES = {"weight": (None,), "bias": (None,)}  # as small as a norm, and whole on every device as a norm is


def trunk_config(decoder: DecoderConfig) -> DecoderConfig:
    """Of the network: the policy's decoder, without an unembedding."""
    return dataclasses.replace(decoder, tied_embeddings=True)


def abstract_params(kind: str, decoder: DecoderConfig) -> Params:
    """Shapes and dtypes; `kind`: head or network."""
    sizes = {"weight": decoder.embed_dim, "bias": 1}
    head = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in sizes.items()}
    return {"head": head} | ({"trunk": policy.abstract_params(trunk_config(decoder))} if kind == "network" else {})


def logical_axes(kind: str, decoder: DecoderConfig) -> Params:
    """The same tree with a tuple of logical axis names (sharding/rules.py) for each leaf."""
    return {"head": HEAD_AXES} | ({"trunk": policy.logical_axes(trunk_config(decoder))} if kind == "network" else {})


def init(kind: str, decoder: DecoderConfig, params: Params) -> Params:
    """The critic beside a policy of these `params`, which are copied: both states are donated to the update."""
    shapes = abstract_params(kind, decoder)
    made = {"head": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["head"])}
    if kind == "network":
        made["trunk"] = {name: jax.tree.map(jnp.copy, params[name]) for name in shapes["trunk"]}
    return made


def values(head: Params, hidden: jax.Array) -> jax.Array:
    """float32 V [...] of hidden states [..., E]."""
    return hidden.astype(jnp.float32) @ head["weight"] + head["bias"][0]
