"""What a data set is made of, and how subsets of it are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.errors import UserError

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set without loading its images: `image_shape` (H, W, C) and the `classes` by label."""

    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """`images`, uint8 [N, H, W, C] in C order, and their `labels`, int32 [N], which index `Spec.classes`."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A whole data set in memory."""

    spec: Spec
    train: Split
    test: Split


def choose(config: DataConfig, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Chooses the images that `config.train_examples` and `config.test_examples` ask for.

    A subset is the beginning of one fixed permutation (NumPy's generator with seed 0, whatever the run's seed), sorted
    back into the original order. So a smaller subset of a split lies within a larger one.

    Args:
      config: names how many images of each split are wanted; 0 is all.
      counts: the number of images that exist, by split.

    Returns:
      By split, the rising indices int64 [n] of the chosen images.

    Raises:
      UserError: more images are wanted than exist.
    """
    indices = {}
    for name, count in counts.items():
        wanted = getattr(config, f"{name}_examples")
        if wanted > count:
            raise UserError(f"data.{name}_examples={wanted}: only {count} {name} images exist in "
                            f"data.name={config.name!r}; give at most {count}, or 0 for all of them.")
        indices[name] = np.sort(np.random.default_rng(0).permutation(count)[:wanted]) if wanted else np.arange(count)
    return indices
