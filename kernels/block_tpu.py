"""A block of attention (kernels/block.py) as Pallas kernels for TPUs: forward, dq, dk with dv; every mask, any lengths.

    block_tpu_tiles.py     sizes of the tiles, VMEM, cost estimates
    block_tpu_mask.py      which tiles are computed, which need a mask, the mask
    block_tpu_launch.py    layouts, and what the three kernels do alike
    block_tpu_forward.py, block_tpu_backward.py    the kernels

Query heads of one key/value head are computed in one step: its keys and values are read once for them and are never
repeated in HBM. Scores, softmax statistics and accumulators are float32; float32 products are not rounded to bfloat16.
An array whose width D is no multiple of 128 is padded to one in HBM by its tiling: D 64 takes the memory of 128.

Left out: partitioning. Under more than one device the call stands inside jax.shard_map(check_vma=False).
"""

import functools

from jax.experimental.pallas import tpu as pltpu

from kernels.block import Block, Mask
from kernels.block_tpu_backward import backward
from kernels.block_tpu_forward import forward


@functools.cache
def make_block(interpret: bool | pltpu.InterpretParams) -> Block:
    """The block, compiled for a TPU or interpreted on any backend: as jnp (True) or with the memory simulated."""

    def block_forward(q, k, v, mask: Mask, scale: float):
        return forward(q, k, v, mask, scale, interpret)

    def block_backward(q, k, v, o, lse, delta, do, mask: Mask, scale: float):
        del o  # delta says it
        return backward(q, k, v, lse, delta, do, mask, scale, interpret)

    return Block("tpu", block_forward, block_backward)


BLOCK = make_block(False)
