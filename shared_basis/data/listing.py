"""Lists image files and directories in an order that is the same on every machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared_basis.errors import UserError

HEIF_SUFFIXES = (".heic", ".heif")
"""Suffixes of HEIF files from phones, which need an optional package."""

HEIF_ADVICE = "pip install 'shared-basis[heic]' reads these, or convert them to JPEG"

READS_HEIF = importlib.util.find_spec("pillow_heif") is not None

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
            *(HEIF_SUFFIXES if READS_HEIF else ()))
"""Suffixes of image files; other files are ignored and counted, hidden ones ignored."""

OTHERS_DIRECTORIES = ("@eadir", ".@__thumb", "__macosx", "$recycle.bin", "#recycle", "@recycle", "lost+found")
"""Directories of thumbnails and metadata that other programs create, in lower case."""


@dataclasses.dataclass
class PassedOver:
    """Counts the files of a directory that are not used: they are not images, or are outside of the classes."""

    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    """Count by lower-case suffix."""
    example: str = ""

    def add(self, path: str) -> None:
        """Counts a file."""
        self.kinds[os.path.splitext(path)[1].lower() or "no suffix"] += 1
        self.example = self.example or path

    def render(self) -> str:
        """Returns a one-line summary, or an empty string if no file was ignored."""
        if not self.kinds:
            return ""
        several = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common(5))
        total = self.kinds.total()
        images = [kind for kind in self.kinds if kind in SUFFIXES]
        reasons = [f"images end in {', '.join(SUFFIXES)}"] if len(images) < len(self.kinds) else []
        reasons += [f"{', '.join(images)}: outside of the splits and classes"] if images else []
        return (f"{total} file{'s are' if total > 1 else ' is'} not used ({several}), e.g. {self.example}; "
                f"{'; '.join(reasons)}{self.advice}")

    @property
    def advice(self) -> str:
        """How to read HEIF files if the package is not installed; empty if there are none."""
        unread = [suffix for suffix in HEIF_SUFFIXES if suffix in self.kinds]
        return f"; {', '.join(unread)}: {HEIF_ADVICE}" if unread else ""


def scan(directory: Path) -> list[os.DirEntry[str]]:
    """Returns the visible entries of `directory`, sorted by name."""
    try:
        with os.scandir(directory) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the directory {directory}: {error.strerror}; change its permissions.") from error


def images_of(entries: Sequence[os.DirEntry[str]], others: PassedOver | None = None) -> Iterator[str]:
    """Yields the paths of the image files among `entries`, and counts other files in `others`."""
    for entry in entries:
        if entry.name.lower().endswith(SUFFIXES) and (_is_file(entry) or (
                entry.is_symlink() and not os.path.exists(entry.path))):
            yield entry.path  # no pipes, which would block; dangling links fail on reading
        elif others is not None and _is_file(entry):
            others.add(entry.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Returns whether `entry` is a directory, or a link to one, that is not created by another program."""
    try:
        return entry.is_dir() and entry.name.lower() not in OTHERS_DIRECTORIES
    except OSError:
        return False


def walk(directory: Path, others: PassedOver | None = None, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the paths of all images in and below `directory`, following links to directories.

    Args:
      others: counts the files that are not images.
      above: the real paths of the parent directories.

    Raises:
      UserError: a directory cannot be read, or contains a link to one of its parents.
    """
    real = os.path.realpath(directory)
    if real in above:
        raise UserError(f"{directory} is a link to a directory that contains it, an endless loop; remove the "
                        "link.")
    entries = scan(directory)
    yield from images_of(entries, others)
    for entry in entries:
        if is_directory(entry):
            yield from walk(Path(entry.path), others, above | {real})
