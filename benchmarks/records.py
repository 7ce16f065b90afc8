"""Rows of measurements in `results/`: dataclasses whose fields are the columns of CSV files, read and appended."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_basis.errors import UserError

Row = typing.TypeVar("Row")

ROOT = Path(__file__).resolve().parents[1]
"""The root of the repository."""


def columns(kind: type) -> list[str]:
    """Returns the columns of a file with rows of the dataclass `kind`."""
    return [field.name for field in dataclasses.fields(kind)]


def cells(row: Any) -> list[str]:
    """Returns the cells of a row for its file: numbers with six digits, without decimals from 100,000 on."""
    return [_plain_number(value) if isinstance(value, float) else str(value) for value in dataclasses.astuple(row)]


def _plain_number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.6g}"


def check_file(path: Path, kind: type) -> None:
    """Raises `UserError` unless rows of `kind` can be appended to `path`: it is missing, empty or has these columns."""
    ours = columns(kind)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), ours)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path.name} cannot be read: {error}.") from error
    if found != ours:
        raise UserError(f"{path.name} has the columns {', '.join(found)}; expected {', '.join(ours)}.")


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Returns the rows of a file as instances of `kind`; empty if there is no file.

    Raises:
      UserError: the columns differ, or a value is invalid.
    """
    check_file(path, kind)
    if not path.exists():
        return []
    hints = typing.get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            return [kind(**{name: hint(line[name]) for name, hint in hints.items()}) for line in reader]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path.name}, line {reader.line_num}: {error}.") from error


def append(path: Path, rows: Sequence[Any]) -> None:
    """Appends `rows`, all of one dataclass, to the file, which gets a header if it is new.

    Raises:
      UserError: see `check_file`.
    """
    if not rows:
        return
    check_file(path, type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    end = "\r\n" if b"\r\n" in content else "\n"
    with path.open("a", newline="", encoding="utf-8") as file:
        if content and not content.endswith(b"\n"):  # left by an editor or a full disk
            file.write(end)
        writer = csv.writer(file, lineterminator=end)
        if not content:
            writer.writerow(columns(type(rows[0])))
        writer.writerows(map(cells, rows))


def commit(root: Path = ROOT) -> str:
    """Returns the current commit, with '+' if files other than results, pages and pictures differ from it.

    'unknown' if `root` is not a checkout.
    """
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", ":!results", ":!*.md", ":!docs/images")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
