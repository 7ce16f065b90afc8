"""Streams: every batch is a function of its number, whoever reads it, and worker processes leave nothing behind.

A worker process takes a second or more to start: what can be tested with threads is.
"""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, user_environment, user_error
from PIL import Image

from shared_basis.config import DataConfig
from shared_basis.data import batches as batches_module
from shared_basis.data import streaming
from shared_basis.data.batches import Batch, Batches, EvalBatches, Shard, TrainingBatches
from shared_basis.data.examples import ArrayExamples, Spec, crop_generator, epoch_order
from shared_basis.data.folder import FileExamples
from shared_basis.data.images import TEST_PART, central, decode, random_resized
from shared_basis.data.streaming import read
from shared_basis.runtime.preemption import STOPPING

COUNT, BATCH, PER_EPOCH, EPOCHS, SEED = 11, 3, 3, 3, 7
"""Eleven images are three batches an epoch, with two images left over."""

SPEC = Spec((6, 6, 3), tuple("abcd"))
CENTER = DataConfig(name="folder", directory="/images", image_size=6)
RANDOM = DataConfig(name="folder", directory="/images", image_size=6, crop="random_resized")
SKIP = DataConfig(name="folder", directory="/images", image_size=6, on_broken="skip")


def write_images(root: Path, broken: Sequence[int] = ()) -> FileExamples:
    """Writes `COUNT` random images of 45×60 pixels, `broken` ones apart, which are text; returns them as examples."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for index in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (45, 60, 3), np.uint8)).save(root / f"{index}.png")
    for index in broken:
        (root / f"{index}.png").write_text("not an image")
    return FileExamples.of(str(root), [f"{index}.png" for index in range(COUNT)], np.arange(COUNT, dtype=np.int32) % 4)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> FileExamples:
    """Returns images that are all whole; for reading only."""
    return write_images(tmp_path_factory.mktemp("images"))


def training(examples: Any, config: DataConfig = CENTER, **changes: Any) -> TrainingBatches:
    return TrainingBatches(examples, SPEC, config,
                           **{"seed": SEED, "batch_size": BATCH, "epochs": EPOCHS, **changes})


def numbered(count: int = COUNT) -> tuple[ArrayExamples, Spec]:
    """Returns images of one pixel that is their number, and labels."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return ArrayExamples(images, np.arange(count, dtype=np.int32) % 4), Spec((1, 1, 1), tuple("abcd"))


