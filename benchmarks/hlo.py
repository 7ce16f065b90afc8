"""What an optimized XLA program does, by its text: kernels, the bytes that each reads and writes, collectives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
               "ragged-all-to-all")
"""The operations by which devices exchange data."""

_NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "add-dependency",
              "opt-barrier", "partition-id", "replica-id"}
"""Operations that only name what is there."""
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_TPU_FAST_MEMORY = "S(1)"
"""How a layout on TPU says that an array lies in the core's own memory."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that a kernel reads or writes."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""
    """As the program has it, e.g. '{3,2,1,0}'."""

    @property
    def bytes(self) -> int:
        """What it takes in the device's main memory."""
        if self.dtype in ("token", "opaque") or _TPU_FAST_MEMORY in self.layout:
            return 0
        found = re.search(r"\d+", self.dtype)  # pred has none
        return -(-math.prod(self.shape) * (int(found[0]) if found else 8) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]{self.layout}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    result: str
    """The type of what it returns: an array, or a tuple of them."""
    operation: str
    operands: tuple[str, ...]
    rest: str
    """Its attributes, as text."""

    def attribute(self, pattern: str) -> str:
        """Returns what the group of `pattern` matches among the attributes, or nothing."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is launched at once."""

    name: str
    kind: str
    """A fusion's kind, a library's function, or the operation."""
    reads: tuple[Array, ...]
    """Each array once."""
    writes: tuple[Array, ...]
    source: str
    """Where it comes from: the path of modules and the operation, as JAX names them."""
    times: int = 1
    """How often it runs, where it is in the body of a loop."""

    @property
    def bytes(self) -> int:
        """Bytes read and written, all times together."""
        return self.times * sum(array.bytes for array in (*self.reads, *self.writes))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation in the text of a program, and the name of the one that is run.

    Raises:
      ValueError: none is marked as `ENTRY`.
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
    """Returns where the bracket that `text` begins with is closed: the place after it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"a bracket is not closed in {text[:80]!r}")


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a program in the order in which they run: every instruction of `ENTRY` that is one.

    What is called is taken apart, and the body of a loop counts as often as it runs. An asynchronous operation is one
    kernel. Workspaces that libraries ask for (bytes, `u8`) are left out. An array that a kernel reads twice is read
    once.
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
            written = _arrays(done.get(one.name, one).result)  # what is started returns its operands too
            read = _read(one, defined)
            if one.operation == "custom-call":
                written = tuple(array for array in written if array.dtype != "u8")
            elif one.operation.removesuffix("-start") in ("slice", "dynamic-slice"):
                read = (dataclasses.replace(read[0], shape=written[0].shape),)
            kind = one.attribute(r"kind=(\w+)") or one.attribute(r'custom_call_target="([^"]*)"') or one.operation
            yield Kernel(one.name, kind, read, written, one.attribute(r'op_name="([^"]*)"'), times)


def _arrays(result: str) -> tuple[Array, ...]:
    """Returns the arrays of a type, which may be a tuple."""
    return tuple(Array(dtype, tuple(int(size.strip("<=")) for size in shape.split(",") if size), layout)
                 for dtype, shape, layout in _ARRAY.findall(result))


def _read(one: Instruction, defined: Mapping[str, Instruction]) -> tuple[Array, ...]:
    """Returns the arrays that an instruction reads, each once, whatever names it goes by."""
    found: dict[str, tuple[Array, ...]] = {}
    for name in one.operands:
        found.setdefault(_origin(name, defined), _arrays(defined[name].result))
    return tuple(array for part in found.values() for array in part)


def _origin(name: str, defined: Mapping[str, Instruction]) -> str:
    """Returns what identifies the memory of `name`: where it was written, behind bitcasts and parts of tuples."""
    one = defined[name]
    if one.operation not in ("bitcast", "get-tuple-element"):
        return name
    index = one.attribute(r"index=(\d+)") if one.operation == "get-tuple-element" else ""
    return _origin(one.operands[0], defined) + f".{index}" * bool(index)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices."""

    operation: str
    """One of the `COLLECTIVES`."""
    arrays: tuple[Array, ...]
    """What a device gives; several that were combined are exchanged at once."""
    beside: int
    """Kernels that the schedule has between its beginning and its end; 0 if the device waits for it."""

    @property
    def is_reduce(self) -> bool:
        """Whether it is an all-reduce."""
        return self.operation == "all-reduce"

    @property
    def bytes(self) -> int:
        """Bytes that a device gives, wherever they lie."""
        return sum(dataclasses.replace(array, layout="").bytes for array in self.arrays)


def collectives(text: str) -> list[Collective]:
    """Returns what a program's devices exchange, in the order of its computations, wherever it is."""
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
    """Returns whether an instruction is a kernel, and no exchange of its own."""
    operation = one.operation.removesuffix("-start").removesuffix("-done")
    return operation not in _NO_KERNEL and operation not in COLLECTIVES and not one.operation.endswith("-done")


def render(listing: Iterable[Kernel]) -> str:
    """Returns kernels as text, tab-separated, a line for each: name, kind, MB, times, reads, writes, source."""
    lines = ["name\tkind\tMB\ttimes\treads\twrites\tsource"]
    for kernel in listing:
        reads, writes = (" ".join(map(str, part)) for part in (kernel.reads, kernel.writes))
        lines.append("\t".join([kernel.name, kernel.kind, f"{kernel.bytes / 1e6:.3f}", str(kernel.times), reads, writes,
                                kernel.source]))
    return "\n".join(lines) + "\n"
