"""mesh=auto: the sizes of the mesh from the devices, the model, the batch and the longest row; pure arithmetic.

Of all meshes that the batch divides over, the first by these criteria, in this order:

    the training state fits       (trained x STATE + parameters x COPIES) / (fsdp seq tensor) <= STATE_SHARE of a
                                  device's memory
    one row's activations fit     longest x 2 width (layers + WORKING) / seq        <= ROW_SHARE of it
    tensor divides the kv heads, and a device keeps at least SHORTEST tokens of a row
    least seq x tensor, then least seq, then least fsdp: every further split moves more between devices

The bytes are those of mixed-precision AdamW (ZeRO, arXiv 1910.02054, section 3.1) and of recomputed layers, which keep
one residual each. Left out: bandwidths, and what only a compiler knows; `python -m infinite_jax.plan` compiles.
"""

import dataclasses
import math
from dataclasses import dataclass

from sharding.mesh import AXES, MeshConfig, filled, training_devices, with_sizes

STATE = 16  # bytes a parameter that learns: float32 parameter and gradient 8, AdamW's moments 8
MOMENTS = 8  # of them, those that mesh.offload=optimizer leaves on the host
COPIES = 4  # bytes a parameter: reference, or frozen base, and rollout weights in bfloat16
REFERENCE = 2  # of them, those that mesh.offload=reference leaves on the host
STATE_SHARE, ROW_SHARE, ROLLOUT_SHARE = 0.6, 0.2, 0.3  # of a device's memory
WORKING = 32  # widths a token that the recomputation of one layer holds: its MLP, heads and their gradients
SHORTEST = 128  # tokens of a row on a device, below which a ring step is all latency


@dataclass(frozen=True)
class Need:
    """What the choice depends on."""

    parameters: int  # all
    trained: int  # of them, those that learn
    width: int  # of the residual stream
    layers: int
    kv_heads: int
    rows: int  # of one micro-batch: data x fsdp must divide them
    sampled: int  # rows of a rollout: the data of its mesh must divide them
    longest: int  # tokens of a row
    memory: int | None  # bytes of a device; None = unknown, then nothing is split that needs not be


def choose(config: MeshConfig, num_devices: int, need: Need) -> tuple[MeshConfig, str]:
    """`config` with a size in place of every 0, and why, in one line. Sizes that are given stay.

    Beside a -1, which takes all that the given sizes leave, every 0 is 1. With sizes to choose, rollout_tensor=0 is
    chosen, too: the least split that divides the rows of a rollout and whose weights leave room for keys and values.
    Raises ValueError as `possible` does.
    """
    devices = training_devices(config, num_devices)
    state, row = state_bytes(config, need), row_bytes(need)

    def cost(sizes):
        _, fsdp, seq, tensor = sizes
        over = [0.0, 0.0]
        if need.memory:
            over = [state / (fsdp * seq * tensor * STATE_SHARE), row / (seq * ROW_SHARE)]
        awkward = (need.kv_heads % tensor > 0) + (seq > 1 and need.longest < SHORTEST * seq)
        return *(max(size, need.memory or 0) for size in over), awkward, seq * tensor, seq, fsdp

    sizes = min(possible(config, num_devices, need.rows), key=cost)
    config = with_sizes(config, sizes)
    if not config.rollout_tensor:
        config = dataclasses.replace(config, rollout_tensor=_rollout_tensor(config, devices, need))
    return config, _reason(config, devices, need, state, row)


def possible(config: MeshConfig, num_devices: int, rows: int) -> list[tuple[int, int, int, int]]:
    """All sizes that the given ones and the `rows` of a micro-batch allow. Raises ValueError where there are none."""
    devices = training_devices(config, num_devices)
    sizes = config.sizes
    if -1 in sizes:  # as many as the others leave: nothing is left to choose
        sizes = filled(tuple(size or 1 for size in sizes), devices)
    given = {axis: size for axis, size in zip(AXES, sizes) if size}
    written = ", ".join(f"{axis}={size}" for axis, size in given.items())
    fitting = [
        sizes for sizes in _factors(devices) if all(given.get(axis, size) == size for axis, size in zip(AXES, sizes))
    ]
    if not fitting:
        raise ValueError(f"mesh {written} does not fit {devices} devices: the sizes must divide their number")
    found = [sizes for sizes in fitting if rows % (sizes[0] * sizes[1]) == 0]
    if not found:
        raise ValueError(
            f"mesh {written} on {devices} devices: the {rows} rows of a micro-batch are not divisible by data x fsdp: "
            "set algorithm.prompts to a multiple of it, or other sizes"
        )
    return found


def state_bytes(config: MeshConfig, need: Need) -> int:
    """Of parameters, gradients, optimizer and copies on all devices together."""
    state = STATE - (MOMENTS if config.offload in ("optimizer", "both") else 0)
    copies = COPIES - (REFERENCE if config.offload in ("reference", "both") else 0)
    return need.trained * state + need.parameters * copies


def row_bytes(need: Need) -> int:
    """Of one row's activations in the backward pass, in bfloat16 with recomputed layers."""
    return need.longest * 2 * need.width * (need.layers + WORKING)


def _factors(devices: int) -> list[tuple[int, int, int, int]]:
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    triples = ((f, s, t) for f in sizes for s in sizes for t in sizes)
    return [(devices // (f * s * t), f, s, t) for f, s, t in triples if devices % (f * s * t) == 0]


def _rollout_tensor(config: MeshConfig, devices: int, need: Need) -> int:
    sampling = config.rollout_devices or devices
    sizes = [size for size in range(1, sampling + 1) if sampling % size == 0 and need.sampled % (sampling // size) == 0]
    fitting = [size for size in sizes if 2 * need.parameters <= size * ROLLOUT_SHARE * (need.memory or math.inf)]
    return (fitting or sizes[-1:])[0]


def _reason(config: MeshConfig, devices: int, need: Need, state: int, row: int) -> str:
    data, fsdp, seq, tensor = config.sizes
    split = fsdp * seq * tensor
    head = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, config.sizes))
    head = f"mesh=auto: {head} on {devices} device{'s' * (devices > 1)}"
    if devices == 1:
        return head
    if not need.memory:
        return f"{head}: their memory is unknown, so only the {need.rows} rows of a micro-batch decide"
    held = f"{need.parameters / 1e9:.2f} billion parameters take {state / 1e9:.1f} GB with optimizer and copies"
    parts = [f"{held}, {state / split / 1e9:.1f} of a device's {need.memory / 1e9:.1f} GB"]
    if state > split * STATE_SHARE * need.memory:
        parts[0] += ", which is too much"
    if seq > 1:
        parts.append(f"a row of {need.longest} tokens takes {row / 1e9:.1f} GB")
    if seq * tensor > 1:
        parts.append(f"{need.rows} rows of a micro-batch feed {data * fsdp} devices")
    if config.rollout_tensor > 1:
        parts.append(f"the rollout splits its weights over {config.rollout_tensor}")
    return f"{head}: {'; '.join(parts)}"
