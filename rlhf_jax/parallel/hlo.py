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


# Kernels of this project that hold their own products, which no program text shows: how many matrix products of queries
# with keys (or as large) one run is, of which a causal mask leaves half.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_GEMM = re.compile(r'custom_call_target="__cublas.*"lhs_contracting_dimensions":\[([^\]]*)\]')
# Names for memory, not work.
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AsyncCollective\w+)"')


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
    chains: set[tuple[str, str]] = set()
    for call in _executed(program, entry, unknown_trips):
        instructions = program[call.name]
        made = {instruction.name: instruction for instruction in instructions}
        for instruction in instructions:
            flops += call.times * _flops(instruction, made)
            if not call.fused:
                traffic += call.times * _traffic(instruction, made, program)
            kind = _kind(instruction)
            if kind is not None and not _is_repeated(instruction, chains):
                if kind == "all-reduce" and call.fused and _is_sliced(instruction, instructions):
                    kind = "reduce-scatter"
                found.append(_collective(kind, instruction, call.times))
            if instruction.opcode == "while" and _trips(instruction, made, program) is None:
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
        elif line.rstrip() == "}":  # an instruction may go on over lines that only begin so
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """A computation that runs: its name, how often, and whether it is the inside of a fusion."""

    name: str
    times: int
    fused: bool


def _executed(program: Program, entry: str, unknown_trips: int) -> Iterator[_Call]:
    """Everything that runs, each call apart."""
    waiting = collections.deque([_Call(name=entry, times=1, fused=False)])
    while waiting:
        call = waiting.popleft()
        yield call
        made = {instruction.name: instruction for instruction in program[call.name]}
        for instruction in program[call.name]:
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # the start has it
            times, fused = call.times, call.fused
            if instruction.opcode == "while":
                trips = _trips(instruction, made, program)
                name = _called(instruction, "body")
                times *= unknown_trips if trips is None else trips
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
                name = names[-1] if names else _called(instruction, "true_computation")
            elif instruction.opcode == "call":
                name = _called(instruction, "to_apply")
            elif "calls=" in instruction.rest:
                name = _called(instruction, "calls")
                fused = fused or instruction.opcode == "fusion"
            else:
                continue
            waiting.append(_Call(name=name, times=times, fused=fused))


def _trips(loop: Instruction, made: Mapping[str, Instruction], program: Program) -> int | None:
    """How often a loop runs; None where it ends when data say so.

    A compiler that does not say counts up to a constant in the loop's condition.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = {instruction.name: instruction for instruction in program[_called(loop, "condition")]}
    (root,) = (instruction for instruction in condition.values() if instruction.root)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    counter, limit = (condition.get(name) for name in root.operands)
    if (
        counter is None
        or counter.opcode != "get-tuple-element"
        or limit is None
        or limit.opcode != "constant"
    ):
        return None
    start = made.get(loop.operands[0])
    place = int(re.search(r"index=(\d+)", counter.rest)[1])
    first = made.get(start.operands[place]) if start is not None and start.opcode == "tuple" else None
    begins = _value(first) if first is not None and first.opcode == "constant" else 0
    return -(-(_value(limit) - begins) // _stride(program[_called(loop, "body")], place))


def _stride(body: Sequence[Instruction], place: int) -> int:
    """By how much one run of a loop's body moves the counter at ``place``: more than 1 where the loop was unrolled."""
    made = {instruction.name: instruction for instruction in body}
    (root,) = (instruction for instruction in body if instruction.root)
    if root.opcode != "tuple":
        return 1
    total, now = 0, made.get(root.operands[place])
    while now is not None and now.opcode == "add":
        operands = [made[name] for name in now.operands]
        constants = [operand for operand in operands if operand.opcode == "constant"]
        if len(constants) != 1:
            break
        total += _value(constants[0])
        now = next(operand for operand in operands if operand is not constants[0])
    return total or 1


def _value(constant: Instruction) -> int:
    return int(re.match(r"-?\d+", constant.rest)[0])


def _is_repeated(instruction: Instruction, chains: set[tuple[str, str]]) -> bool:
    """Whether this is another part of communication that was seen.

    A TPU runs one beside several fusions, each of which holds a copy of it under the same channel and chain. The copy
    that runs least comes first: ``_executed`` visits what is outside before what is inside.
    """
    chain = re.search(r'chain_id="(\d+)"', instruction.rest)
    if chain is None:
        return False
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    mark = (channel[1] if channel else instruction.name, chain[1])
    seen = mark in chains
    chains.add(mark)
    return seen


def _is_sliced(reduced: Instruction, instructions: Sequence[Instruction]) -> bool:
    """Whether nothing but a device's own slice is taken of what is summed: a TPU's way to say reduce-scatter."""
    names = {reduced.name}
    for instruction in instructions:
        if instruction.opcode in ("get-tuple-element", "bitcast") and names.intersection(
            instruction.operands
        ):
            names.add(instruction.name)
    users = [
        instruction
        for instruction in instructions
        if instruction.name not in names and names.intersection(instruction.operands)
    ]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _called(instruction: Instruction, role: str) -> str:
    return re.search(rf"\b{role}=%?([\w.\-]+)", instruction.rest)[1]


def _flops(instruction: Instruction, made: Mapping[str, Instruction]) -> float:
    """Two for every product of a matrix product; everything else is small beside it."""
    if instruction.opcode == "dot":
        left = made[instruction.operands[0]].arrays[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        inner = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2.0 * inner * math.prod(instruction.arrays[0].shape)
    if instruction.opcode == "custom-call" and (gemm := _GEMM.search(instruction.rest)):
        # A GPU's matrix product by cuBLAS: its first output is the product, the second scratch.
        left = made[instruction.operands[0]].arrays[0].shape
        inner = math.prod(left[int(axis)] for axis in re.findall(r"\d+", gemm[1]))
        return 2.0 * inner * math.prod(instruction.arrays[0].shape)
    if instruction.opcode == "custom-call":
        products = next((n for name, n in _KERNEL_PRODUCTS.items() if instruction.name.startswith(name)), 0)
        if not products:
            return 0.0
        # Operands: two maps of blocks, queries [rows, heads, columns, width], keys, values.
        queries = made[instruction.operands[2]].arrays[0].shape
        return products * math.prod(queries) * float(queries[-2])
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
    if instruction.opcode == "custom-call" and _FREE_CALLS.search(instruction.rest):
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


def _collective(kind: str, instruction: Instruction, times: int) -> Collective:
    # The start of an asynchronous one makes (operand, result); the result of several at once is as many arrays.
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[:1]
    devices = _group_size(instruction.rest)
    size = sum(array.bytes for array in arrays)
    if instruction.opcode.startswith("reduce-scatter"):
        size *= devices
    return Collective(kind=kind, shape=arrays[0].shape, bytes=size, devices=devices, times=times)


def _group_size(text: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return len(listed[1].split(","))
    grid = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if grid:
        return int(grid[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return 2
