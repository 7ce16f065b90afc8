"""The purposes of the kernels in a step: the rows of `results/accelerator_kernels.csv`, and their tables."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.accelerator_rows import AcceleratorRow
from benchmarks.common import NOT_MEASURED, Table, markdown
from benchmarks.hlo import COLLECTIVES, Kernel

SMALL = 500_000
"""Bytes below which the launch dominates a kernel's time."""

SHOWN = tuple((target, *step) for target in ("h100x1", "v5e:2x2") for step in (
    ("resnet32-s16u1-double", 32, "bfloat16"), ("resnet34-s32u1", 224, "bfloat16")))
"""Targets, networks, image sizes and dtypes to show on the page; the file contains all."""

_CONVOLUTIONS = {"convForward": "convolutions", "convBiasActivationForward": "convolutions",
                 "convBackwardInput": "convolutions, gradient of the input",
                 "convBackwardFilter": "convolutions, gradient of the filters"}

_TPU_PRODUCTS = "convolutions and products"
_TO_MAIN, _FROM_MAIN, _PARAMETERS = (f"copies between memories: {what}" for what in (
    "activations, to main memory", "activations, from main memory", "float32 (parameters, momentum, sums)"))
_EXCHANGES, _RESHAPES = "exchanges between devices", "copies within a memory"

PURPOSES = (_TO_MAIN, _FROM_MAIN, _PARAMETERS, *dict.fromkeys(_CONVOLUTIONS.values()), *(
    f"{what}, {when}"
    for what in (_TPU_PRODUCTS, "products", "sums over batch and pixels", "arrays, element by element")
    for when in ("forward", "backward")), "update, penalty, metrics", _EXCHANGES, _RESHAPES, *(
    f"small: {what}" for what in ("forward", "backward", "update, penalty, metrics", "copies")))
"""The purposes on all platforms, in table order."""


@dataclasses.dataclass(frozen=True)
class KernelsRow:
    """The kernels of one purpose in a compiled step; the fields are the columns."""

    date: str
    commit: str
    target: str
    network: str
    plain: str
    modules: str
    image_size: int
    dtype: str
    purpose: str
    """Of `PURPOSES`."""
    kernels: int
    bytes: float
    """Bytes read and written; on a TPU, of main memory."""

    def step(self, network: str = "") -> tuple[object, ...]:
        """Returns the key of the row's step, or of that of another network."""
        return self.target, network or self.network, self.modules, self.image_size, self.dtype


def purpose(kernel: Kernel, platform: str) -> str:
    """Returns the purpose of a kernel in a program for a GPU ('cuda') or a TPU ('tpu'), one of `PURPOSES`."""
    return _purpose_on_tpu(kernel) if platform == "tpu" else _purpose_on_gpu(kernel)


def _purpose_on_gpu(kernel: Kernel) -> str:
    for end, what in _CONVOLUTIONS.items():
        if kernel.kind.endswith(end):
            return what
    small = kernel.bytes < SMALL * kernel.times
    if small and kernel.kind.startswith("copy"):
        return "small: copies"
    when = _when(kernel)
    if not when:
        return "small: update, penalty, metrics" if small else "update, penalty, metrics"
    if small:
        return f"small: {when}"
    if kernel.kind == "kCustom" or "cublas" in kernel.kind or kernel.source.endswith("/dot_general"):
        return f"products, {when}"
    return f"{'sums over batch and pixels' if kernel.kind == 'kInput' else 'arrays, element by element'}, {when}"


def _purpose_on_tpu(kernel: Kernel) -> str:
    if kernel.kind in ("copy-start", "slice-start", "dynamic-slice-start"):  # between the chip and main memory
        if all(array.dtype == "f32" for array in kernel.writes):
            return _PARAMETERS
        return _TO_MAIN if any(array.bytes for array in kernel.writes) else _FROM_MAIN
    if kernel.kind.removesuffix("-start") in COLLECTIVES:
        return _EXCHANGES
    if kernel.kind in ("copy", "reshape", "concatenate", "ConcatBitcast", "slice", "pad"):
        return _RESHAPES
    when = _when(kernel)
    if not when:
        return "update, penalty, metrics"
    is_product = kernel.kind == "kOutput" or kernel.source.endswith(("/dot_general", "/conv_general_dilated"))
    return f"{_TPU_PRODUCTS if is_product else 'arrays, element by element'}, {when}"


