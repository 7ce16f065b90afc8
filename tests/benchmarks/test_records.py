"""Rows come back from their file as they went, and what is there stays."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
from helpers import user_error

from benchmarks import records
from benchmarks.session import SpeedRow
from shared_basis.errors import UserError
from studies.compress import CompressionRow
from studies.depth_findings import DepthRow
from studies.findings import StudyRow


@dataclasses.dataclass(frozen=True)
class Pair:
    """A row of this test."""

    name: str
    value: float
    count: int = 1


def test_rows_come_back_and_those_that_are_there_stay(tmp_path: Path) -> None:
    file, rows = tmp_path / "results" / "x.csv", [Pair('a, b"c', 0.5), Pair("", 123456789.0, 3)]
    records.append(file, rows[:1])
    before = file.read_text()
    assert before == 'name,value,count\n"a, b""c",0.5,1\n'
    records.append(file, rows[1:])
    assert file.read_text() == before + ",123456789,3\n"
    assert records.read(file, Pair) == rows
    records.append(file, [])
    assert records.read(tmp_path / "absent.csv", Pair) == []


def test_numbers_have_six_digits() -> None:
    assert records.cells(Pair("x", 1 / 3, 1234567)) == ["x", "0.333333", "1234567"]
    assert records.cells(Pair("x", 99999.87))[1] == "99999.9"
    assert records.cells(Pair("x", 123456.7))[1] == "123457"
    assert records.cells(Pair("x", 1234567.8))[1] == "1234568"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ends_of_lines_are_those_of_the_file_and_a_missing_one_is_mended(end: str, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(end.join(["name,value,count", "a,1,1"]).encode())
    records.append(file, [Pair("b", 2.0)])
    assert file.read_bytes().endswith(f"a,1,1{end}b,2,1{end}".encode())


@pytest.mark.parametrize(("content", "parts"), [
    (b"date,who\n2026-01-01,me\n", ["x.csv", "date, who", "name, value, count"]),
    (b"name,value,count\na,b,1\n", ["x.csv", "line 2"]), (b"name,value,count\n\xff,1,1\n", ["x.csv"])])
def test_a_file_of_other_rows_is_refused_and_left_alone(content: bytes, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(content)
    with user_error(*parts):
        records.read(file, Pair)
    if b"who" in content:
        with pytest.raises(UserError):
            records.append(file, [Pair("b", 2.0)])
    assert file.read_bytes() == content


@pytest.mark.parametrize(("file", "kind"), [
    ("speed.csv", SpeedRow), ("export.csv", SpeedRow), ("compress.csv", CompressionRow), ("depth.csv", DepthRow),
    ("study-digits.csv", StudyRow)])
def test_what_was_measured_can_be_read(file: str, kind: type) -> None:
    assert len(records.read(records.ROOT / "results" / file, kind)) > 5


def test_commit_says_which_files_were_measured(tmp_path: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", records.commit())
    assert records.commit(tmp_path) == "unknown"


def test_pictures_and_results_do_not_change_the_commit(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = records.commit(tmp_path)
    (tmp_path / "docs" / "images" / "results.svg").write_text("<svg/>")
    (tmp_path / "page.md").write_text("text")
    assert records.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert records.commit(tmp_path) == f"{clean}+"
