"""The embedded data set: 1,797 real handwritten digits, 8×8 pixels, which scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.examples import ArrayExamples, Source, Spec
from shared_basis.runtime.reporter import Reporter

TEST_EVERY = 5
"""Of every class, each fifth image is a test image; the rest are for training."""

CLASSES = tuple("0123456789")


def describe(config: DataConfig) -> Spec:
    """Returns the spec; only the size of the images can be chosen."""
    return Spec((config.image_size or 8, config.image_size or 8, 1), CLASSES)


def open_source(config: DataConfig, names: Sequence[str], known: Spec | None = None) -> Source:
    """Opens the splits `names`; the original grey values 0..16 become 0..255, rounded."""
    from sklearn.datasets import load_digits  # importing scikit-learn takes a second that other data sets don't need

    del known
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    whole = ArrayExamples(images, digits.target.astype(np.int32))
    members = _split(whole.labels)
    return Source(describe(config), {name: whole.take(members[name]) for name in names})


def prepare(config: DataConfig, reporter: Reporter) -> str:
    """Returns that there is nothing to do."""
    del config, reporter
    return "the digits come with scikit-learn: nothing to prepare"


def _split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the indices of the train and the test images: the 5th, 10th, ... image of a class is a test image."""
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[TEST_EVERY - 1::TEST_EVERY]] = True
    return {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
