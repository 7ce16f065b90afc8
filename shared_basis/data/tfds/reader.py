"""Reads TensorFlow Datasets (TFDS) in ArrayRecord format without TensorFlow.

    cifar10, cifar100, fashion_mnist, imagenet2012  prepared by this package: see `shared_basis.data.tfds.prepare`
    tfds:<name>[/<config>][:<version>]              any data set that TFDS finds prepared in its data directory

`tensorflow_datasets` is slow to import, so it is only imported to load images or if the spec is not built in.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.examples import Encoded, Examples, Source, Spec
from shared_basis.data.tfds.metadata import check_metadata
from shared_basis.data.tfds.names import SPECS, damaged, data_directory, imagenet_classes, own_builder, tfds_name
from shared_basis.errors import UserError
from shared_basis.runtime.files import one_line

UNLABELLED = {"imagenet2012": ("test",)}
"""Splits without labels, which cannot be used for testing."""

OTHER_FILES = 256
"""Upper bound of other open files of a process: libraries, checkpoints, connections."""


def describe(config: DataConfig) -> Spec:
    """Returns the spec; a data set without a built-in spec must be prepared, as its metadata is read.

    Raises:
      UserError: the data set is not prepared, does not have images and classes, or its images differ in size and
        `config.image_size` is 0.
    """
    name = tfds_name(config)
    if name in SPECS:
        return _sized(config, SPECS[name])
    if name == "imagenet2012":
        return _sized(config, Spec((0, 0, 3), imagenet_classes()))
    builder = find_builder(config)
    if builder is None:
        raise _unprepared(config)
    return _spec_of(config, builder)


def open_source(config: DataConfig, names: Sequence[str]) -> Source:
    """Opens the splits `names` of a prepared data set; examples keep the order of TFDS.

    Raises:
      UserError: the data set is not prepared or is damaged, or a split does not exist.
    """
    builder = find_builder(config)
    if builder is None:
        raise _unprepared(config)
    spec = _spec_of(config, builder)
    if tfds_name(config) in SPECS and spec.classes != SPECS[tfds_name(config)].classes:
        raise damaged(builder, f"its classes are {', '.join(spec.classes)}")
    image, label = _keys(config, builder)
    splits = _split_strings(config, builder, names)
    examples: dict[str, Examples] = {}
    for part, split in splits.items():
        examples[part] = RecordExamples(str(builder.data_dir), split, image, label,
                                        np.arange(_count(config, builder, part, split)))
    _check_disjoint(builder, splits)
    for part, opened in examples.items():
        opened.read([0])  # fails here if only TensorFlow can read the format
        for piece in builder.info.splits[splits[part]].file_instructions:
            if not os.path.exists(piece.filename):
                raise damaged(builder, f"{os.path.basename(piece.filename)} is missing")
    return Source(spec, examples)


def find_builder(config: DataConfig) -> Any | None:
    """Returns the TFDS builder of the prepared data set, or None if it is not prepared.

    Raises:
      UserError: the prepared data is damaged.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, read_only_builder

    name, directory = tfds_name(config), data_directory(config)
    try:
        naming.parse_builder_name_kwargs(name)
    except Exception as error:
        raise UserError(f"data.name={config.name!r}: TFDS takes names such as tfds:cifar10, tfds:name/config and "
                        f"tfds:name:1.0.0 ({one_line(error)}).") from error
    check_metadata(Path(directory) / naming.parse_builder_name_kwargs(name)[0].name)
    own = own_builder(config)
    try:
        if own is not None and own.data_path.exists():
            if not own.is_prepared():
                raise damaged(own, "it holds no metadata")
            return own
        return read_only_builder.builder_from_files(name, data_dir=directory)  # also older versions of own builders
    except tfds.core.DatasetNotFoundError:
        return None
    except UserError:
        raise
    except Exception as error:  # damaged metadata may raise anything
        raise damaged(os.path.join(directory, name), one_line(error)) from error


@dataclasses.dataclass(frozen=True)
class RecordExamples:
    """Examples of a prepared TFDS data set; each process opens the files on first use."""

    directory: str
    split: str
    image: str
    label: str
    indices: np.ndarray
    """int64 [N]: indices of these examples in the split."""
    _opened: list[Any] = dataclasses.field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: np.ndarray) -> RecordExamples:
        """Returns the subset with the given `indices`."""
        return dataclasses.replace(self, indices=self.indices[indices])

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        """Returns pairs of an image, as encoded by TFDS, and its label.

        Raises:
          UserError: the files are damaged.
        """
        try:
            records = self._source().__getitems__(self.indices[list(indices)].tolist())
            return [(record[self.image], int(record[self.label])) for record in records]
        except NotImplementedError as error:  # TFDS's own message is several lines long
            raise UserError(f"the data in {self.directory} is in a format that only TensorFlow reads; set another "
                            "--config.data.directory to have it prepared there as ArrayRecord.") from error
        except UserError:
            raise
        except Exception as error:  # ArrayRecord raises many types for broken data
            raise damaged(self.directory, one_line(error)) from error

    def name(self, index: int) -> str:
        """Returns a description of the example: its index, split and directory."""
        return f"example {self.indices[index]} of {self.split!r} in {self.directory}"

    def _source(self) -> Any:
        if not self._opened:
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(self.directory)
            _allow_open_files(sum(split.num_shards for split in builder.info.splits.values()))
            # No other features are decoded, so that untrusted data does not reach Pillow and other decoders.
            decoders = {key: tfds.decode.SkipDecoding() for key in builder.info.features if key != self.label}
            self._opened.append(builder.as_data_source(self.split, decoders=decoders))
        return self._opened[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files by `count`, since the file of each shard stays open.

    Raises:
      UserError: the system's hard limit is lower.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(f"the data has {count} files, but a process may only have {hard} open (ulimit -Hn); raise "
                            f"that limit to {wanted}, or prepare the data in fewer parts.")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _unprepared(config: DataConfig) -> UserError:
    return UserError(f"data.name={config.name!r}: not prepared in {data_directory(config)}. Prepare it there with "
                     "--mode=prepare, or set its directory with --config.data.directory=DIR.")


