"""The study of transfer: its rows, its table, how it divides classes, and what it refuses; it trains nothing here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from helpers import user_error, write_folder
from study_rows import TRANSFER

from studies.transfer import divide, parse, recipes, table


def test_the_table_pairs_seeds_and_keeps_settings_apart() -> None:
    rows = [TRANSFER, dataclasses.replace(TRANSFER, seed=1, transfer_accuracy=0.62),
            dataclasses.replace(TRANSFER, seed=2, scratch_accuracy=0.51, transfer_accuracy=0.62),
            dataclasses.replace(TRANSFER, examples=1000)]
    text = table(rows)
    # gains of 10, 12 and 11 points: 11 ± 4.303 · 1 / √3
    assert ("| cifar, resnet20 | 5: 10,000 | 5: 500 | 20 | 80.00 ± 0.00 (3) | 50.33 ± 0.58 (3) | 61.33 ± 1.15 (3) | "
            "+11.00 [+8.52, +13.48] |") in text
    assert "| cifar, resnet20 | 5: 10,000 | 5: 1,000 | 20 | 80.00 (1) | 50.00 (1) | 60.00 (1) | +10.00 |" in text


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", classes=("a", "b", "c", "d", "e"), count=1, size=4)


def test_each_class_is_in_one_part_with_the_images_of_both_splits(images: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time all links are there
        first, others = divide(images, tmp_path / "parts", 2)
    for split in ("train", "test"):
        assert sorted(path.name for path in (first / split).iterdir()) == ["a", "b"]
        assert sorted(path.name for path in (others / split).iterdir()) == ["c", "d", "e"]
        for path in (*(first / split).iterdir(), *(others / split).iterdir()):
            assert path.samefile(images / split / path.name)


@pytest.mark.parametrize("source", [1, 4, 5])
def test_a_part_of_one_class_is_refused(images: Path, tmp_path: Path, source: int) -> None:
    with user_error(f"--source={source}", "5 classes"):
        divide(images, tmp_path / "parts", source)
    assert not (tmp_path / "parts").exists()


def test_a_directory_without_splits_is_refused(tmp_path: Path) -> None:
    with user_error("train/ and test/"):
        divide(tmp_path, tmp_path / "parts", 2)


def test_both_ways_have_the_same_images_and_epochs() -> None:
    options = argparse.Namespace(**{**vars(parse(["--data=DIR"])), "seed": 3})
    configs = recipes(options, Path("first"), Path("other"))
    scratch, tuned = configs["scratch"], configs["transfer"]
    assert (tuned.train.epochs, tuned.train.batch_size, tuned.seed) == (
        scratch.train.epochs, scratch.train.batch_size, scratch.seed) == (20, 50, 3)
    for name in ("directory", "train_examples", "validation", "image_size", "pad", "flip"):
        assert getattr(tuned.data, name) == getattr(scratch.data, name)
    assert (configs["source"].data.directory, configs["source"].data.train_examples) == ("first", 10000)