def _when(kernel: Kernel) -> str:
    """Returns 'forward' or 'backward', or an empty string outside of both.

    JAX marks differentiated operations with jvp(…), and their gradients with transpose(jvp(…)).
    """
    if "jvp(" not in kernel.source or "jvp()" in kernel.source:
        return ""
    return "backward" if "transpose(" in kernel.source else "forward"


def rows_of(row: AcceleratorRow, kernels: Iterable[Kernel], platform: str) -> list[KernelsRow]:
    """Returns the rows for the step of `row`, a program for `platform` (see `purpose`)."""
    count: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        count[purpose(kernel, platform)] += kernel.times
        moved[purpose(kernel, platform)] += kernel.bytes
    return [KernelsRow(row.date, row.commit, row.target, row.network, row.plain, row.modules, row.image_size, row.dtype,
                       name, count[name], float(moved[name])) for name in PURPOSES if count[name]]


def tables(rows: Sequence[KernelsRow]) -> str:
    """Returns a Markdown table for each step of a network with sharing, if the plain network's step exists too."""
    parts = []
    for found, plain in beside_plain(rows):
        one, other = (next(iter(side.values())) for side in (found, plain))
        names = [name for name in PURPOSES if name in found or name in plain]
        parts.append(f"{one.network} beside {one.plain}, {one.image_size}×{one.image_size}, {one.dtype}, {one.target} "
                     f"(commits {one.commit} and {other.commit}):\n")
        parts.append(markdown(compare(found, plain, names, "MB", lambda row: row.bytes / 1e6)))
    return "\n".join(parts)


def beside_plain(rows: Iterable[Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the rows of each step of a network with sharing and of the plain network's step, by purpose.

    Args:
      rows: `KernelsRow`s or `gpu_kernels.TimedRow`s. If a step occurs several times, only its newer rows count; a step
        without that of the plain network is omitted.
    """
    last: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in rows:
        kept = last.setdefault(row.step(), {})
        if any((other.date, other.commit) != (row.date, row.commit) for other in kept.values()):
            kept.clear()
        kept[row.purpose] = row
    for found in last.values():
        one = next(iter(found.values()))
        plain = last.get(one.step(one.plain), {})
        if one.network != one.plain and plain:
            yield found, plain


def compare(found: Mapping[str, Any], plain: Mapping[str, Any], purposes: Sequence[str], unit: str,
            amount: Callable[[Any], float]) -> Table:
    """Returns a table of kernels and their `amount`, in `unit`, by purpose and in all, beside the plain network's."""
    def line(name: str, names: Sequence[str]) -> list[str]:
        sides = [[side[key] for key in names if key in side] for side in (found, plain)]
        mine, theirs = (sum(map(amount, side)) for side in sides)
        return [name, *(f"{sum(row.kernels for row in side):,.0f}" if side else NOT_MEASURED for side in sides),
                f"{mine:,.0f}", f"{theirs:,.0f}", f"{mine - theirs:+,.0f}"]
    return [["what kernels are for", "kernels", "plain", unit, "plain", f"{unit} beyond plain"],
            *(line(name, [name]) for name in purposes), line("all", purposes)]


def of_the_page(rows: Sequence[KernelsRow]) -> str:
    """Returns the tables for the steps in `SHOWN`."""
    return tables([row for row in rows if any(
        row.network in (name, row.plain) and (row.target, row.image_size, row.dtype) == (target, *rest)
        and name.startswith(f"{row.plain}-") for target, name, *rest in SHOWN)])
