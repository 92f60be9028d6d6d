"""The device mesh. Four axes, always all four; an axis of size 1 costs nothing.

data    replicas of the parameters, batch split
fsdp    parameters, gradients and optimizer moments split; batch split
tensor  heads, MLP width and vocabulary split
seq     tokens of one sequence split
"""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "seq")


@dataclass(frozen=True)
class MeshConfig:
    data: int  # -1 on one axis: as many as the other axes leave
    fsdp: int
    tensor: int
    seq: int


def axis_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """Sizes of AXES with the one -1 filled in. Raises ValueError when they do not multiply to `num_devices`."""
    sizes = [getattr(config, axis) for axis in AXES]
    written = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh {written}: sizes are positive, and at most one may be -1 (fill up)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        raise ValueError(f"mesh {written} does not fit {num_devices} devices: the sizes must multiply to {num_devices}")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all). Axes are Auto: the compiler propagates shardings from the constraints."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
