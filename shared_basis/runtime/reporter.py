"""Progress and log output of a run: a progress line on terminals, plain lines elsewhere, and a log file."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from shared_basis.runtime.files import Place, open_files

PLAIN_INTERVAL = 60.0
"""Seconds between progress lines if the output is not a terminal."""

VERBOSITIES = ("quiet", "normal", "verbose")


class _Console(Console):
    """A console that re-raises `BrokenPipeError` instead of ending the program."""

    def on_broken_pipe(self) -> None:
        """Called on a `BrokenPipeError`, which is re-raised."""
        raise


class Reporter:
    """Prints lines and, on a terminal, a progress line below them.

    A quiet reporter prints only warnings; a verbose one also details, with process and step on each line.

    Output errors never end a run: characters that the encoding lacks are escaped, and nothing more is printed to a
    stream that is closed, full, or of a lost terminal. The log continues.
    """

    def __init__(self, stream: TextIO | None = None, verbosity: str = "normal", process: int = 0) -> None:
        """Writes to `stream`, by default standard output; `verbosity` is one of `VERBOSITIES`."""
        if verbosity not in VERBOSITIES:
            raise ValueError(f"verbosity={verbosity!r}: must be one of {', '.join(VERBOSITIES)}")
        self.step = 0
        """The current training step, for log lines."""
        stream = stream or sys.stdout or io.StringIO()  # sys.stdout is None if it is closed
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._console = _Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._level = VERBOSITIES.index(verbosity)
        self._process = process
        self._log: TextIO = io.StringIO()  # buffers until the log's directory is known
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_plain = time.monotonic()

    def info(self, text: str) -> None:
        """Prints `text` on a separate line above the progress line, unless quiet."""
        self._show(text, 1)

    def debug(self, text: str) -> None:
        """Prints and logs `text` like `info`, if verbose."""
        if self._level == 2:
            self._show(text, 2)

    def warn(self, text: str) -> None:
        """Prints the warning `text`, even if quiet."""
        self._show(f"warning: {text}", 0)

    def _show(self, text: str, level: int) -> None:
        self._write(text)
        if level <= self._level:
            with self._until_closed():
                self._console.print(self._printable(f"[{self._source()}] {text}" if self._level == 2 else text))
                if not self._console.is_terminal:
                    self._console.file.flush()

    def _printable(self, text: str) -> str:
        return text.encode(self._encoding, "backslashreplace").decode(self._encoding)

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        """Stops all printing if the stream cannot be written any more."""
        try:
            yield
        except (OSError, ValueError):  # closed files raise ValueError
            self._level, self._progress = -1, None

    def _source(self) -> str:
        return f"process {self._process} step {self.step}"

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end a run
            self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {self._source()}: {text}\n")
            self._log.flush()

    @contextlib.contextmanager
    def logging(self, directory: Place) -> Iterator[None]:
        """Logs all lines, including earlier ones, to a file in `directory`, and the error that ends the context."""
        with contextlib.suppress(OSError):
            file = open_files(directory).open_log(f"log-{self._process}.txt" if self._process else "log.txt")
            file.write(self._log.getvalue() if isinstance(self._log, io.StringIO) else "")
            self._log = file
        try:
            yield
        except BaseException as error:
            self._write(f"ended: {error or type(error).__name__}")
            raise
        finally:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = io.StringIO()

    def show_progress(self, done: int, total: int, text: str) -> None:
        """Shows `text` as the progress line: immediately on a terminal, otherwise at most once a minute."""
        if self._level <= 0:
            return
        if self._console.is_terminal:
            with self._until_closed():
                if self._progress is None:
                    self._progress = Progress(BarColumn(bar_width=12), TextColumn("{task.description}", markup=False),
                                              console=self._console, transient=True)
                    self._task = self._progress.add_task("", total=total)
                    self._progress.start()
                    self._console.show_cursor(True)  # Ctrl-C may end the process before anything can restore it
                self._progress.update(self._task, completed=done, total=total, description=self._printable(text))
        elif time.monotonic() - self._last_plain >= PLAIN_INTERVAL:
            self._last_plain = time.monotonic()
            self.info(text)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Returns a callback with the number of items done and the total, which shows progress and the time left."""
        began = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal began
            if not done:
                began = time.monotonic()  # excludes earlier time
            left = (time.monotonic() - began) / max(done, 1) * (total - done)
            self.show_progress(done, total, f"{what}  {count(done)}/{count(total)}  {duration(left)} left")
            if done >= total:
                self.end_progress()

        return show

    def end_progress(self) -> None:
        """Removes the progress line."""
        if self._progress is not None:
            progress, self._progress = self._progress, None
            with self._until_closed():
                progress.stop()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end_progress()


def duration(seconds: float) -> str:
    """Returns `seconds` as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def count(number: float) -> str:
    """Returns a number rounded to a whole, with thousands separators, e.g. 1,234,567."""
    return f"{number:,.0f}"


def size_text(size: float) -> str:
    """Returns a number of bytes with a suitable unit, e.g. 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
