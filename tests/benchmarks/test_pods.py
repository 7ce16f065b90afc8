"""Whether data keeps up with a slice is reckoned right, and the page shows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, user_error

from benchmarks import pods
from benchmarks.accelerator_rows import AcceleratorRow
from benchmarks.common import PAGE, section_of
from benchmarks.session import OURS

ROW = AcceleratorRow(
    "2026-11-26", "abc1234", "0.10.2", "0.12.8", "libtpu 1", "v5e:16x16", "resnet50", "resnet50", OURS, "step", 4096,
    224, "bfloat16", 300, 9e9, 819e7, 197e9, 3, 1, 3e9, 5e9, 5e6, 2.0, 9.5, "python …")
"""16 images a chip: arithmetic takes a millisecond at the peak, memory 10."""


def row(**changes: Any) -> AcceleratorRow:
    return dataclasses.replace(ROW, **changes)


def test_a_chip_is_as_fast_as_the_slower_of_arithmetic_and_memory() -> None:
    assert pods.fastest(ROW) == pytest.approx(16 / 0.010)
    assert pods.fastest(row(main_memory_bytes=819e5)) == pytest.approx(16 / 0.001)
    assert pods.fastest(row(target="h100x1", batch=64, main_memory_bytes=3350e7)) == pytest.approx(64 / 0.010)


def test_data_is_the_limit_where_a_chip_wants_more_than_its_vcpus_decode() -> None:
    rows = [ROW, row(network="fast", main_memory_bytes=819e5), row(image_size=32), row(modules="stock"),
            row(dtype="float32"), row(program="evaluation"), row(target="v5e:2x2")]
    _, *lines = pods.data_table(rows, each=100.0)
    assert lines == [
        ["resnet50", "256 TPU v5e", "1,600", "409,600", "28", "57 %", "the device"],
        ["fast", "256 TPU v5e", "16,000", "4,096,000", "28", "571 %", "data"]]


def test_programs_of_one_device_and_older_rows_are_left_out() -> None:
    _, *lines = pods.program_table([ROW, row(target="h100x1"), row(argument_bytes=float("nan"))])
    assert lines == [["resnet50, 224², step", "256 TPU v5e", "16", "3", "1", "5.00", "2", "5,000", "3,000", "50.0 %"]]


def test_what_a_core_decodes_is_read_from_the_page_of_benchmarks(tmp_path: Path) -> None:
    assert 100 < pods.decoded() < 10_000
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / PAGE).write_text("<!-- data -->\n| 2 threads | 3,000 | 1,500 | 74 MiB |\n<!-- end of data -->\n")
    assert pods.decoded(tmp_path) == 1500
    (tmp_path / PAGE).write_text("<!-- data -->\n<!-- end of data -->\n")
    with user_error("no row for threads", "python -m benchmarks.data --write"):
        pods.decoded(tmp_path)


def test_the_page_shows_the_tables_and_writing_changes_nothing(tmp_path: Path) -> None:
    for name, text in pods.sections().items():
        assert section_of(ROOT / pods.DOC, name) == text
        assert text.count("\n") > 2
    for path in (pods.DOC, pods.FILE, PAGE):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / pods.DOC).write_text("<!-- data -->\nold\n<!-- end of data -->\n<!-- programs -->\n"
                                     "<!-- end of programs -->\n")
    pods.main(["--write"], tmp_path)
    assert section_of(tmp_path / pods.DOC, "data") == pods.sections()["data"]
