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

import jax
import pytest
from helpers import (
    MAIN,
    ROOT,
    CommandLine,
    Watcher,
    assert_trees_equal,
    read_arrays,
    read_metrics,
    tiny_network,
    user_environment,
    user_error,
)

from shared_basis.cli.app import run_and_exit
from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, OrthogonalityConfig, TrainConfig
from shared_basis.evaluation import evaluate as evaluate_module
from shared_basis.evaluation.evaluate import evaluate
from shared_basis.runs import workdir as workdir_module
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.preemption import Interrupted
from shared_basis.training import loop
from shared_basis.training import start as start_module
from shared_basis.training import train as train_module
from shared_basis.training.train import train

# When one array of a checkpoint cannot be read, Orbax leaves the reading of others unfinished, which Python tells.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = Config(
    model=ModelConfig(name="resnet14"), data=DataConfig(train_examples=44, test_examples=30),
    orthogonality=OrthogonalityConfig(elements="shared+unique"),
    optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine", warmup_epochs=0.5),
    train=TrainConfig(epochs=4, batch_size=8, evaluate_every=1))
"""Evaluation at steps 5, 10, 15 and 20."""


@pytest.fixture(autouse=True, scope="module")
def small_network() -> Iterator[None]:
    """Trains a network that compiles fast; its first epoch is said to be the best, so that its checkpoint stays."""
    measure = loop.Training.measure
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_module, evaluate_module, start_module):
            patch.setattr(module, "build_model", lambda config, spec: tiny_network(len(spec.classes)))
        patch.setattr(sys, "unraisablehook", lambda unraisable: None)  # writes that Orbax leaves unfinished
        patch.setattr(loop.Training, "measure",
                      lambda training, state: {**measure(training, state), "test_accuracy": 1 / int(state.step)})
        yield


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
    """Returns the workdir of a run with checkpoints 5 (the best), 15 and 17, where it was stopped; for reading only."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    stop(workdir)
    assert steps(workdir) == [5, 15, 17]
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


# Damaged checkpoints

def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = largest(checkpoint / "state" / "d")
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(checkpoint: Path) -> None:
    path = largest(checkpoint / "state" / "d")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize(("damage", "damaged", "resumed"), [
    (truncate, (17,), 15), (flip, (17, 15), 5), (empty, (17,), 15)],
    ids=["latest truncated", "two with a flipped bit", "latest empty"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
        finished: Path, copied: Path, damage: Callable[[Path], None], damaged: tuple[int, ...], resumed: int) -> None:
    for step in damaged:
        damage(copied / "checkpoints" / str(step))
    before = {step: files(copied / "checkpoints" / str(step)) for step in damaged}
    reporter = run(copied)
    warnings = [line for line in reporter.text.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(damaged)
    for step, warning in zip(damaged, warnings, strict=True):
        assert f"checkpoint {step} in {copied / 'checkpoints'} cannot be restored" in warning
        assert warning.endswith(f"Checkpoint {step} is set aside as {copied / 'damaged' / f'{step}.1'}.")
        assert files(copied / "damaged" / f"{step}.1") == before[step]
    assert f"resumes at step {resumed} of 20\n" in reporter.text.getvalue()
    assert reporter.steps == list(range(resumed + 1, 21))
    assert_as_undisturbed(copied, finished)


def test_checkpoints_damaged_at_the_same_step_are_all_kept_aside(finished: Path, copied: Path) -> None:
    truncate(copied / "checkpoints" / "17")
    stop(copied)
    flip(copied / "checkpoints" / "17")
    reporter = run(copied)
    assert f"set aside as {copied / 'damaged' / '17.2'}." in reporter.text.getvalue()
    assert sorted(path.name for path in (copied / "damaged").iterdir()) == ["17.1", "17.2"]
    assert_as_undisturbed(copied, finished)


def test_where_all_checkpoints_are_damaged_the_run_is_refused_and_nothing_is_moved(copied: Path) -> None:
    for step in (5, 15, 17):
        truncate(copied / "checkpoints" / str(step))
    before = files(copied)
    with user_error("checkpoint 17", "cannot be restored", "other checkpoints there: 5, 15."):
        run(copied)
    assert files(copied) == before


def test_a_directory_that_looks_like_a_checkpoint_is_set_aside(finished: Path, copied: Path) -> None:
    (copied / "checkpoints" / "999").mkdir()
    reporter = run(copied)
    assert f"set aside as {copied / 'damaged' / '999.1'}." in reporter.text.getvalue()
    assert "resumes at step 17 of 20\n" in reporter.text.getvalue()
    assert_as_undisturbed(copied, finished)
    assert steps(copied) == [5, 17, 20]


@pytest.mark.parametrize("content", ["{}", "[" * 100_000], ids=["no accuracy", "deep"])
def test_a_checkpoint_with_damaged_metrics_is_set_aside(finished: Path, copied: Path, content: str) -> None:
    (copied / "checkpoints" / "15" / "metrics" / "metrics").write_text(content)
    reporter = run(copied)
    assert reporter.text.getvalue().count("warning: ") == 1
    assert f"Checkpoint 15 is set aside as {copied / 'damaged' / '15.1'}." in reporter.text.getvalue()
    assert "resumes at step 17 of 20\n" in reporter.text.getvalue()
    assert_as_undisturbed(copied, finished)


def test_a_damaged_checkpoint_is_not_evaluated_and_stays(copied: Path) -> None:
    flip(copied / "checkpoints" / "17")
    before = files(copied)
    with user_error("checkpoint 17", "cannot be restored", "other checkpoints there: 5, 15."):
        evaluate(copied)
    assert evaluate(copied, "15")["step"] == 15
    assert files(copied) == before


def test_a_damaged_checkpoint_that_cannot_be_moved_is_told(copied: Path) -> None:
    truncate(copied / "checkpoints" / "17")
    (copied / "damaged").write_text("a file of the user's")
    with user_error(str(copied / "checkpoints" / "17"), "cannot be moved", "move it away"):
        run(copied)
    assert steps(copied) == [5, 15, 17]


# The other files of a run

@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_file_in_the_place_of_a_directory_is_told(tmp_path: Path, place: str) -> None:
    path = tmp_path / "run" / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    for workdir in (tmp_path / "run", *([] if place else [tmp_path / "run" / "below"])):
        with user_error(str(workdir)):
            run(workdir)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"config": {}, "data": {}, "versions": {}}'],
                         ids=["empty", "cut off", "deep", "without data"])
def test_a_damaged_record_is_told_before_anything_is_done(copied: Path, content: str) -> None:
    (copied / "run.json").write_text(content)
    before = files(copied)
    for use in (run, evaluate):
        with user_error("run.json is damaged", f"{copied / 'checkpoints'}/<step>/run/metadata"):
            use(copied)
    assert files(copied) == before


def test_a_missing_record_is_told_and_can_be_mended(finished: Path, copied: Path) -> None:
    (copied / "run.json").unlink()
    with user_error("holds checkpoints and no run.json", f"{copied / 'checkpoints'}/<step>/run/metadata"):
        run(copied)
    with user_error("holds no run"):
        evaluate(copied)
    shutil.copy(copied / "checkpoints" / "17" / "run" / "metadata", copied / "run.json")
    run(copied)
    assert_as_undisturbed(copied, finished)


def test_metrics_damaged_in_the_middle_cost_lines_of_metrics_alone(finished: Path, copied: Path) -> None:
    path = copied / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff\x00{]\n" + third)
    run(copied)
    assert_trees_equal(read_arrays(copied, 20), read_arrays(finished, 20))
    there = read_metrics(finished)
    assert read_metrics(copied) == [there[0], *there[2:]]


# No space

class Full(Watcher):
    """Lets no file grow beyond `size` bytes, as a full disk does, once this step or a line that begins so is shown."""

    def __init__(self, size: int, when: int | str) -> None:
        super().__init__()
        self._size, self._when = size, when

    def progress(self, done: int, total: int, text: str) -> None:
        super().progress(done, total, text)
        self._fill(done == self._when)

    def line(self, text: str) -> None:
        super().line(text)
        self._fill(text.startswith(str(self._when)))

    def _fill(self, now: bool) -> None:
        if now:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("begun", "size", "when", "parts"), [
    (False, 100, "images are", ("run cannot be written: File too large", "--workdir")),
    (False, 5000, 1, ("a checkpoint cannot be saved", "complete: no checkpoint yet.")),
    (False, 600, 1, ("cannot be",)),  # the checkpoint of step 5 in the background, and the metrics of step 10
    (True, 5000, 18, ("a checkpoint cannot be saved", "complete: checkpoints 5, 17 in ")),  # 15 had made room
    (True, 600, "compiling", ("metrics.jsonl cannot be written: File too large", "the checkpoints are in ")),
    (True, 1500, 18, ("metrics.jsonl cannot be written: File too large", "the checkpoints are in ")),
], ids=["record", "first checkpoint", "checkpoint and metrics", "last checkpoint", "old metrics", "new metrics"])
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

@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a lock that is taken refused at once."""
    monkeypatch.setattr(workdir_module, "LOCK_ATTEMPTS", 1)


