"""Decodes encoded examples to batches of pixels, for loading into memory and for streaming; loads whole splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.examples import Examples, Progress, Spec, Split, no_progress
from shared_basis.data.images import TEST_PART, Box, BrokenImage, central, decode, whole
from shared_basis.errors import UserError

BLOCK = 1000
"""Images read per call: faster for TFDS than single reads, without holding two copies of the data set."""

Region = Callable[[int, int], Box]
"""The region of an image to keep, as a function of its height and width."""


def eval_crop(config: DataConfig, shape: tuple[int, int, int]) -> Region:
    """Returns the region to keep without random cropping: the whole image or its centre."""
    return central(kept_part(config), shape[1] / shape[0]) if config.image_size else whole


def kept_part(config: DataConfig) -> float:
    """Returns the fraction of the shorter side to keep without random cropping."""
    return TEST_PART if config.crop == "random_resized" else 1.0


def read_images(examples: Examples, indices: Sequence[int], spec: Spec, config: DataConfig,
                regions: Sequence[Region]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Reads and decodes the examples `indices`.

    Args:
      regions: the region to keep of each image; a single one applies to all.

    Returns:
      Images uint8 [N, H, W, C]; labels int32 [N]; and, by row, the problem with each image that cannot be decoded;
      its pixels are 0 and its label is −1.

    Raises:
      UserError: images differ in size and `config.image_size` is 0, or a label is invalid.
    """
    shape, size = spec.image_shape, spec.image_shape[:2] if config.image_size else None
    images = np.zeros((len(indices), *shape), np.uint8)
    labels = np.full(len(indices), -1, np.int32)
    broken = {}

    def name(row: int) -> str:  # for messages; not every file name is UTF-8
        return examples.name(indices[row]).encode(errors="backslashreplace").decode()

    for row, (encoded, label) in enumerate(examples.read(indices)):
        if not 0 <= label < len(spec.classes):
            raise UserError(f"{name(row)} has the label {label}, but there are {len(spec.classes)} classes; this split "
                            "has no valid labels.")
        try:
            pixels = decode(encoded, shape[2], size, regions[row % len(regions)])
        except BrokenImage as error:
            broken[row] = f"{name(row)} {error}"
            continue
        if pixels.shape != shape:
            raise UserError(f"images differ in size: {name(row)} has {pixels.shape[0]}×{pixels.shape[1]} pixels (height"
                            f"×width) and the first training image has {shape[0]}×{shape[1]}; set "
                            "--config.data.image_size to bring all images to one size.")
        images[row], labels[row] = pixels, label
    return images, labels, broken


def decode_error(problem: str) -> UserError:
    """Returns the error for an image that cannot be decoded."""
    return UserError(f"{problem}. Set --config.data.on_broken=skip (a run that has begun resumes with it), or, for "
                     "a new run, replace or remove it.")


def load_split(examples: Examples, spec: Spec, config: DataConfig, warn: Callable[[str], None],
               progress: Progress = no_progress) -> Split:
    """Decodes a whole split into images uint8 [N, H, W, C] and labels int32 [N].

    With `config.on_broken='skip'`, `warn` is called for each broken image, which gets the label −1.

    Raises:
      UserError: see `read_images`; or an image is broken and `config.on_broken` is 'fail'.
    """
    images = np.empty((len(examples), *spec.image_shape), np.uint8)
    labels = np.empty(len(examples), np.int32)
    regions = [eval_crop(config, spec.image_shape)]
    for start in range(0, len(examples), BLOCK):
        rows = range(start, min(start + BLOCK, len(examples)))
        images[start:rows.stop], labels[start:rows.stop], broken = read_images(examples, rows, spec, config, regions)
        for problem in broken.values():
            if config.on_broken == "fail":
                raise decode_error(problem)
            warn(f"skipped: {problem}")
        progress(rows.stop, len(examples))
    return Split(images, labels)


def resident_bytes(splits: Mapping[str, Examples], spec: Spec) -> int:
    """Returns the bytes that all images of `splits` take as decoded pixels."""
    return sum(len(part) for part in splits.values()) * int(np.prod(spec.image_shape))
