"""`main.py` as a user runs it: what it prints, what it leaves, how it ends, and what it says to invalid input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import MAIN, ROOT, CommandLine, user_environment, write_folder

RECIPE = f"--config={ROOT / 'configs' / 'digits_resnet.py'}"
SMALL = (f"{RECIPE}:resnet14-s4u1-double", "--config.train.epochs=2", "--config.data.train_examples=200",
         "--config.train.batch_size=40")


@pytest.fixture(scope="module")
def trained(main: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Returns the directory in which `SMALL` was trained, and what that printed; for reading only."""
    directory = tmp_path_factory.mktemp("user")
    return directory, main(*SMALL, cwd=directory)


def last_metrics(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


# Each mode

def test_training_leaves_a_run_in_the_default_workdir(trained: Any) -> None:
    directory, done = trained
    assert (done.returncode, done.stderr) == (0, "")
    workdir = directory / "runs" / "digits_resnet-resnet14-s4u1-double"
    assert sorted(path.name for path in workdir.iterdir()) == [
        ".lock", "checkpoints", "log.txt", "metrics.csv", "metrics.jsonl", "run.json"]
    assert [path.name for path in directory.iterdir()] == ["runs"]
    assert {"10"} <= {path.name for path in (workdir / "checkpoints").iterdir()}
    accuracy = f"{100 * last_metrics(workdir)['test_accuracy']:.2f} %"
    *_, metrics, result, counts = done.stdout.splitlines()
    assert metrics.startswith("epoch 2/2")
    assert accuracy in metrics
    assert result.startswith(f"resnet14-s4u1-double: {accuracy} test accuracy after 2 epochs")
    assert "best test epoch, chosen on the test images as in the paper" in result
    assert re.match(r"109,190 parameters \(36\.6 % fewer .* resnet14\), 1,054,336 MACs \(35\.4 % fewer", counts)
    assert "\x1b" not in done.stdout


def test_the_same_command_again_changes_nothing(main: CommandLine, trained: Any) -> None:
    directory, first = trained
    before = (directory / "runs" / "digits_resnet-resnet14-s4u1-double" / "metrics.jsonl").read_bytes()
    again = main(*SMALL, cwd=directory)
    assert again.returncode == 0
    assert "this run is finished" in again.stdout
    assert again.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]
    assert (directory / "runs" / "digits_resnet-resnet14-s4u1-double" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("checkpoint", "chosen"), [
    ("10", ""), ("best", " (best test epoch, chosen on these images as in the paper)")])
