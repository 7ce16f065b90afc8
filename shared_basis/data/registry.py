"""Named data sets: `describe` returns shapes and classes, `prepare` writes or checks, `open_source` opens for reading.

    digits                                          scikit-learn's 8×8 digits; nothing to download
    folder                                          a directory of image files
    cifar10, cifar100, fashion_mnist, imagenet2012  TensorFlow Datasets (TFDS), without TensorFlow
    tfds:<name>[/<config>]                          any data set that TFDS finds prepared as ArrayRecord

`shared_basis.data.streaming` reads batches with worker processes; `shared_basis.data.feeds` moves images to devices.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from shared_basis.config import DataConfig
from shared_basis.data import digits, folder
from shared_basis.data.examples import SPLITS, Source, Spec, select
from shared_basis.data.tfds import prepare as tfds_prepare
from shared_basis.data.tfds import reader as tfds_reader
from shared_basis.errors import UserError
from shared_basis.runtime.reporter import Reporter

LOCAL = {"digits": digits, "folder": folder}
"""The data sets that do not use TFDS."""


def describe(config: DataConfig) -> Spec:
    """Returns the shape of the images and the names of the classes; reads at most one image.

    Raises:
      UserError: the layout of a folder of images is invalid, or a TFDS data set whose spec is not built in is not
        prepared.
    """
    return LOCAL.get(config.name, tfds_reader).describe(config)


def prepare(config: DataConfig, reporter: Reporter | None = None) -> str:
    """Prepares the data set for training, if needed, and returns a summary.

    Args:
      reporter: shows progress and warnings; None prints to standard error. Downloads show the progress bars of TFDS.

    Raises:
      UserError: source files are missing, damaged or not the published ones, or the data set cannot be written.
    """
    return LOCAL.get(config.name, tfds_prepare).prepare(config, reporter or Reporter(sys.stderr))


def open_source(config: DataConfig, names: Sequence[str] = SPLITS, known: Spec | None = None,
                reporter: Reporter | None = None) -> Source:
    """Opens the splits `names` of a data set, and its validation images, if any, when 'train' is requested.

    A TFDS data set is prepared first if necessary.

    Args:
      known: the spec of the run to evaluate, which the data must match.
      reporter: see `prepare`.

    Raises:
      UserError: the data cannot be found, opened or prepared, does not match `known`, or has fewer images than `config`
        requests.
    """
    for name in names:
        if name not in SPLITS:
            raise ValueError(f"names={names!r}: must be of {', '.join(SPLITS)}.")
    if config.name in LOCAL:
        source = LOCAL[config.name].open_source(config, names, known)
        if source.note and reporter is not None:
            reporter.warn(source.note)
    else:
        if tfds_reader.find_builder(config) is None:
            prepare(config, reporter)
        source = tfds_reader.open_source(config, names)
    for field in ("classes", "image_shape") if known else ():
        if getattr(source.spec, field) != getattr(known, field):
            raise UserError(f"the images of data.name={config.name!r} have other {field.replace('_', ' ')} than those "
                            "that the run was trained on.")
    return dataclasses.replace(source, splits=select(config, source.splits))
