"""The faster of two kernels each way on Hopper: forward of kernels/block_mgpu.py, backward of kernels/block_cudnn.py.

Both give and take o, lse and the mask of the contract, so the one's output is the other's input. For whole or
right-padded rows; docs/results/kernels.md has the speeds.
"""

from kernels import block_cudnn, block_mgpu
from kernels.block import Block

BLOCK = Block("hopper", block_mgpu.BLOCK.forward, block_cudnn.BLOCK.backward)
