"""The study of distillation: its rows, its table, and what it refuses; it trains nothing here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from benchmarks.common import section_of
from benchmarks.records import ROOT, read
from shared_basis.runtime.reporter import Reporter
from studies import distill
from studies.distill import DistillationRow, parse, recipes, record, table

ROW = DistillationRow("2026-11-26", "abc1234", "python -m studies.distill", "digits", "resnet20", 0.35, 4, 0.9, 4.0, 0,
                      0, "resnet20-s13u0", 0.99, 0.8, 0.96, 0.97, 355)


def test_a_row_comes_back_whole_and_what_is_found_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "distill.csv"
    record(path, ROW)
    record(path, dataclasses.replace(ROW, commit="def5678", date="2027-01-01", command="other"))
    assert read(path, DistillationRow) == [ROW]
    other = dataclasses.replace(ROW, seed=1)
    record(path, other)
    assert read(path, DistillationRow) == [ROW, other]


def test_the_table_pairs_seeds_and_keeps_settings_apart() -> None:
    rows = [ROW, dataclasses.replace(ROW, seed=1, labels_accuracy=0.95, taught_accuracy=0.98),
            dataclasses.replace(ROW, seed=2, labels_accuracy=0.96, taught_accuracy=0.98),
            dataclasses.replace(ROW, train_examples=1000)]
    text = table(rows)
    # gains of 1, 3 and 2 points: 2 ± 4.303 · 1 / √3
    assert ("| digits, resnet20 | 0.35 | all | 4 | 99.00 ± 0.00 (3) | 80.00 ± 0.00 (3) | 95.67 ± 0.58 (3) | "
            "97.67 ± 0.58 (3) | +2.00 [-0.48, +4.48] |") in text
    assert "| digits, resnet20 | 0.35 | 1,000 | 4 | 99.00 (1) | 80.00 (1) | 96.00 (1) | 97.00 (1) | +1.00 |" in text


def test_both_ways_differ_in_the_teacher_alone() -> None:
    labels, taught = (recipes(parse_with_seed(), "resnet20", Path("runs/plain"))[way] for way in ("labels", "taught"))
    assert dataclasses.replace(taught, distillation=labels.distillation) == labels
    assert (taught.distillation.teacher, taught.distillation.weight) == ("runs/plain", 0.5)


def parse_with_seed() -> argparse.Namespace:
    return argparse.Namespace(**{**vars(parse(["--weight=0.5"])), "seed": 0})


def test_each_seed_has_a_row_whose_command_names_no_path_of_the_machine(tmp_path: Path) -> None:
    def row_of(options: argparse.Namespace, command: str, reporter: Reporter) -> DistillationRow:
        return dataclasses.replace(ROW, command=command, seed=options.seed)
    distill.main(["--data=/home/me/images", "--runs=/scratch/runs", "--seeds=2"], tmp_path, row_of)
    assert [(row.seed, row.command) for row in read(tmp_path / distill.FILE, DistillationRow)] == [
        (seed, "python -m studies.distill --data=images --seeds=2") for seed in (0, 1)]


def test_the_page_says_what_the_rows_say() -> None:
    assert table(read(ROOT / distill.FILE, DistillationRow)) == section_of(ROOT / distill.PAGE, "distill")


@pytest.mark.parametrize("arguments", [["--seeds=0"], ["--tuning=x"], ["--weight=half"]])
def test_an_invalid_option_ends_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
