"""ImageNet (ILSVRC 2012): its spec, so that its networks can be counted, imported and inspected."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from shared_basis.config import DataConfig
from shared_basis.data.splits import Spec, Split
from shared_basis.errors import UserError


def describe(config: DataConfig) -> Spec:
    """Returns the spec: `image_size` squared, and the 1,000 WordNet ids in the order of TFDS."""
    package = importlib.util.find_spec("tensorflow_datasets")  # finds the files and spares the slow import
    if package is None or package.origin is None:
        raise UserError("imagenet2012 needs the package tensorflow-datasets, which holds the names of its classes.")
    labels = Path(package.origin).parent / "datasets" / "imagenet2012" / "labels.txt"
    return Spec((config.image_size, config.image_size, 3), tuple(labels.read_text().split()))


def load(config: DataConfig, names: Sequence[str]) -> dict[str, Split]:
    """Raises `UserError`: this version holds its images in memory, where ImageNet does not fit."""
    del names
    raise UserError(f"data.name={config.name!r} does not fit into memory, and reading it as a stream is not there yet; "
                    "train on a directory of images: --config.data.name=folder --config.data.directory=DIR.")
