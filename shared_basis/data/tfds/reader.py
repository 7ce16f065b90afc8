"""Data sets by TensorFlow Datasets (TFDS), read without TensorFlow from its ArrayRecord format.

    cifar10, cifar100, fashion_mnist, imagenet2012  prepared by this package: see `shared_basis.data.tfds.prepare`
    tfds:<name>[/<config>][:<version>]              whatever TFDS finds prepared in its data directory

`tensorflow_datasets` is slow to import, so it is imported only to load images, or to describe a set that is not known.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_basis.config import TFDS_PREFIX, DataConfig
from shared_basis.data.examples import Encoded, Examples, Progress, Source, Spec, no_progress
from shared_basis.errors import UserError

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""

SPECS = {
    "cifar10": Spec((32, 32, 3), ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                                  "truck")),
    "cifar100": Spec((32, 32, 3), tuple(_CIFAR100.split())),
    "fashion_mnist": Spec((28, 28, 1), ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
                                        "Sneaker", "Bag", "Ankle boot")),
}
"""Fixed here, since TFDS knows CIFAR's class names only once it has the data; opening it compares them."""

UNLABELLED = {"imagenet2012": ("test",)}
"""Splits that exist and have no labels, so that they cannot be the test split."""


def tfds_name(config: DataConfig) -> str:
    """Returns the name that TFDS knows the data set by."""
    return config.name.removeprefix(TFDS_PREFIX)


def data_directory(config: DataConfig) -> str:
    """Returns the directory in which TFDS keeps prepared data sets."""
    if config.directory:
        return os.path.expanduser(config.directory)
    from tensorflow_datasets.core import constants

    return os.path.expanduser(constants.DATA_DIR)


def describe(config: DataConfig) -> Spec:
    """Returns the spec; a set not known here must be prepared, as its metadata is read.

    Raises:
      UserError: it is not prepared, it is no set of images and classes, or its images differ in size and
        `config.image_size` is 0.
    """
    name = tfds_name(config)
    if name in SPECS:
        return _sized(config, SPECS[name])
    if name == "imagenet2012":
        return _sized(config, Spec((0, 0, 3), _imagenet_classes()))
    from shared_basis.data.tfds.prepare import find_builder

    builder = find_builder(config)
    if builder is None:
        raise _unprepared(config)
    return _spec_of(config, builder)


def open_source(config: DataConfig, names: Sequence[str], known: Spec | None = None,
                progress: Progress = no_progress) -> Source:
    """Opens the splits `names`, in the order of TFDS; prepares the data set first where it is not, if that can be done.

    Raises:
      UserError: the data is neither prepared nor can be, prepared data is damaged, or a split does not exist.
    """
    from shared_basis.data.tfds.prepare import find_builder

    del known
    if find_builder(config) is None:
        prepare(config, progress)
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
        opened.read([0])  # a format that only TensorFlow reads is told of now
        for piece in builder.info.splits[splits[part]].file_instructions:
            if not os.path.exists(piece.filename):
                raise damaged(builder, f"{os.path.basename(piece.filename)} is missing")
    return Source(spec, examples)


def prepare(config: DataConfig, progress: Progress) -> str:
    """Prepares the data set unless it is prepared, and returns where it lies.

    Raises:
      UserError: source files are missing or are not the published ones, or the data cannot be written.
    """
    from shared_basis.data.tfds import prepare

    return prepare.prepare(config, progress)


