"""The interface to the files of a directory, common to disks and buckets."""

from __future__ import annotations

import abc
import contextlib
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import TextIO

from shared_basis.errors import UserError


class FilesError(UserError, OSError):
    """A file operation failed: an `OSError` with `strerror`, which is also a `UserError` if it is not caught."""

    def __init__(self, path: PurePath, why: str) -> None:
        """Sets the path and the reason `why`, on one line."""
        super().__init__(f"{path}: {why}.")
        self.strerror = why


class Files(abc.ABC):
    """The files of a directory. Names are relative to it, with slashes between their parts.

    Readers never see partially written files, except for files appended to on disk. Failures raise `OSError` with a
    one-line reason as `strerror`.
    """

    path: PurePath
    """The directory; only for names and messages, since a path in a bucket cannot be opened."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Returns the contents of a file.

        Raises:
          FileNotFoundError: the file does not exist.
        """

    @abc.abstractmethod
    def write(self, contents: Mapping[str, str | bytes]) -> None:
        """Writes whole files; on disk they are renamed into place once all of them are complete."""

    @abc.abstractmethod
    def append(self, name: str, content: str | bytes) -> None:
        """Appends `content` to a file, which is created if it does not exist."""

    @abc.abstractmethod
    def open_log(self, name: str) -> TextIO:
        """Opens a text file for appending; in a bucket, the last seconds are only written on closing."""

    @abc.abstractmethod
    def names(self, directory: str = "") -> list[str]:
        """Returns the sorted names of direct entries of `directory`; empty if it does not exist."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Returns whether the file exists."""

    @abc.abstractmethod
    def size(self, directory: str) -> int:
        """Returns the total bytes of all files below `directory`."""

    @abc.abstractmethod
    def is_directory(self) -> bool:
        """Returns whether files can be written to the directory as it is; always true in a bucket."""

    @abc.abstractmethod
    def make(self, directory: str = "") -> None:
        """Creates `directory` unless it exists."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file if it exists."""

    @abc.abstractmethod
    def move(self, directory: str, new: str) -> None:
        """Moves `directory`, with its contents, to the name `new`."""

    @abc.abstractmethod
    def locked(self, patience: float, tell: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
        """Locks the existing directory against other processes until the context ends.

        Args:
          patience: seconds to wait for another process; in a bucket, waits until its holder renews the lock or counts
            as dead, and calls `tell` with a message.

        Raises:
          UserError: another process holds the lock.
        """

    @abc.abstractmethod
    def require_lock(self) -> None:
        """Raises `OSError` if another process has taken over the lock because this one was cut off for too long."""


def this_process() -> str:
    """Returns a description of this process for other processes."""
    return f"process {os.getpid()} on {platform.node()}"


def in_use(path: PurePath, holder: str) -> UserError:
    """Returns the error for a directory that the process `holder` has locked."""
    return UserError(f"workdir {path} is in use by another run ({holder or 'unknown'}); wait for it, or choose another "
                     "--workdir. Processes can only train a run together with --distributed.")
