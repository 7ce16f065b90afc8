"""The files of a directory: what disks and buckets have in common."""

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
    """What cannot be done with files: an `OSError` with its `strerror` for who catches that, else for the user."""

    def __init__(self, path: PurePath, why: str) -> None:
        """Says `why` in one line."""
        super().__init__(f"{path}: {why}.")
        self.strerror = why


class Files(abc.ABC):
    """The files of a directory. Names are relative to it, with slashes between their parts.

    Nobody ever reads a file that is written by halves, but for what is appended on a disk. What cannot be done raises
    `OSError`, whose `strerror` is a reason in one line.
    """

    path: PurePath
    """The directory: for names and messages alone, as a path in a bucket cannot be opened as a file."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
          FileNotFoundError: there is none.
        """

    @abc.abstractmethod
    def write(self, contents: Mapping[str, str | bytes]) -> None:
        """Writes whole files; on a disk they get their names when all of them are complete."""

    @abc.abstractmethod
    def append(self, name: str, content: str | bytes) -> None:
        """Adds `content` at the end of a file, which is made where there is none."""

    @abc.abstractmethod
    def open_log(self, name: str) -> TextIO:
        """Opens a text to which lines are added; a bucket has those of the last seconds only when it is closed."""

    @abc.abstractmethod
    def names(self, directory: str = "") -> list[str]:
        """Returns the names of what lies directly within `directory`, sorted; none where there is no such directory."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Returns whether there is such a file."""

    @abc.abstractmethod
    def size(self, directory: str) -> int:
        """Returns the bytes of all files below `directory`."""

    @abc.abstractmethod
    def is_directory(self) -> bool:
        """Returns whether files can be put into it as it is: in a bucket any name will do."""

    @abc.abstractmethod
    def make(self, directory: str = "") -> None:
        """Makes `directory`, unless it is there."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

    @abc.abstractmethod
    def move(self, directory: str, new: str) -> None:
        """Moves `directory`, with all that is below it, to a `new` name."""

    @abc.abstractmethod
    def locked(self, patience: float, tell: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
        """Keeps the directory, which is there, from other processes that lock it, until the context ends.

        Args:
          patience: seconds to wait for another process; in a bucket it is waited until it shows that it lives, or is
            taken for dead, and `tell` is told.

        Raises:
          UserError: another process holds it.
        """

    @abc.abstractmethod
    def require_lock(self) -> None:
        """Raises `OSError` where another process has taken the lock over, as this one was cut off for too long."""


def this_process() -> str:
    """Returns the name of this process for others."""
    return f"process {os.getpid()} on {platform.node()}"


def in_use(path: PurePath, holder: str) -> UserError:
    """Returns the error of a directory that another process, `holder`, has locked."""
    return UserError(f"workdir {path} is in use by another run ({holder or 'unknown'}); wait for it, or choose another "
                     "--workdir. Several processes train one run together with --distributed alone.")
