"""The ways of images to the devices: resident or streamed, a run computes the same, and the choice is told."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TINY,
    Watcher,
    assert_trees_equal,
    mesh_of,
    read_arrays,
    read_metrics,
    user_error,
    write_folder,
)

from shared_basis import data
from shared_basis.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    TrainConfig,
    replace,
)
from shared_basis.data import feeds
from shared_basis.data.examples import ArrayExamples
from shared_basis.runtime.distributed import make_mesh
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.train import train

PER_EPOCH = 5
CONFIG = Config(
    model=ModelConfig(name=TINY),
    data=DataConfig(train_examples=44, test_examples=30, validation=0.01, pad=1, flip=True, workers=0),
    orthogonality=OrthogonalityConfig(elements="shared+unique"),
    optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine"),
    train=TrainConfig(epochs=3, batch_size=8, eval_batch_size=12, evaluate_every=2))
"""44 images are five steps an epoch, with four left over; evaluation at steps 10 and 15, of 14 and of 30 images."""


def load(placement: str) -> tuple[feeds.Images, Config]:
    """Returns the images of `CONFIG` so placed, and the configuration."""
    config = replace(CONFIG, {"data.placement": placement})
    return feeds.load(data.open_source(config.data), config.data, make_mesh(), Reporter(verbosity="quiet")), config


# The same batches

@pytest.mark.parametrize("start", [0, 3, 12])  # from within an epoch and from its beginning, and beyond its end
def test_streamed_and_resident_feeds_give_the_same_batches(start: int) -> None:
    source, mesh = data.open_source(CONFIG.data), make_mesh()
    train = source.splits["train"]
    pixels, labels = (np.array(part) for part in zip(*train.read(range(44)), strict=True))
    batches = {}
    for placement in ("device", "stream"):
        images, config = load(placement)
        feed = images.feed(config, mesh)
        select = jax.jit(feed.select)
        batches[placement] = []
        for step, inputs in zip(range(start, 15), feed.batches(start), strict=False):
            for array, abstract in zip(inputs, feed.abstract, strict=True):
                assert (array.shape, array.dtype) == (abstract.shape, abstract.dtype)
                assert array.sharding.is_equivalent_to(abstract.sharding, array.ndim)
            batches[placement].append([np.asarray(part) for part in select(step, *inputs)])
    assert len(batches["stream"]) == 15 - start
    assert_trees_equal(batches["stream"], batches["device"])
    for step, (images, classes) in enumerate(batches["stream"], start):
        first = step % PER_EPOCH * 8
        chosen = data.epoch_order(CONFIG.seed, step // PER_EPOCH, 44)[first:first + 8]
        np.testing.assert_array_equal(images, pixels[chosen])
        np.testing.assert_array_equal(classes, labels[chosen])


@pytest.mark.parametrize(("batch_size", "devices", "size"), [
    (7, 4, 8), (1000, 4, 32), (11, 2, 12)])
def test_streamed_and_resident_images_are_evaluated_in_the_same_batches(batch_size: int, devices: int,
                                                                        size: int) -> None:
    mesh = mesh_of(devices)
    resident, streamed = (load(placement)[0].batches("test", batch_size, mesh) for placement in ("device", "stream"))
    expected = jax.device_get(list(resident()))
    for _ in range(2):  # each evaluation reads them anew
        assert_trees_equal(jax.device_get(list(streamed())), expected)
    assert {images.shape for images, _ in expected} == {(size, 8, 8, 1)}
    labels = np.concatenate([labels for _, labels in expected])
    np.testing.assert_array_equal(labels[:30], [label for _, label in data.open_source(CONFIG.data).splits["test"].read(
        range(30))])
    np.testing.assert_array_equal(labels[30:], -1)
    assert len(expected) == -(-30 // size)


# The same run

def run(workdir: Path, **fields: Any) -> str:
    """Trains with the tiny network, and returns what was shown."""
    reporter = Watcher()
    train(replace(CONFIG, fields), workdir, reporter)
    assert (reporter.steps[-1], reporter.totals) == (15, {15})
    return reporter.text.getvalue()


@pytest.mark.slow
def test_a_streamed_run_equals_a_resident_one(tmp_path: Path) -> None:
    for placement in ("device", "stream"):
        run(tmp_path / placement, **{"data.placement": placement})
    assert read_metrics(tmp_path / "stream") == read_metrics(tmp_path / "device")
    assert_trees_equal(read_arrays(tmp_path / "stream", 15), read_arrays(tmp_path / "device", 15))
    assert {"validation_loss", "test_loss"} <= read_metrics(tmp_path / "stream")[0].keys()


@pytest.mark.slow
def test_a_skipped_image_of_a_streamed_run_is_shown_and_logged(tmp_path: Path,
                                                               capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "images", ("cat", "dog"), 4)
    broken = [tmp_path / "images" / split / "cat" / "1.png" for split in ("train", "test")]
    for path in broken:
        path.write_text("not an image")
    fields = {"data.name": "folder", "data.directory": str(tmp_path / "images"), "data.on_broken": "skip",
              "data.train_examples": 0, "data.test_examples": 0, "data.validation": 0.0, "data.placement": "stream",
              "train.batch_size": 4, "train.epochs": 1}
    reporter = Watcher()
    train(replace(CONFIG, fields), tmp_path / "run", reporter)
    logged = (tmp_path / "run" / "log.txt").read_text()
    for text in (logged, reporter.text.getvalue()):
        for path in broken:
            assert text.count(f"warning: skipped: {path} is not an image") == 1
    assert "skipped" not in capfd.readouterr().err


# What is loaded

def broken_folder(tmp_path: Path, count: int) -> tuple[DataConfig, list[Path]]:
    """Writes three cats and three dogs for each split; returns `count` test images, which are text."""
    broken = sorted((write_folder(tmp_path, ("cat", "dog"), 3) / "test").glob("*/*"))[:count]
    for path in broken:
        path.write_text("not an image")
    return DataConfig(name="folder", directory=str(tmp_path), placement="device", on_broken="skip"), broken


def test_broken_training_images_are_substituted_alike_wherever_images_wait(tmp_path: Path) -> None:
    broken = sorted((write_folder(tmp_path, ("cat", "dog"), 8) / "train").glob("*/*"))[3:6]
    for path in broken:
        path.write_text("not an image")
    fields = {"data.name": "folder", "data.directory": str(tmp_path), "data.on_broken": "skip", "train.batch_size": 4,
              "train.epochs": 3}
    mesh, seen = mesh_of(1), {}
    for placement in ("device", "stream"):
        config = replace(Config(), {**fields, "data.placement": placement, "data.workers": 0})
        images = feeds.load(data.open_source(config.data), config.data, mesh, Reporter(verbosity="quiet"))
        assert images.count("train") == 16
        feed = images.feed(config, mesh)
        with contextlib.closing(feed.batches(0)) as batches:
            seen[placement] = [feed.select(jnp.asarray(step), *inputs) for step, inputs in zip(range(12), batches,
                                                                                           strict=False)]
    for one, other in zip(seen["device"], seen["stream"], strict=True):
        for part, other_part in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, other_part)
    assert all((labels >= 0).all() for _, labels in seen["device"])


def test_resident_images_that_are_broken_are_left_out_and_told(tmp_path: Path) -> None:
    config, broken = broken_folder(tmp_path, 2)
    written = io.StringIO()
    images = feeds.load(data.open_source(config), config, make_mesh(), Reporter(written))
    lines = written.getvalue().splitlines()
    assert (images.count("train"), images.count("test")) == (6, 6)
    assert (images.broken("train"), images.broken("test")) == (0, 2)
    assert images.describe() == "6 training and 4 test images of 8×8×3, without 2 that cannot be decoded"
    assert lines[0].startswith("images are resident on the device (as configured; decoded, the images take 2.2 KiB")
    assert [line.split(" is not")[0] for line in lines[1:]] == [f"warning: skipped: {path}" for path in broken]
    labels = np.concatenate([labels for _, labels in images.batches("test", 4, mesh_of(1))()])
    assert labels.tolist() == [-1, -1, 0, 1, 1, 1, -1, -1]  # the last two fill the batch


@pytest.mark.parametrize(("on_broken", "told"), [("skip", ", excluding those that cannot be decoded"), ("fail", "")])
def test_streamed_images_that_are_broken_are_not_known_yet(tmp_path: Path, on_broken: str, told: str) -> None:
    config, _ = broken_folder(tmp_path, 2)
    config = dataclasses.replace(config, placement="stream", on_broken=on_broken)
    images = feeds.load(data.open_source(config), config, make_mesh(), Reporter(verbosity="quiet"))
    assert images.describe() == f"6 training and 6 test images of 8×8×3{told}"
    assert images.broken("test") == 0


def test_resident_images_that_are_broken_stop_a_run_unless_they_may_be_skipped(tmp_path: Path) -> None:
    config, broken = broken_folder(tmp_path, 1)
    strict = dataclasses.replace(config, on_broken="fail")
    with user_error(f"{broken[0]} is not an image", "--config.data.on_broken=skip"):
        feeds.load(data.open_source(strict), strict, make_mesh(), Reporter(verbosity="quiet"))


def test_a_split_all_of_whose_images_are_broken_is_told(tmp_path: Path) -> None:
    config, _ = broken_folder(tmp_path, 6)
    with user_error("none of the test images can be decoded", "data.name='folder'"):
        feeds.load(data.open_source(config), config, make_mesh(), Reporter(verbosity="quiet"))


# The choice

GIB = 2**30


class Many:
    """So many examples, which nobody reads."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