def _sized(config: DataConfig, spec: Spec) -> Spec:
    """Returns `spec` with the configured image size."""
    height, width, channels = spec.image_shape
    if config.image_size:
        height = width = config.image_size
    if not height or not width:
        raise UserError(f"data.image_size=0: the images of data.name={config.name!r} differ in size; set it, usually "
                        "to 224 with --config.data.crop=random_resized.")
    return Spec((height, width, channels), spec.classes)


def _keys(config: DataConfig, builder: Any) -> tuple[str, str]:
    """Returns the names of the image and label features: the supervised keys, or the only ones of these kinds."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    keys = builder.info.supervised_keys
    if keys and len(keys) == 2 and all(isinstance(features.get(key), kind) for key, kind in zip(keys, kinds,
                                                                                              strict=True)):
        return keys[0], keys[1]
    found = [[key for key, feature in features.items() if type(feature) is kind] for kind in kinds]
    if [len(part) for part in found] != [1, 1]:
        listed = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items()))
        raise UserError(f"data.name={config.name!r}: it does not have one image and one class label; it has {listed}.")
    return found[0][0], found[1][0]


def _spec_of(config: DataConfig, builder: Any) -> Spec:
    image, label = _keys(config, builder)
    kind = np.dtype(builder.info.features[image].np_dtype)
    if kind not in (np.uint8, np.uint16):
        raise UserError(f"data.name={config.name!r}: its images are of type {kind}; only "
                        "uint8 and uint16 are supported.")
    height, width, channels = builder.info.features[image].shape
    names = builder.info.features[label].names or [str(index) for index in
                                                   range(builder.info.features[label].num_classes)]
    if channels == 4:
        channels = 3  # transparent pixels are blended with white
    return _sized(config, Spec((height or 0, width or 0, channels or 3), tuple(names)))


def _split_strings(config: DataConfig, builder: Any, names: Sequence[str]) -> dict[str, str]:
    """Returns the TFDS split for each of `names`."""
    existing = [name for name in builder.info.splits if name not in UNLABELLED.get(builder.name, ())]
    splits = {"train": config.train_split or "train", "test": config.test_split or (
        next((name for name in ("test", "validation") if name in existing), ""))}
    if not splits["test"] and "test" in names:
        raise UserError(f"data.name={config.name!r} has no test or validation split; it has {_listed(builder)}. Give "
                        "parts, e.g. --config.data.train_split='train[:90%]' --config.data.test_split='train[90%:]'.")
    if config.validation_split and "train" in names:
        splits["validation"] = config.validation_split
    return {part: split for part, split in splits.items() if part in names or part == "validation"}


def _listed(builder: Any) -> str:
    return ", ".join(f"{name} ({info.num_examples:,})" for name, info in builder.info.splits.items()) or "no splits"


def _count(config: DataConfig, builder: Any, part: str, split: str) -> int:
    """Returns the number of examples of `split`."""
    try:
        count = builder.info.splits[split].num_examples
    except Exception as error:  # TFDS raises several types for invalid splits
        raise UserError(f"data.{part}_split={split!r}: no such split of data.name={config.name!r}; it has "
                        f"{_listed(builder)}, and parts of them as 'train[:90%]'.") from error
    if count <= 0:
        raise UserError(f"data.{part}_split={split!r}: holds no examples; {config.name!r} has {_listed(builder)}.")
    return count


def _check_disjoint(builder: Any, splits: dict[str, str]) -> None:
    """Raises `UserError` if two of the splits share an example."""
    ranges = []
    for part, split in splits.items():
        for piece in builder.info.splits[split].file_instructions:
            end = piece.skip + (piece.examples_in_shard if piece.take < 0 else piece.take)
            ranges.append((piece.filename, piece.skip, end, part, split))
    ranges.sort()
    for (file, _, end, part, split), (other_file, start, _, other_part, other) in itertools.pairwise(ranges):
        if file == other_file and start < end:
            raise UserError(f"data.{part}_split={split!r} and data.{other_part}_split={other!r} have examples in "
                            "common; they must be disjoint.")
