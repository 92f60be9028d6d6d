"""The device meshes: one that trains, one that samples. Four axes, always all four; an axis of size 1 costs nothing.

data    replicas of the parameters, batch split
fsdp    parameters, gradients and optimizer moments split; batch split
seq     tokens of one sequence split, in zigzag order (kernels/zigzag.py); parameters split too, as over fsdp
tensor  heads, MLP width and vocabulary split

`tensor` is innermost: its neighbours talk the most. Sampling has no use for fsdp and seq (a parameter would be gathered
for every token), so the rollout's mesh merges all but `tensor` into data. It holds the same devices in the same order,
or, with rollout_devices, the last ones alone; training then has the others.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "seq", "tensor")
OFFLOAD = ("none", "optimizer", "reference", "both")


@dataclass(frozen=True)
class MeshConfig:
    data: int  # sizes: 0 = chosen (sharding/auto.py); -1 on one axis = as many as the others leave, 0 being 1 then
    fsdp: int
    seq: int
    tensor: int
    rollout_tensor: int  # of the rollout's mesh, whose other devices are all data; 0 = the training's
    rollout_devices: int  # the last so many sample and the others train; 0 = all do both, in turns
    offload: str  # none | optimizer | reference | both: what waits in host memory (pinned_host) between its uses

    @property
    def chosen(self) -> bool:
        """Whether a size is left to sharding/auto.py."""
        return 0 in self.sizes

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """As written, in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)


def training_devices(config: MeshConfig, num_devices: int) -> int:
    """How many of `num_devices` train. Raises ValueError where rollout_devices leaves none."""
    train = num_devices - config.rollout_devices
    if config.rollout_devices < 0 or train < 1:
        raise ValueError(
            f"mesh.rollout_devices={config.rollout_devices}: must be 0 (shared) or leave at least one of the "
            f"{num_devices} devices to training"
        )
    return train


def axis_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """Sizes of AXES on the training devices among `num_devices`, with the one -1 filled in.

    Raises ValueError where they do not multiply to that, where a size is still to be chosen, and where the rollout's
    sizes do not fit.
    """
    train = training_devices(config, num_devices)
    sizes = filled(config.sizes, train)
    sampling, tensor = config.rollout_devices or train, config.rollout_tensor or sizes[-1]
    if tensor < 1 or sampling % tensor:
        raise ValueError(
            f"mesh.rollout_tensor={config.rollout_tensor}: {tensor} must divide the rollout's {sampling} devices"
        )
    return sizes


def filled(sizes: tuple[int, int, int, int], train: int) -> tuple[int, int, int, int]:
    """`sizes`, in the order of AXES, on `train` devices, with the one -1 filled in. Raises ValueError as axis_sizes."""
    written, sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes)), list(sizes)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh {written}: sizes are positive, and at most one may be -1 (fill up)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and train % known == 0:
        sizes[sizes.index(-1)] = train // known
    if math.prod(sizes) != train:
        one = "; for one of them alone start with CUDA_VISIBLE_DEVICES=0, for all of them set mesh=auto or mesh.data=-1"
        raise ValueError(
            f"mesh {written} does not fit {train} devices: the sizes must multiply to {train}"
            f"{one if math.prod(sizes) == 1 else ''}"
        )
    return tuple(sizes)


def build(sizes: tuple[int, int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of `sizes`, in the order of AXES, over `devices` (default: all).

    Axes are Auto: the compiler propagates shardings from the constraints.
    """
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that trains, over its part of `devices` (default: all)."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    return build(sizes, devices[: training_devices(config, len(devices))])


def make_rollout_mesh(config: MeshConfig, mesh: Mesh, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that samples, beside make_mesh(config, devices); that mesh itself where both have one shape."""
    devices = jax.devices() if devices is None else devices
    tensor = config.rollout_tensor or mesh.shape["tensor"]
    if config.rollout_devices:
        return build((config.rollout_devices // tensor, 1, 1, tensor), devices[-config.rollout_devices :])
    sizes = (mesh.size // tensor, 1, 1, tensor)
    if sizes == mesh.axis_sizes:
        return mesh
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_sizes(config: MeshConfig, sizes: tuple[int, int, int, int]) -> MeshConfig:
    return dataclasses.replace(config, **dict(zip(AXES, sizes)))
