"""A call of a benchmark: the rows of `results/speed.csv` and `results/export.csv`, and Markdown tables."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import sys
from collections.abc import Callable, Sequence

from benchmarks.cases import SECONDS, Case
from benchmarks.common import Table, markdown, versions
from benchmarks.records import commit

OURS = "shared_basis"
"""The name of this package in the column `framework`."""


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """A measured quantity; the fields are the columns."""

    date: str
    commit: str
    device: str
    python: str
    jax: str
    torch: str
    subject: str
    network: str
    framework: str
    batch: int
    image_size: int
    dtype: str
    quantity: str
    median: float
    minimum: float
    maximum: float
    rounds: int
    command: str


@dataclasses.dataclass
class Part:
    """Tables and notes of one subject."""

    tables: list[Table]
    notes: list[str] = dataclasses.field(default_factory=list)

    def render(self) -> str:
        """Returns the part in Markdown."""
        return "\n".join([*map(markdown, self.tables), *(f"{note}\n" for note in self.notes)])


@dataclasses.dataclass
class Session:
    """The device, the number of rounds, and the rows so far."""

    device: str
    """Human-readable: 'cpu, 2 cores', or the accelerators."""
    platform: str
    """The platform's name in JAX: 'cpu', 'gpu' or 'tpu'."""
    command: str
    rounds: int
    seconds: float = SECONDS
    """Minimum duration of a measurement of steps."""
    modes: tuple[str, ...] = ()
    """The modes of PyTorch to compare with; empty for the usual ones."""
    print_progress: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    rows: list[SpeedRow] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._commit = commit()
        self._versions = versions(("jax", "torch"))

    def add(self, subject: str, case: Case, quantity: str, values: Sequence[float], *, framework: str = OURS,
            network: str = "", device: str = "", dtype: str = "") -> str:
        """Adds a row for `values`, one per round, and returns their median and range as text.

        Args:
          network, device, dtype: only if they differ from those of the case and the session.
        """
        values = list(values)
        self.rows.append(SpeedRow(
            datetime.date.today().isoformat(), self._commit, device or self.device, platform.python_version(),
            self._versions.get("jax", ""), self._versions.get("torch", ""), subject, network or case.network,
            framework, case.batch, case.image_size, dtype or case.dtype, quantity, statistics.median(values),
            min(values), max(values), len(values), self.command))
        return spread(values)


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Returns the median and, for several `values`, minimum and maximum, with three digits."""
    scaled = sorted(value * scale for value in values)
    middle = _digits(statistics.median(scaled))
    return middle if len(scaled) == 1 else f"{middle} ({_digits(scaled[0])} – {_digits(scaled[-1])})"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
