"""What all data sets share: spec, splits, and the selection of the images for a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.errors import UserError

SPLITS = ("train", "test")
"""The splits that every data set has. Some runs have a third, 'validation'."""

Encoded = bytes | str | np.ndarray
"""A stored image: the bytes of a file, the path of a file, or pixels uint8 [H, W, C]."""

Progress = Callable[[int, int], None]
"""A callback with the number of items done and the total."""


def no_progress(done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def warn_on_stderr(text: str) -> None:
    """Prints a warning to standard error; the default where no reporter is passed."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Metadata of a data set, known without loading its images: `image_shape` (H, W, C) and the `classes` by label."""

    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]


class Examples(Protocol):
    """The encoded images and labels of a split, by index; picklable, so that worker processes can read it."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def take(self, indices: np.ndarray) -> Examples:
        """Returns the subset with the given `indices`."""

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        """Returns pairs of an encoded image and its label."""

    def name(self, index: int) -> str:
        """Returns the path or number that identifies the image."""


@dataclasses.dataclass(frozen=True)
class Source:
    """An open data set; `splits` contains 'train' and 'test', and optionally 'validation'."""

    spec: Spec
    splits: Mapping[str, Examples]
    note: str = ""
    """A remark for the user on one line, or empty."""
    single_tree: bool = False
    """Whether the test images are drawn from the single tree of a folder, so that they depend on all of its files."""


@dataclasses.dataclass(frozen=True)
class ArrayExamples:
    """Examples in memory: `images`, uint8 [N, H, W, C], and `labels`, int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> ArrayExamples:
        """Returns the subset with the given `indices`."""
        return ArrayExamples(self.images[indices], self.labels[indices])

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        """Returns pairs of an image and its label."""
        return [(self.images[index], int(self.labels[index])) for index in indices]

    def name(self, index: int) -> str:
        """Returns the index of the image as a string."""
        return f"image {index}"


@dataclasses.dataclass(frozen=True)
class Split:
    """`images`, uint8 [N, H, W, C] in C order, and their `labels`, int32 [N], which index `Spec.classes`.

    A label of −1 marks a broken image, which does not count.
    """

    images: np.ndarray
    labels: np.ndarray


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order, int32 `[examples]`, in which `epoch` visits the training images.

    A pure function of its arguments that only uses NumPy, since worker processes compute it too.
    """
    return np.random.default_rng((seed, 0, epoch)).permutation(examples).astype(np.int32)


def crop_generator(seed: int, position: int) -> np.random.Generator:
    """Returns the random generator for the crop at `position`, the number of images trained on before this one."""
    return np.random.default_rng((seed, 1, position))


def select(config: DataConfig, splits: Mapping[str, Examples]) -> dict[str, Examples]:
    """Returns the examples of each split that a run uses: holds out validation images, then selects the subsets.

    The validation images are a random fraction `config.validation` of train, drawn with `config.split_seed`, which is
    independent of the run's seed: runs with different seeds use the same validation images. A subset is a prefix of one
    fixed permutation (NumPy's generator with seed 0), sorted back into the original order, so a smaller subset is
    contained in a larger one.

    Raises:
      UserError: more images are requested than exist, `config.validation` is set although the data set has its own
        validation images, or a part would be empty.
    """
    parts = dict(splits)
    if config.validation > 0 and "train" in parts:
        parts |= _hold_out(config, parts)
    for name in parts.keys() & set(SPLITS):
        wanted, count = getattr(config, f"{name}_examples"), len(parts[name])
        if wanted > count:
            raise UserError(f"data.{name}_examples={wanted}: only {count} {name} images exist in "
                            f"data.name={config.name!r}; give at most {count}, or 0 for all of them.")
        if wanted:
            parts[name] = parts[name].take(np.sort(np.random.default_rng(0).permutation(count)[:wanted]))
    return parts


def _hold_out(config: DataConfig, splits: Mapping[str, Examples]) -> dict[str, Examples]:
    """Returns train without the held-out images, and these as validation."""
    if "validation" in splits:
        raise UserError(f"data.validation={config.validation}: the data set has validation images of its own; leave "
                        "data.validation at 0 to use them.")
    count = len(splits["train"])
    held = round(count * config.validation)
    if not 0 < held < count:
        raise UserError(f"data.validation={config.validation}: that is {held} of {count} training images; at least one "
                        "must be held out and one left.")
    order = np.random.default_rng(config.split_seed).permutation(count)
    return {"train": splits["train"].take(np.sort(order[held:])),
            "validation": splits["train"].take(np.sort(order[:held]))}
