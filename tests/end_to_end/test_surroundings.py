"""The command line where the surroundings are not a shell's with a terminal in UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import MAIN, user_environment

_DRIVER = """
import runpy, sys, threading
print("begins", file=open("log", "a"))
sys.argv = ["main.py", *sys.argv[1:]]

def run():
    try:
        runpy.run_path(MAIN, run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code, file=open("log", "a"))

RUN
print("goes on", file=open("log", "a"))
"""


def python(*arguments: str, cwd: Path, shell: str = "", umask: int = -1, without: Sequence[str] = (),
           **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with nothing set that a shell does not set, nor what is `without`; `shell` ends the command line."""
    usual = {name: value for name, value in user_environment().items() if name not in ("GLIBC_TUNABLES", *without)}
    command = [sys.executable, *arguments]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(command, cwd=cwd, env={**usual, **environment}, capture_output=True, timeout=300, check=False,
                          umask=umask, encoding=environment.get("PYTHONIOENCODING", "utf-8"))


@pytest.mark.parametrize(("run", "arguments", "code"), [
    ("run()", ["--mode=summary"], "0"),
    pytest.param("run()", ["--mode=none"], "2", marks=pytest.mark.slow),
    pytest.param("t = threading.Thread(target=run); t.start(); t.join()", ["--workdir=nowhere", "--mode=evaluate"], "2",
                 marks=pytest.mark.slow)])
def test_a_program_that_runs_it_goes_on(run: str, arguments: list[str], code: str, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(_DRIVER.replace("MAIN", repr(str(MAIN))).replace("RUN", run))
    done = python("driver.py", *arguments, cwd=tmp_path)
    assert (tmp_path / "log").read_text().splitlines() == ["begins", f"ended with {code}", "goes on"], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_may_have_any_encoding(encoding: str, tmp_path: Path) -> None:
    done = python(str(MAIN), "--mode=summary", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "parameters" in done.stdout


@pytest.mark.parametrize(("redirection", "code"), [
    (">&-", 0), pytest.param(">&- 2>&-", 0, marks=pytest.mark.slow),
    pytest.param("> /dev/full", 2, marks=[pytest.mark.slow, pytest.mark.skipif(
        not os.path.exists("/dev/full"), reason="Linux has /dev/full")])])
def test_output_may_be_closed_or_full(redirection: str, code: int, tmp_path: Path) -> None:
    done = python(str(MAIN), "--mode=summary", cwd=tmp_path, shell=redirection)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("error: the result cannot be written to standard output: No space left" in done.stderr) == bool(code)


@pytest.mark.slow
def test_training_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    arguments = [str(MAIN), "--noreport", "--config.train.epochs=2", "--config.data.train_examples=64",
                 "--config.data.test_examples=8", "--config.train.batch_size=32", "--workdir=run"]
    done = python(*arguments, cwd=tmp_path, shell="| head -n 1; exit ${PIPESTATUS[0]}")
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith('{"step": 4, ')


NOBODY = "import pwd\ndef getpwuid(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\npwd.getpwuid = getpwuid\n"
"""As in a container that runs under a number which its /etc/passwd does not have."""

SMALL = ("--config=digits_resnet:resnet14-s4u1-double", "--config.train.epochs=2", "--config.data.train_examples=64",
         "--config.data.test_examples=8", "--config.train.batch_size=32")


@pytest.fixture
def bare(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Returns an empty directory, and the environment of a user without name and home, with odd settings."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOBODY)
    (tmp_path / "here").mkdir()
    return tmp_path / "here", {"PYTHONPATH": str(tmp_path / "site"), "TZ": "Nowhere/Never", "PYTHONOPTIMIZE": "2"}


NAMELESS = ("HOME", "USER", "LOGNAME", "USERNAME")


def test_a_user_may_have_no_name_no_home_and_odd_settings(bare: tuple[Path, dict[str, str]]) -> None:
    here, environment = bare
    done = python(str(MAIN), "--mode=summary", cwd=here, without=NAMELESS, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "parameters" in done.stdout
    assert not list(here.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("home", ["", "/proc", "/nonexistent"])
def test_all_modes_work_for_such_a_user_and_leave_nothing_elsewhere(bare: tuple[Path, dict[str, str]],
                                                                    home: str) -> None:
    here, environment = bare
    if home:
        environment["HOME"] = home
    package = _files(MAIN.parent / "shared_basis") | _files(MAIN.parent / "configs")
    refused = python(str(MAIN), "--mode=analyze", "--workdir=run", cwd=here, without=NAMELESS, **environment)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "PYTHONOPTIMIZE" in refused.stderr
    for arguments in (SMALL, *((f"--mode={mode}",) for mode in ("evaluate", "report", "inspect", "export", "analyze"))):
        if arguments == ("--mode=analyze",):
            del environment["PYTHONOPTIMIZE"]
        done = python(str(MAIN), *arguments, "--workdir=run", cwd=here, without=NAMELESS, **environment)
        told = [line for line in done.stderr.splitlines() if "onnxruntime:Default, telemetry" not in line]  # its own
        assert (done.returncode, told) == (0, []), arguments
        assert done.stdout.strip()
    assert [path.name for path in here.iterdir()] == ["run"]
    assert _files(MAIN.parent / "shared_basis") | _files(MAIN.parent / "configs") == package  # it may be read-only


def _files(directory: Path) -> dict[Path, float]:
    """Returns when each file below `directory` was written, without those that Python compiles."""
    return {path: path.stat().st_mtime for path in directory.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_user_wants(umask: int, tmp_path: Path) -> None:
    done = python(str(MAIN), *SMALL, "--workdir=run", cwd=tmp_path, umask=umask)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a directory that not even root can write to")
def test_a_directory_that_cannot_be_written_is_named() -> None:
    done = python(str(MAIN), *SMALL, cwd=Path("/proc"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: workdir runs/digits_resnet-resnet14-s4u1-double cannot be written: ")
    assert "--workdir" in done.stderr
    assert done.stderr.count("\n") == 1
