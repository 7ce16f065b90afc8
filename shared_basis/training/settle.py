"""What a configuration leaves open is settled before a run begins: normalisation and batch, by the images."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import Config, replace
from shared_basis.data.statistics import measure
from shared_basis.errors import UserError
from shared_basis.runs.continuation import settled_from
from shared_basis.runtime.reporter import Reporter

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation, by channel or one for all."""

LARGEST_BATCH = 128
"""That is chosen; larger ones are for who asks for them."""
SMALLEST_BATCH = 8
"""That is chosen where there are so many images: batch normalisation needs some."""
STEPS_AN_EPOCH = 8
"""At least, with the batch that is chosen, unless that would be below `SMALLEST_BATCH`."""


def settle(config: Config, source: data.Source, mesh: Mesh, reporter: Reporter, *, saved: Config | None = None,
           weights: Normalization | None = None) -> Config:
    """Returns `config` with mean, deviation and batch where it leaves them open, and says in a line which they are.

    Args:
      source: the images of the run.
      saved: the configuration of the run that goes on; what it has settled stays.
      weights: mean and deviation of the images that the weights which the run starts from were trained on, which are
        kept. None measures those of the training images.

    Raises:
      UserError: there are too few images for a batch, or images cannot be decoded.
    """
    if saved is not None:
        config = replace(config, settled_from(config, saved))
    if not config.data.is_measured:
        if weights is not None:
            (mean, std), why = weights, "of the weights that it starts from"
        else:
            mean, std = measure(source.splits["train"], source.spec, config.data, reporter.warn,
                                reporter.progress("measuring mean and deviation of training images"))
            why = "of the training images"
        config = replace(config, {"data.mean": mean, "data.std": std})
        reporter.info(f"images are normalised by mean {_numbers(mean)} and deviation {_numbers(std)}, {why}")
    images = len(source.splits["train"])
    divisor = config.optimizer.grad_accumulation_steps * math.lcm(mesh.size, config.model.norm_images or 1)
    if not config.train.batch_size:
        config = replace(config, {"train.batch_size": fitting_batch(images, divisor)})
        reporter.info(f"a batch has {config.train.batch_size} images, by the size of the data set")
    if images < config.train.batch_size:
        raise UserError(f"train.batch_size={config.train.batch_size}: there are only {images} training images; set "
                        f"--config.train.batch_size=0 for a batch that fits them, here {fitting_batch(images, divisor)}"
                        ".")
    return config


def fitting_batch(images: int, divisor: int) -> int:
    """Returns a batch for so many training images: a power of two, or the next multiple of `divisor`.

    Raises:
      UserError: there are fewer images than `divisor`, of which a batch must be a multiple.
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