def assert_batches_equal(actual: Sequence[Batch], desired: Sequence[Batch]) -> None:
    assert len(actual) == len(desired)
    for one, other in zip(actual, desired, strict=True):
        for part in ("images", "labels"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
            assert getattr(one, part).dtype == getattr(other, part).dtype
        assert (one.skipped, one.error) == (other.skipped, other.error)


def together(batches: Sequence[Batch]) -> Batch:
    """Returns the batch that the parts of several processes make."""
    return Batch(np.concatenate([batch.images for batch in batches]), np.concatenate([b.labels for b in batches]),
                 [problem for batch in batches for problem in batch.skipped], "".join(b.error for b in batches))


# The order

def test_an_epoch_visits_every_image_in_an_order_of_its_own() -> None:
    orders = {(seed, epoch): epoch_order(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1, 2)}
    for order in orders.values():
        assert sorted(order) == list(range(100))
        assert order.dtype == np.int32
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    np.testing.assert_array_equal(epoch_order(1, 2, 100), orders[1, 2])


# Batches by number

def test_each_epoch_trains_on_the_images_in_its_order_and_not_on_those_left_over() -> None:
    examples, spec = numbered()
    batches = TrainingBatches(examples, spec, DataConfig(), seed=SEED, batch_size=BATCH, epochs=EPOCHS)
    assert len(batches) == PER_EPOCH * EPOCHS
    for number in range(len(batches)):
        epoch, step = divmod(number, PER_EPOCH)
        visited = epoch_order(SEED, epoch, COUNT)[step * BATCH:(step + 1) * BATCH]
        np.testing.assert_array_equal(batches[number].images[:, 0, 0, 0], visited)
        np.testing.assert_array_equal(batches[number].labels, visited % 4)
        assert (batches[number].skipped, batches[number].error) == ([], "")


@pytest.mark.parametrize(("count", "batch"), [(11, 4), (12, 4), (3, 4), (11, 1)])
def test_an_evaluation_scores_each_image_once_and_what_fills_the_last_batch_does_not_count(
        count: int, batch: int) -> None:
    examples, spec = numbered(count)
    batches = EvalBatches(examples, spec, DataConfig(), batch_size=batch)
    whole = together([batches[number] for number in range(len(batches))])
    assert whole.images.shape == (len(batches) * batch, 1, 1, 1)
    assert len(batches) * batch - count < batch
    np.testing.assert_array_equal(whole.images[:count, 0, 0, 0], range(count))
    np.testing.assert_array_equal(whole.labels[:count], np.arange(count) % 4)
    np.testing.assert_array_equal(whole.labels[count:], -1)


@pytest.mark.parametrize(("processes", "crop"), [(4, "center"), (2, "random_resized")])
def test_the_parts_of_all_processes_are_the_whole_batch(tmp_path: Path, processes: int, crop: str) -> None:
    examples = write_images(tmp_path, broken=(2, 5))
    config = DataConfig(name="folder", directory="/images", image_size=6, crop=crop, on_broken="skip")
    shards = [Shard(index, processes) for index in range(processes)]
    whole: Batches
    parts: list[Batches]
    for whole, parts in (
            (training(examples, config, batch_size=4),
             [training(examples, config, batch_size=4, shard=shard) for shard in shards]),
            (EvalBatches(examples, SPEC, config, batch_size=4),
             [EvalBatches(examples, SPEC, config, batch_size=4, shard=shard) for shard in shards])):
        assert {len(part) for part in parts} == {len(whole)}
        for number in range(len(whole)):
            assert {len(part[number].labels) for part in parts} == {4 // processes}
            assert_batches_equal([together([part[number] for part in parts])], [whole[number]])


def by_hand(examples: FileExamples, index: int, position: int | None) -> np.ndarray:
    """Returns an image cut at random for the training `position`, or without chance, from the whole of it."""
    region = central(1, 1) if position is None else random_resized(crop_generator(SEED, position))
    return decode(examples.name(index), 3, (6, 6), region)


def test_random_crops_are_functions_of_the_seed_and_of_the_images_trained_on_before(examples: FileExamples) -> None:
    batches = training(examples, RANDOM)
    seen: dict[int, list[bytes]] = {}
    for number in reversed(range(len(batches))):
        order = epoch_order(SEED, number // PER_EPOCH, COUNT)
        again = pickle.loads(pickle.dumps(training(examples, RANDOM)))[number]  # as in a worker, and after a restart
        assert_batches_equal([again], [batches[number]])
        for row, image in enumerate(batches[number].images):
            index = order[number % PER_EPOCH * BATCH + row]
            np.testing.assert_array_equal(image, by_hand(examples, index, number * BATCH + row))
            seen.setdefault(index, []).append(image.tobytes())
    assert sum(len(crops) > 1 for crops in seen.values()) > 5
    assert all(len(set(crops)) == len(crops) for crops in seen.values())  # each epoch has its own
    assert not np.array_equal(training(examples, RANDOM, seed=SEED + 1)[0].images, batches[0].images)


def test_images_are_scored_on_their_centre(examples: FileExamples) -> None:
    for config, part in ((CENTER, 1), (RANDOM, TEST_PART)):
        batch = EvalBatches(examples, SPEC, config, batch_size=COUNT)[0]
        np.testing.assert_array_equal(
            batch.images, [decode(examples.name(index), 3, (6, 6), central(part, 1)) for index in range(COUNT)])


def test_threads_may_ask_for_batches_of_many_epochs_at_once() -> None:
    examples, spec = numbered(8)
    batches = TrainingBatches(examples, spec, DataConfig(), seed=SEED, batch_size=8, epochs=60)
    chance = random.Random(0)

    def dawdle(frame: Any, *_: Any) -> Any:
        """Has threads take turns at every line, as they would once in a long while."""
        if frame.f_code.co_filename != batches_module.__file__:
            return None
        time.sleep(chance.random() * 1e-4)
        return dawdle
    before = threading.gettrace()
    threading.settrace(dawdle)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            visited = [batch.images[:, 0, 0, 0] for batch in threads.map(batches.__getitem__, range(len(batches)))]
    finally:
        threading.settrace(before)
    np.testing.assert_array_equal(visited, [epoch_order(SEED, epoch, 8) for epoch in range(len(batches))])


# Reading ahead

@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_does_not_show_in_the_batches(examples: FileExamples, workers: int) -> None:
    batches = training(examples, RANDOM)
    assert_batches_equal(list(read(batches, workers, pytest.fail)), [batches[number] for number in range(len(batches))])


def test_reading_may_begin_at_any_batch(examples: FileExamples) -> None:
    batches = training(examples, RANDOM)
    whole = [batches[number] for number in range(len(batches))]
    for start in range(len(batches) + 2):
        assert_batches_equal(list(read(batches, 0, pytest.fail, start)), whole[start:])


@pytest.mark.slow
def test_workers_may_begin_at_any_batch_too(examples: FileExamples) -> None:
    batches = training(examples, RANDOM)
    assert_batches_equal(list(read(batches, 2, pytest.fail, 4)), [batches[n] for n in range(4, len(batches))])


def test_the_number_of_workers_follows_the_cores_unless_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 0), (4, 0), (5, 5), (16, 16), (200, 16)):  # threads are enough for a few
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert streaming.cores() == cores
        assert streaming.workers_of(DataConfig()) == workers
        assert [streaming.workers_of(DataConfig(workers=wanted)) for wanted in (0, 3, 40)] == [0, 3, 40]


# Broken images

ORDER = epoch_order(SEED, 0, COUNT).tolist()
BROKEN = [ORDER[place] for place in (1, 2, 8, 9, 10)]
"""Two in a row of the first epoch's order, and its end, beyond what it uses."""


def substitute(order: Sequence[int], place: int, broken: Sequence[int]) -> int:
    """Returns the first whole image from `place` on in the order, and from its beginning after that."""
    return next(index for index in [*order[place:], *order] if index not in broken)


@pytest.mark.parametrize("crop", ["center", "random_resized"])
def test_the_next_image_of_the_order_takes_the_place_of_a_broken_one(tmp_path: Path, crop: str) -> None:
    examples = write_images(tmp_path, BROKEN)
    batches = training(examples, DataConfig(name="folder", directory="/images", image_size=6, crop=crop,
                                            on_broken="skip"))
    substituted = 0
    for number in range(len(batches)):
        order = epoch_order(SEED, number // PER_EPOCH, COUNT).tolist()
        for row in range(BATCH):
            place, position = number % PER_EPOCH * BATCH + row, number * BATCH + row
            index = substitute(order, place, BROKEN)
            substituted += index != order[place]
            np.testing.assert_array_equal(batches[number].images[row],
                                          by_hand(examples, index, position if crop == "random_resized" else None))
            assert batches[number].labels[row] == index % 4
    assert substituted >= 3
    assert substitute(ORDER, 8, BROKEN) == ORDER[0]  # the order is gone through in a circle


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_that_is_skipped_is_warned_of_once(tmp_path: Path, workers: int) -> None:
    examples = write_images(tmp_path, BROKEN)
    batches, warned = training(examples, SKIP), []
    for _ in range(1 if workers else 2):  # a second time all have been warned of
        assert_batches_equal(list(read(batches, workers, warned.append)), [batches[n] for n in range(len(batches))])
    assert sorted(line.split(" is not an image ")[0] for line in warned) == sorted(
        f"skipped: {examples.name(index)}" for index in BROKEN)


def test_a_broken_image_does_not_count_in_an_evaluation(tmp_path: Path) -> None:
    examples = write_images(tmp_path, [0, 10])
    batches = EvalBatches(examples, SPEC, SKIP, batch_size=4)
    whole = together([batches[number] for number in range(len(batches))])
    np.testing.assert_array_equal(whole.labels, [-1, *np.arange(1, 10) % 4, -1, -1])
    assert [problem.split(" ")[0] for problem in whole.skipped] == [examples.name(0), examples.name(10)]
    assert whole.error == ""


@pytest.mark.parametrize(("batches", "workers"), [("training", 0), ("test", 1)])
def test_a_broken_image_that_may_not_be_skipped_is_named(tmp_path: Path, batches: str, workers: int) -> None:
    examples = write_images(tmp_path, [ORDER[4]])
    source: Batches = training(examples) if batches == "training" else EvalBatches(
        examples, SPEC, CENTER, batch_size=BATCH)
    got = []
    with user_error(f"{examples.name(ORDER[4])} is not an image", "replace or remove it",
                    "--config.data.on_broken=skip"):
        for batch in read(source, workers, pytest.fail):
            got.append(batch)
    place = 4 if batches == "training" else ORDER[4]
    assert_batches_equal(got, [source[number] for number in range(place // BATCH)])
    assert multiprocessing.active_children() == []


def test_images_that_are_all_broken_end_the_search_for_a_whole_one(tmp_path: Path) -> None:
    examples = write_images(tmp_path, range(COUNT))
    with user_error("100 consecutive images cannot be decoded", ".png is not an image"):
        list(read(training(examples, SKIP), 0, pytest.fail))
    scored = EvalBatches(examples, SPEC, SKIP, batch_size=COUNT)[0]
    assert set(scored.labels) == {-1}


@pytest.mark.parametrize("batches", ["training", "test"])
def test_images_of_other_sizes_are_told_unless_they_are_brought_to_one(tmp_path: Path, batches: str) -> None:
    examples = write_images(tmp_path)
    Image.fromarray(np.zeros((45, 61, 3), np.uint8)).save(examples.name(4))

    def read_all(spec: Spec, config: DataConfig) -> list[Any]:
        source: Batches = TrainingBatches(examples, spec, config, seed=0, batch_size=COUNT, epochs=1) if (
            batches == "training") else EvalBatches(examples, spec, config, batch_size=COUNT)
        return list(read(source, 0, pytest.fail))

    with user_error("images differ in size", examples.name(4), "45×61", "45×60", "--config.data.image_size"):
        read_all(Spec((45, 60, 3), SPEC.classes), DataConfig(name="folder", directory="/images", on_broken="skip"))
    (batch,) = read_all(SPEC, SKIP)  # which brings them to 6×6
    assert batch.images.shape == (COUNT, 6, 6, 3)
    assert not any(batch.skipped)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_is_none_of_the_classes_is_told(label: int) -> None:
    examples, spec = numbered()
    examples.labels[3] = label
    with user_error(f"image 3 has the label {label}", "4 classes"):
        list(read(EvalBatches(examples, spec, DataConfig(), batch_size=4), 0, pytest.fail))


# Worker processes

def shared_memory() -> set[str]:
    """Returns the names of Python's segments of shared memory on this machine."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is not visible as files")
def test_a_stream_leaves_no_process_no_shared_memory_and_nothing_to_collect(examples: FileExamples) -> None:
    """Collecting the heap takes seconds where it is large, and would have to follow each stream."""
    expected = [training(examples)[number] for number in range(9)]
    gc.collect()
    collections = gc.get_stats()[2]["collections"]
    gc.disable()
    try:
        files = 0
        for count, epochs in ((4, 100), (9, EPOCHS)):  # an early end, and the end
            before = shared_memory()
            batches = read(training(examples, epochs=epochs), 2, pytest.fail)
            kept = [next(batches) for _ in range(count)]
            assert len(multiprocessing.active_children()) == 2
            assert shared_memory() - before
            assert count == 4 or next(batches, None) is None
            batches.close()
            assert multiprocessing.active_children() == []
            left, deadline = shared_memory() - before, time.monotonic() + 10
            while left & shared_memory() and time.monotonic() < deadline:  # other programs' memory comes and goes
                time.sleep(0.1)
            assert not left & shared_memory()
            assert_batches_equal(kept, expected[:count])  # they lie elsewhere
            assert len(os.listdir("/proc/self/fd")) <= (files or 10**6)
            files = len(os.listdir("/proc/self/fd"))  # some are opened once
        assert gc.get_stats()[2]["collections"] == collections
    finally:
        gc.enable()


def test_threads_collect_nothing_either(examples: FileExamples) -> None:
    collected = []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
    try:
        list(read(training(examples), 0, pytest.fail))
    finally:
        gc.callbacks.pop()
    assert 2 not in collected


@pytest.mark.slow
def test_the_flags_of_a_program_are_as_they_were(examples: FileExamples) -> None:
    import grain  # noqa: F401  # defines flags of its own
    from absl import flags

    def state() -> tuple[bool, dict[str, tuple[int, object]]]:
        return flags.FLAGS.is_parsed(), {name: (flags.FLAGS[name].present, flags.FLAGS[name].value)
                                         for name in flags.FLAGS}
    before = state()
    first, second = (read(training(examples), 1, pytest.fail) for _ in range(2))
    next(first), next(second)
    first.close()
    next(second)
    second.close()
    assert state() == before
    assert not flags.FLAGS.is_parsed()


class WithoutMemory(ArrayExamples):
    """Examples whose reader ends as one that gets no page of shared memory."""

    def read(self, indices: Sequence[int]) -> Any:
        os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.slow
def test_a_worker_without_shared_memory_is_told_from_one_without_memory() -> None:
    examples = WithoutMemory(np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32))
    batches = EvalBatches(examples, Spec((4, 4, 3), ("a",)), DataConfig(), batch_size=4)
    with user_error("ran out of shared memory (/dev/shm)", "--config.data.workers=0"):
        list(read(batches, 1, print))


_READER = """
import multiprocessing, signal, time, numpy
from shared_basis.config import DataConfig
from shared_basis.data.batches import TrainingBatches
from shared_basis.data.examples import ArrayExamples, Spec
from shared_basis.data.streaming import read
from shared_basis.runtime.preemption import STOPPING

for signum in STOPPING:
    signal.signal(signum, lambda *_: None)
examples = ArrayExamples(numpy.zeros((8, 4, 4, 3), numpy.uint8), numpy.zeros(8, numpy.int32))
batches = TrainingBatches(examples, Spec((4, 4, 3), ("a",)), DataConfig(), seed=0, batch_size=4, epochs=9)
print("begins", flush=True)
reader = read(batches, 2, print)
next(reader), next(reader)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
"""


def start_reader(end: str) -> subprocess.Popen[str]:
    """Starts a program, and a group of processes, in which two workers read 18 batches, of which it takes two."""
    return subprocess.Popen([sys.executable, "-c", f"{_READER}{end}"], cwd=ROOT, env=user_environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.slow
def test_signals_to_all_processes_do_not_end_workers_that_are_about_to_start() -> None:
    with start_reader("print(len(list(reader)), flush=True)") as process:
        assert process.stdout.readline() == "begins\n"
        done = threading.Event()

        def interrupt() -> None:
            """Does what a terminal does at Ctrl-C, and a cluster at the end of a job."""
            while not done.wait(0.1):
                for signum in STOPPING:
                    os.killpg(process.pid, signum)
        thread = threading.Thread(target=interrupt)
        thread.start()
        workers, rest = process.stdout.readline(), process.stdout.readline()
        done.set()
        thread.join()
        errors = process.communicate(timeout=60)[1]
    assert errors == ""
    assert len(workers.split()) == 2
    assert rest == "16\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are not visible as files")
def test_workers_end_with_a_main_process_that_is_killed() -> None:
    with start_reader("time.sleep(600)") as process:
        assert process.stdout.readline() == "begins\n"
        workers = [Path("/proc", pid, "cmdline") for pid in process.stdout.readline().split()]
        assert all("spawn_main" in worker.read_text() for worker in workers)
        process.kill()
    deadline = time.monotonic() + 20

    def alive() -> list[Path]:
        return [worker for worker in workers if worker.exists() and "spawn_main" in worker.read_text()]  # not a zombie
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2
    assert not alive()
