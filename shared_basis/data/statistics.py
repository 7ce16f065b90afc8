"""Per-channel mean and standard deviation of the training images, for normalisation if `config` gives none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.examples import Examples, Progress, Spec, no_progress
from shared_basis.data.in_memory import decode_error, eval_crop, read_images
from shared_basis.errors import UserError

MEASURED = 1000
"""Maximum number of images to measure; a fixed random subset is used if there are more."""

AT_ONCE = 100
"""Number of images to decode per accumulation."""

LEAST_DEVIATION = 1 / 255
"""Lower bound of the standard deviation, to avoid division by 0 for a constant channel."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, for images in [0, 1]."""


def measure(examples: Examples, spec: Spec, config: DataConfig, warn: Callable[[str], None],
            progress: Progress = no_progress) -> Statistics:
    """Returns the `Statistics` over all pixels of `examples`, cropped as for evaluation, rounded to four digits.

    A pure function of the images, so all processes and all runs on them get the same values.

    Args:
      warn: called with a line about each image that is skipped.

    Raises:
      UserError: an image cannot be decoded and `config.on_broken` is 'fail', or no image can be decoded.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(examples))[:MEASURED])
    count, total, squares = 0, np.zeros(spec.image_shape[2]), np.zeros(spec.image_shape[2])
    for start in range(0, len(chosen), AT_ONCE):
        rows = [int(index) for index in chosen[start:start + AT_ONCE]]
        images, labels, broken = read_images(examples, rows, spec, config, [eval_crop(config, spec.image_shape)])
        for problem in broken.values():
            if config.on_broken == "fail":
                raise decode_error(problem)
            warn(f"skipped: {problem}")
        pixels = images[labels >= 0].reshape(-1, spec.image_shape[2]).astype(np.float64) / 255
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels ** 2).sum(0)
        progress(start + len(rows), len(chosen))
    if not count:
        raise UserError(f"data.directory={config.directory!r}: none of the training images can be decoded.")
    mean = total / count
    deviation = np.maximum(np.sqrt(np.maximum(squares / count - mean ** 2, 0)), LEAST_DEVIATION)
    return tuple(round(float(value), 4) for value in mean), tuple(round(float(value), 4) for value in deviation)