SOURCE: Any = data.Source(data.Spec((512, 512, 1), ("a", "b")), {"train": Many(3072), "test": Many(1024)})
"""Decoded, these images take 1 GiB."""


def mesh(platform: str, memory: int | None, devices: int = 4) -> Any:
    """Returns what `choose` looks at of a mesh whose devices have so much memory."""
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: memory and {"bytes_limit": memory})
    return types.SimpleNamespace(local_mesh=types.SimpleNamespace(devices=np.array([device] * devices), size=devices))


def choose(host: int | None, here: Any, **fields: Any) -> tuple[bool, str]:
    return feeds.choose(SOURCE, DataConfig(**{"workers": 0, **fields}), here, host)


@pytest.mark.parametrize(("host", "device", "streamed", "why"), [
    (2 * GIB, 4 * GIB, False, "2.0 GiB of memory are free, the device has 4.0 GiB"),
    (2 * GIB - 1, 4 * GIB, True, "2.0 GiB of memory are free, the device has 4.0 GiB"),
    (2 * GIB, 4 * GIB - 1, True, "2.0 GiB of memory are free, the device has 4.0 GiB"),
    (None, 16 * GIB, False, "the device has 16.0 GiB"), (None, 2 * GIB, True, "the device has 2.0 GiB"),
    (64 * GIB, None, False, "64.0 GiB of memory are free"), (GIB, None, True, "1.0 GiB of memory are free"),
    (None, None, False, "the memory is not known")])
