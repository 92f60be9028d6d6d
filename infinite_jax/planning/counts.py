"""What one run of a compiled program does on one device: operations, bytes of HBM, collectives.

Loops are multiplied out, of branches the dearest counts. The compiler's own cost analysis counts a loop's body once;
with layers scanned that is a small part of a step. Counted here, from the scheduled program:

    flops        2 x multiply-adds of matrix products and convolutions, positions in padding left out; what a kernel or
                 library call says of itself. Element-wise work is left out: it runs beside and seldom bounds.
    HBM bytes    what every scheduled instruction reads and writes in HBM, a fusion as one; slices and in-place updates
                 count by what they touch
    collectives  planning/collectives.py
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from infinite_jax.planning import collectives, hlo
from infinite_jax.planning.collectives import COLLECTIVES, FREE, Collective, hbm
from infinite_jax.planning.hlo import HBM, Computation, Instruction, Module

_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|mosaic\w*|__cudnn\$\w*|__gpu\$\w*)"')


class Counts(NamedTuple):
    flops: float
    bytes: float
    collectives: list[Collective]
    unknown_loops: int  # loops whose trip count nothing says: their bodies count once
    silent_calls: int  # kernels and library calls that do not say what they compute: not in flops


def count(text: str, num_devices: int) -> Counts:
    """Counts of a program's text, `compiled.as_text()`, which is one device's part of it."""
    module = hlo.parse(text)
    flops, moved, found, silent, unknown = 0.0, 0.0, [], 0, [0]
    for computation, times in _scheduled(module, module.entry, 1, unknown):
        for instruction in computation.instructions.values():
            flops += times * _flops(module, computation, instruction)
            moved += times * _moved(module, computation, instruction)
            silent += _silent(instruction)
        found += collectives.find(module, computation, times, num_devices)
    moved += sum(each.memory * each.times for each in found)
    return Counts(flops, moved, found, unknown[0], silent)


def _scheduled(module: Module, name: str, times: int, unknown: list[int]) -> Iterator[tuple[Computation, int]]:
    """Computations that are scheduled step by step, with how often each runs; fusions are steps of theirs."""
    computation = module.computations[name]
    yield computation, times
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            trips = hlo.trip_count(module, instruction)
            unknown[0] += trips is None
            for part in ("body", "condition"):
                yield from _scheduled(module, instruction.called(part), times * (trips or 1), unknown)
        elif instruction.opcode in ("call", "call-start"):
            yield from _scheduled(module, instruction.called("to_apply"), times, unknown)
        elif instruction.opcode == "conditional":
            dearest = max(_branches(instruction), key=functools.partial(_work, module))
            yield from _scheduled(module, dearest, times, unknown)


def _work(module: Module, name: str) -> tuple[float, float]:
    """Operations and bytes of HBM of a computation and all that it calls."""
    steps = [
        (times * _flops(module, computation, each), times * _moved(module, computation, each))
        for computation, times in _scheduled(module, name, 1, [0])
        for each in computation.instructions.values()
    ]
    return sum(flops for flops, _ in steps), sum(moved for _, moved in steps)


def _branches(instruction: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
        return re.findall(r"%?([\w.\-]+)", listed.group(1))
    return [x for x in map(instruction.called, ("true_computation", "false_computation")) if x]


# --- operations ---


def _flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Of one run of one instruction, a fusion's inner ones included."""
    match instruction.opcode:
        case "dot":
            lhs = computation.instructions[instruction.operands[0]].shapes[0].dims
            return 2.0 * math.prod(instruction.shapes[0].dims) * _product(lhs, "lhs_contracting_dims", instruction)
        case "convolution":
            return _convolution_flops(computation, instruction)
        case "custom-call":
            return _stated_flops(computation, instruction) or 0.0
        case "fusion" | "async-start":
            inner = module.computations[instruction.called("calls")]
            return sum(_flops(module, inner, each) for each in inner.instructions.values())
    return 0.0


