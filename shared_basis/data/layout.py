"""Which directories of a folder of images are its splits, and which its classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from shared_basis.data.listing import PassedOver, images_of, is_directory, scan, walk
from shared_basis.errors import UserError

WORDS = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("val", "valid", "validation")}
"""By split, what its directory may be called, or have in its name as in training_set and seg_train."""


def split_directories(root: Path, needed: Sequence[str]) -> dict[str, Path]:
    """Returns the directories of all splits there are, or nothing where one tree holds all images.

    Without a test part of its own, the validation part is what is tested on.

    Raises:
      UserError: some of the splits `needed` are missing, or it cannot be told which directories are splits.
    """
    entries = [Path(entry.path) for entry in scan(root) if is_directory(entry)]
    found = _by_exact_name(entries) or _by_word(root, entries)
    own_test, validation = found.get("test"), found.get("validation")
    directories = {"train": found.get("train"), "test": own_test or validation,
                   "validation": validation if own_test else None}
    if any(directories[split] is None for split in needed):
        for path in directories.values():
            if path is not None and any(map(is_directory, scan(path))):  # one that holds images is a class
                lacking = "test/ or val/" if path == directories["train"] else "train/"
                raise UserError(f"{root} holds {path.name}/ and no {lacking}; add it, or name {path} itself to have it "
                                "divided into a train and a test part.")
        return {}
    return {split: _unwrapped(directory) for split, directory in directories.items() if directory is not None}


def count_beside(root: Path, splits: Collection[Path], others: PassedOver) -> None:
    """Counts in `others` the files below `root` that lie in none of the directories `splits`."""
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
    """Returns the splits where directories are named like training_set and test_set; nothing where they are not.

    Raises:
      UserError: some are, and others are not, or two are of one split.
    """
    words = {path: set(re.split(r"[\W_]+", path.name.lower())) for path in entries}
    named: dict[str, list[Path]] = {split: [path for path in entries if words[path] & set(names)]
                                    for split, names in WORDS.items()}
    if not named["train"] or not (named["test"] or named["validation"]):
        return {}
    paths = [path for found in named.values() for path in found]
    if len(set(paths)) < len(entries) or any(len(found) > 1 for found in named.values()) or (
            len(set(paths)) < len(paths)):
        raise UserError(f"{root} holds {', '.join(f'{path.name}/' for path in entries[:6])}: it is not clear which of "
                        "them are parts of a data set and which are classes; name the parts train/ and test/ (or "
                        "val/), move the others away, or name one directory of classes itself.")
    return {split: found[0] for split, found in named.items() if found}


def _unwrapped(directory: Path) -> Path:
    """Returns the directory of the same name that alone lies in `directory`, as archives of data sets have it."""
    entries = scan(directory)
    inside = [entry for entry in entries if is_directory(entry)]
    if len(inside) == 1 and inside[0].name == directory.name and not any(images_of(entries)):
        return _unwrapped(Path(inside[0].path))
    return directory
