"""Zigzag order: how the tokens of a row lie over a ring of n devices so that causal attention costs each the same.

A row is cut into 2n chunks; device r holds chunks r and 2n - 1 - r, its `lo` and `hi`, one early and one late. The same
permutation goes for tokens, positions, segments, targets and masks.
"""

import jax
import jax.numpy as jnp
import numpy as np


def padded(length: int, n: int) -> int:
    """The next length that 2n chunks divide. Padding goes last in position, where causality hides it."""
    return -(-length // (2 * n)) * 2 * n


def order(length: int, n: int) -> np.ndarray:
    """i32 [length]: x[:, order] lies in zigzag order, device after device.

    Raises ValueError where 2n does not divide the length.
    """
    if length % (2 * n):
        remedy = f"pad it to {padded(length, n)}"
        raise ValueError(f"zigzag: length {length} is no multiple of {2 * n} = 2 x {n} devices: {remedy}")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * n, -1)
    device = np.arange(n)
    return chunks[np.stack([device, 2 * n - 1 - device], axis=1).ravel()].ravel()


def inverse(length: int, n: int) -> np.ndarray:
    """i32 [length]: undoes `order`, x[:, order][:, inverse] == x."""
    return np.argsort(order(length, n)).astype(np.int32)


def chunk_lengths(lengths_B: jax.Array, device: jax.Array, n: int, chunk: int) -> tuple[jax.Array, jax.Array]:
    """How many of a row's first lengths_B[b] tokens are in a device's lo and in its hi, the first ones of each."""
    return tuple(jnp.clip(lengths_B - which * chunk, 0, chunk) for which in (device, 2 * n - 1 - device))
