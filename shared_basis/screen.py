"""What a run shows: one progress line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

PLAIN_INTERVAL = 60.0
"""Seconds between progress lines where there is no terminal to draw one on."""


class Screen:
    """Prints lines, and keeps one progress line below them on a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Writes to `stream`, standard output if None."""
        self._console = Console(file=stream or sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_plain = time.monotonic()

    def line(self, text: str) -> None:
        """Prints `text` on a line of its own, above the progress line."""
        self._console.print(text)
        if not self._console.is_terminal:
            self._console.file.flush()

    def progress(self, done: int, total: int, text: str) -> None:
        """Shows `text` as the progress line: on a terminal at once, elsewhere at most once a minute."""
        if self._console.is_terminal:
            if self._progress is None:
                self._progress = Progress(BarColumn(bar_width=12), TextColumn("{task.description}", markup=False),
                                          console=self._console, transient=True)
                self._task = self._progress.add_task("", total=total)
                self._progress.start()
            self._progress.update(self._task, completed=done, description=text)
        elif time.monotonic() - self._last_plain >= PLAIN_INTERVAL:
            self._last_plain = time.monotonic()
            self.line(text)

    def end_progress(self) -> None:
        """Removes the progress line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end_progress()


def duration(seconds: float) -> str:
    """Returns `seconds` as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def count(number: float) -> str:
    """Returns a whole number with thousands separated, e.g. 1,234,567."""
    return f"{number:,.0f}"


def size_text(size: float) -> str:
    """Returns a number of bytes in the unit that suits it, e.g. 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
