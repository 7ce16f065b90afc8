"""The rows of `results/gpu_kernels.csv`: the time of a step's kernels on a GPU, by purpose; and their tables."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from benchmarks import hlo
from benchmarks.accelerator_kernels import PURPOSES, beside_plain, compare, purpose
from benchmarks.common import markdown

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

    def step(self, network: str = "") -> tuple[object, ...]:
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
    """Returns a Markdown table for each step of a network with sharing, what takes longer than plain first."""
    parts = []
    for found, plain in beside_plain(rows):
        one = next(iter(found.values()))
        beyond = collections.Counter({name: row.microseconds for name, row in found.items()})
        beyond.subtract({name: row.microseconds for name, row in plain.items()})
        names = [name for name, _ in beyond.most_common()]
        parts.append(f"{one.network} beside {one.plain}, {one.batch} images of {one.image_size}×{one.image_size}, "
                     f"{one.dtype}, {one.device}, {one.date}, JAX {one.jax}, commit {one.commit}:\n")
        parts.append(markdown(compare(found, plain, names, "µs", lambda row: row.microseconds)))
    return "\n".join(parts)
