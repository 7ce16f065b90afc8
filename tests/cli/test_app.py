"""The command line before anything is done: what it takes, what it refuses, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import MAIN, ROOT, user_environment, user_error

from shared_basis.cli.app import main, parse, run_and_exit
from shared_basis.config import RENAMED, Config, ModelConfig, OptimizerConfig, from_config_dict, to_config_dict
from shared_basis.errors import RenamedWarning, UserError

RECIPE = f"--config={ROOT / 'configs' / 'digits_resnet.py'}"


def taken(*arguments: str) -> Any:
    """Returns the values of the flags."""
    return parse(["main.py", *arguments])[0]


def config_of(*arguments: str) -> Config:
    return from_config_dict(taken(*arguments).config)


# What is taken

def test_flags_that_are_options_of_a_mode_are_told_from_the_others() -> None:
    values, options = parse(["main.py"])
    assert {"json", "checkpoint", "images", "budget"} <= set(options)
    assert not {"config", "mode", "workdir", "distributed", "process", "help"} & set(options)
    assert (values.mode, values.checkpoint, values.report, values.images) == ("train", "latest", True, [])


@pytest.mark.parametrize("arguments", [
    (f"{RECIPE}:resnet14", "--config.train.epochs=7"), ("--config.train.epochs=7", f"{RECIPE}:resnet14"),
    ("--config.train.epochs", "7", *f"{RECIPE}:resnet14".split("="))], ids=["file first", "field first", "apart"])
def test_fields_are_set_wherever_they_stand(arguments: Sequence[str]) -> None:
    config = config_of(*arguments)
    assert (config.name, config.model.name, config.train.epochs) == ("digits_resnet-resnet14", "resnet14", 7)


def test_a_value_that_begins_like_a_field_is_a_value() -> None:
    values, _ = parse(["main.py", "--mode=predict", "--output", "config.csv", "--workdir", "config.d"])
    assert (values.output, values.workdir) == ("config.csv", "config.d")


def test_the_default_recipe_is_the_digits() -> None:
    assert config_of("--config.seed=3", "--config.data.mean=(0.25,)").data.mean == (0.25,)
    assert config_of().name == "digits_resnet-resnet20-s8u1-double"


# Earlier names

@pytest.mark.parametrize("old", RENAMED)
def test_a_field_is_set_by_its_earlier_name_with_a_note(old: str) -> None:
    value = {"model.loop": "yes", "optimizer.accumulate": "4", "optimizer.decay": "kernel,basis"}[old]
    with pytest.warns(RenamedWarning, match=f"--config.{old} is now --config.{RENAMED[old]}"):
        earlier = config_of(f"--config.{old}={value}")
    assert earlier == config_of(f"--config.{RENAMED[old]}={value}") != config_of()


def test_a_recipe_may_use_the_earlier_names(tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning) as notes:
        config = Config(model=ModelConfig(loop="yes"),  # type: ignore[call-arg]
                        optimizer=OptimizerConfig(accumulate=4, decay=("basis",)))  # type: ignore[call-arg]
    assert [str(note.message).split()[0] for note in notes] == ["model.loop", "optimizer.accumulate", "optimizer.decay"]
    assert {note.filename for note in notes} == {__file__}, "the line to change is named"
    assert (config.model.scan_blocks, config.optimizer.grad_accumulation_steps) == ("yes", 4)
    assert config.optimizer.weight_decay_labels == ("basis",)
    tree = to_config_dict(config)
    tree.model.loop = "no"
    with pytest.warns(RenamedWarning, match=r"model\.loop is now model\.scan_blocks"):
        assert from_config_dict(tree).model.scan_blocks == "no"
    assert from_config_dict({"model": {"loop": "no"}}).model.scan_blocks == "no"  # as in the record of a run: no note


def test_main_prints_a_note_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(MAIN), "--mode=import", "--checkpoint=absent.pth"], cwd=tmp_path,
                          env=user_environment(), text=True, capture_output=True, timeout=300, check=False)
    note, error = done.stderr.splitlines()
    assert note.startswith("note: --checkpoint=FILE of --mode=import is now --weights=FILE")
    assert error.startswith("error: --weights=absent.pth: no such file")
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])


# What is refused

@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the current directory, with configuration files that are broken."""
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    raise RuntimeError('on purpose')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "parts"), [
    ((RECIPE, "--config.train.epoch=3"), ("'train.epoch'", "Did you mean 'train.epochs'?")),
    (("--config.train=3",), ("'train'",)),
    (("--config.train.epochs=abc", RECIPE), ("abc", "epochs")),
    (("--config.train.epochs",), ("epochs",)),
    (("--mode=test",), ("--mode=test", "train", "evaluate", "summary")),
    (("--wrokdir=x",), ("--wrokdir", "Did you mean --workdir?", "see --help", "--config.seed=1")),
    (("--budget=half",), ("--budget=half",)),
    (("--json=maybe",), ("--json=maybe",)),
    (("train",), ("'train'", "--mode=train")), (("export", "a"), ("'export'", "--mode=export")),
    (("--mode=predict", "--images", "a.png", "b.png"), ("'b.png'", "--images=b.png")),
    (("--mode=report", "--runs=a", "b"), ("'b'", "--runs=b")),
    (("syntax.py",), ("'syntax.py'", "pass a path with its flag", "--workdir=syntax.py")),
    (("--epochs=3",), ("unknown flag --epochs. Did you mean --config.train.epochs?",)),
    (("--max-epochs=3",), ("--max-epochs. Did you mean --config.train.epochs?",)),
    (("--num_classes=3",), ("--num_classes: the classes are those of the images", "(see --help")),
    (("--lr=3",), ("unknown flag --lr", "Did you mean --config.optimizer.learning_rate?")),
    (("--name=x",), ("--config.name or --config.model.name or ",)),
    (("--quiet", "--verbose"), ("--quiet and --verbose", "give one of them")),
    (("--config=.",), ("--config=.: no such file",)),
    (("--config=syntax.py",), ("syntax.py",)), (("--config=raises.py",), ("on purpose",))], ids=" ".join)
