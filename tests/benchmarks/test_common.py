"""Measuring in turns, tables and sections of pages."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import user_error

from benchmarks import common


def test_in_turns_calls_subjects_in_turns() -> None:
    calls: list[str] = []

    def subject(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]
    found = common.in_turns({"a": subject("a"), "b": subject("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert common.medians(found) == {"a": 3, "b": 4}


def test_markdown_has_numbers_to_the_right() -> None:
    assert common.markdown([["a", "b"], ["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |\n"


def test_a_section_is_replaced_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n")
    assert common.section_of(page, "one") == "old\n"
    common.replace_section(page, "one", "new\n")
    assert page.read_text() == "before\n<!-- one -->\nnew\n<!-- end of one -->\nafter\n"
    for content in ("", "<!-- end of two -->\n<!-- two -->\n", "<!-- end of two -->\n", "<!-- two -->\n"):
        page.write_text(content)
        with user_error("page.md", "<!-- two -->", "<!-- end of two -->"):
            common.replace_section(page, "two", "")


def test_names_and_numbers_of_the_command_line() -> None:
    assert common.names(" a,b ,a") == ("a", "b")
    assert common.positive("12") == 12
    for text, choices in (("", ()), ("c", ("a", "b"))):
        with pytest.raises(argparse.ArgumentTypeError):
            common.names(text, choices)
    for number in ("0", "-1", "1.5", "1000000"):
        with pytest.raises(argparse.ArgumentTypeError):
            common.positive(number)
