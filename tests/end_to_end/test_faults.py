"""Faults of storage and signals: one line says what is intact, and the same command goes on with nothing lost."""

from __future__ import annotations

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    MAIN,
    ROOT,
    TINY,
    CommandLine,
    Watcher,
    assert_trees_equal,
    read_arrays,
    read_metrics,
    user_environment,
    user_error,
)

from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, OrthogonalityConfig, TrainConfig
from shared_basis.evaluation.evaluate import evaluate
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.preemption import Interrupted
from shared_basis.training.train import train

# When one array of a checkpoint cannot be read, Orbax leaves the reading of others unfinished, which Python tells.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = Config(
    model=ModelConfig(name=TINY), data=DataConfig(train_examples=44, test_examples=30),
    orthogonality=OrthogonalityConfig(elements="shared+unique"),
    optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine", warmup_epochs=0.5),
    train=TrainConfig(epochs=4, batch_size=8, evaluate_every=1))
"""Evaluation at steps 5, 10, 15 and 20."""


@pytest.fixture(autouse=True)
def collect_unfinished_reads() -> Iterator[None]:
    """Has Python tell of them within the test that caused them."""
    yield
    gc.collect()


def run(workdir: Path, **watch: Any) -> Watcher:
    reporter = Watcher(**watch)
    train(CONFIG, workdir, reporter)
    return reporter


