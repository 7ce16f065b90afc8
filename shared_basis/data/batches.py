"""Batches by number: the images in a training or evaluation batch, a pure function of the seed and the number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.examples import Examples, Spec, crop_generator, epoch_order
from shared_basis.data.images import random_resized
from shared_basis.data.in_memory import Region, decode_error, eval_crop, read_images
from shared_basis.errors import UserError

TRIES = 100
"""Number of consecutive broken images after which a stream fails instead of substituting the next one."""


class Batch(NamedTuple):
    """This process's part of a batch, or the error that prevented reading it."""

    images: np.ndarray
    """uint8 [B, H, W, C]."""
    labels: np.ndarray
    """int32 [B]; −1 marks padding and broken images, which do not count."""
    skipped: list[str]
    """Descriptions of the images that were skipped."""
    error: str
    """The error that ends the stream, or empty. A string, as worker processes cannot pass exceptions on."""


class Batches(Protocol):
    """Picklable batches by number."""

    warned: set[str]
    """Warnings so far: one for each skipped image, even if it is read repeatedly."""

    def __len__(self) -> int:
        """Returns the number of batches."""

    def __getitem__(self, number: int) -> Batch:
        """Returns the batch `number`."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of every batch that this process reads: part `index` of `count`."""

    index: int = 0
    count: int = 1

    def of(self, batch_size: int) -> range:
        """Returns the rows of a batch of `batch_size` that this process reads."""
        rows = batch_size // self.count
        return range(self.index * rows, (self.index + 1) * rows)


WHOLE = Shard()
"""The whole of every batch."""


class TrainingBatches:
    """The batches of a training run, by step."""

    def __init__(self, examples: Examples, spec: Spec, config: DataConfig, *, seed: int, batch_size: int, epochs: int,
                 shard: Shard = WHOLE) -> None:
        self._examples, self._spec, self._config, self._seed = examples, spec, config, seed
        self._batch_size, self._rows = batch_size, shard.of(batch_size)
        self._per_epoch = len(examples) // batch_size
        self._epochs = epochs
        self._orders: dict[int, np.ndarray] = {}
        self.warned: set[str] = set()

    def __len__(self) -> int:
        return self._per_epoch * self._epochs

    def __getitem__(self, number: int) -> Batch:
        epoch, step = divmod(int(number), self._per_epoch)
        order = self._order(epoch)
        places = [step * self._batch_size + row for row in self._rows]
        regions = self._regions([int(number) * self._batch_size + row for row in self._rows])
        try:
            images, labels, broken = self._read([int(order[place]) for place in places], regions)
            skipped = [*broken.values()]
            for row in broken:
                images[row], labels[row] = self._substitute(order, places[row], regions[row % len(regions)], skipped)
        except UserError as error:
            return without_images(str(error))
        return Batch(images, labels, skipped, "")

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the order of `epoch`; caches two, as threads read ahead into the next epoch."""
        orders = self._orders  # another thread may replace the attribute
        if epoch not in orders:
            kept = {known: order for known, order in orders.items() if known == epoch - 1}
            self._orders = orders = {**kept, epoch: epoch_order(self._seed, epoch, len(self._examples))}
        return orders[epoch]

    def _regions(self, positions: Sequence[int]) -> list[Region]:
        if self._config.crop == "random_resized":
            return [random_resized(crop_generator(self._seed, position)) for position in positions]
        return [eval_crop(self._config, self._spec.image_shape)]

    def _read(self, indices: Sequence[int], regions: Sequence[Region]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        images, labels, broken = read_images(self._examples, indices, self._spec, self._config, regions)
        if broken and self._config.on_broken == "fail":
            raise decode_error(next(iter(broken.values())))
        return images, labels, broken

    def _substitute(self, order: np.ndarray, place: int, region: Region,
                    skipped: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the next intact image and its label in the epoch's order; deterministic given seed and step."""
        for other in range(place + 1, place + 1 + TRIES):
            images, labels, broken = self._read([int(order[other % len(order)])], [region])
            if not broken:
                return images[0], labels[0]
            skipped.extend(broken.values())
        raise UserError(f"{TRIES} consecutive images cannot be decoded, the last one: {skipped[-1]}.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}


class EvalBatches:
    """The batches of an evaluation: every image once, in order; the last batch is padded with images labelled −1."""

    __test__ = False  # not a pytest class

    def __init__(self, examples: Examples, spec: Spec, config: DataConfig, *, batch_size: int,
                 shard: Shard = WHOLE) -> None:
        self._examples, self._spec, self._config = examples, spec, config
        self._batch_size, self._rows = batch_size, shard.of(batch_size)
        self.warned: set[str] = set()

    def __len__(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        first = int(number) * self._batch_size
        indices = [first + row for row in self._rows if first + row < len(self._examples)]
        images = np.zeros((len(self._rows), *self._spec.image_shape), np.uint8)
        labels = np.full(len(self._rows), -1, np.int32)
        region = eval_crop(self._config, self._spec.image_shape)
        try:
            images[:len(indices)], labels[:len(indices)], broken = read_images(
                self._examples, indices, self._spec, self._config, [region])
            if broken and self._config.on_broken == "fail":
                raise decode_error(next(iter(broken.values())))
        except UserError as error:
            return without_images(str(error))
        return Batch(images, labels, [*broken.values()], "")


def without_images(error: str = "") -> Batch:
    """Returns an empty batch that carries `error`, if any."""
    return Batch(np.zeros(0, np.uint8), np.zeros(0, np.int32), [], error)
