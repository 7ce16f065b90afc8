"""Five commands for each mode as somebody in a hurry mistypes them: each ends at once with one line that helps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import CommandLine, save_run, write_folder

from shared_basis.cli.flags import MODES
from shared_basis.config import from_config_dict

HURRIED = {
    "train": (("train --workdir runs/a", "--mode=train"), ("--epochs=3", "--config.train.epochs"),
              ("--images photos/train/cat/0.png", "takes a directory"), ("--config=resnet20", "follows a colon"),
              ("--init=runs/nothing --workdir=new", "no such run or file")),
    "evaluate": (("--mode=evaluate", "pass a trained run with --workdir"), ("--mode=eval --workdir=runs/a", "evaluate"),
                 ("evaluate runs/a", "--mode=evaluate"), ("--mode=evaluate --workdir=runs/a --checkpoint=23", "22, 44"),
                 ("--mode=evaluate --workdir=runs/a --images=photos", "other classes")),
    "predict": (("--mode=predict --workdir=runs/a", "--images=PATH"),
                ("--mode=predict --workdir=runs/a x.png", "--images=x.png"),
                ("--mode=predict --workdir=runs/a --images x.png notes.txt", "--images=notes.txt"),
                ("--mode=predict --workdir=runs/a --image=x.png", "Did you mean --images?"),
                ("--mode=predict --workdir=runs/a --images=x.png --output=empty", "choose another")),
    "export": (("--mode=export", "pass a trained run with --workdir"),
               ("--mode=export --workdir=runs/a --format=tflite", "onnx|stablehlo|pytorch"),
               ("--mode=export --workdir=runs/a --quantize", "--quantize"),
               ("--mode=export --workdir=runs/a --output=empty", "writes a file"),
               ("--mode=export --workdir=runs/a --format=stablehlo --quantize=int8", "--format=onnx")),
    "inspect": (("--mode=inspect", "pass a trained run with --workdir"), ("--mode=inspect runs/a", "--workdir=runs/a"),
                ("--mode=inspect --workdir=runs/a/checkpoints", "holds no run"),
                ("--mode=inspect --workdir=runs/a --checkpoint=0", "22, 44"),
                ("--mode=inspect --workdir=runs/a --against=runs/none", "runs/none holds no run")),
    "analyze": (("--mode=analyse --workdir=runs/a", "analyze"), ("--mode=analyze --workdir=photos", "holds no run"),
                ("--mode=analyze --workdir=runs/a --checkpoint=final", "latest, best"),
                ("--mode=analyze --workdir=runs/a --output=x.png", "writes a directory"),
                ("--mode=analyze --workdir=runs/a --runs=runs/a", "--mode=report")),
    "report": (("--mode=report", "pass a trained run with --workdir"),
               ("--mode=report --runs=runs/a runs/plain", "--runs=runs/plain"),
               ("--mode=report --runs=empty", "neither a run"), ("--mode=report --runs=runs/*", "neither a run"),
               ("--mode=report --workdir=runs/a --output=x.png", "writes a directory")),
    "summary": (("--mode=summary --config=resnet56", "follows a colon"), ("--mode=summary resnet56", "see --help"),
                ("--mode=summary --config=configs/cifar_resnet.py:resnet56-s16", "s<S>u<U>"),
                ("--mode=summary --config=configs/cifar_resnet.py:ResNet56", "resnet56"),
                ("--mode=summary --workdir=empty", "holds no run")),
    "prepare": (("--mode=prepare --images=x.png", "takes a directory"), ("--mode=prepare cifar10", "see --help"),
                ("--mode=prepare --config.data.name=cifar", "Did you mean 'cifar10'?"),
                ("--mode=prepare --images=empty", "at least 2 classes"),
                ("--mode=prepare --dataset=cifar10", "see --help")),
    "import": (("--mode=import", "--weights=FILE"), ("--mode=import --weights=none.pth", "no such file"),
               ("--mode=import --weights=w.pth --workdir=new", "not a readable state dict"),
               ("--mode=import --weights=runs/a --workdir=new", "is a directory"),
               ("--mode=import w.pth", "pass a path with its flag")),
    "compress": (("--mode=compress", "--source=RUN"), ("--mode=compress --source=runs/none", "no such run or file"),
                 ("--mode=compress --source=runs/plain", "--budget=0.5"),
                 ("--mode=compress --source=runs/plain --budget=50", "at most 1"),
                 ("--mode=compress --source=runs/plain --budget=50%", "--budget=50%")),
}


def test_there_are_five_for_each_mode() -> None:
    assert HURRIED.keys() == MODES.keys()
    assert {len(commands) for commands in HURRIED.values()} == {5}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with two runs, photographs, and what is none of these; nothing is to change it."""
    from configs import digits_resnet

    root = tmp_path_factory.mktemp("desk")
    for name, network in (("a", "resnet14-s4u1-double"), ("plain", "resnet14")):
        save_run(root / "runs" / name, from_config_dict(digits_resnet.get_config(network)), {22: 0.5, 44: 0.25})
    write_folder(root / "photos", ("cat", "dog"), 2)
    (root / "empty").mkdir()
    (root / "x.png").write_bytes((root / "photos" / "train" / "cat" / "0.png").read_bytes())
    (root / "w.pth").write_bytes(b"PK\3\4 and no more")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("mode", HURRIED)
def test_a_mistyped_command_ends_at_once_with_one_line_that_helps(mode: str, desk: Path, main: CommandLine) -> None:
    before = sorted(desk.rglob("*"))
    for command, part in HURRIED[mode]:
        done = main(*shlex.split(command), cwd=desk)
        assert (done.returncode, done.stdout) == (2, ""), command
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), command
        assert part in done.stderr, command
    assert sorted(desk.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "--mode=predict --workdir=runs/a --images=x.png --images=photos/test", "--mode=inspect --workdir=runs/a",
    "--mode=evaluate --workdir=runs/a --checkpoint=22", "--mode=summary --config=cifar_resnet:resnet56",
    "--mode=summary --config.train.epochs=3"])
def test_what_these_lines_say_to_do_works(command: str, desk: Path, main: CommandLine) -> None:
    done = main(*shlex.split(command), cwd=desk)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
