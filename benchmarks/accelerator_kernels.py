"""What the kernels of a step on a GPU are for: the rows of `results/accelerator_kernels.csv`, and tables of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from benchmarks.accelerator_rows import AcceleratorRow
from benchmarks.common import NOT_MEASURED, Table, markdown
from benchmarks.hlo import Kernel

SMALL = 500_000
"""Bytes below which a kernel costs its launch."""

SHOWN = (("resnet32-s16u1-double", 32, "bfloat16"), ("resnet34-s32u1", 224, "bfloat16"))
"""Networks, image sizes and types that the page shows; the file holds them all."""

_CONVOLUTIONS = {"convForward": "convolutions", "convBiasActivationForward": "convolutions",
                 "convBackwardInput": "convolutions, gradient of the input",
                 "convBackwardFilter": "convolutions, gradient of the filters"}

PURPOSES = (*dict.fromkeys(_CONVOLUTIONS.values()), *(
    f"{what}, {when}" for what in ("products", "sums over batch and pixels", "arrays, element by element")
    for when in ("forward", "backward")), "update, penalty, metrics", *(
    f"small: {what}" for what in ("forward", "backward", "update, penalty, metrics", "copies")))
"""In the order of a table."""


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

    def step(self, network: str = "") -> tuple[object, ...]:
        """Returns what identifies its step, or that of another network."""
        return self.target, network or self.network, self.modules, self.image_size, self.dtype


def purpose(kernel: Kernel) -> str:
    """Returns what a kernel of a GPU's program is for, one of `PURPOSES`."""
    for end, what in _CONVOLUTIONS.items():
        if kernel.kind.endswith(end):
            return what
    small = kernel.bytes < SMALL * kernel.times
    if small and kernel.kind.startswith("copy"):
        return "small: copies"
    # As JAX names operations: what is differentiated within jvp(…), its gradient within transpose(jvp(…)).
    if "jvp(" not in kernel.source or "jvp()" in kernel.source:
        return "small: update, penalty, metrics" if small else "update, penalty, metrics"
    when = "backward" if "transpose(" in kernel.source else "forward"
    if small:
        return f"small: {when}"
    if kernel.kind == "kCustom" or "cublas" in kernel.kind or kernel.source.endswith("/dot_general"):
        return f"products, {when}"
    return f"{'sums over batch and pixels' if kernel.kind == 'kInput' else 'arrays, element by element'}, {when}"


def rows_of(row: AcceleratorRow, kernels: Iterable[Kernel]) -> list[KernelsRow]:
    """Returns the rows of the step that `row` is of."""
    count: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        count[purpose(kernel)] += kernel.times
        moved[purpose(kernel)] += kernel.bytes
    return [KernelsRow(row.date, row.commit, row.target, row.network, row.plain, row.modules, row.image_size, row.dtype,
                       name, count[name], float(moved[name])) for name in PURPOSES if count[name]]


def tables(rows: Sequence[KernelsRow]) -> str:
    """Returns a table in Markdown for each step of a network with sharing whose plain network's step is there too."""
    last: dict[tuple[object, ...], dict[str, KernelsRow]] = {}
    for row in rows:  # of a step compiled again, the newer rows count, and all of them
        kept = last.setdefault(row.step(), {})
        if any((other.date, other.commit) != (row.date, row.commit) for other in kept.values()):
            kept.clear()
        kept[row.purpose] = row
    parts = []
    for found in last.values():
        one = next(iter(found.values()))
        plain = last.get(one.step(one.plain), {})
        if one.network != one.plain and plain:
            parts.append(f"{one.network} beside {one.plain}, {one.image_size}×{one.image_size}, {one.dtype}, "
                         f"{one.target} (commits {one.commit} and {next(iter(plain.values())).commit}):\n")
            parts.append(markdown(_table(found, plain)))
    return "\n".join(parts)


def of_the_page(rows: Sequence[KernelsRow]) -> str:
    """Returns the tables of those that are `SHOWN`."""
    return tables([row for row in rows if any(
        row.network in (name, row.plain) and (row.image_size, row.dtype) == of and name.startswith(f"{row.plain}-")
        for name, *rest in SHOWN for of in [tuple(rest)])])


def _table(found: dict[str, KernelsRow], plain: dict[str, KernelsRow]) -> Table:
    table = [["what kernels are for", "kernels", "plain", "MB", "plain", "MB beyond plain"]]

    def line(name: str, names: Iterable[str]) -> list[str]:
        mine, theirs = ([side[key] for key in names if key in side] for side in (found, plain))
        moved, other = (sum(row.bytes for row in side) / 1e6 for side in (mine, theirs))
        return [name, *(f"{sum(row.kernels for row in side):,}" if side else NOT_MEASURED for side in (mine, theirs)),
                f"{moved:,.0f}", f"{other:,.0f}", f"{moved - other:+,.0f}"]
    table += [line(name, [name]) for name in PURPOSES if name in found or name in plain]
    return [*table, line("all", PURPOSES)]