def test_images_are_resident_if_they_take_half_of_the_memory_and_a_quarter_of_the_devices_at_most(
        host: int | None, device: int | None, streamed: bool, why: str) -> None:
    chosen, line = choose(host, mesh("gpu", device))
    assert chosen == streamed
    assert line.startswith("images are streamed by " if streamed else "images are resident on the device (")
    assert line.endswith(f"(decoded, the images take 1.0 GiB; {why})")
    assert "\n" not in line


def test_devices_that_are_the_host_hold_copies_each() -> None:
    assert not choose(10 * GIB, mesh("cpu", None))[0]
    streamed, line = choose(10 * GIB - 1, mesh("cpu", None))
    assert streamed
    assert "take 1.0 GiB (5.0 GiB with one copy per device); 10.0 GiB of memory are free" in line
    assert not choose(10 * GIB - 1, mesh("cpu", None, devices=1))[0]


def test_a_configured_placement_is_taken_if_it_fits() -> None:
    streamed, line = choose(64 * GIB, mesh("gpu", 64 * GIB), placement="stream")
    assert streamed
    assert "(as configured; decoded, the images take 1.0 GiB; 64.0 GiB" in line
    streamed, line = choose(GIB, mesh("gpu", GIB), placement="device")
    assert not streamed
    assert "(as configured; decoded, the images take 1.0 GiB; 1.0 GiB" in line


@pytest.mark.parametrize(("host", "device"), [(GIB - 1, 64 * GIB), (64 * GIB, GIB - 1)])
def test_images_that_cannot_be_resident_are_told_with_the_ways_out(host: int,
                                                                   device: int) -> None:
    with user_error("data.placement='device'", "take 1.0 GiB", "64.0 GiB", "--config.data.placement=stream",
                    "--config.data.image_size", "--config.data.train_examples"):
        choose(host, mesh("gpu", device), placement="device")
    assert choose(host, mesh("gpu", device))[0]


@pytest.mark.parametrize("placement", ["auto", "stream"])
def test_images_that_are_cut_at_random_are_streamed_whatever_their_size(placement: str) -> None:
    streamed, line = choose(64 * GIB, mesh("gpu", 64 * GIB), placement=placement, crop="random_resized",
                            image_size=512)
    assert streamed
    assert "random crops" in line


@pytest.mark.parametrize(("workers", "words"), [(0, "by 3 threads,"), (1, "by 1 process,"), (2, "by 2 processes,")])
def test_it_is_told_who_reads_and_what_decodes(monkeypatch: pytest.MonkeyPatch, workers: int, words: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    _, line = choose(GIB, mesh("gpu", GIB), workers=workers)
    assert f"images are streamed {words} decoded by Pillow (" in line


def test_the_choice_is_made_for_the_images_of_a_run() -> None:
    config = dataclasses.replace(CONFIG.data, placement="auto")
    source = data.open_source(config)
    needed = 2 * 5 * 88 * 64  # 88 images of 64 bytes, on four devices and decoded, in half of the memory
    assert not feeds.choose(source, config, make_mesh(), needed)[0]
    assert feeds.choose(source, config, make_mesh(), needed - 1)[0]


@pytest.mark.parametrize(("placement", "kind"), [("device", data.Split), ("stream", ArrayExamples)])
def test_images_are_where_they_were_chosen_to_be(placement: str, kind: type) -> None:
    images, _ = load(placement)
    assert {type(part) for part in images.splits.values()} == {kind}
    assert {name: images.count(name) for name in images.splits} == {"train": 44, "test": 30, "validation": 14}
