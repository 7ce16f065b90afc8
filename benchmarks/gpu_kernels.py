"""The rows of `results/gpu_kernels.csv`: the time of a step's kernels on a GPU, by purpose; and their tables."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from benchmarks import hlo
from benchmarks.accelerator_kernels import PURPOSES, purpose
from benchmarks.common import NOT_MEASURED, Table, markdown

CONVOLUTIONS, PRODUCTS, PADDING, LAYOUTS, CLEARING, COPYING, OTHERS = LIBRARIES = (
    "convolutions, all", "products, by libraries", "padding within cuDNN", "changes of layout within cuDNN",
    "clearing memory", "copying memory", "other kernels of libraries")
"""The purposes of kernels that are not in the program's text, since libraries or the driver launch them."""

_NAMES = ((PADDING, r"AddPadding"), (LAYOUTS, r"nchwToNhwc|nhwcToNchw"), (CLEARING, r"^Memset"),
          (COPYING, r"^[Mm]emcpy"), (CONVOLUTIONS, r"cudnn|conv|fprop|dgrad|wgrad"),
          (PRODUCTS, r"gemm|nvjet|cutlass|xmma"))
"""The purposes by patterns in names, the first of which decides."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step that was measured; the fields are columns."""

    date: str
    commit: str
    device: str
    jax: str
    network: str
    plain: str
    batch: int
    image_size: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class TimedRow(Step):
    """The kernels of one purpose in a training step; the fields are the columns."""

    purpose: str
    """Of `accelerator_kernels.PURPOSES` or `LIBRARIES`."""
    kernels: float
    """Launches per step."""
    microseconds: float
    """Sum of their durations, per step."""

    def key(self, network: str = "") -> tuple[object, ...]:
        """Returns the key of the row's step, or of that of another network."""
        return self.device, network or self.network, self.batch, self.image_size, self.dtype


def purpose_of(name: str, known: dict[str, hlo.Kernel]) -> str:
    """Returns the purpose of the kernel that a profiler calls `name`.

    Args:
      known: the kernels of the program, by `kernel_name`.
    """
    if kernel := known.get(kernel_name(name)):
        return purpose(kernel, "cuda")
    return next((what for what, pattern in _NAMES if re.search(pattern, name)), OTHERS)


def kernel_name(name: str) -> str:
    """Returns the name of a program's instruction as its kernel is called on the GPU."""
    return re.sub(r"[.\-]", "_", name)


def rows_of(step: Step, events: Iterable[tuple[str, float]], text: str, steps: int) -> list[TimedRow]:
    """Returns the rows for a step.

    Args:
      events: names and nanoseconds of the kernels of all profiled steps.
      text: the text of the optimised program. XLA compiles identical kernels once, and all have the name of the first.
      steps: the number of profiled steps.
    """
    known = {kernel_name(kernel.name): kernel for kernel in hlo.kernels(text)}
    count: collections.Counter[str] = collections.Counter()
    time: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in events:
        what = purpose_of(name, known)
        count[what] += 1
        time[what] += round(nanoseconds)
    return [TimedRow(**dataclasses.asdict(step), purpose=what, kernels=count[what] / steps,
                     microseconds=time[what] / steps / 1000)
            for what in (*LIBRARIES, *PURPOSES) if count[what]]


def tables(rows: Sequence[TimedRow]) -> str:
    """Returns a Markdown table for each step of a network with sharing, beside that of the plain network."""
    steps: dict[tuple[object, ...], dict[str, TimedRow]] = {}
    for row in rows:  # if a step was measured again, only its newer rows count
        kept = steps.setdefault(row.key(), {})
        if any((other.date, other.commit) != (row.date, row.commit) for other in kept.values()):
            kept.clear()
        kept[row.purpose] = row
    parts = []
    for found in steps.values():
        one = next(iter(found.values()))
        plain = steps.get(one.key(one.plain), {})
        if one.network != one.plain and plain:
            parts.append(f"{one.network} beside {one.plain}, {one.batch} images of {one.image_size}×{one.image_size}, "
                         f"{one.dtype}, {one.device}, {one.date}, JAX {one.jax}, commit {one.commit}:\n")
            parts.append(markdown(_table(found, plain)))
    return "\n".join(parts)


def _table(found: dict[str, TimedRow], plain: dict[str, TimedRow]) -> Table:
    def line(name: str, names: Iterable[str]) -> list[str]:
        sides = [[side[key] for key in names if key in side] for side in (found, plain)]
        mine, theirs = (sum(row.microseconds for row in side) for side in sides)
        return [name, *(f"{sum(row.kernels for row in side):,.0f}" if side else NOT_MEASURED for side in sides),
                f"{mine:,.0f}", f"{theirs:,.0f}", f"{mine - theirs:+,.0f}"]
    names = sorted({*found, *plain}, key=lambda name: -sum(
        sign * side[name].microseconds for sign, side in ((1, found), (-1, plain)) if name in side))
    return [["what kernels are for", "kernels", "plain", "µs", "plain", "µs beyond plain"],
            *(line(name, [name]) for name in names), line("all", names)]
