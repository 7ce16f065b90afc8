"""The embedded data set: 1,797 real handwritten digits, 8×8 pixels, which scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.splits import Spec, Split, choose

TEST_EVERY = 5
"""Of every class, each fifth image is a test image; the rest are for training."""


def describe(config: DataConfig) -> Spec:
    """Returns the spec, which is fixed."""
    del config
    return Spec(image_shape=(8, 8, 1), classes=tuple("0123456789"))


def load(config: DataConfig, names: Sequence[str]) -> dict[str, Split]:
    """Loads the splits `names`; the original grey values 0..16 become 0..255, rounded.

    Raises:
      UserError: more images are wanted than exist.
    """
    from sklearn.datasets import load_digits  # importing scikit-learn takes a second that other data sets don't need

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    members = _split(labels)
    chosen = choose(config, {name: len(members[name]) for name in names})
    rows = {name: members[name][indices] for name, indices in chosen.items()}
    return {name: Split(images[index], labels[index]) for name, index in rows.items()}


def _split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the indices of the train and the test images: the 5th, 10th, ... image of a class is a test image."""
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[TEST_EVERY - 1::TEST_EVERY]] = True
    return {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
