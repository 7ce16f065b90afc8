"""Input pipelines: images decoded and resident on the devices, or streamed in batches; and the choice between them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from shared_basis.config import Config, DataConfig
from shared_basis.data import in_memory, streaming
from shared_basis.data.batches import Batch, EvalBatches, Shard, TrainingBatches
from shared_basis.data.examples import Examples, Source, Spec, Split, epoch_order, warn_on_stderr
from shared_basis.errors import UserError
from shared_basis.nn.types import Array
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import batch_sharding, make_global_array, process_allgather, replicated
from shared_basis.runtime.reporter import Reporter, count, size_text

Inputs = tuple[jax.Array, ...]

DEVICE_SHARE = 4
"""Resident images may take 1/4 of a device's memory; the rest is for activations."""

HOST_SHARE = 2
"""While being loaded, resident images may take 1/2 of the host's available memory."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """The inputs of the compiled step besides the state."""

    batches: Callable[[int], Generator[Inputs, None, None]]
    """Yields the inputs of each step, starting with the given step."""
    abstract: tuple[Any, ...]
    """Shapes, dtypes and shardings of the inputs."""
    select: Callable[..., tuple[jax.Array, jax.Array]]
    """Maps step number and inputs, inside the compiled step, to images uint8 [B, H, W, C] and labels int32 [B]."""


@dataclasses.dataclass(frozen=True)
class Images:
    """The splits of a run: `Split`s in memory, or `Examples` to stream."""

    spec: Spec
    splits: Mapping[str, Split | Examples]
    config: DataConfig
    warn: Callable[[str], None] = warn_on_stderr
    """Called with a line about each streamed image that is skipped."""

    def count(self, name: str) -> int:
        """Returns the number of images in the split `name`, including broken ones that are skipped."""
        part = self.splits[name]
        return len(part.labels) if isinstance(part, Split) else len(part)

    def broken(self, name: str) -> int:
        """Returns the number of images in the split `name` known to be broken; 0 for streamed images."""
        part = self.splits[name]
        return int((part.labels < 0).sum()) if isinstance(part, Split) else 0

    @property
    def are_streamed(self) -> bool:
        """Whether images are decoded during training rather than before."""
        return any(not isinstance(part, Split) for part in self.splits.values())

    def describe(self) -> str:
        """Returns a human-readable description: the number of images per split and their shape."""
        *parts, last = (f"{count(self.count(name) - self.broken(name))} {'training' if name == 'train' else name}"
                        for name in self.splits)
        broken = sum(map(self.broken, self.splits))
        without = f", without {count(broken)} that cannot be decoded" if broken else ""
        if self.are_streamed and self.config.on_broken == "skip":
            without = ", excluding those that cannot be decoded"
        return f"{', '.join(parts)} and {last} images of {'×'.join(map(str, self.spec.image_shape))}{without}"

    def bytes_on_device(self, feed: Feed, mesh: Mesh) -> int:
        """Returns the bytes per device for images: resident ones of all splits, or two batches of a stream."""
        if self.are_streamed:
            return 2 * memory.bytes_on_device(feed.abstract)
        scored = sum(part.images.nbytes + part.labels.nbytes for name, part in self.splits.items()
                     if name != "train" and isinstance(part, Split))
        return memory.bytes_on_device(feed.abstract) + scored // mesh.size

    def feed(self, config: Config, mesh: Mesh) -> Feed:
        """Returns the training images as batches of `config.train.batch_size`."""
        part = self.splits["train"]
        return _resident_feed(part, config, mesh) if isinstance(part, Split) else _streamed_feed(
            part, self.spec, config, mesh, self.warn)

    def batches(self, name: str, batch_size: int, mesh: Mesh) -> Callable[[], Iterable[Inputs]]:
        """Returns a function that yields the images and labels of a split in batches for an evaluation.

        Batches have about `batch_size` images, sharded over the devices; the last one is padded with images that do not
        count, whose label is −1.
        """
        part = self.splits[name]
        size = scored_at_once(batch_size, self.count(name), mesh.size)
        if not isinstance(part, Split):
            batches = EvalBatches(part, self.spec, self.config, batch_size=size, shard=_shard())
            workers = streaming.workers_of(self.config)
            return lambda: (_place(batch, mesh) for batch in streaming.read(batches, workers, self.warn))
        placed = [(make_global_array(_filled(part.images[first:first + size], size, 0), batch_sharding(mesh)),
                   make_global_array(_filled(part.labels[first:first + size], size, -1), batch_sharding(mesh)))
                  for first in range(0, len(part.labels), size)]
        return lambda: placed


def scored_at_once(batch_size: int, count: int, devices: int) -> int:
    """Returns the batch size of an evaluation: `batch_size`, at most `count`, rounded up to a multiple of `devices`."""
    return -(-min(batch_size, count) // devices) * devices


def load(source: Source, config: DataConfig, mesh: Mesh, reporter: Reporter) -> Images:
    """Decides whether images are resident or streamed, logs the decision, and decodes them if resident.

    Raises:
      UserError: resident images do not fit into memory, or cannot be decoded.
    """
    streamed, line = choose(source, config, mesh, memory.available_memory())
    (reporter.debug if not streamed and config.placement == "auto" else reporter.info)(line)  # news only if unusual
    if streamed:
        return Images(source.spec, source.splits, config, reporter.warn)
    loaded = {name: in_memory.load_split(part, source.spec, config, reporter.warn,
                                         reporter.progress(f"decoding {name} images"))
              for name, part in source.splits.items()}
    for name, part in loaded.items():
        if not (part.labels >= 0).any():
            raise UserError(f"data.name={config.name!r}: none of the {name} images can be decoded.")
    return Images(source.spec, loaded, config, reporter.warn)


def choose(source: Source, config: DataConfig, mesh: Mesh, host: int | None) -> tuple[bool, str]:
    """Returns whether to stream the images, and the reason on one line; the same in all processes.

    Args:
      host: the bytes of memory available on this machine; None if unknown.

    Raises:
      UserError: `config` asks for resident images that do not fit into memory.
    """
    needed = in_memory.resident_bytes(source.splits, source.spec)
    device = mesh.local_mesh.devices.flat[0]
    on_host = device.platform == "cpu"
    copies = 1 + (mesh.local_mesh.size if on_host else 0)  # the decoded array, and one per CPU device
    limit = None if on_host else (device.memory_stats() or {}).get("bytes_limit")
    fits = (host is None or needed * copies <= host) and (limit is None or needed <= limit)
    fits_well = (host is None or needed * copies * HOST_SHARE <= host) and (
        limit is None or needed * DEVICE_SHARE <= limit)
    known = (("{} of memory are free", host), ("the device has {}", limit))
    found = ", ".join(text.format(size_text(value)) for text, value in known if value is not None)
    times = f" ({size_text(needed * copies)} with one copy per device)" if copies > 1 else ""
    size = f"decoded, the images take {size_text(needed)}{times}; {found or 'the memory is not known'}"
    if config.placement == "device" and not fits:
        raise UserError(f"data.placement='device': {size}. Set --config.data.placement=stream, a smaller "
                        "--config.data.image_size, or fewer --config.data.train_examples and "
                        "--config.data.test_examples.")
    if config.crop == "random_resized":
        streamed, why = True, "random crops are cut out of the original images"
    elif config.placement != "auto":
        streamed, why = config.placement == "stream", f"as configured; {size}"
    else:
        streamed, why = not process_allgather(fits_well).all(), size
    if not streamed:
        return False, f"images are resident on the device ({why})"
    workers = streaming.workers_of(config)
    readers = f"{workers} process{'es' * (workers > 1)}" if workers else f"{streaming.cores()} threads"
    return True, f"images are streamed by {readers}, decoded by Pillow ({why})"


def _resident_feed(split: Split, config: Config, mesh: Mesh) -> Feed:
    everywhere, size = replicated(mesh), config.train.batch_size
    examples, broken = len(split.labels), split.labels < 0
    pixels, labels = make_global_array(split.images, everywhere), make_global_array(split.labels, everywhere)

    def batches(start: int) -> Generator[Inputs, None, None]:
        order = None
        for step in itertools.count(start):
            epoch, rest = divmod(step, examples // size)
            if order is None or not rest:
                order = make_global_array(without(broken, epoch_order(config.seed, epoch, examples)), everywhere)
            yield pixels, labels, order

    def select(step: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return select_batch(step, *inputs, batch_size=size, batch_sharding=batch_sharding(mesh))

    order = jax.ShapeDtypeStruct((examples,), np.int32, sharding=everywhere)
    return Feed(batches, (pixels, labels, order), select)


def select_batch(step: Array, images: Array, labels: Array, order: Array, *, batch_size: int,
                 batch_sharding: NamedSharding) -> tuple[Array, Array]:
    """Selects the batch of `step` from images on the devices.

    Args:
      step: number of updates made before this one.
      images: all training images, uint8 `[N, H, W, C]`.
      labels: their classes, int32 `[N]`.
      order: `shared_basis.data.epoch_order` of the epoch that contains `step`, `[N]`.
      batch_sharding: the sharding of a batch.

    Returns:
      Images uint8 `[B, H, W, C]` and labels int32 `[B]`. The incomplete last batch of an epoch is not used.
    """
    first = step % (order.shape[0] // batch_size) * batch_size
    chosen = jax.lax.with_sharding_constraint(jax.lax.dynamic_slice(order, (first,), (batch_size,)), batch_sharding)
    return images[chosen], labels[chosen]


def _streamed_feed(examples: Examples, spec: Spec, config: Config, mesh: Mesh, warn: Callable[[str], None]) -> Feed:
    size = config.train.batch_size
    numbered = TrainingBatches(examples, spec, config.data, seed=config.seed, batch_size=size,
                                epochs=config.train.epochs, shard=_shard())
    workers = streaming.workers_of(config.data)

    def batches(start: int) -> Generator[Inputs, None, None]:
        for batch in streaming.read(numbered, workers, warn, start):
            yield _place(batch, mesh)

    abstract = tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for shape, dtype in (
        ((size, *spec.image_shape), np.uint8), ((size,), np.int32)))
    return Feed(batches, abstract, lambda step, pixels, labels: (pixels, labels))


def without(broken: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns `order` with each `broken` image replaced by the next intact one, as in `TrainingBatches`."""
    substituted = order.copy()
    for at in np.flatnonzero(broken[order]):
        following = np.roll(order, -at)
        substituted[at] = following[np.argmin(broken[following])]
    return substituted


def _shard() -> Shard:
    return Shard(jax.process_index(), jax.process_count())


def _place(batch: Batch, mesh: Mesh) -> Inputs:
    """Returns images and labels as global arrays, to which this process contributes its part."""
    return cast(Inputs, tuple(jax.make_array_from_process_local_data(batch_sharding(mesh), part)
                              for part in (batch.images, batch.labels)))


def _filled(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    """Returns `array`, [N, ...], padded with `fill` to [size, ...]."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=fill)
