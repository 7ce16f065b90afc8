"""Files and text: whole files or none, CSV, columns, and errors in one line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes the whole file, or leaves what was there: the content gets its name when it is complete.

    Raises:
      OSError: it cannot be written.
    """
    write_all_atomic({path: content})


def write_all_atomic(contents: dict[Path, str | bytes]) -> None:
    """Writes several files, which get their names when all of them are complete.

    Raises:
      OSError: one cannot be written; none has changed, unless renaming itself fails.
    """
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            temporary[path].write_bytes(content.encode() if isinstance(content, str) else content)
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table as CSV, lines ended as RFC 4180 has it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def align(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Returns the rows as lines of columns two spaces apart, numbers (all but the first column) to the `right`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) if right and index else cell.ljust(width)
                      for index, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException, limit: int = 250) -> str:
    """Returns type and message of an error in one line; of a long one, which storage layers print, both ends."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= limit else f"{line[:limit - 103]} … {line[-100:]}"
