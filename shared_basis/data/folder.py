"""A directory of image files: their classes and splits.

    DIR/train/<class>/*  DIR/test/<class>/*    or val, valid, validation instead of test. With both test and val, val is
                                               used as validation images, to choose the best checkpoint. training,
                                               testing and names such as training_set and seg_test are accepted too,
                                               in upper or lower case
    DIR/<class>/*                              a single tree; a fraction `data.test` is held out for testing

Images may be in nested directories below a class directory. Without any directories, the class of an image is its
file name without the trailing number: cat.0.jpg, cat.1.jpg, dog.0.jpg, ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from shared_basis.config import AUTO_VALIDATION, DataConfig
from shared_basis.data import streaming
from shared_basis.data.batches import EvalBatches
from shared_basis.data.examples import Encoded, Examples, Source, Spec
from shared_basis.data.images import BrokenImage, size_of
from shared_basis.data.layout import count_beside, split_directories
from shared_basis.data.listing import SUFFIXES, PassedOver, images_of, is_directory, scan, walk
from shared_basis.errors import UserError
from shared_basis.runtime.reporter import Reporter

VALIDATION_PART = 0.1
"""Fraction of each class to hold out for validation if `data.validation` selects the folder's default."""

SIZED = 200
"""Number of files per split whose sizes enter the fingerprint."""

CHECKED_AT_ONCE = 64
"""Batch size when a folder is checked."""

_LAYOUT = ("it must hold train/<class>/* and test/<class>/* (or val/), or only <class>/*, or files named "
           f"<class><number> with the suffix {', '.join(SUFFIXES)}")
_NUMBER = re.compile(r"[\s._()-]*\d+[\s._()-]*$")


