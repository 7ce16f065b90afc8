"""What the studies share: rows that are kept and found again, commands, pages, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from study_rows import COMPRESSION, DISTILLATION, TRANSFER

from benchmarks.common import section_of
from benchmarks.records import read
from shared_basis.runtime.reporter import Reporter
from studies import compress, distill, transfer

ROWS: dict[Any, Any] = {compress: COMPRESSION, distill: DISTILLATION, transfer: TRANSFER}
LAST = {compress: "tuned_accuracy", distill: "taught_accuracy", transfer: "transfer_accuracy"}
"""A column of what was found."""

each_study = pytest.mark.parametrize("study", ROWS, ids=lambda study: study.__name__.rpartition(".")[2])


@each_study
def test_the_latest_row_of_a_subject_counts_and_what_is_found_again_is_not_written(study: ModuleType,
                                                                                   tmp_path: Path) -> None:
    kept, row = study.STUDY, ROWS[study]
    kept.record(row, tmp_path)
    before = (tmp_path / kept.file).read_text()
    kept.record(dataclasses.replace(row, commit="def5678", date="2027-01-01", command="other"), tmp_path)
    assert (tmp_path / kept.file).read_text() == before
    other, better = dataclasses.replace(row, seed=1), dataclasses.replace(row, **{LAST[study]: 0.995})
    for each in (other, better):
        kept.record(each, tmp_path)
    assert kept.latest(tmp_path) == [better, other]
    assert (tmp_path / kept.file).read_text().startswith(before)
    kept.record(row, tmp_path)  # as it was first: it counts again
    assert kept.latest(tmp_path) == [row, other]
    assert read(tmp_path / kept.file, kept.row) == [row, other, better, row]


@each_study
def test_the_page_says_what_the_rows_say(study: ModuleType) -> None:
    kept = study.STUDY
    assert kept.table(kept.latest()) == section_of(Path(__file__).parents[2] / kept.page, kept.name)


@pytest.mark.parametrize("study", [distill, transfer], ids=["distill", "transfer"])
def test_each_seed_has_a_row_whose_command_names_no_path_of_the_machine(study: Any, tmp_path: Path) -> None:
    def row_of(options: argparse.Namespace, command: str, reporter: Reporter) -> Any:
        return dataclasses.replace(ROWS[study], command=command, seed=options.seed)
    study.main(["--data=/home/me/images", "--runs=/scratch/runs", "--seeds=2"], tmp_path, row_of)
    assert [(row.seed, row.command) for row in study.STUDY.latest(tmp_path)] == [
        (seed, f"python -m studies.{study.STUDY.name} --data=images --seeds=2") for seed in (0, 1)]


def test_a_row_is_kept_as_soon_as_it_is_there(tmp_path: Path) -> None:
    def rows_of(options: argparse.Namespace, command: str, reporter: Reporter) -> Iterator[Any]:
        yield dataclasses.replace(COMPRESSION, command=command)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        compress.main(["--data=/home/me/images", "--runs=/scratch/runs", "--tuning=1"], tmp_path, rows_of)
    assert [each.command for each in compress.STUDY.latest(tmp_path)] == [
        "python -m studies.compress --data=images --tuning=1"]


@pytest.mark.parametrize(("study", "arguments"), [
    *((compress, words) for words in (["--budgets", "0"], ["--budgets", "0.5", "1.5"], ["--budgets", "half"],
                                      ["--epochs=0"], ["--tuning=x"], ["--rounds=-1"])),
    *((distill, words) for words in (["--seeds=0"], ["--tuning=x"], ["--weight=half"])),
    *((transfer, words) for words in ([], ["--data=DIR", "--seeds=0"], ["--data=DIR", "--examples=few"]))],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__name__.rpartition(".")[2])
def test_an_invalid_option_ends_with_one_line(study: Any, arguments: list[str],
                                              capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        study.parse(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
