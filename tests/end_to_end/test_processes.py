"""Two real processes on this machine, of two devices each: they train one run, and what befalls one befalls both."""

from __future__ import annotations

import json
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from gcs_emulator import Emulator
from helpers import (
    MAIN,
    ROOT,
    TINY,
    Watcher,
    assert_trees_equal,
    read_arrays_anywhere,
    read_metrics,
    save_run,
    user_environment,
    user_error,
    write_folder,
)

from shared_basis.config import from_config_dict, replace
from shared_basis.evaluation import evaluate as evaluate_module
from shared_basis.training import train as train_module

RECIPE = ROOT / "configs" / "digits_resnet.py"
CHANGES = {"data.train_examples": 128, "data.test_examples": 64, "train.batch_size": 32, "train.epochs": 16,
           "train.evaluate_every": 4, "optimizer.learning_rate": 0.02}
CONFIG = replace(from_config_dict(runpy.run_path(str(RECIPE))["get_config"](TINY)), CHANGES)
FIELDS = (f"--config={RECIPE}:{TINY}", *(f"--config.{name}={value}" for name, value in CHANGES.items()))
STEPS = 64
"""Four steps an epoch; evaluation and a checkpoint at steps 16, 32, 48 and 64."""

SECONDS = 300
"""No process of these tests takes nearly as long: one that does is stuck."""

_START = """
import pathlib, runpy, sys, time
sys.path[:0] = sys.argv[1:3]
import helpers  # which registers the tiny network
from shared_basis.training.loop import Training
signal, advance, finish = pathlib.Path(sys.argv[3]), Training.advance, Training.evaluate
evaluated = []

def wait(*arguments):
    if evaluated:
        while not signal.exists():
            time.sleep(0.02)
        time.sleep(0.5)
    return advance(*arguments)

if sys.argv[3]:
    Training.advance = wait
    Training.evaluate = lambda *arguments: (finish(*arguments), evaluated.append(True))[0]
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs `main.py` with a network that compiles fast. Given a file, steps after the first evaluation wait for it and
take half a second each from then on: however busy the machine is, a signal comes in time."""


