"""A jittable function over the leading axis of its inputs, a fixed number of rows at a time under vmap."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


class Executable(NamedTuple):
    size: int  # rows at a time
    call: Callable


def build(function: Callable, size: int, inputs: tuple, shared: tuple = ()) -> Executable:
    """function(*inputs, *shared) compiled for at most `size` rows of `inputs`, whose leaves have one leading axis.

    `shared` goes to every row as it is, and is an argument of the program, not a constant in it.
    """
    size = min(size, len(jax.tree.leaves(inputs)[0]))
    program = jax.jit(jax.vmap(function, in_axes=(0,) * len(inputs) + (None,) * len(shared)))
    return Executable(size, program.lower(*jax.tree.map(lambda x: x[:size], inputs), *shared).compile())


def run(executable: Executable, inputs: tuple, shared: tuple = ()):
    """What the function gives for every row, numpy leaves. The last part is filled up with the last row."""
    total, outputs = len(jax.tree.leaves(inputs)[0]), []
    for first in range(0, total, executable.size):
        rows = np.minimum(np.arange(first, first + executable.size), total - 1)
        outputs.append(jax.device_get(executable.call(*jax.tree.map(lambda x, rows=rows: x[rows], inputs), *shared)))
    return jax.tree.map(lambda *x: np.concatenate(x)[:total], *outputs)
