"""Streams batches with Grain, for images that do not fit into memory or need random crops of the original.

The batch of a step is a pure function of the seed and the step; it depends neither on the number of workers nor on
interruptions. Without random crops it equals, pixel by pixel, the batch that `shared_basis.data.feeds.select_batch`
takes from images in memory.

Memory: each worker holds the batch in progress and up to `AHEAD` finished ones, and the main process one more per
worker: about (2 + AHEAD) · workers · batch bytes in total, independent of the size of the data set (a batch of 256
images of 224×224×3 takes 37 MiB), plus the list of files or the index of records in every worker.
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
"""Maximum number of cores for reading by threads. Decoding and scaling release the GIL, so on two cores threads are
as fast as processes and need less memory and start-up time (benchmarks/README.md); not measured on more cores."""

MOST_WORKERS = 16
"""Maximum number of worker processes chosen automatically."""


def workers_of(config: DataConfig) -> int:
    """Returns the configured number of worker processes, or one derived from the number of usable cores."""
    if config.workers >= 0:
        return config.workers
    return min(cores(), MOST_WORKERS) if cores() > ENOUGH_THREADS_UP_TO else 0


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read(batches: Batches, workers: int, warn: Callable[[str], None], start: int = 0) -> Generator[Batch, None, None]:
    """Yields the batches from number `start` on, prefetched by `workers` processes, or by threads if `workers` is 0.

    Args:
      warn: called once with a line about each image that is skipped.

    Raises:
      UserError: an image is broken and `on_broken` is 'fail', the data is damaged, or a worker was killed.
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
                # Copies, since JAX may release its inputs later, and the workers' shared memory must not outlive this
                # iterator.
                yield batch._replace(images=np.array(batch.images), labels=np.array(batch.labels))
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(_killed(str(error))) from error
        finally:
            batch = None  # frees shared memory before the workers end
            iterator.close()


def _killed(text: str) -> str:
    """Returns the message for the termination of a worker, given Grain's error `text`."""
    no_page = -getattr(signal, "SIGBUS", 7)  # raised if shared memory is exhausted
    if f"exit code {no_page}" in text:
        return ("a process that reads images ran out of shared memory (/dev/shm); give the container more (docker run "
                "--shm-size=8g), or read by threads: --config.data.workers=0.")
    return (f"a process that reads images was killed ({text.split('.')[0]}); if memory ran out, set fewer "
            "--config.data.workers.")


class _Endless:
    """Batches followed by infinitely many empty ones, so that Grain's workers never reach the end.

    The exceptions that Grain raises there form reference cycles which keep each worker's shared memory and pipes alive
    until a full garbage collection, which takes seconds.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, number: int) -> Batch:
        return self._batches[number] if number < len(self._batches) else without_images()


def _iterate(batches: Batches, workers: int, start: int) -> Any:
    """Returns Grain's infinite iterator over the batches."""
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
    """Makes Grain's absl flags readable if the program has not parsed any, by marking them as given."""
    import grain  # noqa: F401  # defines the flags
    from absl import flags

    own = [flags.FLAGS[name] for name in flags.FLAGS if name.startswith("grain_")]
    for flag in own:
        flag.present += 1  # a counter, so that streams may end in any order
    try:
        yield
    finally:
        for flag in own:
            flag.present -= 1


def _first(iterator: Any) -> Batch:
    """Returns the first batch; blocks signals until it arrives, which takes workers some seconds.

    Signals of a terminal or a job reach all processes, and would kill a worker that does not ignore them yet.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return next(iterator)
    # Child threads and processes inherit the mask, including Python's resource tracker; starting the tracker unblocks
    # Ctrl-C and SIGTERM.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGINT, signal.SIGTERM})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return next(iterator)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_main_process(_: int, __: int) -> None:
    """Makes a worker process ignore signals, and exit when the main process exits, even if that is killed."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
