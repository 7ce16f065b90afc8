"""The embedded data set: 1,797 handwritten digits of 8×8 pixels from scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.examples import ArrayExamples, Source, Spec
from shared_basis.runtime.reporter import Reporter

TEST_EVERY = 5
"""Every fifth image of a class is a test image; the others are training images."""

CLASSES = tuple("0123456789")


def describe(config: DataConfig) -> Spec:
    """Returns the spec; only the image size is configurable."""
    return Spec((config.image_size or 8, config.image_size or 8, 1), CLASSES)


def open_source(config: DataConfig, names: Sequence[str], known: Spec | None = None) -> Source:
    """Opens the splits `names`; grey values 0..16 are rescaled to 0..255 and rounded."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    del known
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    whole = ArrayExamples(images, digits.target.astype(np.int32))
    members = _split(whole.labels)
    return Source(describe(config), {name: whole.take(members[name]) for name in names})


def prepare(config: DataConfig, reporter: Reporter) -> str:
    """Returns a message that no preparation is needed."""
    del config, reporter
    return "the digits come with scikit-learn: nothing to prepare"


def _split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the indices of the train and the test images: the 5th, 10th, ... image of each class is a test image."""
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[TEST_EVERY - 1::TEST_EVERY]] = True
    return {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