@pytest.mark.usefixtures("impatient")
def test_a_run_in_use_is_refused_to_all_that_write_and_can_be_evaluated(copied: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    variables = tiny_network().init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)), train=False)
    monkeypatch.setattr(start_module, "load_official", lambda file, model: variables)
    with Workdir(copied).locked():
        before = files(copied)
        with user_error(f"workdir {copied} is in use by another run (process {os.getpid()} on "):
            run(copied)
        assert evaluate(copied)["step"] == 17
        assert files(copied) == before
    with Workdir(copied.parent / "new").locked(), user_error("is in use by another run"):
        start_module.import_weights(CONFIG, copied.parent / "new", "weights.pth")
    assert [path.name for path in (copied.parent / "new").iterdir()] == [".lock"]
    start_module.import_weights(CONFIG, copied.parent / "new", "weights.pth")
    assert steps(copied.parent / "new") == [0]


def test_a_run_is_locked_while_it_trains_and_no_longer(tmp_path: Path, impatient: None) -> None:
    refusals: list[str] = []

    class Rival(Watcher):
        def progress(self, done: int, total: int, text: str) -> None:
            if done == 3:
                with user_error("is in use by another run") as caught:
                    run(tmp_path / "run")
                refusals.append(str(caught.value))
    train(CONFIG, tmp_path / "run", Rival())
    assert len(refusals) == 1
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


