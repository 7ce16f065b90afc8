"""Files of a directory on disk or in Cloud Storage, and text formats: CSV, aligned columns, one-line errors."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO, Any, TextIO

from shared_basis.errors import UserError
from shared_basis.runtime.filesystem import Files, FilesError, in_use, this_process

LOCK_INTERVAL = 0.2
"""Seconds between attempts to acquire a lock."""

Place = str | os.PathLike[str]
"""A path on disk, or gs://BUCKET/PATH."""


class _Local(Files):
    """The files of a directory on disk."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, contents: Mapping[str, str | bytes]) -> None:
        # A link stays a link, to a file with the new content; devices and pipes, such as /dev/stdout, are written to.
        paths = {name: Path(os.path.realpath(self.path / name)) for name in contents}
        temporary = {name: path.with_name(f".{path.name}.tmp") for name, path in paths.items()}
        try:
            for name, content in contents.items():
                encoded = content.encode() if isinstance(content, str) else content
                if paths[name].exists() and not paths[name].is_file():
                    paths[name].write_bytes(encoded)
                    del temporary[name]
                else:
                    temporary[name].write_bytes(encoded)
            for name, written in temporary.items():
                os.replace(written, paths[name])
        finally:
            for written in temporary.values():
                written.unlink(missing_ok=True)

    def append(self, name: str, content: str | bytes) -> None:
        with (self.path / name).open("ab") as file:
            file.write(content.encode() if isinstance(content, str) else content)

    def open_log(self, name: str) -> TextIO:
        return (self.path / name).open("a", encoding="utf-8", errors="backslashreplace")

    def names(self, directory: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.path / directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise FilesError(self.path / directory, error.strerror or str(error)) from error

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path / name)

    def size(self, directory: str) -> int:
        return sum(path.stat().st_size for path in (self.path / directory).rglob("*") if path.is_file())

    def is_directory(self) -> bool:
        return os.path.isdir(self.path)  # Path.is_dir raises if permissions are missing

    def make(self, directory: str = "") -> None:
        (self.path / directory).mkdir(parents=True, exist_ok=True)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def move(self, directory: str, new: str) -> None:
        self.make(str(PurePath(new).parent))
        (self.path / directory).rename(self.path / new)

    @contextlib.contextmanager
    def locked(self, patience: float, tell: Callable[[str], None]) -> Iterator[None]:
        # The lock is released when the process exits. On Windows and file systems without locks there is no locking.
        with (self.path / ".lock").open("a+") as file:
            _lock(file, self.path, patience)
            yield

    def require_lock(self) -> None:
        pass  # a local lock cannot be lost


def _lock(file: IO[str], path: Path, patience: float) -> None:
    """Locks `file`, and writes the holder's name to it.

    Does not use filelock: before version 4 it truncates the file, including the holder's name, when trying; later ones
    leave a file behind on file systems without locks, which remains after a process was killed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                raise in_use(path, file.read(200).strip()) from None
            time.sleep(LOCK_INTERVAL)
        except OSError:  # a file system without locks
            return
    with contextlib.suppress(OSError):  # a full disk must not stop a finished run
        file.truncate(0)
        file.write(f"{this_process()}\n")
        file.flush()


def open_files(place: Place) -> Files:
    """Returns the files of the directory `place`; does not access it.

    Raises:
      UserError: see `as_path`.
    """
    path = as_path(place)
    if isinstance(path, Path):
        return _Local(path)
    from shared_basis.runtime import cloud  # imports slow packages
    return cloud.open_directory(path)


def as_path(place: Place) -> PurePath:
    """Returns `place` as a path, with ~ expanded; for components, parents and messages, as it may be in a bucket.

    Raises:
      UserError: `place` is a URL other than gs://BUCKET/PATH, or the package for these is not installed.
    """
    text = os.fspath(place)
    address = re.match("([a-z][a-z0-9+.-]+):/+", text)  # pathlib.Path collapses the slashes
    if address is None:
        return Path(os.path.expanduser(text))
    if address[1] != "gs" or address.end() == len(text):
        raise UserError(f"{text}: must be a directory, or gs://BUCKET/DIRECTORY in Google Cloud Storage; mount other "
                        "storage and use its mount point.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: the package gcsfs is not installed; pip install "
                        "'shared-basis[gcs]', or use a local directory.")
    from etils import epath
    return epath.Path(f"gs://{text[address.end():]}")


def absolute(place: str) -> str:
    """Returns `place` as an absolute path, for processes with another working directory; URLs are unchanged."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def write_atomic(place: Place, content: str | bytes) -> None:
    """Writes the whole file, or leaves the existing one unchanged: a complete temporary file is renamed.

    Raises:
      OSError: the file cannot be written.
    """
    path = as_path(place)
    open_files(path.parent).write({path.name: content})


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table as CSV with the line endings of RFC 4180."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def align(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Returns the rows as lines of columns two spaces apart; `right` aligns all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) if right and index else cell.ljust(width)
                      for index, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException, limit: int = 250) -> str:
    """Returns type and message of an error on one line; long messages keep their beginning and end."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= limit else f"{line[:limit - 103]} … {line[-100:]}"