def files(workdir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*")
            if path.is_file() and path.name != "log.txt"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of an undisturbed run; for reading only."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    run(workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run that was stopped at step 17, with its checkpoints 15 and 17; for reading only."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    stop(workdir)
    assert {15, 17} <= set(steps(workdir))
    return workdir


def stop(workdir: Path) -> Watcher:
    """Trains until it is stopped at step 17."""
    reporter = Watcher(at=[16])
    with pytest.raises(Interrupted, match="saved at step 17"):
        train(CONFIG, workdir, reporter)
    return reporter


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    """Returns a copy of `stopped`, to be damaged."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_as_undisturbed(workdir: Path, finished: Path) -> None:
    assert read_metrics(workdir) == read_metrics(finished)
    assert_trees_equal(read_arrays(workdir, 20), read_arrays(finished, 20))


# Damaged checkpoints (of single ones see tests/runs/test_checkpoints.py)

def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = largest(checkpoint / "state" / "d")
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_which_is_kept_aside(finished: Path,
                                                                                    copied: Path) -> None:
    truncate(copied / "checkpoints" / "17")
    stop(copied)  # at the same step once more
    truncate(copied / "checkpoints" / "17")
    before = files(copied / "checkpoints" / "17")
    reporter = run(copied)
    warning, = (line for line in reporter.text.getvalue().splitlines() if line.startswith("warning: "))
    assert f"checkpoint 17 in {copied / 'checkpoints'} cannot be restored" in warning
    assert warning.endswith(f"Checkpoint 17 is set aside as {copied / 'damaged' / '17.2'}.")
    assert files(copied / "damaged" / "17.2") == before
    assert "resumes at step 15 of 20\n" in reporter.text.getvalue()
    assert reporter.steps == list(range(16, 21))
    assert_as_undisturbed(copied, finished)


def test_where_all_checkpoints_are_damaged_the_run_is_refused_and_nothing_is_moved(copied: Path) -> None:
    for step in steps(copied):
        truncate(copied / "checkpoints" / str(step))
    before = files(copied)
    with user_error("checkpoint 17", "cannot be restored", "other checkpoints there: "):
        run(copied)
    assert files(copied) == before


def test_a_damaged_checkpoint_that_cannot_be_moved_is_told(copied: Path) -> None:
    truncate(copied / "checkpoints" / "17")
    (copied / "damaged").write_text("a file of the user's")
    before = steps(copied)
    with user_error(str(copied / "checkpoints" / "17"), "cannot be moved", "move it away"):
        run(copied)
    assert steps(copied) == before


# The other files of a run

@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_file_in_the_place_of_a_directory_is_told(tmp_path: Path, place: str) -> None:
    path = tmp_path / "run" / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with user_error(str(tmp_path / "run")):
        run(tmp_path / "run")
    assert path.read_text() == "precious"


def test_a_missing_record_is_told_and_can_be_restored_from_its_copy(copied: Path) -> None:
    (copied / "run.json").unlink()
    with user_error("holds checkpoints and no run.json", f"{copied / 'checkpoints'}/<step>/run/metadata"):
        run(copied)
    shutil.copy(copied / "checkpoints" / "17" / "run" / "metadata", copied / "run.json")
    assert "resumes at step 17 of 20\n" in run(copied).text.getvalue()


# No space

class Full(Watcher):
    """Lets no file grow beyond `size` bytes, as a full disk does, once this step or a line that begins so is shown."""

    def __init__(self, size: int, when: int | str) -> None:
        super().__init__()
        self._size, self._when = size, when

    def show_progress(self, done: int, total: int, text: str) -> None:
        super().show_progress(done, total, text)
        self._fill(done == self._when)

    def info(self, text: str) -> None:
        super().info(text)
        self._fill(text.startswith(str(self._when)))

    def _fill(self, now: bool) -> None:
        if now:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("begun", "size", "when", "parts"), [
    pytest.param(False, 5000, 1, ("a checkpoint cannot be saved", "complete: no checkpoint yet."),
                 id="first checkpoint", marks=pytest.mark.slow),
    pytest.param(True, 600, "compiling", ("metrics.jsonl cannot be written: File too large", "the checkpoints are in "),
                 id="metrics"),
])
def test_a_full_disk_is_told_and_with_space_the_run_goes_on(
        finished: Path, stopped: Path, tmp_path: Path, begun: bool, size: int, when: int | str,
        parts: tuple[str, ...]) -> None:
    workdir = tmp_path / "run"
    if begun:
        shutil.copytree(stopped, workdir)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with user_error(*parts):
            train(CONFIG, workdir, Full(size, when))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    reporter = run(workdir)
    assert reporter.steps == list(range(18 if begun else 1, 21))
    assert_as_undisturbed(workdir, finished)


# The lock

@pytest.mark.slow
def test_a_run_in_use_is_refused_and_can_be_evaluated(copied: Path) -> None:
    with Workdir(copied).locked():
        before = files(copied)
        with user_error(f"workdir {copied} is in use by another run (process {os.getpid()} on "):
            run(copied)
        assert evaluate(copied)["step"] == 17
        assert files(copied) == before


def test_a_run_is_locked_while_it_trains_and_no_longer(finished: Path, tmp_path: Path) -> None:
    class Rival(Watcher):
        refusals = 0

        def show_progress(self, done: int, total: int, text: str) -> None:
            if done == 18 and " images/s " in text:
                with user_error("is in use by another run"), Workdir(tmp_path / "run").locked(patience=0):
                    pass
                self.refusals += 1
    rival = Rival()
    train(CONFIG, tmp_path / "run", rival)
    assert rival.refusals == 1
    assert "this run is finished" in run(tmp_path / "run").text.getvalue()


# The command line

RECIPE = (f"--config={ROOT / 'configs' / 'digits_resnet.py'}:resnet14-s4u1-double", "--noreport",
          "--config.train.epochs=3", "--config.train.evaluate_every=1", "--config.data.train_examples=200",
          "--config.train.batch_size=40")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Returns a function that mounts a file system of memory with these options, or mounts it anew with others."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," * os.path.ismount(place)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", place], text=True,
                              capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system can be mounted by root alone: {done.stderr.strip()}")
        return place
    if not shutil.which("mount"):
        pytest.skip("there is no command to mount a file system")
    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", place], check=True)


def assert_told(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Asserts that the command ended with one line about a mistake, which holds all `parts`."""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert "Traceback" not in done.stdout
    assert done.returncode == 2
    for part in parts:
        assert part in done.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_and_one_that_is_read_only(main: CommandLine, mounted: Callable[[str], Path],
                                                        tmp_path: Path) -> None:
    assert main(*RECIPE, "--workdir=there", cwd=tmp_path).returncode == 0
    command = (*RECIPE, f"--workdir={mounted('size=1500k') / 'run'}")  # space for one checkpoint and a half
    assert_told(main(*command, cwd=tmp_path), "a checkpoint cannot be saved", "complete: checkpoint 5 in ")
    mounted("size=20m,ro")
    assert_told(main(*command, cwd=tmp_path), "cannot be written: Read-only file system")
    evaluated = main("--mode=evaluate", *command[-1:], cwd=tmp_path)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    mounted("size=20m,rw")
    done = main(*command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumes at step 5 of 15\n" in done.stdout
    workdir = tmp_path / "mounted" / "run"
    assert read_metrics(workdir) == read_metrics(tmp_path / "there")
    assert_trees_equal(read_arrays(workdir, 15), read_arrays(tmp_path / "there", 15))


def start(workdir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(MAIN), *RECIPE, f"--workdir={workdir}"], env=user_environment(),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("line", "signum"), [
    ("import", signal.SIGINT), ("compiling", signal.SIGTERM),
    pytest.param("import", signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param("compiling", signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_before_training_ends_the_process_at_once_and_silently(tmp_path: Path, line: str,
                                                                         signum: int) -> None:
    with start(tmp_path / "run") as process:
        assert process.stdout is not None
        if line == "import":  # JAX's libraries are being loaded
            while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
                assert process.poll() is None
        else:
            assert any(text.startswith(line) for text in iter(process.stdout.readline, ""))
        process.send_signal(signum)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == -signum  # as a shell shows it, 130 and 143
    assert (printed, errors) == ("", "")
    assert Workdir(tmp_path / "run").read_record() is None or line == "compiling"
