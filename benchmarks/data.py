"""Measures streaming of images and training on them. Prints tables; --write updates benchmarks/README.md.

    python -m benchmarks.data --write

Subjects are measured alternately in one session over several rounds, and medians are reported: on a shared machine,
only ratios are meaningful. Images are random crops of photographs (from scikit-learn), in ImageNet's usual size.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if not __package__:  # python benchmarks/data.py, deprecated
    from moved import run_as_module
    run_as_module("benchmarks.data")

# Each Grain worker imports this file: without JAX, as in training.
from benchmarks.common import PAGE, Parser, Table, in_turns, machine, markdown, medians, positive, replace_section
from benchmarks.records import ROOT
from shared_basis.cli.app import run_and_exit
from shared_basis.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from shared_basis.data import streaming
from shared_basis.data.batches import TrainingBatches
from shared_basis.data.examples import Source, warn_on_stderr

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from shared_basis.data.feeds import Images

PACKAGES = ("jax", "pillow", "grain")


def photographs(count: int, size: tuple[int, int], quality: int = 92) -> list[bytes]:
    """Returns JPEG files of `size` (height, width), each a different crop of a photograph."""
    from sklearn.datasets import load_sample_images

    samples = [Image.fromarray(sample) for sample in load_sample_images().images]
    random, files = np.random.default_rng(0), []
    for index in range(count):
        sample = samples[index % len(samples)]
        width, height = (int(side * random.uniform(0.5, 1)) for side in sample.size)
        left, top = (int(random.integers(whole - part + 1)) for whole, part in zip(sample.size, (width, height),
                                                                                  strict=True))
        part = sample.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        part.save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return files


def pipeline(rounds: int) -> Table:
    """Returns a table of the pipeline's images per second and memory, by number of workers."""
    from shared_basis import data

    with tempfile.TemporaryDirectory() as root:
        for index, file in enumerate(photographs(256, (375, 500), 96)):
            for split in ("train", "test") if index < 8 else ("train",):
                path = Path(root, split, "even" if index % 2 else "odd", f"{index}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file)
        config = DataConfig(name="folder", directory=root, image_size=224, crop="random_resized")
        source = data.open_source(config)
        batch = 64 * 224 * 224 * 3 / 2**20
        table = [["read by", "images/s", "images/s and core", f"memory for it (a batch has {batch:.1f} MiB)"]]
        options = sorted({0, 1, streaming.cores()})
        peaks = dict.fromkeys(options, 0)

        def measured(workers: int) -> Callable[[], float]:
            def measure() -> float:
                speed, peaks[workers] = _streamed(source, config, workers)
                return speed
            return measure
        found = medians(in_turns({str(workers): measured(workers) for workers in options}, max(1, rounds // 2)))
        for workers in options:
            cores = workers or streaming.cores()
            name = f"{workers} process{'es' * (workers > 1)}" if workers else f"{cores} threads"
            speed = found[str(workers)]
            table.append([name, f"{speed:,.0f}", f"{speed / min(cores, streaming.cores()):,.0f}",
                          f"{peaks[workers] / 2**20:,.0f} MiB"])
    return table


def _streamed(source: Source, config: DataConfig, workers: int) -> tuple[float, int]:
    """Returns images per second after the first eight batches, and the peak memory of streaming."""
    batches = TrainingBatches(source.splits["train"], source.spec, config, seed=0, batch_size=64, epochs=8)
    before, peak, began, counted, speed = _memory(), 0, 0.0, 0, 0.0
    with contextlib.closing(streaming.read(batches, workers, warn_on_stderr)) as reader:
        for number, batch in enumerate(reader):
            if number == 7:
                began = time.perf_counter()
            elif number > 7:
                counted += len(batch.labels)
            if number == len(batches) - 1:
                speed = counted / (time.perf_counter() - began)
            if number in (4, 6, len(batches) - 1):  # not while timing
                peak = max(peak, _memory() - before)
    return speed, peak


def _memory() -> int:
    """Returns the bytes of this process and its workers, counting shared memory once; Linux only."""
    processes = (os.getpid(), *(child.pid for child in multiprocessing.active_children()))
    maps = "".join(Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes)
    own = sum(map(int, re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", maps, re.MULTILINE)))
    return 1024 * own + sum(path.stat().st_size for path in Path("/dev/shm").glob("psm_*"))


def training(rounds: int) -> Table:
    """Returns a table of the trainer's speed relative to the compiled step, with resident and streamed images."""
    from benchmarks.trainer import trainers

    digits = Config(model=ModelConfig(name="resnet20-s8u1-double"), train=TrainConfig(
        epochs=1, batch_size=64, evaluate_every=1))
    table = [["trainer against the bare compiled step", "bare, images/s", "resident", "streamed"]]
    for name, config in (("digits, ResNet-20 S8U1*, batch 64", digits),
                         ("folder of 32×32 JPEG, ResNet-20 S16U1*, batch 64", replace(digits, {
                             "model.name": "resnet20-s16u1-double", "data.pad": 4, "data.flip": True}))):
        with tempfile.TemporaryDirectory() as root:
            if "folder" in name:
                for index, file in enumerate(photographs(1280, (32, 32))):
                    for split in ("train", "test") if index < 64 else ("train",):
                        path = Path(root, "images", split, "even" if index % 2 else "odd", f"{index}.jpg")
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(file)
                config = replace(config, {"data.name": "folder", "data.directory": f"{root}/images"})
            found = medians(in_turns(trainers(config, _load, ("device", "stream"), Path(root)), rounds))
        table.append([name, f"{found['bare']:,.0f}", *(f"{100 * found[key] / found['bare']:.1f} %"
                                                     for key in ("device", "stream"))])
    return table


def _load(config: Config, mesh: Mesh) -> Images:
    from shared_basis import data
    from shared_basis.data import feeds
    from shared_basis.runtime.reporter import Reporter

    return feeds.load(data.open_source(config.data), config.data, mesh, Reporter(verbosity="quiet"))


def report(parts: Iterator[Table]) -> str:
    """Returns the section for benchmarks/README.md."""
    tables = "\n".join(markdown(part) for part in parts)
    return f"`python -m benchmarks.data --write`, {machine(PACKAGES)}:\n\n{tables}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Measures and prints; updates the page below `root` if requested."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=7, help="number of measurements to take the median of")
    parser.add_argument("--write", action="store_true", help="update the figures in benchmarks/README.md")
    options = parser.parse_args(arguments)
    text = report(part(options.rounds) for part in (pipeline, training))
    print(text)
    if options.write:
        replace_section(root / PAGE, "data", text)


if __name__ == "__main__":
    run_and_exit(main)
