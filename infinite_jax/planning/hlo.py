"""A compiled program's text (`compiled.as_text()`) as data: computations, instructions, trip counts, device groups.

Only what planning counts is read: names, opcodes, shapes with their memory space, operands and the attributes' text.
Left out: layouts, metadata, literals beyond the scalar that bounds a loop. XLA promises no stable text; the forms read
here are those of the CPU, GPU and TPU compilers that jax 0.10 to 0.12 bring.
"""

import math
import re
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16} | {"s4": 4, "u4": 4, "s2": 2, "u2": 2}
HBM = 0  # memory space of an array without S(n) in its layout; 1 is a TPU's VMEM, 5 the host

_SHAPE = re.compile(r"(\w+)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_MESH = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}",
)
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    space: int  # HBM, or where else it lives

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype) if self.dtype in BITS else int(re.search(r"\d+", self.dtype).group())
        return math.prod(self.dims) * bits // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # a tuple's elements, flattened
    operands: tuple[str, ...]
    literal: str  # between the parentheses, such as a constant's value
    attributes: str  # behind them
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def called(self, key: str) -> str | None:
        """The computation named by `key=`, such as calls, body or condition."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]  # in the order of the schedule

    @property
    def root(self) -> Instruction:
        return next(x for x in reversed(self.instructions.values()) if x.root)

    def parameter(self, number: int) -> Instruction | None:
        found = (x for x in self.instructions.values() if x.opcode == "parameter" and x.literal == str(number))
        return next(found, None)


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Raises ValueError where the text has no entry computation."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = Computation(head.group(2), {})
                computations[current.name] = current
                entry = current.name if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the program's text holds no ENTRY computation: it is not what compiled.as_text() gives")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if head is None:
        return None
    start = head.end()
    stop = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, stop)
    if opcode is None:
        return None
    closing = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : closing]
    return Instruction(
        name=head.group(2),
        opcode=opcode.group(1),
        shapes=_shapes(line[start:stop]),
        operands=tuple(_NAME.findall(inside)),
        literal=inside.strip(),
        attributes=line[closing + 1 :],
        root=head.group(1) is not None,
    )


def _closing(line: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in the program's text: {line[:120]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.strip().lstrip("<=")) for size in dims.split(",") if size.strip())
        found.append(Shape(dtype, sizes, int(space.group(1)) if space else HBM))
    return tuple(found)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while loop's body runs; None where nothing says it.

    The compiler's own number where it prints one; else the bound that the condition compares the counter with, which
    is the most that a loop with an early end can run.
    """
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes):
        return int(known.group(1))
    condition = module.computations[loop.called("condition")].instructions
    bounds = []
    for instruction in condition.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            bound = condition.get(instruction.operands[-1])
            if bound is not None and bound.opcode == "constant" and bound.literal.isdigit():
                bounds.append(int(bound.literal))
    return max(bounds, default=None)


def groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """Device numbers of the groups that a collective works in, i32 [groups, members].

    Numbers are positions in the mesh's flat list of devices. Of a collective-permute: [pairs, 2].
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
        return np.array([[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", text):
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota.group(2), iota.group(3)).reshape(_ints(iota.group(1)))
    if mesh := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", text
    ):
        return _mesh_groups(*mesh.groups())
    return np.arange(num_devices)[None]


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _ints(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_ints(order)) if order else numbers


def _mesh_groups(axes: str, shape: str | None, order: str | None, chosen: str) -> np.ndarray:
    """Groups written as axes of a mesh: mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}; 'a':(2)2 is part of one."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    numbers = _iota(shape, order) if shape else np.arange(math.prod(sizes.values()))
    split, moved = [], []  # every axis as (before, chosen, after)
    parts = {name: (int(pre or 1), size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}
    for name, size in sizes.items():
        if name not in parts:
            split += [size, 1, 1]
        else:
            before, inner = parts[name]
            inner = int(inner) if inner else size
            split += [before, inner, size // (before * inner)]
        moved.append(len(split) - 2)
    numbers = numbers.reshape(split)
    rest = [axis for axis in range(numbers.ndim) if axis not in moved]
    members = math.prod(numbers.shape[axis] for axis in moved)
    return numbers.transpose(rest + moved).reshape(-1, members)
