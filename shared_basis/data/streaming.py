"""Batches read and decoded as they are needed, by Grain: for images that do not fit into memory, or are cut at random.

The batch of a step is a pure function of the seed and the step: neither the number of workers nor where a run was
interrupted shows in it. Without random crops it is the batch that `shared_basis.data.feeds.select_batch` takes from
images in memory, pixel by pixel.

Memory: each worker holds the batch it makes and up to `AHEAD` finished ones, and this process one more for each, so
about (2 + AHEAD) · workers · batch bytes in all, whatever the size of the data set (a batch of 256 images of
224×224×3 has 37 MiB), beside the list of files or the index of the records, which every worker has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.batches import Batch, Batches, without_images
from shared_basis.errors import UserError
from shared_basis.runtime.preemption import STOPPING

AHEAD = 1
"""Finished batches that each worker keeps ready."""

ENOUGH_THREADS_UP_TO = 4
"""Cores: decoding and scaling leave Python's lock, so that on two cores threads read as fast as processes do, without
their memory and their start (benchmarks/README.md); where that ends has not been measured."""

MOST_WORKERS = 16
"""Without being asked for more."""


def workers_of(config: DataConfig) -> int:
    """Returns the number of worker processes, by the cores that this process may use if it is not configured."""
    if config.workers >= 0:
        return config.workers
    return min(cores(), MOST_WORKERS) if cores() > ENOUGH_THREADS_UP_TO else 0


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read(batches: Batches, workers: int, warn: Callable[[str], None], start: int = 0) -> Generator[Batch, None, None]:
    """Yields the batches from number `start` on, read ahead by `workers` processes, or by threads if that is 0.

    Args:
      warn: gets a line about each image that is skipped, once.

    Raises:
      UserError: an image is broken and may not be skipped, the data is damaged, or a worker was killed.
    """
    if start >= len(batches):
        return
    with _readable_grain_flags():
        iterator = _iterate(batches, min(workers, len(batches) - start), start)
        try:
            for number in range(start, len(batches)):
                batch = next(iterator) if number > start else _first(iterator)
                if batch.error:
                    raise UserError(batch.error)
                for problem in dict.fromkeys(batch.skipped):
                    if problem not in batches.warned:
                        batches.warned.add(problem)
                        warn(f"skipped: {problem}")
                # Copies, as JAX lets go of what it was given at a time of its own, and the workers' shared memory must
                # not outlive this iterator.
                yield batch._replace(images=np.array(batch.images), labels=np.array(batch.labels))
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(_killed(str(error))) from error
        finally:
            batch = None  # before the workers end, so that the memory it shares with them is freed meanwhile
            iterator.close()


def _killed(text: str) -> str:
    """Returns the message for the end of a worker, of which Grain says `text`."""
    no_page = -getattr(signal, "SIGBUS", 7)  # how a process learns that there is no more shared memory
    if f"exit code {no_page}" in text:
        return ("a process that reads images ran out of shared memory (/dev/shm); give the container more (docker run "
                "--shm-size=8g), or read by threads: --config.data.workers=0.")
    return (f"a process that reads images was killed ({text.split('.')[0]}); if memory ran out, set fewer "
            "--config.data.workers.")


class _Endless:
    """Batches that are followed by empty ones without end, so that Grain's workers never come to theirs.

    What Grain raises there forms reference cycles that hold shared memory and pipes of each worker until all of the
    heap is collected, which takes seconds.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, number: int) -> Batch:
        return self._batches[number] if number < len(self._batches) else without_images()


def _iterate(batches: Batches, workers: int, start: int) -> Any:
    """Returns Grain's iterator over the batches, which does not end."""
    import grain  # slow to import

    threads = 1 if workers else cores()
    dataset = grain.MapDataset.source(_Endless(batches))[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_main_process)
    return iter(dataset)


@contextlib.contextmanager
def _readable_grain_flags() -> Iterator[None]:
    """Lets Grain read its own absl flags where the program has not parsed any: they count as given meanwhile."""
    import grain  # noqa: F401  # defines them
    from absl import flags

    own = [flags.FLAGS[name] for name in flags.FLAGS if name.startswith("grain_")]
    for flag in own:
        flag.present += 1  # a count, so that streams may end in any order
    try:
        yield
    finally:
        for flag in own:
            flag.present -= 1


def _first(iterator: Any) -> Batch:
    """Returns the first batch; until it is there, which takes workers some seconds, signals wait.

    Every process of a terminal or a job gets its signals, and a worker that does not ignore them yet would end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return next(iterator)
    # Threads and processes that are started inherit it, Python's resource tracker too; starting that lets Ctrl-C and
    # SIGTERM through.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGINT, signal.SIGTERM})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
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
