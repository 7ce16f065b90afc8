"""What a directory holds: image files and directories, in an order that is the same on every machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared_basis.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Files with other suffixes, and hidden files, are passed over."""


def scan(directory: Path) -> list[os.DirEntry[str]]:
    """Returns what `directory` holds, hidden entries apart, sorted by name."""
    try:
        with os.scandir(directory) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the directory {directory}: {error.strerror}; mend its permissions.") from error


def images_of(entries: Sequence[os.DirEntry[str]]) -> Iterator[str]:
    """Yields the paths of the image files among `entries`."""
    for entry in entries:
        if entry.name.lower().endswith(SUFFIXES) and (_is_file(entry) or (
                entry.is_symlink() and not os.path.exists(entry.path))):
            yield entry.path  # not a pipe, which would wait; a dangling link is reported when it is read


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Returns whether `entry` is a directory, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def walk(directory: Path) -> Iterator[str]:
    """Yields the paths of the images in `directory` and below it; links to directories are not followed."""
    entries = scan(directory)
    yield from images_of(entries)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))
