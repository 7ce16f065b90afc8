"""The study of compression: its rows, its tables, and what it refuses; it trains nothing here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from benchmarks.common import section_of
from benchmarks.records import ROOT, read
from shared_basis.errors import UserError
from shared_basis.runtime.reporter import Reporter
from studies import compress
from studies.compress import CompressionRow, latest, parse, record, tables

ROW = CompressionRow("2026-11-24", "abc1234", "python -m studies.compress", "digits", "resnet20", 0, 0.5,
                     "resnet20-s13u0", 133410, 2344576, 269434, 2516608, 0.991549, 0.957746, 4, 0.99, "24", "0.9887",
                     355, 539060, 1083854, 0.99, 0.0001756, 1.08, 9)


def test_a_row_comes_back_whole_and_the_latest_of_its_budget_counts(tmp_path: Path) -> None:
    path = tmp_path / "compress.csv"
    record(path, ROW)
    assert read(path, CompressionRow) == [ROW]
    before = path.read_text()
    other = dataclasses.replace(ROW, budget=0.75, scratch_epochs="", scratch_accuracy="")
    better = dataclasses.replace(ROW, tuned_accuracy=0.995, commit="def5678")
    record(path, other)
    record(path, better)
    assert latest(read(path, CompressionRow)) == [better, other]
    assert path.read_text().startswith(before)


def test_what_is_found_again_keeps_the_commit_it_was_found_at(tmp_path: Path) -> None:
    path = tmp_path / "compress.csv"
    record(path, ROW)
    record(path, dataclasses.replace(ROW, commit="def5678", date="2027-01-01", command="other", latency=1.0,
                                     latency_over_plain=2.0))
    assert read(path, CompressionRow) == [ROW]


def test_tables_tell_parts_and_what_was_not_run() -> None:
    text = tables([ROW, dataclasses.replace(ROW, scratch_epochs="", scratch_accuracy="")])
    assert ("| digits, resnet20 | 0.5 | resnet20-s13u0 | 50 % | 93 % | 99.15 | 95.77 | 99.00 (4) | 98.87 (24) | "
            "2026-11-24 |") in text
    assert "| 99.00 (4) | not run |" in text
    assert "| digits, resnet20-s13u0 | 526 | 50 % | 99.00 | 0.176 | 1.08 |" in text


def test_the_page_says_what_the_rows_say() -> None:
    rows = read(ROOT / compress.FILE, CompressionRow)
    assert tables(latest(rows)) == section_of(ROOT / compress.PAGE, "compress")


def test_the_command_of_a_row_names_no_path_of_the_machine(tmp_path: Path) -> None:
    def rows_of(options: argparse.Namespace, command: str, reporter: Reporter) -> list[CompressionRow]:
        return [dataclasses.replace(ROW, command=command)]
    compress.main(["--data=/home/me/images", "--runs=/scratch/runs", "--tuning=1"], tmp_path, rows_of)
    assert [row.command for row in read(tmp_path / compress.FILE, CompressionRow)] == [
        "python -m studies.compress --data=images --tuning=1"]


@pytest.mark.parametrize("arguments", [["--budgets", "0"], ["--budgets", "0.5", "1.5"], ["--budgets", "half"],
                                       ["--epochs=0"], ["--tuning=x"], ["--rounds=-1"]])
def test_an_invalid_option_ends_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("argument", "part"), [("--network=resnet21", "resnet21"), ("--data=/no/such/directory",
                                                                                     "/no/such/directory")])
def test_networks_and_data_that_do_not_exist_are_refused(argument: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        compress.main([argument, f"--runs={tmp_path / 'runs'}"], tmp_path)
    assert not (tmp_path / compress.FILE).exists()


def test_defaults_are_the_digits() -> None:
    options = parse([])
    assert (options.data, options.network, options.budgets) == ("digits", "resnet20", [0.35, 0.5, 0.75])
