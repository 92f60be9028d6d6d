"""What an accelerator offers: the numbers that a plan is held against, and the topologies that can be compiled for.

A row is one JAX device: of a TPU v4 or v5p both cores of a chip, of a TPU7x one core with half of the chip. Peaks are
the makers' own, dense:

    TPU   cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x}; links of v4: arXiv 2304.01433, section 2
    GPU   NVIDIA's data sheets: A100 (2021), H100 and H200 SXM (2024), L4 (2023), T4 (2019)

`usable` is what the compiler lets a program have of a TPU's HBM, read from its refusals (libtpu 0.0.42); a GPU is asked
itself. `link` is one direction of one link; a torus of d dimensions has 2 d links a chip. A GPU's NVLink, or its PCIe
where it has none, counts as one link to a switch.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies

GIB, GIGA, TERA = 2**30, 1e9, 1e12


@dataclass(frozen=True)
class Chip:
    name: str
    kind: str  # jax.Device.device_kind
    hbm: float  # bytes
    usable: float  # bytes that one program may have
    flops: float  # bf16 operations a second, multiply and add counted apart; T4: float16
    bandwidth: float  # of HBM, bytes a second
    link: float  # bytes a second in one direction
    torus: int  # dimensions; 0 = a switch
    shapes: tuple[str, ...]  # topologies, small to large; () = only the local machine's

    @property
    def platform(self) -> str:
        return "tpu" if self.torus else "gpu"


V5E_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
V5P_SHAPES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

CHIPS = (
    Chip("v4", "TPU v4", 32 * GIB, 30.75 * GIB, 275 * TERA, 1200 * GIGA, 50 * GIGA, 3, V5P_SHAPES),
    Chip("v5e", "TPU v5 lite", 16 * GIB, 15.75 * GIB, 197 * TERA, 819 * GIGA, 50 * GIGA, 2, V5E_SHAPES),
    Chip("v5p", "TPU v5", 95 * GIB, 95.74 * GIB, 459 * TERA, 2765 * GIGA, 100 * GIGA, 3, V5P_SHAPES),
    Chip("v6e", "TPU v6 lite", 32 * GIB, 31.25 * GIB, 918 * TERA, 1638 * GIGA, 100 * GIGA, 2, V5E_SHAPES),
    Chip("tpu7x", "TPU7x", 96 * GIB, 94.75 * GIB, 1153.5 * TERA, 3690 * GIGA, 50 * GIGA, 3, V5P_SHAPES),
    Chip("H200", "NVIDIA H200", 141e9, 141e9, 989 * TERA, 4800 * GIGA, 450 * GIGA, 0, ()),
    Chip("H100", "NVIDIA H100 80GB HBM3", 80e9, 80e9, 989 * TERA, 3350 * GIGA, 450 * GIGA, 0, ()),
    Chip("A100-80GB", "NVIDIA A100-SXM4-80GB", 80e9, 80e9, 312 * TERA, 2039 * GIGA, 300 * GIGA, 0, ()),
    Chip("A100-40GB", "NVIDIA A100-SXM4-40GB", 40e9, 40e9, 312 * TERA, 1555 * GIGA, 300 * GIGA, 0, ()),
    Chip("L4", "NVIDIA L4", 24e9, 24e9, 121 * TERA, 300 * GIGA, 32 * GIGA, 0, ()),
    Chip("T4", "Tesla T4", 16e9, 16e9, 65 * TERA, 320 * GIGA, 16 * GIGA, 0, ()),
)

# Read by libtpu when it is loaded. This machine is no TPU host: it must not ask the network, and complains without a
# type of accelerator, which has no bearing on the topology compiled for. Compiling takes no device, so that several
# processes may.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def named(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Chip and shape of a TPU topology such as v5p:4x4x4. Raises ValueError, one line, with the names that work."""
    name, _, shape = topology.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == name and chip.shapes), None)
    if chip is None:
        known = ", ".join(chip.name for chip in CHIPS if chip.shapes)
        raise ValueError(f"topology={topology}: expected <chip>:<shape> with a chip of {known}; or local")
    sizes = tuple(int(size) for size in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if len(sizes) != chip.torus or 0 in sizes:
        raise ValueError(f"topology={topology}: expected {chip.torus} sizes, such as {name}:{chip.shapes[-6]}")
    return chip, sizes


def num_devices(chip: Chip, shape: Sequence[int]) -> int:
    return math.prod(shape) * (2 if chip.name == "tpu7x" else 1)


def prepare(topology: str) -> tuple[Chip, int]:
    """The chip and the number of devices of a topology; nothing is loaded yet but for `local`.

    Call before anything asks for a device: for a TPU topology this process is put on the CPU. Raises ValueError, one
    line, where there is no such thing.
    """
    if topology == "local":
        return local(jax.devices()), len(jax.devices())
    chip, shape = named(topology)
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    return chip, num_devices(chip, shape)


def devices(topology: str) -> list[jax.Device]:
    """The devices to compile for, of a topology that `prepare` has seen.

    Raises ModuleNotFoundError with the pip line where libtpu is missing, ValueError where it does not know the shape.
    """
    if topology == "local":
        return jax.devices()
    chip, shape = named(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(f"topology={topology} needs libtpu, the TPU's compiler: pip install 'jax[tpu]'")
    options: dict = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    if chip.torus == 2 and math.prod(shape) < 4:
        options["chips_per_host_bounds"] = [*shape, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        shapes = ", ".join(f"{chip.name}:{each}" for each in chip.shapes)
        raise ValueError(f"topology={topology}: {error}; names that work: {shapes}") from error


def local(found: Sequence[jax.Device]) -> Chip:
    """This machine's accelerator, with the memory that this process may use of each."""
    kind = found[0].device_kind
    chip = next((chip for chip in CHIPS if kind.startswith(chip.kind)), None)
    if chip is None:
        known = ", ".join(chip.kind for chip in CHIPS)
        raise ValueError(
            f"topology=local: device {kind!r} is not in the table of chips ({known}): name a TPU topology, such as "
            "topology=v5e:4x4"
        )
    limit = (found[0].memory_stats() or {}).get("bytes_limit")
    return dataclasses.replace(chip, usable=limit or chip.usable)


def larger(chip: Chip, devices: int) -> list[str]:
    """TPU topologies with more memory than so many devices of the chip: its own, then others', small to large."""
    own, others = [], []
    for each in CHIPS:
        for shape in each.shapes:
            number = num_devices(each, [int(size) for size in shape.split("x")])
            memory = number * each.usable
            if each.name == chip.name and number > devices:
                own.append((memory, f"{each.name}:{shape}"))
            elif each.name != chip.name and memory > devices * chip.usable:
                others.append((memory, f"{each.name}:{shape}"))
    return [name for _, name in (*sorted(own), *sorted(others))]


def outgoing(chip: Chip, members: Sequence[jax.Device], neighbours: bool = False) -> float:
    """Bytes a second that one member of a group can send to the others, at best.

    On a torus a group can use both directions of those dimensions along which its members differ; with `neighbours`,
    a permute, one direction of one.
    """
    if not chip.torus:
        return chip.link
    spread = np.ptp([device.coords for device in members], axis=0)
    return chip.link * (1 if neighbours else 2 * max(1, np.count_nonzero(spread)))