@dataclasses.dataclass(frozen=True)
class RecordExamples:
    """Examples of a prepared TFDS data set; the files are opened on first use, in each process anew."""

    directory: str
    split: str
    image: str
    label: str
    indices: np.ndarray
    """int64 [N]: which examples of the split these are."""
    _opened: list[Any] = dataclasses.field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: np.ndarray) -> RecordExamples:
        """Returns the examples `indices` alone."""
        return dataclasses.replace(self, indices=self.indices[indices])

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        """Returns images as encoded by TFDS, and labels.

        Raises:
          UserError: the files are damaged.
        """
        try:
            records = self._source().__getitems__(self.indices[list(indices)].tolist())
            return [(record[self.image], int(record[self.label])) for record in records]
        except NotImplementedError as error:  # TFDS says so in several lines that send the user elsewhere
            raise UserError(f"the data in {self.directory} is in a format that only TensorFlow reads; set another "
                            "--config.data.directory to have it prepared there as ArrayRecord.") from error
        except Exception as error:  # ArrayRecord raises many types for broken data
            raise damaged(self.directory, one_line(error)) from error

    def name(self, index: int) -> str:
        """Returns the number of the example in its split."""
        return f"example {self.indices[index]} of {self.split!r} in {self.directory}"

    def _source(self) -> Any:
        if not self._opened:
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(self.directory)
            # No other feature is decoded: Pillow and others would be given whatever they hold.
            decoders = {key: tfds.decode.SkipDecoding() for key in builder.info.features if key != self.label}
            self._opened.append(builder.as_data_source(self.split, decoders=decoders))
        return self._opened[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def damaged(where: Any, reason: str) -> UserError:
    """Returns the error for prepared data, a builder or its directory, that cannot be read."""
    directory = getattr(where, "data_dir", where)
    return UserError(f"cannot read the prepared data in {directory}: {reason}; delete that directory to have it "
                     "prepared again, or set another --config.data.directory.")


def one_line(error: Exception) -> str:
    """Returns kind and message of `error`, shortened: storage layers print their whole state."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _unprepared(config: DataConfig) -> UserError:
    return UserError(f"data.name={config.name!r}: not prepared in {data_directory(config)}. Prepare it there with "
                     "--mode=prepare, or name the directory where it is with --config.data.directory=DIR.")


def _imagenet_classes() -> tuple[str, ...]:
    """Returns the 1,000 WordNet ids in the order of TFDS."""
    package = importlib.util.find_spec("tensorflow_datasets")  # finds the files and spares the slow import
    if package is None or package.origin is None:
        raise UserError("imagenet2012 needs the package tensorflow-datasets, which holds the names of its classes.")
    labels = Path(package.origin).parent / "datasets" / "imagenet2012" / "labels.txt"
    return tuple(labels.read_text().split())


def _sized(config: DataConfig, spec: Spec) -> Spec:
    """Returns `spec` with the configured size of images."""
    height, width, channels = spec.image_shape
    if config.image_size:
        height = width = config.image_size
    if not height or not width:
        raise UserError(f"data.image_size=0: the images of data.name={config.name!r} differ in size; set it, usually "
                        "to 224 with --config.data.crop=random_resized.")
    return Spec((height, width, channels), spec.classes)


def _keys(config: DataConfig, builder: Any) -> tuple[str, str]:
    """Returns the names of the image and of the label: the supervised keys, or the only ones of their kinds."""
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
        raise UserError(f"data.name={config.name!r}: its images are of type {kind}; those of pictures are "
                        "uint8 and uint16.")
    height, width, channels = builder.info.features[image].shape
    names = builder.info.features[label].names or [str(index) for index in
                                                   range(builder.info.features[label].num_classes)]
    if channels == 4:
        channels = 3  # transparency is laid over white
    return _sized(config, Spec((height or 0, width or 0, channels or 3), tuple(names)))


def _split_strings(config: DataConfig, builder: Any, names: Sequence[str]) -> dict[str, str]:
    """Returns the TFDS split of each of our splits."""
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
    except Exception as error:  # TFDS raises several types for what it cannot parse
        raise UserError(f"data.{part}_split={split!r}: no such split of data.name={config.name!r}; it has "
                        f"{_listed(builder)}, and parts of them as 'train[:90%]'.") from error
    if count <= 0:
        raise UserError(f"data.{part}_split={split!r}: holds no examples; {config.name!r} has {_listed(builder)}.")
    return count


def _check_disjoint(builder: Any, splits: dict[str, str]) -> None:
    """Raises `UserError` if an example is in two of the splits."""
    ranges = []
    for part, split in splits.items():
        for piece in builder.info.splits[split].file_instructions:
            end = piece.skip + (piece.examples_in_shard if piece.take < 0 else piece.take)
            ranges.append((piece.filename, piece.skip, end, part, split))
    ranges.sort()
    for (file, _, end, part, split), (other_file, start, _, other_part, other) in itertools.pairwise(ranges):
        if file == other_file and start < end:
            raise UserError(f"data.{part}_split={split!r} and data.{other_part}_split={other!r} have examples in "
                            "common; an image must be in one of them alone.")
