"""Rows of `results/speed.csv`: what was measured, on what, and by which command."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import platform
import statistics
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.common import Table, markdown, versions
from shared_basis.errors import UserError

Kind = typing.TypeVar("Kind")

ROOT = Path(__file__).resolve().parents[1]

OURS = "shared_basis"
"""How the column `framework` names this package."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the file; its fields are the columns."""

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


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclasses.dataclass
class Part:
    """What a subject found out, for a person."""

    tables: list[Table]
    notes: list[str] = dataclasses.field(default_factory=list)

    def render(self) -> str:
        """Returns it in Markdown."""
        return "\n".join([*map(markdown, self.tables), *(f"{note}\n" for note in self.notes)])


@dataclasses.dataclass
class Session:
    """One call of the command: what it runs on, how often it measures, and the rows so far."""

    device: str
    """For a person: 'cpu, 2 cores', or the accelerators."""
    platform: str
    """As JAX calls it: 'cpu', 'gpu' or 'tpu'."""
    command: str
    rounds: int
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    """Says what is going on."""
    rows: list[Row] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._commit = commit()
        self._versions = versions(("jax", "torch"))

    def add(self, subject: str, case: Case, quantity: str, values: Sequence[float], *, framework: str = OURS,
            network: str = "", device: str = "", dtype: str = "") -> str:
        """Adds a row for `values`, one for each round, and returns its median and spread as text.

        Args:
          network, device, dtype: where they are not those of the case and the session.
        """
        values = list(values)
        self.rows.append(Row(
            datetime.date.today().isoformat(), self._commit, device or self.device, platform.python_version(),
            self._versions.get("jax", ""), self._versions.get("torch", ""), subject, network or case.network,
            framework, case.batch, case.image_size, dtype or case.dtype, quantity, statistics.median(values),
            min(values), max(values), len(values), self.command))
        return spread(values)


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Returns the median, and the least and the greatest of `values` where they are several, in three digits."""
    scaled = sorted(value * scale for value in values)
    middle = _digits(statistics.median(scaled))
    return middle if len(scaled) == 1 else f"{middle} ({_digits(scaled[0])} – {_digits(scaled[-1])})"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain_number(value: float) -> str:
    """Returns a number as the file holds it: six digits, and whole from 100,000 on."""
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.6g}"


def check_file(path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Raises `UserError` unless rows can be appended to `path`: it is absent, empty, or has these columns."""
    try:
        with path.open(newline="") as file:
            found = next(csv.reader(file), list(columns))
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path.name} cannot be read: {error}.") from error
    if found != list(columns):
        raise UserError(f"{path.name} has the columns {', '.join(found)}; ours have {', '.join(columns)}.")


def read(path: Path, kind: type[Kind]) -> list[Kind]:
    """Returns the rows of a file as the dataclass `kind`, whose fields are the columns; none where there is no file.

    Raises:
      UserError: it has other columns, or a value is none.
    """
    if not path.exists():
        return []
    check_file(path, tuple(hints := typing.get_type_hints(kind)))
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            return [kind(**{name: hint(line[name]) for name, hint in hints.items()}) for line in reader]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path.name}, line {reader.line_num}: {error}.") from error


def append(path: Path, rows: Sequence[Any], columns: Sequence[str] = COLUMNS) -> None:
    """Adds `rows`, dataclasses with the fields `columns`, to the end of the file, which gets its header if it is new.

    Raises:
      UserError: as `check_file`.
    """
    check_file(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    whole = new or path.read_bytes().endswith(b"\n")  # not so if an editor, or a full disk, left it
    with path.open("a", newline="") as file:
        if not whole:
            file.write("\n")
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        for row in rows:
            writer.writerow([plain_number(value) if isinstance(value, float) else value
                             for value in dataclasses.astuple(row)])


def commit() -> str:
    """Returns the commit that is measured, with '+' if files differ from it; results and figures may."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!results", ":!*.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
