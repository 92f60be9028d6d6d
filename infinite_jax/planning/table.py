"""The plan in print: aligned plain text, at most 100 columns."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from configs.schema import Config
from infinite_jax.planning.chips import GIB, Chip
from infinite_jax.planning.counts import Collective
from infinite_jax.planning.memory import Resident
from infinite_jax.planning.programs import Program
from infinite_jax.planning.roofline import Roofline, Work, mfu
from models.architectures import DecoderConfig
from sharding.mesh import AXES

FIRST, COLUMN = 44, 14  # widths


def row(name: str, *cells: str) -> str:
    return name.ljust(FIRST) + "".join(cell.rjust(COLUMN) for cell in cells)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def head(
    config: Config, decoder: DecoderConfig, parameters: int, trained: int, topology: str, chip: Chip, devices: int
) -> str:
    """What is planned for."""
    adapters = f"; {trained:,} of adapters learn, rank {decoder.lora.rank}" if decoder.lora else ""
    algorithm, mesh = config.algorithm, config.mesh
    sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, mesh.sizes))
    rollout = f"; rollout tensor={mesh.rollout_tensor or mesh.tensor}" + (
        f" on {mesh.rollout_devices} devices of its own" if mesh.rollout_devices else ""
    )
    lengths = f"{algorithm.prompt_buckets[-1]} + {algorithm.max_new_tokens} tokens"
    parts = f"{algorithm.minibatches} x {algorithm.microbatches} parts of a batch"
    return "\n".join(
        [
            f"{config.model.path}: {parameters:,} parameters ({parameters / 1e9:.2f} billion)" + adapters,
            f"{topology}: {devices} x {chip.name}, {gib(chip.usable)} GiB usable each",
            f"mesh: {sizes}{rollout}; offload {mesh.offload}",
            f"batch: {algorithm.prompts} prompts x {algorithm.group_size} samples, {lengths}, {parts}",
            f"{decoder.dtype}, remat {decoder.remat}, attention {decoder.attention}",
        ]
    )


def state(resident: Resident, chip: Chip) -> str:
    """The part of the memory table that needs no compilation."""
    parts = [("parameters", resident.parameters), ("optimizer", resident.optimizer), ("reference", resident.reference)]
    lines = [row("memory of a device, GiB", "state")] + [row(f"  {name}", gib(size)) for name, size in parts]
    lines.append(row("  total", gib(resident.device)))
    lines.append(row("  usable", gib(chip.usable)))
    if resident.host:
        lines.append(row("  on the host, a device", gib(resident.host)))
    return "\n".join(lines)


def phases(
    resident: Resident, update: Program, rollout: Program, keys_values: int, weights: int, copied: bool, shared: bool
) -> dict[str, tuple]:
    """Kind of memory -> bytes in the update, in the rollout.

    weights: the parameters in the compute dtype, which are sampled from.
    copied: they come as such, made once a step; else the rollout makes them from the parameters.
    shared: the same devices train and sample, so that the state stays while sampling.
    """
    state = (resident.parameters, resident.optimizer, resident.reference)
    trained = update.arguments - resident.parameters - resident.optimizer
    sampled = rollout.arguments - (weights if copied else resident.parameters)
    made = rollout.temporaries - keys_values - (0 if copied else weights)
    code = update.code + rollout.code
    return {
        **{name: (size, size * shared) for name, size in zip(("parameters", "optimizer", "reference"), state)},
        "weights to sample from": (0, weights),
        "keys and values": (0, keys_values),
        "gradients, activations, buffers": (update.temporaries, max(0, made)),
        "inputs, outputs, padding": (max(0, trained) + update.outputs, max(0, sampled) + rollout.outputs),
        "programs": (code, code),
    }


def totals(kinds: dict[str, tuple]) -> tuple[float, float]:
    return tuple(sum(column) for column in zip(*kinds.values()))


def memory(kinds: dict[str, tuple], resident: Resident, chip: Chip) -> str:
    lines = [row("memory of a device, GiB", "update", "rollout")]
    lines += [row(f"  {name}", *map(gib, sizes)) for name, sizes in kinds.items()]
    both = totals(kinds)
    lines.append(row("  total", *map(gib, both)))
    lines.append(row("  of the usable", *(f"{size / chip.usable:.0%}" for size in both)))
    if resident.host:
        lines.append(row("  on the host, a device", gib(resident.host), gib(resident.host)))
    return "\n".join(lines)


def collectives(name: str, found: Sequence[Collective], mesh: Mesh) -> str:
    """One line for each kind and mesh axes, the largest first; what is below a thousandth of all is one line."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for each in found:
        line = sums[each.op, over(each.groups, mesh)]
        line[0] += each.times
        line[1] += each.sent
        line[2] += each.sent * each.asynchronous
        line[3] += each.sent * each.overlaps
    lines = [row(f"collectives of the {name}", "runs", "sent, GB", "asynchronous", "overlapped")]
    everything = sum(line[1] for line in sums.values())
    small = [0, 0.0]
    for (op, axes), (runs, sent, begun, hidden) in sorted(sums.items(), key=lambda item: -item[1][1]):
        if sent <= everything / 1000:
            small = [small[0] + runs, small[1] + sent]
            continue
        shares = (f"{begun / sent:.0%}", f"{hidden / sent:.0%}")
        lines.append(row(f"  {op} over {axes}", f"{runs:,}", f"{sent / 1e9:,.2f}", *shares))
    if small[0]:
        lines.append(row("  smaller ones", f"{small[0]:,}", f"{small[1] / 1e9:,.3f}"))
    return "\n".join(lines) if sums else row(f"collectives of the {name}", "none")


