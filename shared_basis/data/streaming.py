"""Batches read and decoded as they are needed, by Grain: for images that do not fit into memory, or are cut at random.

The batch of a step is a pure function of the seed and the step: neither the number of workers nor where a run was
interrupted shows in it. Without random crops it is the batch that `shared_basis.training.steps.select_batch` takes from images
in memory, pixel by pixel.

Memory: each worker holds the batch it makes and up to `AHEAD` finished ones, and this process one more for each, so
about (2 + AHEAD) · workers · batch bytes in all, whatever the size of the data set (a batch of 256 images of
224×224×3 has 37 MiB), beside the list of files or the index of the records, which every worker has.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from multiprocessing import resource_tracker, shared_memory
from typing import Any, NamedTuple, Protocol

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.examples import Examples, Spec, crop_generator, epoch_order
from shared_basis.data.images import random_resized
from shared_basis.data.in_memory import Region, decode_error, eval_crop, read_images
from shared_basis.errors import UserError

AHEAD = 1
"""Finished batches that each worker keeps ready."""

ENOUGH_THREADS_UP_TO = 4
"""Cores: decoding and scaling leave Python's lock, so that on two cores threads read as fast as processes do, without
their memory and their start (benchmarks/README.md); where that ends has not been measured."""

MOST_WORKERS = 16
"""Without being asked for more."""

UNLINKING_SECONDS = 0.1
"""How long Grain is given to free shared memory, which it does in a thread of its own."""

SEGMENTS_IN_USE = 200
"""Segments of shared memory, two for each batch, after which one that still exists was forgotten."""

STOPPING = (signal.SIGINT, signal.SIGTERM)

TRIES = 100
"""Images in a row that may be broken before a stream gives up looking for one that is not."""


class Batch(NamedTuple):
    """One process's part of a batch, or the reason why there is none."""

    images: np.ndarray
    """uint8 [B, H, W, C]."""
    labels: np.ndarray
    """int32 [B]; −1 marks an image that does not count."""
    skipped: list[str]
    """What is wrong with images that were skipped."""
    error: str
    """What stops the stream; otherwise empty. Exceptions do not survive the way from a worker."""


class Batches(Protocol):
    """Batches by number; can be pickled."""

    warned: set[str]
    """Warnings given: one for each skipped image, also where it is read again and again."""

    def __len__(self) -> int:
        """Returns the number of batches."""

    def __getitem__(self, number: int) -> Batch:
        """Returns a batch."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of every batch this process reads: that of process `index` of `count`."""

    index: int = 0
    count: int = 1

    def of(self, batch_size: int) -> range:
        """Returns the rows of a batch that this process reads."""
        rows = batch_size // self.count
        return range(self.index * rows, (self.index + 1) * rows)


WHOLE = Shard()
"""All of every batch."""


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
            return _failed(error)
        return Batch(images, labels, skipped, "")

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the order of `epoch`; two are kept, as threads work on both sides of an epoch's end."""
        orders = self._orders  # another thread may replace it meanwhile
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
        """Returns the image and label that follow in the epoch's order; a function of the seed and the step too."""
        for other in range(place + 1, place + 1 + TRIES):
            images, labels, broken = self._read([int(order[other % len(order)])], [region])
            if not broken:
                return images[0], labels[0]
            skipped.extend(broken.values())
        raise UserError(f"{TRIES} images in a row cannot be decoded, the last: {skipped[-1]}.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}


class EvalBatches:
    """The batches of an evaluation: every image once, in order, and the last batch filled with what does not count."""

    __test__ = False  # not one of pytest's

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
            return _failed(error)
        return Batch(images, labels, [*broken.values()], "")


def _failed(error: UserError) -> Batch:
    return Batch(np.zeros(0, np.uint8), np.zeros(0, np.int32), [], str(error))


def workers_of(config: DataConfig) -> int:
    """Returns the number of worker processes, by the cores that this process may use if it is not configured."""
    if config.workers >= 0:
        return config.workers
    return min(cores(), MOST_WORKERS) if cores() > ENOUGH_THREADS_UP_TO else 0


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read(batches: Batches, workers: int, start: int = 0) -> Generator[Batch, None, None]:
    """Yields the batches from number `start` on, read ahead by `workers` processes, or by threads if that is 0.

    Warns of images that are skipped, once for each.

    Raises:
      UserError: an image is broken and may not be skipped, the data is damaged, or a worker was killed.
    """
    if start >= len(batches):
        return
    iterator = _iterate(batches, min(workers, len(batches) - start), start)
    segments: collections.deque[str] = collections.deque()
    try:
        for batch in itertools.chain([_first(iterator)], iterator):
            if batch.error:
                raise UserError(batch.error)
            for problem in dict.fromkeys(batch.skipped):
                if problem not in batches.warned:
                    batches.warned.add(problem)
                    print(f"warning: skipped: {problem}", file=sys.stderr, flush=True)
            segments.extend(part.shm.name for part in batch[:2] if getattr(part, "shm", None))
            # Copies, as JAX lets go of what it was given at a time of its own, and the workers' shared memory must not
            # outlive this iterator.
            yield batch._replace(images=np.array(batch.images), labels=np.array(batch.labels))
            _unlink(segments, keep=SEGMENTS_IN_USE)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(f"a process that reads images was killed ({str(error).split('.')[0]}); if memory ran out, set "
                        "fewer --config.data.workers.") from error
    finally:
        iterator.close()
        batch = iterator = None
        gc.collect()  # cycles hold shared memory
        if segments:
            time.sleep(UNLINKING_SECONDS)
            _unlink(segments, keep=0)


def _iterate(batches: Batches, workers: int, start: int) -> Any:
    """Returns Grain's iterator over the batches."""
    import grain  # slow to import
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, and its workers are handed them
        flags.FLAGS.mark_as_parsed()
    threads = 1 if workers else cores()
    dataset = grain.MapDataset.source(batches)[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_main_process)
    return iter(dataset)


def _unlink(segments: collections.deque[str], keep: int) -> None:
    """Frees all but the last `keep` of the `segments` of shared memory, should Grain not have done so.

    Once in a while its thread fails with EBADF (seen in two of three short runs), and the memory would be lost.
    """
    while len(segments) > keep:
        try:
            segment = shared_memory.SharedMemory(segments.popleft())
        except FileNotFoundError:  # as it should be
            continue
        segment.close()
        segment.unlink()


def _first(iterator: Any) -> Batch:
    """Returns the first batch; until it is there, which takes workers some seconds, signals wait.

    Every process of a terminal or a job gets its signals, and a worker that does not ignore them yet would end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return next(iterator)
    resource_tracker.ensure_running()  # starting it would let the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # threads and processes that are started inherit it
    try:
        return next(iterator)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_main_process(_: int, __: int) -> None:
    """Makes a worker process leave signals to the main process, and end with it, even if that is killed."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