@pytest.mark.usefixtures("desk")
def test_what_is_invalid_is_refused_in_one_line(arguments: Sequence[str], parts: Sequence[str]) -> None:
    with user_error(*parts):
        taken(*arguments)


# How it ends

@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores what `run_and_exit` replaces, as the process is its own."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


def interrupted() -> None:
    error = KeyboardInterrupt("saved")
    error.exit_code = 143  # type: ignore[attr-defined]
    raise error


def ended(code: int) -> None:
    sys.exit(code)


def stopped() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("command", "code", "told"), [
    (lambda: None, 0, ""), (lambda: ended(0), 0, ""), (lambda: ended(3), 3, ""), (stopped, 130, "stopped\n"),
    (interrupted, 143, "saved\n")], ids=["done", "exit 0", "exit 3", "stopped", "interrupted"])
@pytest.mark.usefixtures("hook")
def test_the_exit_code_says_how_it_ended(capsys: pytest.CaptureFixture[str], command: Any, code: int,
                                         told: str) -> None:
    with pytest.raises(SystemExit) as end:
        run_and_exit(command)
    assert end.value.code == code
    assert capsys.readouterr().err == told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize(("error", "code"), [
    ("UserError('x')", 2), ("KeyboardInterrupt('saved')", 130), ("Interrupted(signal.SIGTERM, 'saved')", 143)])
def test_the_exit_code_is_the_same_if_nothing_can_be_printed(error: str, code: int) -> None:
    program = ("import signal, sys; sys.path.insert(0, sys.argv[1])\n"
               "from shared_basis.cli.app import run_and_exit\n"
               "from shared_basis.errors import UserError\n"
               "from shared_basis.runtime.preemption import Interrupted\n"
               f"def fail(): raise {error}\nrun_and_exit(fail)")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-c", program, ROOT], stderr=full, timeout=120, check=False)
    assert done.returncode == code


_ABANDONED = """
import sys; sys.path.insert(0, sys.argv[1])
from shared_basis.cli.app import run_and_exit
from shared_basis.errors import UserError
class Abandoned:
    def __del__(self): raise RuntimeError("Event loop is closed")
def fail():
    print(type(Abandoned()).__name__)
    raise UserError("two\\nlines")
run_and_exit(fail)
"""


def test_an_error_is_one_line_and_what_a_failed_save_abandons_prints_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", _ABANDONED, ROOT], text=True, capture_output=True, timeout=120,
                          check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "Abandoned\n", "error: two\\nlines\n")


def test_a_reader_who_has_read_enough_is_no_error() -> None:
    with subprocess.Popen([sys.executable, str(MAIN), "--help"], env=user_environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings are Linux's")
@pytest.mark.parametrize(("program", "given"), [
    ("main.py", ("main.py",)), ("/env/bin/shared-basis", ("/env/bin/shared-basis",)),
    ("/env/shared_basis/__main__.py", ("-m", "shared_basis"))])
def test_main_starts_anew_with_huge_pages_and_keeps_its_arguments(monkeypatch: pytest.MonkeyPatch, program: str,
                                                                  given: tuple[str, ...]) -> None:
    import os
    import signal

    class Replaced(Exception):
        """This process is another one now."""

    started: list[Any] = []

    def replace(*arguments: Any) -> None:
        started.append(arguments)
        raise Replaced
    monkeypatch.setattr(os, "execv", replace)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", *given, "a b"])
    monkeypatch.setattr(sys, "argv", [program, "a b"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with pytest.raises(Replaced):
        main()
    assert started == [(sys.executable, [sys.executable, "-X", "dev", *given, "a b"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_a_user_error_is_one_printable_line() -> None:
    assert str(UserError("a\nb\x1b[2J\udcff × λ")) == "a\\nb\\x1b[2J\\udcff × λ"
