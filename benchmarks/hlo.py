"""Analyses the text of an optimised XLA program: kernels, the bytes that each reads and writes, collectives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
               "ragged-all-to-all")
"""The operations for communication between devices."""

_NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "add-dependency",
              "opt-barrier", "partition-id", "replica-id"}
"""Operations that only rename existing data."""
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_TPU_FAST_MEMORY = "S(1)"
"""The marker in TPU layouts for arrays in on-core memory."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that a kernel reads or writes."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""
    """The layout in the program's text, e.g. '{3,2,1,0}'."""

    @property
    def bytes(self) -> int:
        """Bytes in the device's main memory."""
        if self.dtype in ("token", "opaque") or _TPU_FAST_MEMORY in self.layout:
            return 0
        found = re.search(r"\d+", self.dtype)  # pred has none
        return -(-math.prod(self.shape) * (int(found[0]) if found else 8) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]{self.layout}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction: a line of a computation."""

    name: str
    result: str
    """The type of its result: an array, or a tuple of arrays."""
    operation: str
    operands: tuple[str, ...]
    rest: str
    """Its attributes, as text."""

    def attribute(self, pattern: str) -> str:
        """Returns the group of `pattern` if it matches the attributes, or an empty string."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A single kernel launch."""

    name: str
    kind: str
    """The kind of a fusion, the function of a library, or the operation."""
    reads: tuple[Array, ...]
    """The arrays that it reads, without duplicates."""
    writes: tuple[Array, ...]
    source: str
    """Its source: the path of modules and the operation, as named by JAX."""
    times: int = 1
    """The number of executions, above 1 in a loop body."""

    @property
    def bytes(self) -> int:
        """Bytes read and written in all executions."""
        return self.times * sum(array.bytes for array in (*self.reads, *self.writes))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation in a program's text, and the name of the entry computation.

    Raises:
      ValueError: no computation is marked as `ENTRY`.
    """
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            current.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("this text is no optimized program: no computation is marked as ENTRY")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    result, text = text[:end], text[end:].lstrip()
    operation, _, text = text.partition("(")
    end = _closing("(" + text) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end - 1]))
    return Instruction(name, result, operation, operands, text[end:])


def _closing(text: str) -> int:
    """Returns the index after the bracket that closes the one at the start of `text`."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"a bracket is not closed in {text[:80]!r}")


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a program in execution order, from the instructions of `ENTRY`.

    Calls are expanded, and loop bodies count once per iteration. An asynchronous operation is one kernel. Workspaces of
    libraries (bytes, `u8`) are excluded. An array that a kernel reads twice counts once.
    """
    computations, entry = parse(text)
    return list(_kernels(computations, entry, 1))


def _kernels(computations: Mapping[str, list[Instruction]], name: str, times: int) -> Iterator[Kernel]:
    defined = {instruction.name: instruction for instruction in computations[name]}
    done = {one.operands[0]: one for one in defined.values() if one.operation.endswith("-done")}
    for one in defined.values():
        if one.operation == "while":
            count = int(one.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            yield from _kernels(computations, one.attribute(r"body=%?([\w.\-]+)"), times * count)
        elif one.operation == "call":
            yield from _kernels(computations, one.attribute(r"to_apply=%?([\w.\-]+)"), times)
        elif one.operation not in _NO_KERNEL and not one.operation.endswith("-done"):
            written = _arrays(done.get(one.name, one).result)  # asynchronous starts also return their operands
            read = _read(one, defined)
            if one.operation == "custom-call":
                written = tuple(array for array in written if array.dtype != "u8")
            elif one.operation.removesuffix("-start") in ("slice", "dynamic-slice"):
                read = (dataclasses.replace(read[0], shape=written[0].shape),)
            kind = one.attribute(r"kind=(\w+)") or one.attribute(r'custom_call_target="([^"]*)"') or one.operation
            yield Kernel(one.name, kind, read, written, one.attribute(r'op_name="([^"]*)"'), times)


def _arrays(result: str) -> tuple[Array, ...]:
    """Returns the arrays in a type, which may be a tuple."""
    return tuple(Array(dtype, tuple(int(size.strip("<=")) for size in shape.split(",") if size), layout)
                 for dtype, shape, layout in _ARRAY.findall(result))


def _read(one: Instruction, defined: Mapping[str, Instruction]) -> tuple[Array, ...]:
    """Returns the arrays that an instruction reads, without duplicates under different names."""
    found: dict[str, tuple[Array, ...]] = {}
    for name in one.operands:
        found.setdefault(_origin(name, defined), _arrays(defined[name].result))
    return tuple(array for part in found.values() for array in part)


def _origin(name: str, defined: Mapping[str, Instruction]) -> str:
    """Returns the name under which the memory of `name` was written, through bitcasts and tuple elements."""
    one = defined[name]
    if one.operation not in ("bitcast", "get-tuple-element"):
        return name
    index = one.attribute(r"index=(\d+)") if one.operation == "get-tuple-element" else ""
    return _origin(one.operands[0], defined) + f".{index}" * bool(index)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication between devices."""

    operation: str
    """One of the `COLLECTIVES`."""
    arrays: tuple[Array, ...]
    """The arrays that a device contributes; combined collectives are a single one."""
    beside: int
    """Number of kernels scheduled between its start and end; 0 if the device waits for it."""

    @property
    def is_reduce(self) -> bool:
        """Whether it is an all-reduce."""
        return self.operation == "all-reduce"

    @property
    def bytes(self) -> int:
        """Bytes that a device contributes, in any memory."""
        return sum(dataclasses.replace(array, layout="").bytes for array in self.arrays)


def collectives(text: str) -> list[Collective]:
    """Returns all collectives of a program, in the order of its computations."""
    computations, _ = parse(text)
    return [found for instructions in computations.values() for found in _collectives(instructions)]


def _collectives(instructions: list[Instruction]) -> Iterator[Collective]:
    defined = {one.name: one for one in instructions}
    for place, one in enumerate(instructions):
        operation = one.operation.removesuffix("-start")
        if operation not in COLLECTIVES:
            continue
        beside = 0
        if one.operation != operation:
            ends = next(later for later, other in enumerate(instructions)
                        if other.operation == f"{operation}-done" and other.operands[0] == one.name)
            beside = sum(_computes(other) for other in instructions[place + 1:ends])
        arrays = tuple(array for name in one.operands for array in _arrays(defined[name].result))
        yield Collective(operation, arrays, beside)


def _computes(one: Instruction) -> bool:
    """Returns whether an instruction is a kernel other than a collective."""
    operation = one.operation.removesuffix("-start").removesuffix("-done")
    return operation not in _NO_KERNEL and operation not in COLLECTIVES and not one.operation.endswith("-done")


def render(listing: Iterable[Kernel]) -> str:
    """Returns kernels as tab-separated text, one per line: name, kind, MB, times, reads, writes, source."""
    lines = ["name\tkind\tMB\ttimes\treads\twrites\tsource"]
    for kernel in listing:
        reads, writes = (" ".join(map(str, part)) for part in (kernel.reads, kernel.writes))
        lines.append("\t".join([kernel.name, kernel.kind, f"{kernel.bytes / 1e6:.3f}", str(kernel.times), reads, writes,
                                kernel.source]))
    return "\n".join(lines) + "\n"
