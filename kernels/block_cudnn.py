"""cuDNN flash attention as a block: NVIDIA GPUs from Ampere on, bfloat16 or float16, whole or right-padded rows.

jax exposes cuDNN's attention as a differentiable function only, whose residual is a bfloat16 log-sum-exp without a
gradient: of no use for a part of a row. The two primitives underneath return the float32 log-sum-exp and take it, with
the global o, in the backward pass. They are private: their names and parameters are checked at the first use.

cuDNN computes delta from o and do itself. Left out: segments and positions (windows). Its packed layout wants a table
of segment lengths, and its sliding window cannot reach into another device's chunk; benchmarks/packed.py tries both.
"""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from kernels.block import MASKED, Block, Mask

MAX_HEAD_DIM = 256  # from Hopper on; before it MAX_HEAD_DIM_AMPERE
MAX_HEAD_DIM_AMPERE = 128

ARRAYS = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
ARRAYS += ("page_table_k", "page_table_v")
RESIDUALS = ("activation", "fwd_output", "grad_output")
STATIC = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")
ADDED = ("score_mod_name", "score_mod_jaxpr")  # newer jax has them; None turns the feature off


class Private(NamedTuple):
    """The private names of jax that are used."""

    forward: Primitive
    backward: Primitive
    added: dict[str, None]  # static parameters that this jax has beyond STATIC
    masks: type  # the enumeration of mask types
    layout: int  # [B, T, H, D]


@functools.cache
def private() -> Private:
    """jax's private primitives. Raises ValueError where this jax has them no longer, or with other parameters."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module

        added = _check_parameters(module._dot_product_attention_fwd_cuda_lowering, ARRAYS, (*STATIC, "is_training"))
        _check_parameters(module._dot_product_attention_bwd_cuda_lowering, ARRAYS + RESIDUALS, STATIC)
        for name in ("NO_MASK", "PADDING", "CAUSAL", "PADDING_CAUSAL"):
            getattr(module.MaskType, name)
        forward, backward = module._dot_product_attention_fwd_p, module._dot_product_attention_bwd_p
        return Private(forward, backward, added, module.MaskType, module.AttentionLayout.BTNH.value)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"jax {jax.__version__} lacks the private cuDNN attention that kernels/block_cudnn.py was written for "
            f"({error}): set model.attention=xla, or install jax 0.10.2 to 0.12.0"
        ) from error


def _check_parameters(rule, arrays: tuple[str, ...], static: tuple[str, ...]) -> dict[str, None]:
    """Compares a lowering rule's parameters with what is passed here; TypeError names the first difference."""
    found = inspect.signature(rule).parameters
    names = [name for name, kind in found.items() if kind.kind is not inspect.Parameter.VAR_POSITIONAL][1:]
    if tuple(names[: len(arrays)]) != arrays:
        raise TypeError(f"{rule.__name__} takes the arrays {names[: len(arrays)]}")
    different = (set(names[len(arrays) :]) ^ set(static)) - set(ADDED)
    if different:
        raise TypeError(f"{rule.__name__} differs in {', '.join(sorted(different))}")
    return {name: None for name in names if name in ADDED}


def forward(q, k, v, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array]:
    """Block.forward: o in q's dtype. Rows of length 0 have o = 0 and lse = MASKED. Raises ValueError: see check."""
    check(q, k, v, mask)
    jax_private = private()
    bound = _static(jax_private, mask, scale) | {"is_training": True}
    o, lse = jax_private.forward.bind(q, k, v, *_masks(q, k, mask), **bound)
    if mask.lengths_B is None:
        return o, lse
    some_B = mask.lengths_B > 0
    return jnp.where(some_B[:, None, None, None], o, 0), jnp.where(some_B[:, None, None], lse, MASKED)


def backward(q, k, v, o, lse, delta, do, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block.backward: dq, dk, dv in q's dtype. o and do are rounded to it; delta is left to cuDNN."""
    del delta
    check(q, k, v, mask)
    jax_private = private()
    arrays = (*_masks(q, k, mask), lse, o.astype(q.dtype), do.astype(q.dtype))
    dq, dk, dv = jax_private.backward.bind(q, k, v, *arrays, **_static(jax_private, mask, scale))
    if mask.lengths_B is None:
        return dq, dk, dv
    # a row of length 0 was computed with one key, whose weight exp(s - lse) may be infinite
    some_B111 = (mask.lengths_B > 0)[:, None, None, None]
    key_BS11 = (jnp.arange(k.shape[1]) < mask.lengths_B[:, None])[:, :, None, None]
    return jnp.where(some_B111, dq, 0), jnp.where(key_BS11, dk, 0), jnp.where(key_BS11, dv, 0)


def check(q, k, v, mask: Mask) -> None:
    """Raises ValueError, in one line, for what cuDNN's attention does not compute here."""
    if mask.segments is not None or mask.positions is not None:
        what = "segments" if mask.segments is not None else "positions (windows)"
        raise ValueError(f"cuDNN attention has no {what} here: set model.attention=auto, which picks another kernel")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        written = ", ".join(str(x.dtype) for x in (q, k, v))
        raise ValueError(f"cuDNN attention of q, k, v in {written}: set model.dtype=bfloat16, or model.attention=xla")
    limit, device = MAX_HEAD_DIM, jax.devices()[0]
    if device.platform == "gpu" and float(device.compute_capability) < 9.0:
        limit = MAX_HEAD_DIM_AMPERE
    if q.shape[-1] > limit or q.shape[-1] % 8:
        raise ValueError(
            f"cuDNN attention with head dimension {q.shape[-1]}: it is a multiple of 8 up to {limit}; "
            "set model.attention=xla"
        )


def _masks(q, k, mask: Mask) -> list[jax.Array]:
    """Operands after q, k, v: only the sequence lengths are in use, and these only for right-padded keys."""
    absent = jnp.zeros(0, q.dtype)
    if mask.lengths_B is None:
        return [absent] * (len(ARRAYS) - 3)
    lengths_B = jnp.clip(mask.lengths_B, 1, k.shape[1]).astype(jnp.int32)
    return [absent, jnp.full(len(q), q.shape[1], jnp.int32), lengths_B] + [absent] * (len(ARRAYS) - 6)


def _static(jax_private: Private, mask: Mask, scale: float) -> dict:
    padding = "PADDING" * (mask.lengths_B is not None)
    name = "_".join(part for part in (padding, "CAUSAL" * mask.causal) if part) or "NO_MASK"
    return jax_private.added | {
        "scale": float(scale),
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # a bias, its gradient
        "mask_type": jax_private.masks[name],
        "layout": jax_private.layout,
        "sliding_window_length": None,
    }


BLOCK = Block("cudnn", forward, backward)
