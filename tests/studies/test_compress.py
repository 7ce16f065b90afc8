"""The study of compression: its rows, its tables, and what it refuses; it trains nothing here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from study_rows import COMPRESSION

from shared_basis.errors import UserError
from studies import compress
from studies.compress import parse, tables


def test_tables_tell_parts_and_what_was_not_run() -> None:
    text = tables([COMPRESSION, dataclasses.replace(COMPRESSION, scratch_epochs="", scratch_accuracy="")])
    assert ("| digits, resnet20 | 0.5 | resnet20-s13u0 | 50 % | 93 % | 99.15 | 95.77 | 99.00 (4) | 98.87 (24) | "
            "2026-11-24 |") in text
    assert "| 99.00 (4) | not run |" in text
    assert "| digits, resnet20-s13u0 | 526 | 50 % | 99.00 | 0.176 | 1.08 |" in text


@pytest.mark.parametrize(("argument", "part"), [("--network=resnet21", "resnet21"), ("--data=/no/such/directory",
                                                                                     "/no/such/directory")])
def test_networks_and_data_that_do_not_exist_are_refused(argument: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        compress.main([argument, f"--runs={tmp_path / 'runs'}"], tmp_path)
    assert not (tmp_path / compress.STUDY.file).exists()


def test_defaults_are_the_digits() -> None:
    options = parse([])
    assert (options.data, options.network, options.budgets) == ("digits", "resnet20", [0.35, 0.5, 0.75])
