"""What the studies share that keep rows below results/ and show them on a page: compress, distill and transfer."""

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
"""Measures, by the options, and returns or yields rows with the command, the second argument."""


@dataclasses.dataclass(frozen=True)
class Kept(Generic[Row]):
    """The rows of a study, and where they are kept and shown."""

    name: str
    """Of the module, and of the section of the page."""
    row: type[Row]
    page: Path
    """Below the repository's root, as is `file`."""
    noted: tuple[str, ...]
    """Columns that differ from call to call where all else is the same."""
    subject: tuple[str, ...]
    """Columns that say what was done; the latest row of each subject counts."""
    table: Callable[[Sequence[Row]], str]
    """Returns the tables of the latest rows in Markdown."""

    @property
    def file(self) -> Path:
        """Returns the file of the rows."""
        return Path("results") / f"{self.name}.csv"

    def latest(self, root: Path = ROOT) -> list[Row]:
        """Returns the last row of each subject."""
        rows = read(root / self.file, self.row)
        return list({tuple(getattr(row, name) for name in self.subject): row for row in rows}.values())

    def over_seeds(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Returns the rows of each subject, which differ in the seed alone."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(getattr(row, name) for name in self.subject if name != "seed"), []).append(row)
        return list(groups.values())

    def record(self, row: Row, root: Path = ROOT) -> None:
        """Adds a row, unless the latest ones have it; that keeps the commit that it was found at."""
        found = [name not in self.noted for name in columns(self.row)]
        if all(list(itertools.compress(cells(each), found)) != list(itertools.compress(cells(row), found))
               for each in self.latest(root)):
            append(root / self.file, [row])

    def run(self, options: argparse.Namespace, arguments: Sequence[str] | None, root: Path,
            rows_of: RowsOf[Row]) -> None:
        """Measures, keeps each row as it comes, prints the tables, and writes them to the page if asked to.

        Args:
          options: has `write`.
          arguments: those that `options` are read from; None for those of the process.

        Raises:
          UserError: an option does not fit the data, or the rows cannot be read.
        """
        check_file(root / self.file, self.row)  # before what takes hours
        command = shlex.join(["python", "-m", f"studies.{self.name}", *(
            f"--data={Path(word.removeprefix('--data=')).name}" if word.startswith("--data=") else word
            for word in (sys.argv[1:] if arguments is None else arguments)
            if not word.startswith("--runs"))])  # no path of this machine
        with Reporter(sys.stderr) as reporter:
            for row in rows_of(options, command, reporter):
                self.record(row, root)
        text = self.table(self.latest(root))
        print(text)
        if options.write:
            replace_section(root / self.page, self.name, text)


def by_seed(row_of: Callable[[argparse.Namespace, str, Reporter], Row]) -> RowsOf[Row]:
    """Returns what yields a row for each of `options.seeds`, of options that have a `seed`."""
    def rows_of(options: argparse.Namespace, command: str, reporter: Reporter) -> Iterator[Row]:
        for seed in range(options.seeds):
            yield row_of(argparse.Namespace(**{**vars(options), "seed": seed}), command, reporter)
    return rows_of


def gain(differences: Sequence[float]) -> str:
    """Returns the mean of paired differences, with its 95 % interval where there are two or more."""
    if len(differences) < 2:
        return f"{differences[0]:+.2f}"
    mean, low, high = interval(differences)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
