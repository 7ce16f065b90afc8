"""The study of transfer: its rows, its table, how it divides classes, and what it refuses; it trains nothing here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from helpers import user_error, write_folder

from benchmarks.common import section_of
from benchmarks.records import ROOT, read
from shared_basis.runtime.reporter import Reporter
from studies import transfer
from studies.transfer import TransferRow, divide, parse, recipes, record, table

ROW = TransferRow("2026-11-26", "abc1234", "python -m studies.transfer", "cifar", "resnet20", 5, 10000, 12, 5, 500, 20,
                  0, 0.8, 0.5, 0.6)


def test_a_row_comes_back_whole_and_what_is_found_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "transfer.csv"
    record(path, ROW)
    record(path, dataclasses.replace(ROW, commit="def5678", date="2027-01-01", command="other"))
    assert read(path, TransferRow) == [ROW]
    other = dataclasses.replace(ROW, seed=1)
    record(path, other)
    assert read(path, TransferRow) == [ROW, other]


def test_the_table_pairs_seeds_and_keeps_settings_apart() -> None:
    rows = [ROW, dataclasses.replace(ROW, seed=1, transfer_accuracy=0.62),
            dataclasses.replace(ROW, seed=2, scratch_accuracy=0.51, transfer_accuracy=0.62),
            dataclasses.replace(ROW, examples=1000)]
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


def test_each_seed_has_a_row_whose_command_names_no_path_of_the_machine(tmp_path: Path) -> None:
    def row_of(options: argparse.Namespace, command: str, reporter: Reporter) -> TransferRow:
        return dataclasses.replace(ROW, command=command, seed=options.seed)
    transfer.main(["--data=/home/me/images", "--runs=/scratch/runs", "--seeds=2"], tmp_path, row_of)
    assert [(row.seed, row.command) for row in read(tmp_path / transfer.FILE, TransferRow)] == [
        (seed, "python -m studies.transfer --data=images --seeds=2") for seed in (0, 1)]


def test_the_page_says_what_the_rows_say() -> None:
    assert table(read(ROOT / transfer.FILE, TransferRow)) == section_of(ROOT / transfer.PAGE, "transfer")


@pytest.mark.parametrize("arguments", [[], ["--data=DIR", "--seeds=0"], ["--data=DIR", "--examples=few"]])
def test_an_invalid_option_ends_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
