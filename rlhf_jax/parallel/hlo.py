"""What a compiled program will do, counted in its own text: operations, memory traffic, communication. Imports nothing.

XLA's own cost analysis counts the body of a loop once, and a decoder is a loop over its layers. Here a body counts as
often as it runs, and work that partitioning left on every device counts on every device.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsu]\d+|c\d+)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
# What moves nothing: names for what is there already, or the outside of what is counted inside.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
    "opt-barrier",
    "partition-id",
    "replica-id",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """dtype, dimensions, bytes; near: whether it lives in the chip's fast memory, which is no traffic."""

    dtype: str
    shape: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _SIZES.get(self.dtype, 1 if self.dtype.startswith("f8") else 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line: what it makes (arrays), from which others (names), and the text from its operands on."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of communication. times: how often it runs. bytes: of the whole array of one, as gathered or summed.

    devices: how many take part.
    """

    kind: str
    shape: tuple[int, ...]
    bytes: int
    devices: int
    times: int

    @property
    def wire_bytes(self) -> float:
        """What one device sends, all times together, by the usual ring algorithms."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.bytes * factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Per device. flops: of matrix products. traffic: bytes between chip and memory, about. unknown_loops: loops whose
    length the compiler did not know."""

    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    unknown_loops: int


Program = Mapping[str, Sequence[Instruction]]


def count(text: str, *, unknown_trips: int = 1) -> Counts:
    """Counts what a compiled program (``compiled.as_text()``) does on one device.

    Args:
      text: optimised HLO.
      unknown_trips: how often loops run whose length depends on data, such as decoding until every row has ended.
    """
    program, entry = parse(text)
    flops, traffic, unknown, found = 0.0, 0.0, 0, []
    for name, times, fused in _executed(program, entry, unknown_trips):
        instructions = program[name]
        made = {instruction.name: instruction for instruction in instructions}
        for instruction in instructions:
            flops += times * _flops(instruction, made)
            if not fused:
                traffic += times * _traffic(instruction, made, program)
            kind = _kind(instruction)
            if kind is not None:
                found.append(_collective(kind, instruction, made, times))
            if instruction.opcode == "while" and not _TRIPS.search(instruction.rest):
                unknown += 1
    return Counts(flops=flops, traffic=traffic, collectives=tuple(found), unknown_loops=unknown)


def parse(text: str) -> tuple[Program, str]:
    """The computations of a program by name, and the name of the first."""
    program: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) or (current is None and _COMPUTATION.match(line)):
            match = _COMPUTATION.match(line)
            if match:
                current = program.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], root=bool(match[1]))
            if instruction is not None:
                current.append(instruction)
    return program, entry


def _instruction(name: str, text: str, *, root: bool) -> Instruction | None:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    made, text = text[:end], text[end:].lstrip()
    start = text.find("(")
    if start < 0:
        return None
    stop = _closing(text, start)
    return Instruction(
        name=name,
        opcode=text[:start],
        arrays=tuple(
            Array(
                dtype=dtype,
                shape=tuple(int(size) for size in sizes.split(",") if size),
                near="S(1)" in layout,
            )
            for dtype, sizes, layout in _ARRAY.findall(made)
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", text[start:stop])),
        rest=text[start + 1 :],
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _executed(program: Program, entry: str, unknown_trips: int) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether it is the inside of a fusion), each call apart."""
    waiting = collections.deque([(entry, 1, False)])
    while waiting:
        name, times, fused = waiting.popleft()
        yield name, times, fused
        for instruction in program[name]:
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # the start has it
            if instruction.opcode == "while":
                known = _TRIPS.search(instruction.rest)
                trips = int(known[1]) if known else unknown_trips
                waiting.append((_called(instruction, "body"), times * trips, fused))
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
                names = names or [_called(instruction, "true_computation")]
                waiting.append((names[-1], times, fused))
            elif instruction.opcode == "call":
                waiting.append((_called(instruction, "to_apply"), times, fused))
            elif "calls=" in instruction.rest:
                inside = fused or instruction.opcode == "fusion"
                waiting.append((_called(instruction, "calls"), times, inside))


def _called(instruction: Instruction, role: str) -> str:
    return re.search(rf"\b{role}=%?([\w.\-]+)", instruction.rest)[1]


def _flops(instruction: Instruction, made: Mapping[str, Instruction]) -> float:
    """Two for every product of a matrix product; everything else is small beside it."""
    if instruction.opcode == "dot":
        left = made[instruction.operands[0]].arrays[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        inner = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2.0 * inner * math.prod(instruction.arrays[0].shape)
    if instruction.opcode != "convolution":
        return 0.0
    # A TPU computes matrix products as convolutions: features are contracted; a window is another contracted axis,
    # or, where it is dilated over what it reads, an axis of the batch, of which each output sees one element.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    right = made[instruction.operands[1]].arrays[0].shape
    inner = right[labels[2].index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    if window and (size := re.search(r"size=([\dx]+)", window[1])):
        sizes = [int(value) for value in size[1].split("x")]
        dilated = re.search(r"(?:lhs|rhs)_dilate=([\dx]+)", window[1])
        dilations = [int(value) for value in dilated[1].split("x")] if dilated else [1] * len(sizes)
        padded = re.search(r"pad=([\d_x\-]+)", window[1])
        pads = padded[1].split("x") if padded else ["0_0"] * len(sizes)
        inner *= math.prod(
            size
            for size, dilation, pad in zip(sizes, dilations, pads, strict=True)
            if dilation == 1 and pad == "0_0"
        )
    return 2.0 * inner * math.prod(instruction.arrays[0].shape)


def _traffic(instruction: Instruction, made: Mapping[str, Instruction], program: Program) -> int:
    """Bytes read and written: outputs, and of the operands what is really read; slices count as slices."""
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update", "-start")):
        return 0
    written = sum(array.bytes for array in instruction.arrays if not array.near)
    reads = [
        sum(array.bytes for array in made[name].arrays if not array.near) if name in made else 0
        for name in instruction.operands
    ]
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * reads[1]
    if instruction.opcode != "fusion":
        return written + sum(reads)
    inside = program[_called(instruction, "calls")]
    by_name = {inner.name: inner for inner in inside}
    parameters = {
        inner.name: int(number[1])
        for inner in inside
        if inner.opcode == "parameter" and (number := re.match(r"(\d+)", inner.rest))
    }
    return _fusion_traffic(inside, by_name, parameters, reads, written)


def _fusion_traffic(inside, by_name, parameters, reads, written) -> int:
    order = [inner.name for inner in inside if inner.opcode == "parameter"]
    read = 0
    for place, name in enumerate(order):
        whole = reads[parameters.get(name, place)] if parameters.get(name, place) < len(reads) else 0
        users = [inner for inner in inside if name in inner.operands]
        if users and all(user.opcode in ("dynamic-slice", "gather", "slice") for user in users):
            read += min(whole, sum(user.bytes for user in users))
        elif users and all(
            user.opcode == "dynamic-update-slice" and user.operands[0] == name for user in users
        ):
            # Updated in place: what is not in the slice is neither read nor written.
            update = sum(by_name[user.operands[1]].bytes for user in users)
            written -= min(written, max(whole - update, 0))
        else:
            read += whole
    return read + written


def _kind(instruction: Instruction) -> str | None:
    """The kind of communication, counted at its start."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def _collective(kind: str, instruction: Instruction, made, times: int) -> Collective:
    # The start of an asynchronous one makes (operand, result); the result of several at once is as many arrays.
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[:1]
    devices = _group_size(instruction.rest)
    size = sum(array.bytes for array in arrays)
    if kind == "reduce-scatter":
        size *= devices
    return Collective(kind=kind, shape=arrays[0].shape, bytes=size, devices=devices, times=times)


def _group_size(text: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return len(listed[1].split(","))
    grid = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    return int(grid[2]) if grid else 2
