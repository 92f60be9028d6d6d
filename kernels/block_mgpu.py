"""Attention for Hopper GPUs, written in Pallas Mosaic GPU: every mask of the contract, head dimensions 64 and 128.

What cuDNN's block lacks are packed rows (segments) and sliding windows; this one has them, at the price of being ours.
It asks for bfloat16 or float16. Left out: other head dimensions, and GPUs before Hopper, which have no wgmma.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import block_mgpu_backward, block_mgpu_forward
from kernels.block import Block, Mask
from kernels.block_mgpu_tiles import SIZES


def check(q, k, v) -> None:
    """Raises ValueError, in one line, for arrays that the kernels were not written for."""
    if q.shape[-1] not in SIZES:
        raise ValueError(
            f"attention kernel mgpu with head dimension {q.shape[-1]}: it has {sorted(SIZES)}; set model.attention=xla"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        written = ", ".join(str(x.dtype) for x in (q, k, v))
        raise ValueError(
            f"attention kernel mgpu with q, k, v in {written}: set model.dtype=bfloat16, or model.attention=xla"
        )


@functools.cache
def make_block(interpret=None) -> Block:
    """interpret: pallas's parameters, to run the kernels on a CPU in tests."""
    kernels = (block_mgpu_forward.forward, block_mgpu_backward.backward)
    run_forward, run_backward = (functools.partial(kernel, interpret=interpret) for kernel in kernels)
    if interpret is None:  # to be traced and compiled once, however many layers call them
        run_forward, run_backward = (jax.jit(run, static_argnames="scale") for run in (run_forward, run_backward))

    def forward(q, k, v, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array]:
        check(q, k, v)
        return run_forward(q, k, v, mask, scale)

    def backward(q, k, v, o, lse, delta, do, mask: Mask, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        check(q, k, v)
        return run_backward(q, k, v, lse, delta, do.astype(q.dtype), mask, scale)

    return Block("mgpu", forward, backward)


BLOCK = make_block()
