"""What a configuration leaves open, and how the images, or the run, settle it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, mesh_of, user_error, write_folder
from PIL import Image

from shared_basis import data
from shared_basis.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from shared_basis.data import statistics
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.settle import fitting_batch, settle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder") / "photos", ("cat", "dog"), count=9)


@pytest.fixture
def config(folder: Path) -> Config:
    return Config(model=ModelConfig(name=TINY), train=TrainConfig(batch_size=0, epochs=1),
                  data=DataConfig(name="folder", directory=str(folder), mean=(), std=()))


def settled(config: Config, **options: object) -> tuple[Config, str]:
    text = io.StringIO()
    source = data.open_source(config.data)
    return settle(config, source, mesh_of(1), Reporter(text), **options), text.getvalue()  # type: ignore[arg-type]


def by_hand(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "train").rglob("*.png"))]) / 255
    return pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))


def test_mean_and_deviation_are_those_of_the_training_images(config: Config, folder: Path) -> None:
    found, said = settled(config)
    for values, expected in zip((found.data.mean, found.data.std), by_hand(folder), strict=True):
        np.testing.assert_allclose(values, expected, atol=6e-5)
    assert f"mean ({', '.join(f'{value:g}' for value in found.data.mean)})" in said
    assert found.train.batch_size == 8
    assert "batch size 8, chosen for 18 training images" in said


def test_they_are_measured_in_blocks_and_on_a_part_of_many_images(config: Config, folder: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    source = data.open_source(config.data)

    def measured() -> statistics.Statistics:
        return statistics.measure(source.splits["train"], source.spec, config.data, lambda text: None)
    whole = measured()
    monkeypatch.setattr(statistics, "AT_ONCE", 4)
    assert measured() == whole
    monkeypatch.setattr(statistics, "MEASURED", 5)
    assert measured() != whole
    assert measured() == measured()


def test_images_of_one_colour_have_a_deviation_to_divide_by(config: Config, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (0, 255, 51)).save(tmp_path / split / name / "0.png")
    found, _ = settled(replace(config, {"data.directory": str(tmp_path)}))
    assert found.data.mean == (0.0, 1.0, 0.2)
    assert found.data.std == (round(1 / 255, 4),) * 3


def test_a_broken_image_is_told_or_left_out(config: Config, folder: Path, tmp_path: Path) -> None:
    import shutil
    shutil.copytree(folder, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "dog" / "3.png").write_bytes(b"nothing")
    config = replace(config, {"data.directory": str(tmp_path / "photos")})
    with user_error("3.png", "on_broken=skip"):
        settled(config)
    found, _ = settled(replace(config, {"data.on_broken": "skip"}))
    (tmp_path / "photos" / "train" / "dog" / "3.png").unlink()
    for values, expected in zip((found.data.mean, found.data.std), by_hand(tmp_path / "photos"), strict=True):
        np.testing.assert_allclose(values, expected, atol=6e-5)


def test_those_of_the_weights_and_of_the_run_come_first(config: Config) -> None:
    weights = (0.1, 0.2, 0.3), (0.4,)
    found, said = settled(config, weights=weights)
    assert (found.data.mean, found.data.std) == weights
    assert "as for the initial weights" in said
    saved = replace(config, {"data.mean": (0.7,), "data.std": (0.8,), "train.batch_size": 6})
    found, said = settled(config, saved=saved, weights=weights)
    assert (found, said) == (saved, "")


def test_what_is_given_stays(config: Config) -> None:
    given = replace(config, {"data.mean": (0.7,), "data.std": (0.8,), "train.batch_size": 3})
    assert settled(given) == (given, "")


@pytest.mark.parametrize(("images", "divisor", "batch"), [
    (5, 1, 5), (8, 1, 8), (38, 1, 8), (64, 1, 8), (127, 1, 8), (128, 1, 16), (5000, 1, 128), (10**6, 1, 128),
    (38, 4, 8), (38, 6, 12), (7, 4, 4), (5000, 48, 144)])
def test_a_batch_fits_the_images_and_the_devices(images: int, divisor: int, batch: int) -> None:
    assert fitting_batch(images, divisor) == batch


def test_a_batch_fits_what_divides_it(config: Config) -> None:
    parts = replace(config, {"optimizer.grad_accumulation_steps": 2, "model.norm_images": 3})
    assert settled(parts)[0].train.batch_size == 12


def test_no_training_images_are_told(folder: Path, config: Config) -> None:
    whole = replace(config, {"data.directory": str(folder / "train"), "data.test": 1.0})
    for fields in ({}, {"data.mean": (0.5,), "data.std": (0.5,)}, {"train.batch_size": 4}):
        with user_error("data.test=1 leaves no training images", "below 1"):
            settled(replace(whole, fields))


def test_too_few_images_are_told_with_a_batch_that_fits(config: Config) -> None:
    with user_error("train.batch_size=256: there are only 18 training images", "--config.train.batch_size=0", "here 8"):
        settled(replace(config, {"train.batch_size": 256}))
    with user_error("only 3 training images", "a multiple of 4"):
        fitting_batch(3, 4)
