"""How fast images are decoded, streamed and trained on. Prints tables; --write puts them into benchmarks/README.md.

    python benchmarks/data.py --write

Subjects are measured in turns within one session, several rounds, and medians are reported: on a shared machine
only ratios mean much. Images are photographs (scikit-learn's two samples, cut at random) of ImageNet's usual size.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from benchmarks.common import README, Table, in_turns, machine, markdown, medians, replace_section, trainers
from shared_basis.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from shared_basis.data import images, streaming
from shared_basis.data.batches import TrainingBatches
from shared_basis.data.examples import Source, warn_on_stderr

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from shared_basis.data.feeds import Images

BEGIN, END = "<!-- data -->\n", "<!-- end of data -->\n"
PACKAGES = ("jax", "pillow", "grain", "simplejpeg", "opencv-python-headless")


def photographs(count: int, size: tuple[int, int], quality: int = 92) -> list[bytes]:
    """Returns JPEG files of `size` (height, width), each another part of a photograph."""
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


def rate(function: Callable[[bytes], object], files: Sequence[bytes]) -> float:
    """Returns images per second of one thread."""
    began = time.perf_counter()
    for file in files:
        function(file)
    return len(files) / (time.perf_counter() - began)


Box = tuple[int, int, int, int]
Scale = Callable[[np.ndarray, Box], np.ndarray]


def box_of(file: bytes) -> Box:
    """Returns a random box of a file of 500×375, always the same."""
    left, top, right, bottom = images.random_resized(np.random.default_rng(len(file)))(375, 500)
    return int(left), int(top), int(right), int(bottom)


def scaled_by_pillow(pixels: np.ndarray, box: Box) -> np.ndarray:
    """Returns the part `box` of an image, scaled to 224×224 by the antialiased filter of the recipes."""
    part = Image.fromarray(pixels[box[1]:box[3], box[0]:box[2]])
    return np.asarray(part.resize((224, 224), Image.Resampling.BILINEAR))


def decoding(rounds: int) -> Table:
    """Returns images per second and core: decoding alone, and with the random resized crop to 224."""
    large, small = photographs(40, (375, 500), 96), photographs(400, (32, 32))
    columns = ("decoded, 32×32", "decoded, 500×375", "cropped and scaled to 224")
    subjects = {}
    for name, decode, scale in _decoders():
        whole = decode or (lambda file: images.decode(file, 3))
        cropped = _cropped(decode, scale)
        for column, function, files in zip(columns, (whole, whole, cropped), (small, large, large), strict=True):
            subjects[f"{name}|{column}"] = functools.partial(rate, function, files)
    found = medians(in_turns(subjects, rounds))
    names = dict.fromkeys(key.split("|")[0] for key in found)
    size = statistics.mean(map(len, large)) / 1000
    return [[f"images/s of one core; 500×375: {size:.0f} kB", *columns],
            *([name, *(f"{found[f'{name}|{column}']:,.0f}" for column in columns)] for name in names)]


def _decoders() -> list[tuple[str, Callable[[bytes], np.ndarray] | None, Scale]]:
    """Returns names, decoders and scalers; the first, with None, is this package's own way, others are if installed."""
    found: list[tuple[str, Callable[[bytes], np.ndarray] | None, Scale]] = [
        ("this package: Pillow", None, scaled_by_pillow)]
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        found.append(("simplejpeg, scaled by Pillow", lambda file: simplejpeg.decode_jpeg(file, "RGB"),
                      scaled_by_pillow))
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)

        def decode(file: bytes) -> np.ndarray:
            return np.asarray(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB))

        def scaled(interpolation: int) -> Scale:
            return lambda pixels, box: np.asarray(cv2.resize(
                pixels[box[1]:box[3], box[0]:box[2]], (224, 224), interpolation=interpolation))
        found += [("OpenCV, scaled by Pillow", decode, scaled_by_pillow),
                  ("OpenCV, its area filter (another filter)", decode, scaled(cv2.INTER_AREA)),
                  ("OpenCV, its linear filter (no antialias: not equal)", decode, scaled(cv2.INTER_LINEAR))]
    return found


def _cropped(decode: Callable[[bytes], np.ndarray] | None, scale: Scale) -> Callable[[bytes], np.ndarray]:
    if decode is None:
        return lambda file: images.decode(file, 3, (224, 224), lambda height, width: box_of(file))
    return lambda file: scale(decode(file), box_of(file))


def pipeline(rounds: int) -> Table:
    """Returns images per second of the whole pipeline, by number of workers, and its memory."""
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
    """Returns images per second of the batches after the first eight, and the most memory that streaming took."""
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
            if number in (4, 6, len(batches) - 1):  # not while it is timed
                peak = max(peak, _memory() - before)
    return speed, peak


def _memory() -> int:
    """Returns the bytes that this process and its children hold, what they share counted once."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    shared = Path("/dev/shm")
    return sum(process.memory_full_info().uss for process in processes) + (
        sum(path.stat().st_size for path in shared.glob("psm_*")) if shared.is_dir() else 0)


def training(rounds: int) -> Table:
    """Returns how much of the compiled step's speed the whole trainer keeps, resident and streamed."""
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
    """Returns the section for the README."""
    tables = "\n".join(markdown(part) for part in parts)
    return f"`python benchmarks/data.py --write`, {machine(PACKAGES)}:\n\n{tables}"


def main() -> None:
    """Measures, prints, and writes if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each subject; the median counts")
    parser.add_argument("--write", action="store_true", help="replace the figures in benchmarks/README.md")
    options = parser.parse_args()
    text = report(part(options.rounds) for part in (decoding, pipeline, training))
    print(text)
    if options.write:
        replace_section(README, BEGIN, END, text)


if __name__ == "__main__":
    main()
