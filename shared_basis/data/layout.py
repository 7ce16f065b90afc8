"""Detects the splits and classes among the directories of a folder of images."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from shared_basis.data.listing import PassedOver, images_of, is_directory, scan, walk
from shared_basis.errors import UserError

WORDS = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("val", "valid", "validation")}
"""The directory names of each split; also accepted as a part of a name, as in training_set and seg_train."""


def split_directories(root: Path, needed: Sequence[str]) -> dict[str, Path]:
    """Returns the directory of each split, or an empty dict if a single tree contains all images.

    If there is no test directory, the validation directory is used for testing.

    Raises:
      UserError: one of the splits `needed` is missing, or the split directories are ambiguous.
    """
    entries = [Path(entry.path) for entry in scan(root) if is_directory(entry)]
    found = _by_exact_name(entries) or _by_word(root, entries)
    own_test, validation = found.get("test"), found.get("validation")
    directories = {"train": found.get("train"), "test": own_test or validation,
                   "validation": validation if own_test else None}
    if any(directories[split] is None for split in needed):
        for path in directories.values():
            if path is not None and any(map(is_directory, scan(path))):  # a directory of images is a class
                lacking = "test/ or val/" if path == directories["train"] else "train/"
                raise UserError(f"{root} holds {path.name}/ but no {lacking}; add it, or pass {path} itself to "
                                "divide it into training and test images.")
        return {}
    return {split: _unwrapped(directory) for split, directory in directories.items() if directory is not None}


def count_beside(root: Path, splits: Collection[Path], others: PassedOver) -> None:
    """Adds to `others` the files below `root` that are not in one of the directories `splits`."""
    entries = scan(root)
    for path in images_of(entries, others):
        others.add(path)
    for directory in (Path(entry.path) for entry in entries if is_directory(entry)):
        if any(split.is_relative_to(directory) for split in splits):
            if directory not in splits:
                count_beside(directory, splits, others)
        else:
            for path in walk(directory, others):
                others.add(path)


def _by_exact_name(entries: Sequence[Path]) -> dict[str, Path]:
    by_name = {path.name.lower(): path for path in entries}
    return {split: by_name[name] for split, names in WORDS.items() for name in reversed(names) if name in by_name}


def _by_word(root: Path, entries: Sequence[Path]) -> dict[str, Path]:
    """Returns the splits if directories are named like training_set and test_set; an empty dict otherwise.

    Raises:
      UserError: only some directories have such names, or two match the same split.
    """
    words = {path: set(re.split(r"[\W_]+", path.name.lower())) for path in entries}
    named: dict[str, list[Path]] = {split: [path for path in entries if words[path] & set(names)]
                                    for split, names in WORDS.items()}
    if not named["train"] or not (named["test"] or named["validation"]):
        return {}
    paths = [path for found in named.values() for path in found]
    if len(set(paths)) < len(entries) or any(len(found) > 1 for found in named.values()) or (
            len(set(paths)) < len(paths)):
        raise UserError(f"{root} holds {', '.join(f'{path.name}/' for path in entries[:6])}: it is unclear which of "
                        "them are splits and which are classes; name the splits train/ and test/ (or "
                        "val/), move other directories away, or pass a directory of classes.")
    return {split: found[0] for split, found in named.items() if found}


def _unwrapped(directory: Path) -> Path:
    """Returns `directory`, or its only subdirectory if that has the same name, as in unpacked archives."""
    entries = scan(directory)
    inside = [entry for entry in entries if is_directory(entry)]
    if len(inside) == 1 and inside[0].name == directory.name and not any(images_of(entries)):
        return _unwrapped(Path(inside[0].path))
    return directory
