"""Named data sets as arrays in memory: `describe` tells shapes and classes, `load` and `load_split` read images.

    digits                            scikit-learn's 8×8 digits; nothing to download
    folder                            a directory with train/<class>/* and test/<class>/*
    cifar10, cifar100, fashion_mnist  TensorFlow Datasets, without TensorFlow
    imagenet2012                      described only, so far
"""

from __future__ import annotations

from types import ModuleType

from shared_basis.config import DataConfig
from shared_basis.data import digits, folder, imagenet, tfds_sets
from shared_basis.data.splits import SPLITS, Dataset, Spec, Split

__all__ = ["SPLITS", "Dataset", "Spec", "Split", "describe", "load", "load_split"]


def describe(config: DataConfig) -> Spec:
    """Returns the shape of the images and the names of the classes; reads one image at most.

    Raises:
      UserError: a folder of images is not laid out as it must be.
    """
    return _source(config).describe(config)


def load(config: DataConfig) -> Dataset:
    """Loads the training and the test images.

    Raises:
      UserError: the data cannot be found, read or prepared, or fewer images exist than `config` asks for.
    """
    splits = _source(config).load(config, SPLITS)
    return Dataset(spec=describe(config), train=splits["train"], test=splits["test"])


def load_split(config: DataConfig, name: str) -> Split:
    """Loads one split alone, `name` being 'train' or 'test'; its labels are those that `load` gives.

    Raises:
      UserError: as `load`.
    """
    if name not in SPLITS:
        raise ValueError(f"name={name!r}: must be one of {', '.join(SPLITS)}.")
    return _source(config).load(config, (name,))[name]


def _source(config: DataConfig) -> ModuleType:
    """Returns the module that holds `describe` and `load` for `config.name`."""
    return {"digits": digits, "folder": folder, "imagenet2012": imagenet}.get(config.name, tfds_sets)