def _product(dims: tuple[int, ...], key: str, instruction: Instruction) -> int:
    found = re.search(rf'{key}"?[=:][{{\[]([\d,"\s]*)', instruction.attributes)
    return math.prod(dims[int(i)] for i in re.findall(r"\d+", found.group(1))) if found else 1


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """2 x output features x batch x input features x the pairs of positions that meet outside the padding."""
    lhs, rhs = (computation.instructions[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(part.split("=") for part in window.group(1).split()) if window else {}
    pairs = 1
    for d in range(sum(label.isdigit() for label in labels[0])):

        def option(key: str, default: str, d: int = d) -> list[int]:
            return [int(x) for x in window[key].split("x")[d].split("_")] if key in window else [int(default)]

        size, step, dilate, spread = (option(key, "1")[0] for key in ("size", "stride", "lhs_dilate", "rhs_dilate"))
        low = option("pad", "0")[0]
        length, outputs = lhs[labels[0].index(str(d))], out[labels[2].index(str(d))]
        position = np.arange(outputs)[:, None] * step + np.arange(size) * spread - low
        meets = (position >= 0) & (position % dilate == 0) & (position // dilate < length)
        pairs *= int(meets.sum())
    batch, features, inputs = out[labels[2].index("b")], out[labels[2].index("f")], rhs[labels[1].index("i")]
    return 2.0 * batch * features * inputs * pairs


def _stated_flops(computation: Computation, instruction: Instruction) -> float | None:
    """What a custom call says of itself: a kernel's cost estimate, or the dimensions of a library's product."""
    if (stated := _stated(instruction, "flops")) is not None:
        return stated
    if "lhs_contracting_dimensions" in instruction.attributes:
        lhs = computation.instructions[instruction.operands[0]].shapes[0].dims
        product = _product(lhs, "lhs_contracting_dimensions", instruction)
        return 2.0 * math.prod(instruction.shapes[0].dims) * product
    return None


def _stated(instruction: Instruction, what: str) -> float | None:
    """A number of a kernel's cost estimate."""
    found = re.search(rf'"{what}":\s*"?(\d+)', instruction.attributes)
    return float(found.group(1)) if found else None


def _silent(instruction: Instruction) -> int:
    """1 for a kernel or an attention call whose work is not known."""
    kernel = instruction.opcode == "custom-call" and _KERNEL.search(instruction.attributes)
    return int(bool(kernel) and _stated(instruction, "flops") is None)


# --- bytes of HBM ---


def _moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes of HBM that one scheduled instruction reads and writes."""
    opcode, known = instruction.opcode, computation.instructions
    if opcode in FREE or opcode.endswith("-done") or opcode.removesuffix("-start") in COLLECTIVES:
        return 0
    if opcode in ("copy-start", "slice-start"):  # (source and destination, or the other way round; a semaphore)
        data = [shape for shape in instruction.shapes if shape.dims]
        smallest = min((shape.bytes for shape in data), default=0)
        return smallest * sum(shape.space == HBM for shape in data)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return hbm(instruction) * 2
    if opcode in ("dynamic-update-slice", "scatter"):
        update = known[instruction.operands[1 if opcode == "dynamic-update-slice" else -1]]
        return 2 * update.bytes if instruction.shapes[0].space == HBM else hbm(update)
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        read = sum(
            min(hbm(known[name]), _read(module, inner, inner.parameter(i)))
            for i, name in enumerate(instruction.operands)
            if name in known and hbm(known[name])
        )
        return read + sum(n for n, shape in zip(_written(module, inner), instruction.shapes) if shape.space == HBM)
    if opcode == "custom-call" and (stated := _stated(instruction, "bytes_accessed")) is not None:
        return stated
    return sum(hbm(known[name]) for name in instruction.operands if name in known) + hbm(instruction)


def _read(module: Module, computation: Computation, value: Instruction | None) -> float:
    """Bytes of a fusion's parameter that its users touch; passing it on or updating it in place reads nothing."""
    if value is None:
        return 0
    total = 0.0
    for user in computation.instructions.values():
        for i in (i for i, name in enumerate(user.operands) if name == value.name):
            if user.opcode in ("bitcast", "get-tuple-element"):
                total += _read(module, computation, user)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and i == 0:
                total += user.bytes
            elif user.opcode == "fusion":
                inner = module.computations[user.called("calls")]
                total += _read(module, inner, inner.parameter(i))
                if _passed(inner, inner.parameter(i)):
                    total += _read(module, computation, user)
            elif user.opcode in ("tuple", *COLLECTIVES) or "AsyncCollective" in user.attributes:
                continue
            elif user.opcode in ("dynamic-update-slice", "scatter") and i == 0:
                continue
            else:
                return value.bytes
    return min(total, value.bytes)


def _passed(computation: Computation, value: Instruction | None) -> bool:
    """Whether the computation's result is this value, seen in another shape."""
    result = computation.root
    while result.opcode == "bitcast":
        result = computation.instructions[result.operands[0]]
    return result is value


def _written(module: Module, computation: Computation) -> list[float]:
    """Bytes that a fusion writes of each element of its result."""

    def written(value: Instruction) -> list[float]:
        known = computation.instructions
        match value.opcode:
            case "tuple":
                return [n for name in value.operands for n in written(known[name])]
            case "parameter" | "get-tuple-element":
                return [0.0] * len(value.shapes)
            case "bitcast" if value.operands[0] in known:
                return written(known[value.operands[0]])
            case "dynamic-update-slice" | "scatter":
                return [float(known[value.operands[1 if value.opcode[0] == "d" else -1]].bytes)]
            case "fusion":
                return _written(module, module.computations[value.called("calls")])
            case opcode if opcode in COLLECTIVES or "AsyncCollective" in value.attributes:
                return [0.0] * len(value.shapes)
        return [float(shape.bytes) for shape in value.shapes]

    return written(computation.root)
