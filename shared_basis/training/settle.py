"""Settles what a configuration leaves open before a run begins: the normalisation and the batch size."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import Config, replace
from shared_basis.data.statistics import measure
from shared_basis.errors import UserError
from shared_basis.runs.continuation import settled_from
from shared_basis.runtime.reporter import Reporter, count

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, each by channel or one for all."""

LARGEST_BATCH = 128
"""Maximum batch size to choose automatically."""
SMALLEST_BATCH = 8
"""Minimum batch size to choose, if there are enough images, since batch normalisation needs several."""
STEPS_AN_EPOCH = 8
"""Minimum number of steps per epoch, unless the batch size would fall below `SMALLEST_BATCH`."""


def settle(config: Config, source: data.Source, mesh: Mesh, reporter: Reporter, *, saved: Config | None = None,
           weights: Normalization | None = None) -> Config:
    """Returns `config` with mean, standard deviation and batch size filled in if left open; logs the chosen values.

    Args:
      source: the images of the run.
      saved: the configuration of the run to resume, whose settled values are kept.
      weights: mean and standard deviation with which the initial weights were trained, which are reused. None measures
        the training images.

    Raises:
      UserError: there are no training images, or too few for a batch, or an image cannot be decoded.
    """
    if saved is not None:
        config = replace(config, settled_from(config, saved))
    images = len(source.splits["train"])
    if not images:
        raise UserError(f"data.test={config.data.test:g} leaves no training images; set it below 1.")
    if not config.data.is_measured:
        if weights is not None:
            (mean, std), why = weights, "as for the initial weights"
        else:
            mean, std = measure(source.splits["train"], source.spec, config.data, reporter.warn,
                                reporter.progress("measuring mean and deviation of training images"))
            why = "measured on the training images"
        config = replace(config, {"data.mean": mean, "data.std": std})
        reporter.info(f"images are normalised with mean {_numbers(mean)} and standard deviation {_numbers(std)}, {why}")
    divisor = config.optimizer.grad_accumulation_steps * math.lcm(mesh.size, config.model.norm_images or 1)
    if not config.train.batch_size:
        config = replace(config, {"train.batch_size": fitting_batch(images, divisor)})
        reporter.info(f"batch size {config.train.batch_size}, chosen for {count(images)} training images")
    if images < config.train.batch_size:
        raise UserError(f"train.batch_size={config.train.batch_size}: there are only {images} training images; set "
                        f"--config.train.batch_size=0 for a suitable batch size, here {fitting_batch(images, divisor)}"
                        ".")
    return config


def fitting_batch(images: int, divisor: int) -> int:
    """Returns a batch size for the given number of images: a power of two, or the next multiple of `divisor`.

    Raises:
      UserError: there are fewer images than `divisor`, of which a batch size must be a multiple.
    """
    if images < divisor:
        raise UserError(f"train.batch_size: there are only {images} training images, and a batch must be a multiple of "
                        f"{divisor}, by the number of devices, optimizer.grad_accumulation_steps and "
                        "model.norm_images.")
    wanted = min(max(images // STEPS_AN_EPOCH, SMALLEST_BATCH), LARGEST_BATCH)
    power = 1 << (wanted.bit_length() - 1)
    return min(-(-power // divisor) * divisor, images // divisor * divisor)


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