def test_evaluation_needs_the_workdir_alone(main: CommandLine, trained: Any, tmp_path: Path, checkpoint: str,
                                            chosen: str) -> None:
    workdir = trained[0] / "runs" / "digits_resnet-resnet14-s4u1-double"
    done = main("--mode=evaluate", f"--workdir={workdir}", f"--checkpoint={checkpoint}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    accuracy = f"{100 * last_metrics(workdir)['test_accuracy']:.2f} %"
    result, = done.stdout.splitlines()
    assert result.startswith(f"resnet14-s4u1-double at step 10 of {workdir}{chosen}: test accuracy {accuracy}, top-5 ")
    assert result.endswith("on 355 images")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_evaluation_takes_overrides_of_the_data(main: CommandLine, trained: Any) -> None:
    directory, _ = trained
    workdir = "--workdir=runs/digits_resnet-resnet14-s4u1-double"
    done = main(RECIPE, "--mode=evaluate", workdir, "--config.data.test_examples=50", "--json", cwd=directory)
    assert (done.returncode, json.loads(done.stdout)["test_examples"]) == (0, 50)
    refused = main(RECIPE, "--mode=evaluate", workdir, "--config.model.name=resnet20", cwd=directory)
    assert_mistake(refused, "--config.model.name", "cannot be changed")


@pytest.mark.slow
def test_json_is_one_object_on_standard_output(main: CommandLine, trained: Any, tmp_path: Path) -> None:
    directory, _ = trained
    summary = main(*SMALL, "--mode=summary", "--json", cwd=tmp_path)
    shutil.copytree(directory / "runs", tmp_path / "runs")
    train = main(*SMALL, "--json", cwd=tmp_path)
    evaluate = main(*SMALL[:1], "--mode=evaluate", "--json", cwd=tmp_path)
    for done in (summary, train, evaluate):
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == 1
    for done in (summary, train):
        result = json.loads(done.stdout)
        assert (result["parameters"], result["macs"]) == (109190, 1054336)
    assert "this run is finished" in train.stderr
    assert json.loads(train.stdout)["test_accuracy"] == json.loads(evaluate.stdout)["test_accuracy"]


def test_summary_needs_no_data(main: CommandLine, tmp_path: Path) -> None:
    done = main(f"--config={ROOT / 'configs' / 'cifar_resnet.py'}", "--mode=summary",
                f"--config.data.directory={tmp_path / 'absent'}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    title, header, *rows, total, saving = done.stdout.splitlines()
    assert title.startswith("resnet56-s16u1-double, images 32×32×3, 10 classes")
    assert [row.split()[0] for row in rows] == ["stem", "group1", "group2", "group3", "head"]
    for column in range(1, 6):
        cells = [int(row.split()[column].replace(",", "")) for row in (*rows, total)]
        assert sum(cells[:-1]) == cells[-1]
    assert len({len(line) for line in (header, *rows, total)}) == 1
    assert "62.6 % fewer" in saving
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_of_images_trains_and_evaluates(main: CommandLine, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", classes=("cat", "dog", "owl"), count=4, size=10)
    fields = ("--config.data.name=folder", f"--config.data.directory={images}", "--config.data.image_size=8",
              "--config.train.epochs=2", "--config.train.batch_size=6")
    done = main(f"{RECIPE}:resnet14", *fields, "--workdir=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 training and 12 test images of 8×8×3, 3 classes" in done.stdout
    again = main(RECIPE, "--mode=evaluate", "--workdir=run", "--config.data.name=folder", "--json", cwd=tmp_path)
    assert again.returncode == 0, "what is set need suit the run alone, not the default recipe"
    images.rename(tmp_path / "moved")
    moved = main(RECIPE, "--mode=evaluate", "--workdir=run", f"--config.data.directory={tmp_path / 'moved'}", "--json",
                 cwd=tmp_path)
    assert json.loads(moved.stdout)["test_accuracy"] == last_metrics(tmp_path / "run")["test_accuracy"]
    assert_mistake(main(RECIPE, "--mode=evaluate", "--workdir=run", cwd=tmp_path), str(images), "cannot be found")


def heed_signals() -> None:
    """Where the tests run under nohup, or in the background, their processes would ignore SIGHUP or SIGINT too."""
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)


@pytest.mark.parametrize("fields", [
    pytest.param((), id="resident", marks=pytest.mark.slow),
    pytest.param(("--config.data.placement=stream", "--config.data.workers=1"), id="streamed",
                 marks=pytest.mark.slow)])
def test_signals_stop_a_run_that_the_same_command_continues(tmp_path: Path, fields: tuple[str, ...]) -> None:
    command = [sys.executable, str(MAIN), "--noreport", *SMALL[:1], *SMALL[2:], "--config.train.epochs=1000",
               "--config.train.evaluate_every=500", "--workdir=run", *fields]
    saved = None
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)):
        with subprocess.Popen(command, cwd=tmp_path, env=user_environment(), text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed_signals) as process:
            lines = []
            while not lines or not lines[-1].startswith("ready in" if saved is None else "resumes at step"):
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            os.killpg(process.pid, signum)  # as a terminal does, which tells every process
            _, errors = process.communicate(timeout=120)
        assert process.returncode == code
        message = re.fullmatch(r"\nstopping after this step; a second one stops at once\nstopped by (\w+) and saved at "
                               r"step ([\d,]+) of 5,000; the same command resumes from "
                               r"there\n", errors)
        assert message, errors
        assert message[1] == signum.name
        assert saved is None or f"resumes at step {saved} of 5,000\n" in lines
        saved = message[2]


# Mistakes

def assert_mistake(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Asserts that the command ended with one line about a mistake, which holds all `parts`."""
    assert "Traceback" not in done.stdout + done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert done.returncode == 2
    for part in parts:
        assert part in done.stderr


MISTAKES = {  # one a mechanism: those of the command line itself are in tests/cli, those of fields in tests/config
    "flag": (("--wrokdir=x",), ("--wrokdir", "Did you mean --workdir?", "see --help")),
    "value of a field": ((RECIPE, "--config.train.epochs=-1"), ("train.epochs=-1", "positive")),
    "network": ((f"{RECIPE}:resnet57",), ("resnet57", "resnet56", "resnet56-s16u1-double")),
    "file of another program": (("--config=foreign.py",), ("batch_size",)),
    "batch larger than the data": ((*SMALL, "--config.train.batch_size=400"), ("train.batch_size=400", "only 200")),
    "mean of three channels": ((RECIPE, "--config.data.mean=(0.1,0.2,0.3)"),
                               ("data.mean=(0.1, 0.2, 0.3)", "1 channel;")),
    "data that is not prepared": (
        (f"--config={ROOT / 'configs' / 'cifar_resnet.py'}", "--config.data.directory=absent",
         "--config.data.manual_directory=nowhere"), ("nowhere", "cifar10")),
    "workdir below a file": ((*SMALL, "--workdir=foreign.py/run"), ("workdir foreign.py/run",)),
    "workdir that is an address": ((*SMALL, "--workdir=s3://bucket/run"), ("s3://bucket/run", "gs://BUCKET/DIRECTORY")),
    "compression of no run": (("--mode=compress", "--source=absent", "--budget=0.5"),
                              ("--source=absent: no such run or file",)),
    "evaluation without a run": ((RECIPE, "--mode=evaluate", "--workdir=absent"), ("absent", "holds no run")),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with a configuration file of another program."""
    directory = tmp_path_factory.mktemp("desk")
    (directory / "foreign.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'batch_size': 3})\n")
    return directory


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(main: CommandLine, desk: Path, mistake: str) -> None:
    before = sorted(desk.rglob("*"))
    arguments, parts = MISTAKES[mistake]
    assert_mistake(main(*arguments, cwd=desk), *parts)
    assert sorted(desk.rglob("*")) == before


def test_mistakes_about_a_run_are_told(main: CommandLine, trained: Any) -> None:
    directory, _ = trained
    workdir = directory / "runs" / "digits_resnet-resnet14-s4u1-double"
    before = sorted(workdir.rglob("*"))
    other = main(*SMALL, "--config.seed=1", "--config.orthogonality.weight=1.0", cwd=directory)
    assert_mistake(other, "seed: 1 now, 0 there", "orthogonality.weight: 1.0 now, 10.0 there", "--workdir")
    unknown = main(RECIPE, "--mode=evaluate", f"--workdir={workdir}", "--checkpoint=7", cwd=directory)
    assert_mistake(unknown, "checkpoint '7'", "10")
    assert sorted(workdir.rglob("*")) == before


def test_a_damaged_image_of_a_folder_is_told_in_one_line(main: CommandLine, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", classes=("cat", "dog"), count=2)
    (images / "test" / "dog" / "1.png").write_bytes(b"not an image")
    done = main(f"{RECIPE}:resnet14", "--config.data.name=folder", "--config.data.directory=images",
                "--config.train.batch_size=2", cwd=tmp_path)
    assert_mistake(done, "1.png", "not an image")
    assert not (tmp_path / "runs").exists()


def test_a_damaged_checkpoint_is_told_in_one_line(main: CommandLine, trained: Any, tmp_path: Path) -> None:
    shutil.copytree(trained[0] / "runs", tmp_path / "runs")
    data = tmp_path / "runs" / "digits_resnet-resnet14-s4u1-double" / "checkpoints" / "10" / "state" / "d"
    for path in data.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    done = main(*SMALL[:1], "--mode=evaluate", cwd=tmp_path)
    assert_mistake(done, "checkpoint 10", "cannot be restored")
    assert len(done.stderr) < 600