@dataclasses.dataclass(frozen=True)
class FileExamples:
    """Image files and their labels, int32 [N]. Paths are stored in one string, as millions are sent to workers."""

    root: str
    names: bytes
    """The paths relative to `root`, concatenated."""
    ends: np.ndarray
    """int64 [M]: the end offset of each path in `names`."""
    files: np.ndarray
    """int32 [N]: indices of the paths that belong to these examples."""
    labels: np.ndarray

    @classmethod
    def of(cls, root: str, paths: Sequence[str], labels: np.ndarray) -> FileExamples:
        """Returns the examples for `paths`, relative to `root`."""
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        return cls(root, b"".join(encoded), ends, np.arange(len(paths), dtype=np.int32), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> FileExamples:
        """Returns the subset with the given `indices`."""
        return dataclasses.replace(self, files=self.files[indices], labels=self.labels[indices])

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        """Returns pairs of a path and a label."""
        return [(self.name(index), int(self.labels[index])) for index in indices]

    def name(self, index: int) -> str:
        """Returns the path of the image."""
        file = self.files[index]
        begin = self.ends[file - 1] if file else 0
        return os.path.join(self.root, os.fsdecode(self.names[begin:self.ends[file]]))


def fingerprint(splits: Mapping[str, Examples]) -> str | None:
    """Returns a digest that identifies the images of `splits`, or None if they are not files.

    It covers the relative paths of all files and the sizes of some, so it does not change if the folder is moved.
    """
    digest = hashlib.sha256()
    for name, part in sorted(splits.items()):
        if not isinstance(part, FileExamples):
            return None
        digest.update(name.encode() + part.names + part.files.astype("<i4").tobytes())
        for index in np.unique(np.linspace(0, len(part) - 1, SIZED).astype(int)) if len(part) else ():
            with contextlib.suppress(OSError):  # a dangling link, is reported when it is read
                digest.update(os.path.getsize(part.name(index)).to_bytes(8, "little"))
    return digest.hexdigest()[:16]


def describe(config: DataConfig) -> Spec:
    """Returns the spec: the names of the classes, and the shape of the first training image after preprocessing.

    Raises:
      UserError: the directory layout is invalid, or that image is broken.
    """
    return open_source(config, ("train", "test")).spec


def open_source(config: DataConfig, names: Sequence[str], known: Spec | None = None) -> Source:
    """Lists the images of the splits `names`, and of the validation split if it exists and 'train' is requested.

    Examples are sorted by class name and then path, by code point, so that all machines use the same order.

    Args:
      known: the spec of a run to evaluate on this directory. Labels then index its classes, some of which may be absent
        here, and only the splits `names` are required.

    Raises:
      UserError: the directory layout is invalid, or there are classes that `known` lacks.
    """
    root = _root(config)
    directories = split_directories(root, names if known else ("train", "test"))
    least = 1 if known else 2  # classes
    others = PassedOver()
    wanted = {*names, "validation"} if "train" in names else set(names)
    if directories:
        count_beside(root, directories.values(), others)
        directories = {split: path for split, path in directories.items() if not known or split in wanted}
    trees = {split: _list_tree(root, directory, directories.get("train"), least, others)
             for split, directory in (directories or {"": root}).items()}
    classes = known.classes if known else _common_classes(trees, directories or {"": root})
    parts = {split: _examples(root, tree, classes, config) for split, tree in trees.items()}
    first = parts["train" if "train" in parts else next(iter(parts))]
    if not directories:
        parts = _divide(config, parts[""], classes, known)
    if config.validation == AUTO_VALIDATION and "train" in parts and "validation" not in parts:
        parts |= _hold_out(parts["train"], config.split_seed)
    own_size = known is not None and config.image_size in (0, known.image_shape[0])
    shape = known.image_shape if known and own_size else (*_first_size(config, first), 3)
    return Source(Spec(shape, classes), {split: part for split, part in parts.items() if split in wanted},
                  others.render(), single_tree=not directories)


def prepare(config: DataConfig, reporter: Reporter) -> str:
    """Decodes every image once and returns a summary of the directory; nothing is written.

    Raises:
      UserError: see `open_source`; or images are broken (a warning names each) and `config.on_broken` is 'fail'.
    """
    lenient = dataclasses.replace(config, on_broken="skip", crop="center")
    source = open_source(lenient, ("train", "test"))
    if source.note:
        reporter.warn(source.note)
    broken = done = 0
    total = sum(map(len, source.splits.values()))
    progress = reporter.progress("preparing images")
    for part in source.splits.values():
        batches = EvalBatches(part, source.spec, lenient, batch_size=CHECKED_AT_ONCE)
        for number, batch in enumerate(streaming.read(batches, streaming.workers_of(config), reporter.warn), 1):
            broken += len(batch.skipped)
            progress(done + min(number * CHECKED_AT_ONCE, len(part)), total)
        done += len(part)
    if broken and config.on_broken == "fail":
        raise UserError(f"{broken} image{'s' * (broken > 1)} in {config.directory} cannot be decoded, see above; "
                        "replace or remove, or set --config.data.on_broken=skip.")
    counts = ", ".join(f"{len(part):,} {name}" for name, part in source.splits.items())
    return (f"{config.directory}: {counts} images of {len(source.spec.classes)} classes, "
            f"{f'{broken} of them broken' if broken else 'all of which can be decoded'}")


def _root(config: DataConfig) -> Path:
    root = Path(os.path.abspath(os.path.expanduser(config.directory)))  # of ./NAME, Path would drop the ./
    if not os.path.isdir(root):  # unlike Path.is_dir, False if permissions are missing
        problem = "is not a directory" if os.path.exists(root) else "cannot be found"
        raise UserError(f"data.directory={config.directory!r}: {root} {problem}; {_LAYOUT}. If it has moved, give "
                        "--images=DIR.")
    return root


def _list_tree(root: Path, directory: Path, train: Path | None, least: int,
               others: PassedOver) -> dict[str, list[str]]:
    """Returns the sorted paths of the images in `directory`, relative to `root`, by class; at least `least` classes.

    Class names are normalised to Unicode's composed form, independently of the file system.

    Args:
      train: the directory of the training images, if the folder has splits.
    """
    entries = scan(directory)
    folders = [entry for entry in entries if is_directory(entry)]
    tree: dict[str, list[str]] = {}
    if folders:
        for path in images_of(entries, others):  # outside of all classes
            others.add(path)
        for folder in folders:
            name = unicodedata.normalize("NFC", folder.name)
            tree[name] = sorted([*tree.get(name, []), *walk(Path(folder.path), others)])
        for name, paths in tree.items():
            if not paths:
                raise UserError(f"class directory {directory / name} holds no image ({', '.join(SUFFIXES)}); put "
                                f"images there, or remove the class from all splits{others.advice}.")
    else:
        for path in images_of(entries, others):
            name = _NUMBER.sub("", Path(path).stem)
            if not name or name == Path(path).stem:
                raise UserError(f"{directory} holds no class directories, and the file name {Path(path).name!r} is not "
                                f"a class followed by a number, such as cat.12.jpg; {_LAYOUT}. "
                                f"{_hint(root, directory, train)}".rstrip())
            tree.setdefault(name, []).append(path)
    if len(tree) < least:
        names = "".join(f", {name!r}" for name in tree)
        raise UserError(f"{directory} holds {len(tree)} class{'es' if len(tree) != 1 else ''}{names}; at least {least} "
                        f"class{'es are' if least > 1 else ' is'} needed. "
                        f"{'' if folders else _hint(root, directory, train)}{_LAYOUT[0].upper()}{_LAYOUT[1:]}.")
    start = len(os.path.join(root, ""))
    return {name: [path[start:] for path in tree[name]] for name in sorted(tree)}


def _hint(root: Path, directory: Path, train: Path | None) -> str:
    """Returns a sentence on what to give instead if `directory` of the folder `root` holds no class directories."""
    if directory != root:  # a split, usually test images without labels
        return "" if train in (None, directory) else f"To hold out training images for testing, give --images={train}. "
    beside = [entry.name for entry in scan(directory.absolute().parent) if is_directory(entry)]
    return (f"If {directory.name} is itself a class, like {', '.join(beside[:3])}, give {directory.parent}. "
            if len(beside) > 1 else "")


def _common_classes(trees: Mapping[str, Mapping[str, object]], directories: Mapping[str, Path]) -> tuple[str, ...]:
    """Returns the classes after checking that all splits have the same ones."""
    for split in trees:
        for here, there in ((split, "train"), ("train", split)):
            if split not in ("", "train") and (extra := trees[here].keys() - trees[there].keys()):
                raise UserError(f"class {min(extra)!r} is in {directories[here]} but not in {directories[there]}; all "
                                "splits must hold the same classes.")
    return tuple(next(iter(trees.values())))


def _examples(root: Path, tree: Mapping[str, Sequence[str]], classes: Sequence[str],
              config: DataConfig) -> FileExamples:
    """Returns the examples of `tree`; raises `UserError` if one of its classes is not in `classes`."""
    labels = {name: label for label, name in enumerate(classes)}
    for name in tree:
        if name not in labels:
            raise UserError(f"data.directory={config.directory!r} holds other classes than the run was trained on: "
                            f"{name!r} is not one of {', '.join(classes[:10])}{', …' * (len(classes) > 10)}.")
    counts = [len(paths) for paths in tree.values()]
    return FileExamples.of(str(root), [path for paths in tree.values() for path in paths],
                           np.repeat(np.array([labels[name] for name in tree], np.int32), counts))


def _divide(config: DataConfig, tree: FileExamples, classes: Sequence[str],
            known: Spec | None) -> dict[str, FileExamples]:
    """Holds out a fraction `config.test` of each class of a single tree as test, drawn with `config.split_seed`."""
    test = np.zeros(len(tree), bool)
    for label, order in _drawn(tree, config.split_seed):
        held = max(1, round(len(order) * config.test))
        if config.test < 1:
            held = min(held, len(order) - 1)
        if not held:
            instead = ", or evaluate on all with --config.data.test=1.0" if known else ""  # none would be left to train
            raise UserError(f"data.directory={config.directory!r}: class {classes[label]!r} has one image, but one "
                            f"must be held out for testing; add images{instead}.")
        test[order[:held]] = True
    return {"train": tree.take(np.flatnonzero(~test)), "test": tree.take(np.flatnonzero(test))}


def _hold_out(train: FileExamples, split_seed: int) -> dict[str, FileExamples]:
    """Holds out `VALIDATION_PART` of each class as validation images; none for a class with a single image."""
    held = np.zeros(len(train), bool)
    for _, order in _drawn(train, split_seed, 1):
        held[order[:max(1, round(len(order) * VALIDATION_PART)) if len(order) > 1 else 0]] = True
    parts = {"train": train.take(np.flatnonzero(~held)), "validation": train.take(np.flatnonzero(held))}
    return parts if held.any() else {"train": train}


def _drawn(tree: FileExamples, split_seed: int, *stream: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each label of `tree` with the indices of its images in random order."""
    for label in np.unique(tree.labels):
        members = np.flatnonzero(tree.labels == label)
        yield int(label), np.random.default_rng((split_seed, int(label), *stream)).permutation(members)


def _first_size(config: DataConfig, examples: FileExamples) -> tuple[int, int]:
    """Returns height and width of preprocessed images: as configured, or those of the first readable image."""
    if config.image_size:
        return config.image_size, config.image_size
    for index in range(len(examples)):
        try:
            return size_of(examples.name(index))
        except BrokenImage as error:
            if config.on_broken == "fail":
                raise UserError(f"{examples.name(index)} {error}; replace or remove it, or set "
                                "--config.data.on_broken=skip.") from error
    raise UserError(f"data.directory={config.directory!r}: no image there can be decoded.")
