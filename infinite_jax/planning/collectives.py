"""The collectives of a compiled program: what they send, among which devices, and whether computation hides them.

sent    of N bytes in all among n members: all-gather, reduce-scatter and all-to-all (n - 1) / n N, all-reduce twice
        that, collective-permute N: what the best algorithms send (Thakur et al. 2005)
hidden  the schedule has computation between start and end. A TPU's compiler writes a pair start, done; or carries
        the collective through a chain of fusions, each of which moves a part of it and computes besides
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from infinite_jax.planning import hlo
from infinite_jax.planning.hlo import HBM, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# Bookkeeping, or counted where it begins or within what it calls.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier call-start copy-done slice-done async-start async-update async-done add-dependency domain".split()
)


class Collective(NamedTuple):
    """One collective of the program, as often as it runs in all."""

    op: str
    groups: np.ndarray  # i32 [groups, members]; of a permute [pairs, 2]
    payload: int  # bytes a device holds of it once, gathered or before it is reduced
    times: int
    memory: int  # bytes of HBM that one run reads and writes
    asynchronous: bool
    overlaps: bool  # computation is scheduled while it is under way

    @property
    def sent(self) -> float:
        """Bytes that a device sends, all runs together."""
        members = self.groups.shape[1]
        if self.op in ("collective-permute", "collective-broadcast"):
            return float(self.payload * self.times)
        once = self.payload * (members - 1) / members
        return (2 if self.op == "all-reduce" else 1) * once * self.times


def find(module: Module, computation: Computation, times: int, num_devices: int) -> Iterator[Collective]:
    """Of one scheduled computation. A TPU carries one through a chain of fusions, known by its channel."""
    order = list(computation.instructions.values())
    chains: dict[str, list] = {}  # channel -> [(collective, its computation, the fusion that holds it)]
    for place, instruction in enumerate(order):
        op = instruction.opcode.removesuffix("-start")
        if op in COLLECTIVES:
            begun = instruction.opcode != op
            busy = begun and _busy(module, computation, order[place + 1 :], instruction.name)
            yield _collective(op, computation, instruction, instruction, times, num_devices, begun, busy)
        elif instruction.opcode in ("fusion", "async-start"):
            for inner, held in _held(module, instruction):
                channel = re.search(r"channel_id=(\d+)", held.attributes)
                key = channel.group(1) if channel else held.name
                chains.setdefault(key, []).append((held, inner, instruction, place))
    for chain in chains.values():
        held, inner, fusion, place = chain[0]
        op = "reduce-scatter" if "all-reduce-scatter" in inner.name else held.opcode
        busy = any(_computes(module, each) for _, _, each, _ in chain)
        begun = len(chain) > 1 or fusion.opcode == "async-start"
        if fusion.opcode == "async-start":
            busy = _busy(module, computation, order[place + 1 :], fusion.name)
        yield _collective(op, inner, held, chain[-1][2], times, num_devices, begun, begun and busy)


def _held(module: Module, fusion: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    inner = module.computations[fusion.called("calls")]
    for each in inner.instructions.values():
        if each.opcode in COLLECTIVES:
            yield inner, each
        elif each.opcode == "fusion":
            yield from _held(module, each)


def _collective(op, computation, instruction, last, times, num_devices, begun, busy) -> Collective:
    """`last`: the step that holds the result, which says whether it lies in HBM."""
    groups = hlo.groups(instruction, num_devices)
    given = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    payload = sum(each.bytes for each in given) * (groups.shape[1] if op == "all-gather" else 1)
    result = payload // groups.shape[1] if op == "reduce-scatter" else payload
    place = last.opcode in ("all-gather-start", "collective-permute-start")  # (operand, result, ...)
    memory = sum(map(hbm, given)) + result * (last.shapes[place].space == HBM)
    return Collective(op, groups, payload, times, memory, begun, busy)


def _busy(module: Module, computation: Computation, behind: list[Instruction], start: str) -> bool:
    """Whether anything computes between a start and the first step that waits for it."""
    for instruction in behind:
        if start in instruction.operands:
            return False
        if _computes(module, instruction):
            return True
    return False


def _computes(module: Module, instruction: Instruction) -> bool:
    """A loop, a kernel or a fusion that does more than move a collective's data along."""
    if instruction.opcode in ("while", "call", "conditional", "dot", "convolution"):
        return True
    if instruction.opcode == "custom-call":
        return "AsyncCollective" not in instruction.attributes and "AllocateBuffer" not in instruction.attributes
    if instruction.opcode != "fusion":
        return False
    inner = module.computations[instruction.called("calls")].instructions.values()
    plain = {*COLLECTIVES, *FREE, "fusion", "custom-call"}
    return any(x.opcode not in plain or (x.opcode == "fusion" and _computes(module, x)) for x in inner)


def hbm(instruction: Instruction) -> int:
    """Bytes of an instruction's result that lie in HBM; scalars do not."""
    return sum(shape.bytes for shape in instruction.shapes if shape.space == HBM and shape.dims)
