"""Which output of a file of weights is which class: lists that name them, and what is said without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import user_error

from shared_basis.interop.classes import describe_order, name_outputs, read_classes


@pytest.mark.parametrize(("content", "names"), [
    ("cat\ndog\n\n  red panda  \n", [("cat",), ("dog",), ("red panda",)]),
    ("\ufeffcat\r\ndog\r\n", [("cat",), ("dog",)]),
    ("n01440764 tench, Tinca tinca\nn01443537 goldfish", [
        ("n01440764", "tench, Tinca tinca"), ("n01443537", "goldfish")]),
    (json.dumps(["cat", "dog"]), [("cat",), ("dog",)]),
    (json.dumps({"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"]}), [
        ("n01440764", "tench"), ("n01443537", "goldfish")])])
def test_lists_of_names_are_read(tmp_path: Path, content: str, names: Any) -> None:
    path = tmp_path / "classes"
    path.write_text(content, encoding="utf-8", newline="")
    assert read_classes(str(path)) == names


@pytest.mark.parametrize("content", [b"[1, 2]", b'{"0": "a", "2": "b"}', b'{"cat": 0}', b"[[]]", b"[", b"\xff\xfe"])
def test_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "classes"
    path.write_bytes(content)
    with user_error(f"--classes={path}", "one name per line"):
        read_classes(str(path))


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with user_error("--classes=", "cannot be read: No such file"):
        read_classes(str(tmp_path / "absent"))


NAMES = [("n01440764", "tench"), ("n01443537", "goldfish"), ("n01484850", "great white shark")]


def test_outputs_have_the_names_of_the_data() -> None:
    assert name_outputs(NAMES, 3, ("goldfish", "tench"), "list", "w.pth") == ("tench", "goldfish", "n01484850")
    assert name_outputs(NAMES, 3, ("n01484850",), "list", "w.pth")[2] == "n01484850"


@pytest.mark.parametrize(("names", "outputs", "classes", "parts"), [
    (NAMES, 4, ("tench",), ("holds 3 names", "w.pth has 4 outputs")),
    (NAMES, 3, ("tench", "trout"), ("class 'trout'", "none of the names")),
    ([("crane",), ("crane",)], 2, ("crane",), ("class 'crane'", "outputs 0 and 1"))])
def test_a_list_that_does_not_fit_is_refused(names: Any, outputs: int, classes: Any, parts: tuple[str, ...]) -> None:
    with user_error("--classes=list", *parts):
        name_outputs(names, outputs, classes, "list", "w.pth")


def test_the_order_is_said_and_numbers_out_of_order_surprise() -> None:
    text, surprising = describe_order(tuple(sorted(map(str, range(12)))), "w.pth")
    assert surprising
    assert "0 '0', 1 '1', 2 '10', 3 '11', 4 '2', 5 '3', …, 11 '9'" in text
    assert "--classes=FILE" in text
    for classes in (("0", "1", "2"), ("cat", "dog")):
        assert not describe_order(classes, "w.pth").surprising
