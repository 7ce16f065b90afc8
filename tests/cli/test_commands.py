"""What a mode takes, and what it refuses before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from helpers import ROOT, CommandLine, user_error

from shared_basis.cli import commands
from shared_basis.cli.commands import MODES, MODES_BY_FLAG, Request
from shared_basis.config import Config


def request(**fields: Any) -> Request:
    return Request(Config(), {}, "absent", True, **fields)


@pytest.mark.parametrize(("mode", "fields", "parts"), [
    ("evaluate", {"against": "5"}, ("--against is only valid with --mode=inspect or analyze,", "--mode=evaluate")),
    ("report", {"against": "5"}, ("--against",)), ("inspect", {"output": "x"}, ("--output",)),
    ("summary", {"checkpoint": "12"}, ("--checkpoint",)), ("inspect", {"images": ["a.png"]}, ("--images", "predict")),
    ("evaluate", {"runs": ["a"]}, ("--runs",)), ("predict", {"fold": "none"}, ("--fold", "export")),
    ("predict", {"format": "stablehlo"}, ("--format",)), ("evaluate", {"tensorboard": True}, ("--tensorboard",)),
    ("train", {"budget": 0.5}, ("--budget", "compress")), ("report", {"spectra": True}, ("--spectra",)),
    ("compress", {"output": "x.csv"}, ("--output", "--spectra", "--workdir"))])
def test_flags_of_other_modes_are_refused(mode: str, fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        commands.run(mode, request(**fields))


@pytest.mark.parametrize(("mode", "output"), [("export", "directory"), ("predict", "directory"), ("report", "file"),
                                              ("analyze", "file")])
def test_an_output_of_the_other_kind_is_refused_before_anything_is_done(mode: str, output: str, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "it", {"file": "directory", "directory": "file"}[output]
    monkeypatch.setitem(MODES, mode, lambda _: ({}, "done"))
    assert commands.run(mode, request(output=str(path)))[1] == "done"
    path.mkdir() if output == "directory" else path.touch()
    if mode not in ("analyze", "report"):
        with user_error(f"--output={path / 'absent' / 'x'}: the directory {path / 'absent'} does not exist"):
            commands.run(mode, request(output=str(path / "absent" / "x")))
    with user_error(f"--output={path} is a {output}", f"--mode={mode} writes a {other}"):
        commands.run(mode, request(output=str(path)))


def test_what_a_mode_takes_and_defaults_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(Request.__dataclass_fields__)
    assert names >= set(MODES_BY_FLAG)
    assert all(set(taken) <= set(MODES) for taken in MODES_BY_FLAG.values())
    for mode in MODES:
        monkeypatch.setitem(MODES, mode, lambda _: ({}, "done"))
        assert commands.run(mode, request(images=[], runs=[], report=False)) == ({}, "done")  # --noreport suits all
        for name in (name for name, taken in MODES_BY_FLAG.items() if mode in taken):
            assert commands.run(mode, request(**{name: "7"})) == ({}, "done")


def test_several_processes_share_training_and_evaluation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for mode in MODES:
        monkeypatch.setitem(MODES, mode, lambda _: ({}, "done"))
        if mode in ("train", "evaluate"):
            assert commands.run(mode, request()) == ({}, "done")
        else:
            with user_error(f"--mode={mode} runs in one process"):
                commands.run(mode, request())


def test_a_tilde_is_the_users_home(main: CommandLine, tmp_path: Path) -> None:
    for flag in ("--mode=inspect --workdir=~/absent", "--mode=report --runs=~/absent",
                 "--mode=compress --source=~/absent --config=configs/digits_resnet.py:resnet20-s8u1"):
        done = main(*flag.split(), cwd=ROOT)
        assert done.returncode == 2
        assert str(Path.home() / "absent") in done.stderr
    done = main("--mode=report", "--workdir=absent", "--output=~", cwd=tmp_path)
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())
