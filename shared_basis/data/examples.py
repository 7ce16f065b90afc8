"""What the data sets have in common: their spec, their splits, and which images belong to a run."""

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
"""An image as it is stored: the bytes of a file, the path of one, or pixels uint8 [H, W, C]."""

Progress = Callable[[int, int], None]
"""A function of how many are done, and of how many."""


def no_progress(done: int, total: int) -> None:
    """Is a `Progress` that shows nothing."""


def warn_on_stderr(text: str) -> None:
    """Prints a warning, where no reporter is given that would log it too."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set without loading its images: `image_shape` (H, W, C) and the `classes` by label."""

    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]


class Examples(Protocol):
    """The encoded images and labels of one split, by index. Can be pickled, so that worker processes can read too."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def take(self, indices: np.ndarray) -> Examples:
        """Returns the examples `indices` alone."""

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        """Returns images, still encoded, and labels."""

    def name(self, index: int) -> str:
        """Returns the path or number by which the image can be found."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that is open for reading; `splits` holds 'train' and 'test', and may hold 'validation'."""

    spec: Spec
    splits: Mapping[str, Examples]
    note: str = ""
    """What a reader should know of it, in a line."""


@dataclasses.dataclass(frozen=True)
class ArrayExamples:
    """Examples that lie in memory: `images`, uint8 [N, H, W, C], and `labels`, int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> ArrayExamples:
        """Returns the examples `indices` alone."""
        return ArrayExamples(self.images[indices], self.labels[indices])

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        """Returns images and labels."""
        return [(self.images[index], int(self.labels[index])) for index in indices]

    def name(self, index: int) -> str:
        """Returns the number of the image."""
        return f"image {index}"


@dataclasses.dataclass(frozen=True)
class Split:
    """`images`, uint8 [N, H, W, C] in C order, and their `labels`, int32 [N], which index `Spec.classes`.

    A label of −1 marks an image that is broken and does not count.
    """

    images: np.ndarray
    labels: np.ndarray


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order int32 `[examples]` in which `epoch` visits the training images.

    A pure function of its arguments, and of NumPy alone: worker processes compute it too.
    """
    return np.random.default_rng((seed, 0, epoch)).permutation(examples).astype(np.int32)


def crop_generator(seed: int, position: int) -> np.random.Generator:
    """Returns the generator of the random crop at `position`, the number of images trained on before this one."""
    return np.random.default_rng((seed, 1, position))


def select(config: DataConfig, splits: Mapping[str, Examples]) -> dict[str, Examples]:
    """Returns the parts of `splits` that a run uses: holds out validation images, then chooses the subsets asked for.

    The validation images are a random `config.validation` of train, drawn with `config.split_seed`, whatever the run's
    seed, so that runs of several seeds are chosen on the same images. A subset is the beginning of one fixed
    permutation (NumPy's generator with seed 0), sorted back into the original order: a smaller subset lies within a
    larger one.

    Raises:
      UserError: more images are wanted than exist, the data set has validation images of its own and
        `config.validation` asks for others, or one part would be empty.
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
    """Returns train without its validation images, and these."""
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
