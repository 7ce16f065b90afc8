"""Common code of benchmarks and studies: alternating measurements, tables, sections of pages, options."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from shared_basis.errors import UserError
from shared_basis.runtime.files import write_atomic

PAGE = Path("benchmarks") / "README.md"
"""The page with the benchmarks' tables, relative to the repository's root."""

NOT_MEASURED = "–"
"""The contents of a cell without a value."""

Table = list[list[str]]
Measure = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)


class Parser(argparse.ArgumentParser):
    """An argument parser that exits with a one-line message and code 2 on invalid arguments."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser`."""
        self.exit(2, f"error: {message}\n")



def names(text: str, choices: Sequence[str] = ()) -> tuple[str, ...]:
    """Parses a comma-separated list; raises argparse's error if it is empty or an entry is not in `choices`."""
    given = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in given if choices and name not in choices]
    if unknown or not given:
        known = f"; choose from {', '.join(choices)}" if choices else ""
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown)) or 'nothing'} given{known}")
    return given


def positive(text: str) -> int:
    """Returns a whole number from 1 to 999,999; raises argparse's error for any other text."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def in_turns(subjects: Mapping[Key, Measure], rounds: int) -> dict[Key, list[float]]:
    """Calls all subjects alternately, for `rounds` rounds; returns each subject's results."""
    values: dict[Key, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, measure in subjects.items():
            values[name].append(measure())
    return values


def medians(values: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Returns the median of each subject's values."""
    return {name: statistics.median(part) for name, part in values.items()}


def markdown(table: Table) -> str:
    """Returns a table in Markdown, with right-aligned numbers."""
    head, *rows = table
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those `packages` that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine(packages: Iterable[str]) -> str:
    """Returns the date, and the machine and versions used for measuring."""
    named = (f"{name} {version}" for name, version in versions(packages).items())
    return (f"{datetime.date.today().isoformat()}, {os.cpu_count()} cores ({platform.machine()}), Python "
            f"{platform.python_version()}, {', '.join(named)}")


def section_of(path: Path, name: str) -> str:
    """Returns the text between the lines `<!-- name -->` and `<!-- end of name -->` of a file.

    Raises:
      UserError: a mark is missing.
    """
    return _split(path, name)[1]


def replace_section(path: Path, name: str, text: str) -> None:
    """Replaces the text that `section_of` returns.

    Raises:
      UserError: a mark is missing.
    """
    before, _, after = _split(path, name)
    write_atomic(path, before + text + after)


def _split(path: Path, name: str) -> tuple[str, str, str]:
    """Returns the text before, between and after the marks; first and last part include the marks."""
    content, begin, end = path.read_text(encoding="utf-8"), f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if not 0 <= content.find(begin) < content.find(end):
        raise UserError(f"{path.name} lacks the marks {begin.strip()} and, below it, {end.strip()}.")
    first, last = content.index(begin) + len(begin), content.index(end)
    return content[:first], content[first:last], content[last:]