def test_a_bucket_is_refused_and_help_is_no_mistake(main: CommandLine, tmp_path: Path) -> None:
    for mode in ("train", "evaluate"):
        assert_told(main(*RECIPE, f"--mode={mode}", "--workdir=gs://bucket/run", cwd=tmp_path),
                    "workdir gs://bucket/run: must be a directory", "mount the bucket")
    assert list(tmp_path.iterdir()) == []
    assert main("--help", cwd=tmp_path).returncode == 0


def test_what_a_failed_save_abandons_prints_no_traceback() -> None:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from shared_basis.cli.app import run_and_exit\n"
            "class Abandoned:\n    def __del__(self): raise RuntimeError('Event loop is closed')\n"
            "run_and_exit(lambda: print(type(Abandoned()).__name__))")
    done = subprocess.run([sys.executable, "-c", code, ROOT], text=True, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Abandoned\n", "")


@pytest.mark.parametrize("arguments", [["--help"], [*RECIPE, "--mode=summary"]])
def test_a_reader_who_has_read_enough_is_no_mistake(arguments: list[str]) -> None:
    with subprocess.Popen([sys.executable, str(MAIN), *arguments], env=user_environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 1)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_command_that_ends_the_process_itself_keeps_its_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a benchmark's parser does, whose mistakes once ended with 0."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which `run_and_exit` replaces
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: sys.exit(code))
    assert ended.value.code == code


def start(workdir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(MAIN), *RECIPE, f"--workdir={workdir}"], env=user_environment(),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("line", ["import", "compiling"])
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