class Job:
    """Processes that run `main.py`, each with arguments of its own; within the context of this, none outlives it."""

    def __init__(self, logs: Path, commands: Sequence[Sequence[str]], wait_for: Path | None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        environment = {**user_environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        self._logs = [[logs / f"{process}.{stream}" for stream in ("out", "err")] for process in range(len(commands))]
        self.processes = []
        for arguments, (out, err) in zip(commands, self._logs, strict=True):
            with out.open("w") as stdout, err.open("w") as stderr:
                self.processes.append(subprocess.Popen(
                    [sys.executable, "-c", _START, str(ROOT / "tests"), str(ROOT), str(wait_for or ""), str(MAIN),
                     "--noreport", *arguments],
                    stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment, cwd=logs))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self) -> list[int]:
        """Returns the exit codes, once all have ended."""
        deadline = time.monotonic() + SECONDS
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {SECONDS} seconds: {self.text()}")

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds, while all processes run."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"nothing after {SECONDS} seconds: {self.text()}"
            assert [process.poll() for process in self.processes] == [None] * len(self.processes), self.text()
            time.sleep(0.02)

    def out(self, process: int) -> str:
        """Returns what a process printed, without what JAX's collectives print of themselves."""
        lines = self._logs[process][0].read_text().splitlines(keepends=True)
        # Two threads of Gloo may tear each other's lines.
        return "".join(line for line in lines if not line.startswith("[Gloo]") and "connected peer ranks" not in line)

    def err(self, process: int) -> str:
        """Returns what a process wrote to standard error."""
        return self._logs[process][1].read_text()

    def text(self) -> str:
        """Returns all that all of them wrote, for a message."""
        return "\n".join(text for process in range(len(self.processes))
                         for text in (self.out(process), self.err(process)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def pair(workdir: Path, *arguments: str, fields: Sequence[str] = FIELDS, own: Sequence[Sequence[str]] = ((), ()),
         wait_for: Path | None = None, place: str = "") -> Job:
    """Starts two processes with `fields`, `arguments` and what each has of its `own`, on the run in `workdir`.

    The run may have another `place`, in a bucket; what they print goes beside `workdir` anyway. Steps after the first
    evaluation wait for the file `wait_for` to appear.
    """
    where = f"--coordinator=127.0.0.1:{free_port()}"
    return Job(workdir.with_name(f"{workdir.name}.logs"), [
        (*fields, f"--workdir={place or workdir}", where, "--processes=2", f"--process={process}", *arguments, *more)
        for process, more in enumerate(own)], wait_for)


def finish(job: Job) -> None:
    """Waits for the success of all."""
    with job:
        assert job.wait() == [0] * len(job.processes), job.text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """Returns the workdir of two processes that nothing befell, and what they said; for reading only."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    job = pair(workdir)
    finish(job)
    return workdir, job


def assert_close(metrics: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Asserts that two runs have computed the same, but for rounding."""
    assert [line["step"] for line in metrics] == [16, 32, 48, 64]
    assert [line.keys() for line in metrics] == [other.keys() for other in others]
    for line, other in zip(metrics, others, strict=True):
        for name, value in line.items():
            # Rounding may decide one of the 64 test images.
            error = 1.1 / 64 if "accuracy" in name else 1e-4
            assert value == pytest.approx(other[name], rel=1e-2, abs=error), name


@pytest.mark.slow
def test_only_the_first_process_prints_and_writes(undisturbed: tuple[Path, Job]) -> None:
    workdir, job = undisturbed
    assert [line["step"] for line in read_metrics(workdir)] == [16, 32, 48, 64]
    assert "; 4 × cpu in 2 processes; workdir" in job.out(0)
    assert re.findall(r"^epoch (\d+)/16 .* test accuracy", job.out(0), re.MULTILINE) == ["4", "8", "12", "16"]
    assert job.out(0).count("test accuracy after 16 epochs") == 1
    assert job.out(1) == ""
    assert "epoch" not in job.err(0) + job.err(1)


@pytest.mark.slow
def test_two_processes_train_as_one(undisturbed: tuple[Path, Job], tmp_path: Path) -> None:
    train_module.train(CONFIG, tmp_path / "one", Watcher())
    assert_close(read_metrics(undisturbed[0]), read_metrics(tmp_path / "one"))


@pytest.mark.slow
def test_two_processes_begin_with_the_weights_of_a_run(tmp_path: Path) -> None:
    source = save_run(tmp_path / "source", replace(CONFIG, {"data.train_examples": 0}), {7: 0.5})
    job = pair(tmp_path / "run", f"--init={source}", "--config.train.epochs=2")
    finish(job)
    assert f"starts from step 7 of {source} ({TINY}); the classifier is kept" in job.out(0)
    assert job.out(1) == ""
    there, here = read_arrays_anywhere(source, 7), read_arrays_anywhere(tmp_path / "run", 0)
    for kind in ("params", "batch_stats"):
        assert_trees_equal(here[kind], there[kind])
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [8]
    again = pair(tmp_path / "run", f"--init={tmp_path / 'absent'}", "--config.train.epochs=2")
    with again:
        assert again.wait() == [2, 2], again.text()
    assert f"began with --init={source}" in again.err(0)


@pytest.mark.slow
def test_two_processes_score_as_one(undisturbed: tuple[Path, Job]) -> None:
    workdir, _ = undisturbed
    job = pair(workdir, "--mode=evaluate", "--json", fields=())
    finish(job)
    scores = json.loads(job.out(0))
    assert scores.pop("test_loss") == pytest.approx(read_metrics(workdir)[-1]["test_loss"], rel=1e-5)
    expected = evaluate_module.evaluate(workdir)
    assert expected.pop("test_loss") > 0
    assert scores == expected
    assert scores["test_examples"] == 64
    assert job.out(1) == ""


@pytest.mark.slow
def test_processes_that_read_their_parts_of_a_stream_train_as_with_resident_images(undisturbed: tuple[Path, Job],
                                                                                   tmp_path: Path) -> None:
    job = pair(tmp_path / "run", "--config.data.placement=stream", "--config.data.workers=0")
    finish(job)
    assert "images are streamed" in job.out(0)
    assert_close(read_metrics(tmp_path / "run"), read_metrics(undisturbed[0]))


def stop(workdir: Path, process: int, signum: int) -> tuple[Job, list[int]]:
    """Goes on with a run, sends a signal to one process after the next checkpoint, and returns how both end."""
    signalled = workdir.with_name(f"{workdir.name}.signalled")
    signalled.unlink(missing_ok=True)
    with pair(workdir, wait_for=signalled) as job:
        job.until(lambda: "test accuracy" in job.out(0))
        step = read_metrics(workdir)[-1]["step"]
        job.until((workdir / "checkpoints" / str(step)).exists)
        job.processes[process].send_signal(signum)
        signalled.touch()
        return job, job.wait()


@pytest.mark.slow
def test_a_run_that_is_killed_preempted_and_stopped_equals_one_that_nothing_befell(undisturbed: tuple[Path, Job],
                                                                                   tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    _, (killed, other) = stop(workdir, 0, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    assert other != 0, "JAX ends what is left"
    saved = [16]
    for process, signum, codes in ((1, signal.SIGTERM, [143, 143]), (0, signal.SIGINT, [130, 143])):
        job, ends = stop(workdir, process, signum)
        assert ends == codes, job.text()
        assert f"resumes at step {saved[-1]} of 64" in job.out(0)
        told = re.search(rf"^stopped by {signum.name} and saved at step (\d+) of 64; the same command resumes",
                         job.err(0), re.MULTILINE)
        assert told, job.text()
        assert "saved at" not in job.err(1)
        saved.append(int(told[1]))
    assert 16 < saved[1] < saved[2] < 64
    finish(pair(workdir))
    assert read_metrics(workdir) == read_metrics(undisturbed[0])
    assert_trees_equal(read_arrays_anywhere(workdir, STEPS), read_arrays_anywhere(undisturbed[0], STEPS))


@pytest.mark.slow
def test_a_run_in_a_bucket_that_one_process_is_told_to_stop_is_saved_by_both(
        cloud: Emulator, undisturbed: tuple[Path, Job], tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with pair(tmp_path / "first", place="gs://bucket/run", wait_for=stopped) as job:
        job.until(lambda: "test accuracy" in job.out(0))
        job.processes[1].send_signal(signal.SIGTERM)
        stopped.touch()
        assert job.wait() == [143, 143], job.text()
    told = re.search(r"^stopped by SIGTERM and saved at step (\d+) of 64", job.err(0), re.MULTILINE)
    assert told, job.text()
    again = pair(tmp_path / "second", "--config.train.checkpoint_minutes=0.001", place="gs://bucket/run")
    finish(again)
    assert f"resumes at step {told[1]} of 64" in again.out(0)
    for name in cloud.names(prefix="run/"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(cloud.read(name))
    assert {"log.txt", "log-1.txt"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) > 2, "saves by time, too"
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed[0])
    assert_trees_equal(read_arrays_anywhere(tmp_path / "run", STEPS), read_arrays_anywhere(undisturbed[0], STEPS))


@pytest.mark.slow
def test_the_first_process_notices_the_loss_of_another(undisturbed: tuple[Path, Job], tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    job, (other, killed) = stop(workdir, 1, signal.SIGKILL)
    assert killed == -signal.SIGKILL, job.text()
    # Where they were about to connect, only the heartbeats tell, and JAX itself ends the first process.
    message, code = (("another task died", -signal.SIGABRT) if "stopped sending heartbeats" in job.err(0) else (
        r"^error: process 0: another process was lost .* Saved: checkpoint 16 in .* Start all of them", 2))
    assert re.search(message, job.err(0), re.MULTILINE), job.text()
    assert other == code, job.text()
    finish(pair(workdir))
    assert_trees_equal(read_arrays_anywhere(workdir, STEPS), read_arrays_anywhere(undisturbed[0], STEPS))


@pytest.mark.slow
def test_the_workdir_is_theirs_alone(tmp_path: Path) -> None:
    with pair(tmp_path / "run") as job:
        job.until((tmp_path / "run" / "run.json").exists)
        with user_error("in use by another run", f"process {job.processes[0].pid} on", "--distributed"):
            train_module.train(CONFIG, tmp_path / "run", Watcher())


@pytest.mark.parametrize(("failing", "placement"), [
    (1, "auto"), pytest.param(0, "auto", marks=pytest.mark.slow), pytest.param(1, "stream", marks=pytest.mark.slow)])
def test_a_mistake_that_one_process_meets_ends_both(tmp_path: Path, failing: int, placement: str) -> None:
    images = write_folder(tmp_path / "images", ("cat", "dog"), 8)
    where = [f"--config.data.directory={tmp_path / 'absent' if process == failing else images}" for process in (0, 1)]
    with pair(tmp_path / "run", "--config.data.name=folder", "--config.data.train_examples=0",
              "--config.data.test_examples=0", "--config.train.batch_size=8",
              f"--config.data.placement={placement}", own=[[one] for one in where]) as job:
        assert job.wait() == [2, 2], job.text()
    errors = [[line for line in job.err(process).splitlines() if line.startswith("error: ")] for process in (0, 1)]
    assert [len(lines) for lines in errors] == [1, 1], job.text()
    assert errors[failing][0].startswith(f"error: process {failing}: ")
    assert "absent" in errors[failing][0]
    assert errors[1 - failing] == [f"error: process {1 - failing}: process {failing} has stopped with an "
                                   "error; see its output."]
    assert "Traceback" not in job.text()
    assert not (tmp_path / "run").exists()
