"""Named data sets: `describe` tells shapes and classes, `open_source` gives encoded images, `load` pixels in memory.

    digits                                          scikit-learn's 8×8 digits; nothing to download
    folder                                          a directory of image files
    cifar10, cifar100, fashion_mnist, imagenet2012  TensorFlow Datasets (TFDS), without TensorFlow
    tfds:<name>[/<config>]                          anything that TFDS finds prepared as ArrayRecord

`shared_basis.data.streaming` reads batches with worker processes; `shared_basis.data.feeds` brings images to the devices.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from shared_basis.config import DataConfig
from shared_basis.data import digits, folder, in_memory
from shared_basis.data.examples import (
    SPLITS,
    Dataset,
    Progress,
    Source,
    Spec,
    Split,
    epoch_order,
    no_progress,
    select,
)
from shared_basis.data.tfds import reader
from shared_basis.errors import UserError

__all__ = [
    "SPLITS",
    "Dataset",
    "Progress",
    "Source",
    "Spec",
    "Split",
    "describe",
    "epoch_order",
    "load",
    "load_split",
    "no_progress",
    "open_source",
    "prepare",
]


def describe(config: DataConfig) -> Spec:
    """Returns the shape of the images and the names of the classes; reads one image at most.

    Raises:
      UserError: a folder of images is not laid out as it must be, or a data set that only its metadata describes is not
        prepared.
    """
    return _room(config).describe(config)


def prepare(config: DataConfig, progress: Progress = no_progress) -> str:
    """Makes the data set ready for training, if that takes more than opening it, and returns what is there.

    Args:
      progress: is told of images that are checked, or written; downloads show the bars of TFDS.

    Raises:
      UserError: source files are missing, damaged or not the published ones, or it cannot be written.
    """
    return _room(config).prepare(config, progress)


def open_source(config: DataConfig, names: Sequence[str] = SPLITS, known: Spec | None = None,
                progress: Progress = no_progress) -> Source:
    """Opens the splits `names` of a data set, and the validation images if 'train' is among them and there are any.

    Args:
      known: the spec of the run that is evaluated, which the data must fit.
      progress: as in `prepare`, where the data set has to be prepared first.

    Raises:
      UserError: the data cannot be found, opened or prepared, is not that of `known`, or has fewer images than
        `config` asks for.
    """
    for name in names:
        if name not in SPLITS:
            raise ValueError(f"names={names!r}: must be of {', '.join(SPLITS)}.")
    source = _room(config).open_source(config, names, known, progress)
    for field in ("classes", "image_shape") if known else ():
        if getattr(source.spec, field) != getattr(known, field):
            raise UserError(f"the images of data.name={config.name!r} have other {field.replace('_', ' ')} than those "
                            "that the run was trained on.")
    return Source(source.spec, select(config, source.splits))


def load(config: DataConfig) -> Dataset:
    """Loads all images into memory, broken ones apart where they may be skipped.

    Raises:
      UserError: as `open_source`, an image is broken and may not be skipped, or images differ in size.
    """
    source = open_source(config)
    splits = {name: in_memory.load_split(part, source.spec, config, _warn).good() for name, part in source.splits.items()}
    return Dataset(source.spec, **splits)


def load_split(config: DataConfig, name: str) -> Split:
    """Loads one split alone, `name` being 'train' or 'test'; its labels are those that `load` gives.

    Raises:
      UserError: as `load`.
    """
    source = open_source(config, (name,))
    return in_memory.load_split(source.splits[name], source.spec, config, _warn).good()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _room(config: DataConfig) -> ModuleType:
    """Returns the module that holds `describe` and `open_source` for `config.name`."""
    return {"digits": digits, "folder": folder}.get(config.name, reader)
