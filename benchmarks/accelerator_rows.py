"""The rows of `results/accelerators.csv` and the tables derived from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from benchmarks.accelerator_targets import STEP, STOCK, TARGETS
from benchmarks.common import NOT_MEASURED, Table, markdown
from benchmarks.session import OURS


@dataclasses.dataclass(frozen=True)
class AcceleratorRow:
    """A compiler's analysis of a program; the fields are the columns. Figures are per device."""

    date: str
    commit: str
    jax: str
    flax: str
    compiler: str
    target: str
    """Of `accelerator_targets.TARGETS`."""
    network: str
    plain: str
    """The network without sharing."""
    modules: str
    """This package, or 'stock' Flax modules; with norm_images=N if batch statistics cover N images."""
    program: str
    """'step' for a training step, or 'evaluation' for a batch."""
    batch: int
    """Number of images over all devices."""
    image_size: int
    dtype: str
    kernels: int
    bytes: float
    main_memory_bytes: float
    flops: float
    all_reduces: int
    other_collectives: int
    temporary_bytes: float
    argument_bytes: float
    exchanged_bytes: float
    hidden_collectives: float
    """Number of collectives that overlap with kernels; this and the two fields above are NaN in older rows."""
    compile_seconds: float
    command: str

    def key(self, **changes: str) -> tuple[object, ...]:
        """Returns the key of the row, or of one with the given `changes`."""
        one = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        return one.target, one.network, one.modules, one.program, one.batch, one.image_size, one.dtype


def newest(rows: Sequence[AcceleratorRow]) -> list[AcceleratorRow]:
    """Returns the last row of each key, ordered by target, then by first occurrence."""
    last = {row.key(): row for row in rows}
    return sorted(last.values(), key=lambda row: list(TARGETS).index(row.target))


def tables(rows: Sequence[AcceleratorRow], among: Sequence[AcceleratorRow]) -> str:
    """Returns a Markdown table per target, ratios first, relative to plain and stock networks in `among`."""
    by_key = {row.key(): row for row in among}
    parts = []
    for target in dict.fromkeys(row.target for row in rows):
        group = [row for row in rows if row.target == target]
        made = ", ".join(f"{what} {', '.join(sorted({getattr(row, field) for row in group}))}" for what, field in (
            ("jax", "jax"), ("flax", "flax"), ("compiled by", "compiler")))
        parts += [f"**{target}**, {TARGETS[target].title} ({made}):\n", markdown(_table(group, by_key))]
    return "\n".join(parts)


def _table(rows: Sequence[AcceleratorRow], by_key: dict[tuple[object, ...], AcceleratorRow]) -> Table:
    table = [["network, images per step", "bytes over plain", "kernels over plain", "temporary over plain",
              "FLOPs over plain", "bytes over stock", "kernels over stock", "kernels", "MB", "MB in main memory",
              "GFLOP", "all-reduces", "other collectives", "exchanged, MB", "collectives beside kernels",
              "arguments, MiB", "temporary, MiB", "compiled in s", "commit"]]
    for row in rows:
        plain = by_key.get(row.key(network=row.plain)) if row.network != row.plain else None
        modules, *groups = row.modules.split(", ")
        stock = by_key.get(row.key(modules=", ".join([STOCK, *groups]))) if modules != STOCK else None
        name = ", ".join([row.network, *([] if modules == OURS else [modules]), *groups,
                          *([] if row.program == STEP else [row.program]), row.dtype])
        table.append([
            f"{name}, {row.batch:,} of {row.image_size}²",
            *(_over(row, plain, field) for field in ("bytes", "kernels", "temporary_bytes", "flops")),
            *(_over(row, stock, field) for field in ("bytes", "kernels")),
            f"{row.kernels:,}", f"{row.bytes / 1e6:,.0f}", f"{row.main_memory_bytes / 1e6:,.0f}",
            f"{row.flops / 1e9:,.0f}", str(row.all_reduces), str(row.other_collectives),
            _figure(row.exchanged_bytes / 1e6, 2), _figure(row.hidden_collectives), _figure(row.argument_bytes / 2**20),
            f"{row.temporary_bytes / 2**20:,.0f}", f"{row.compile_seconds:.0f}", row.commit])
    return table


def _figure(value: float, digits: int = 0) -> str:
    """Formats a value that older rows lack."""
    return NOT_MEASURED if math.isnan(value) else f"{value:,.{digits}f}"


def _over(row: AcceleratorRow, other: AcceleratorRow | None, field: str) -> str:
    """Returns the ratio of a field to that of another row, if there is one."""
    divisor = getattr(other, field, 0)
    return f"{getattr(row, field) / divisor:.2f}" if divisor else NOT_MEASURED
