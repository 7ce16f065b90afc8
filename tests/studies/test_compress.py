"""The benchmark of compression: its rows, its tables, and what it refuses; it trains nothing here."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compress
from benchmarks.compress import Row, parse, record, tables
from benchmarks.records import ROOT, read
from shared_basis.runtime.reporter import Reporter

ROW = Row("2026-11-24", "abc1234", "python benchmarks/compress.py", "digits", "resnet20", 0, 0.5, "resnet20-s13u0",
          133410, 2344576, 269434, 2516608, 0.9915492957746479, 0.9577464788732394, 4, 0.99, "24", "0.9887", 355,
          539060, 1083854, 0.99, 0.0001756, 1.08, 9)


def test_a_row_comes_back_whole_and_replaces_that_of_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "compress.csv"
    record(path, ROW)
    assert read(path, Row) == [ROW]
    other = dataclasses.replace(ROW, budget=0.75, scratch_epochs="", scratch_accuracy="")
    record(path, other)
    better = dataclasses.replace(ROW, tuned_accuracy=0.995, commit="def5678")
    record(path, better)
    assert read(path, Row) == [other, better]


def test_what_is_found_again_keeps_the_commit_it_was_found_at(tmp_path: Path) -> None:
    path = tmp_path / "compress.csv"
    record(path, ROW)
    record(path, dataclasses.replace(ROW, commit="def5678", date="2027-01-01", command="other", latency=1.0,
                                     latency_over_plain=2.0))
    assert read(path, Row) == [ROW]


def test_tables_tell_parts_and_what_was_not_run() -> None:
    text = tables([ROW, dataclasses.replace(ROW, scratch_epochs="", scratch_accuracy="")])
    assert ("| digits, resnet20 | 0.5 | resnet20-s13u0 | 50 % | 93 % | 99.15 | 95.77 | 99.00 (4) | 98.87 (24) | "
            "2026-11-24 |") in text
    assert "| 99.00 (4) | not run |" in text
    assert "| digits, resnet20-s13u0 | 526 | 50 % | 99.00 | 0.176 | 1.08 |" in text


def test_committed_rows_are_those_of_the_page() -> None:
    page = compress.PAGE.read_text()
    assert tables(read(compress.RECORDS, Row)) == page.partition(compress.BEGIN)[2].partition(compress.END)[0]


def test_the_command_of_a_row_names_no_path_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []

    def measure(options: argparse.Namespace, command: str, reporter: Reporter) -> list[Row]:
        told.append(command)
        return [dataclasses.replace(ROW, command=command)]
    monkeypatch.setattr(compress, "measure", measure)
    monkeypatch.setattr(compress, "RECORDS", tmp_path / "compress.csv")
    compress.main(["--data=/home/me/images", "--runs=/scratch/runs", "--tuning=1"])
    assert told == ["python benchmarks/compress.py --data=images --tuning=1"]
    with (tmp_path / "compress.csv").open(newline="") as file:
        assert [line["command"] for line in csv.DictReader(file)] == told


@pytest.mark.parametrize("arguments", [["--budgets", "0"], ["--budgets", "0.5", "1.5"], ["--budgets", "half"],
                                       ["--epochs=0"], ["--tuning=x"], ["--rounds=-1"], ["--network=resnet21"],
                                       ["--data=/no/such/directory"]])
def test_a_mistake_ends_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[Any],
                                      monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compress, "RECORDS", tmp_path / "compress.csv")
    with pytest.raises(SystemExit) as ended:
        compress.main([*arguments, f"--runs={tmp_path / 'runs'}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "compress.csv").exists()


def test_defaults_are_the_digits() -> None:
    options = parse([])[1]
    assert (options.data, options.network, options.budgets) == ("digits", "resnet20", [0.35, 0.5, 0.75])


def test_a_mistake_ends_the_process_with_2() -> None:
    done = subprocess.run([sys.executable, "benchmarks/compress.py", "--budgets=1.5"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
