"""Common code of the studies that store rows in results/ and show them on a page: compress, distill and transfer."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.common import replace_section
from benchmarks.records import ROOT, append, cells, check_file, columns, read
from shared_basis.runtime.reporter import Reporter
from studies.findings import interval

Row = TypeVar("Row")

RowsOf = Callable[[argparse.Namespace, str, Reporter], Iterable[Row]]
"""Measures according to the options; returns or yields rows with the command, the second argument."""


@dataclasses.dataclass(frozen=True)
class Kept(Generic[Row]):
    """The rows of a study, and where they are stored and shown."""

    name: str
    """The name of the module and of the section on the page."""
    row: type[Row]
    page: Path
    """The page, relative to the repository's root, like `file`."""
    noted: tuple[str, ...]
    """Columns that may differ between repeated measurements."""
    subject: tuple[str, ...]
    """Columns that identify the subject; only its latest row counts."""
    table: Callable[[Sequence[Row]], str]
    """Returns the tables of the latest rows in Markdown."""

    @property
    def file(self) -> Path:
        """Returns the path of the rows."""
        return Path("results") / f"{self.name}.csv"

    def latest(self, root: Path = ROOT) -> list[Row]:
        """Returns the latest row of each subject."""
        rows = read(root / self.file, self.row)
        return list({tuple(getattr(row, name) for name in self.subject): row for row in rows}.values())

    def over_seeds(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Returns the rows of each subject, which differ only in the seed."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(getattr(row, name) for name in self.subject if name != "seed"), []).append(row)
        return list(groups.values())

    def record(self, row: Row, root: Path = ROOT) -> None:
        """Appends a row, unless the latest rows contain it; those keep their original commit."""
        found = [name not in self.noted for name in columns(self.row)]
        if all(list(itertools.compress(cells(each), found)) != list(itertools.compress(cells(row), found))
               for each in self.latest(root)):
            append(root / self.file, [row])

    def run(self, options: argparse.Namespace, arguments: Sequence[str] | None, root: Path,
            rows_of: RowsOf[Row]) -> None:
        """Measures, stores each row immediately, prints the tables, and writes them to the page if requested.

        Args:
          options: must contain `write`.
          arguments: the arguments from which `options` were parsed; None for those of the process.

        Raises:
          UserError: an option does not fit the data, or the rows cannot be read.
        """
        check_file(root / self.file, self.row)  # before hours of measuring
        command = shlex.join(["python", "-m", f"studies.{self.name}", *(
            f"--data={Path(word.removeprefix('--data=')).name}" if word.startswith("--data=") else word
            for word in (sys.argv[1:] if arguments is None else arguments)
            if not word.startswith("--runs"))])  # paths of this machine are omitted
        with Reporter(sys.stderr) as reporter:
            for row in rows_of(options, command, reporter):
                self.record(row, root)
        text = self.table(self.latest(root))
        print(text)
        if options.write:
            replace_section(root / self.page, self.name, text)


def by_seed(row_of: Callable[[argparse.Namespace, str, Reporter], Row]) -> RowsOf[Row]:
    """Wraps `row_of` to yield a row for each of `options.seeds`, passed as `options.seed`."""
    def rows_of(options: argparse.Namespace, command: str, reporter: Reporter) -> Iterator[Row]:
        for seed in range(options.seeds):
            yield row_of(argparse.Namespace(**{**vars(options), "seed": seed}), command, reporter)
    return rows_of


def gain(differences: Sequence[float]) -> str:
    """Returns the mean of paired differences, with its 95 % confidence interval if there are at least two."""
    if len(differences) < 2:
        return f"{differences[0]:+.2f}"
    mean, low, high = interval(differences)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