def over(groups: np.ndarray, mesh: Mesh) -> str:
    """The mesh axes along which a group's members differ, with their sizes."""
    places = np.unravel_index(groups[0], mesh.devices.shape)
    axes = [axis for axis, place in zip(mesh.axis_names, places) if len(set(place.tolist())) > 1]
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes) or "nothing"


def times(
    chip: Chip, devices: Sequence[int], works: Sequence[Work], programs: Sequence[Program], lines: Sequence[Roofline]
) -> str:
    """Operations and the time they take at least, of the update and of the rollout; `devices`: of either's mesh."""
    counted = [program.counts for program in programs]

    def line_of(name: str, texts) -> str:
        return row(f"  {name}", *texts)

    bounds = [line.bound for line in lines]
    table = [
        row("operations and time of one step, a device", "update", "rollout"),
        line_of("model, Tflop", (f"{work.flops / n / 1e12:.3f}" for work, n in zip(works, devices))),
        line_of("compiled, Tflop, loops multiplied out", (f"{found.flops / 1e12:.3f}" for found in counted)),
        line_of("the compiler's count, loops once, Tflop", (f"{p.compiler_flops / 1e12:.3f}" for p in programs)),
        line_of("HBM, GB", (f"{found.bytes / 1e9:.2f}" for found in counted)),
        line_of("compute, ms", (f"{line.compute * 1e3:.1f}" for line in lines)),
        line_of("HBM, ms", (f"{line.hbm * 1e3:.1f}" for line in lines)),
        line_of("links, ms", (f"{line.links * 1e3:.1f}" for line in lines)),
        line_of("at least, ms", (f"{bound * 1e3:.1f}" for bound in bounds)),
        line_of("bound by", (line.by for line in lines)),
        line_of("at least, collectives as scheduled, ms", (f"{line.scheduled * 1e3:.1f}" for line in lines)),
        line_of("MFU at most", (f"{mfu(chip, *each):.1%}" for each in zip(works, devices, bounds))),
    ]
    rates = (work.tokens / bound for work, bound in zip(works, bounds))
    table.append(line_of("tokens a second, all devices, at most", (f"{rate:,.0f}" for rate in rates)))
    silent = [found.silent_calls for found in counted]
    if any(silent):
        table.append(line_of("kernels that do not state their work", map(str, silent)))
    if unknown := sum(found.unknown_loops for found in counted):
        table.append(f"  {unknown} loops of unknown length count once")
    return "\n".join(table)
