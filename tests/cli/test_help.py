"""Help and version: every mode and flag is explained, and every example of the help is understood."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from helpers import user_error

from shared_basis.cli import help
from shared_basis.cli.app import parse
from shared_basis.cli.flags import CONFIG, FLAGS, MODES, MODES_BY_FLAG


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, program: str = "main.py") -> str:
    """Returns what the command line prints before it ends well."""
    with pytest.raises(SystemExit) as ended:
        parse([program, *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--help=true",), ("help",),
                                       ("--mode=test", "--help")], ids=" ".join)
def test_help_names_every_mode_and_flag(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *arguments)
    for name, mode in MODES.items():
        assert f"\n  {name:24}  {mode.purpose[:40]}" in text
    for flag in (CONFIG, *FLAGS):
        assert text.count(f"\n  {flag.usage}") == 1


@pytest.mark.parametrize("mode", MODES)
def test_help_of_a_mode_names_its_flags_and_no_others(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "help", mode)
    assert text == printed(capsys, f"--mode={mode}", "--help") == printed(capsys, "help", f"--mode={mode}")
    assert text.startswith(f"--mode={mode}: {MODES[mode].purpose}\n")
    for flag in FLAGS:
        assert (f"\n  {flag.usage}" in text) == (mode in flag.modes)
        assert flag.name not in MODES_BY_FLAG or flag.modes == MODES_BY_FLAG[flag.name]


@pytest.mark.parametrize(("mode", "arguments"), [(mode, arguments) for mode, each in MODES.items()
                                                 for arguments, _ in each.examples])
def test_an_example_is_understood(mode: str, arguments: str) -> None:
    words = shlex.split(arguments.replace("--config=...", "--config=cifar_resnet"))
    values, options = parse(["main.py", *words])
    assert values.mode == mode
    assert all(mode in MODES_BY_FLAG.get(name, MODES) for name in options if values[name].present)


@pytest.mark.parametrize(("program", "shown"), [
    ("/opt/env/bin/shared-basis", "shared-basis"), ("main.py", "python main.py"),
    ("/opt/shared_basis/__main__.py", "python -m shared_basis")])
def test_help_calls_the_program_as_the_user_does(program: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"usage: {shown} [--mode=MODE]" in printed(capsys, "--help", program=program)


@pytest.mark.parametrize(("columns", "widest"), [(20, 58), (80, 80), (300, 100)])
def test_explanations_are_wrapped_to_the_terminal(columns: int, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = [line for line in help.render("main.py").splitlines() if line.startswith(" " * 28)]
    assert widest - 12 < max(map(len, lines)) <= widest


@pytest.mark.parametrize("topics", [("trian",), ("train", "export"), ("--json",)], ids=" ".join)
def test_help_on_what_is_no_mode_names_the_modes(topics: tuple[str, ...]) -> None:
    with user_error(f"help {' '.join(topics)}: give exactly one mode", ", ".join(MODES)):
        parse(["main.py", "help", *topics])


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                 tmp_path: Path) -> None:
    import flax
    import jax

    import shared_basis
    line = printed(capsys, "--version")
    assert line.startswith(f"shared-basis {shared_basis.__version__} (jax {jax.__version__}, flax {flax.__version__}, ")
    assert line.count("\n") == 1

    def missing(name: str) -> str:
        raise help.importlib.metadata.PackageNotFoundError
    monkeypatch.setattr(help.importlib.metadata, "version", missing)
    assert printed(capsys, "--version").startswith("shared-basis (not installed) (jax (not installed), ")
