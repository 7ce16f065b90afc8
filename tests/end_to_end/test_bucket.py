"""Runs in a bucket, from the command line: all modes, and what is computed is what a run on a disk computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gcs_emulator import Emulator
from helpers import ROOT, CommandLine, assert_trees_equal, read_arrays_anywhere
from PIL import Image

RECIPE = f"--config={ROOT / 'configs' / 'digits_resnet.py'}"
FEW = ("--config.train.epochs=2", "--config.data.train_examples=200", "--config.train.batch_size=40",
       "--config.data.test_examples=40")
pytestmark = pytest.mark.slow

PLACE = "gs://bucket/runs/shared"


@pytest.fixture(scope="module")
def directory(cloud: Emulator, main: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory to run commands in; a shared and a plain network are trained in the bucket."""
    directory = tmp_path_factory.mktemp("user")
    for name, place in (("resnet14-s4u1-double", PLACE), ("resnet14", "gs://bucket/runs/plain")):
        done = main(f"{RECIPE}:{name}", *FEW, f"--workdir={place}", "--tensorboard", cwd=directory)
        assert done.returncode == 0, done.stderr
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(directory / "image.png")
    return directory


@pytest.fixture(scope="module")
def run_json(main: CommandLine, directory: Path) -> Any:
    """Runs a command that must succeed, and returns its result."""
    def run(*arguments: str) -> Any:
        done = main(*arguments, "--json", cwd=directory)
        assert done.returncode == 0, done.stderr
        assert not [path for path in directory.iterdir() if path.name not in ("image.png", "here", "weights")]
        return json.loads(done.stdout)
    return run


def test_a_run_in_a_bucket_computes_what_one_on_a_disk_does(cloud: Emulator, main: CommandLine, directory: Path,
                                                            tmp_path: Path) -> None:
    done = main(f"{RECIPE}:resnet14-s4u1-double", *FEW, f"--workdir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in cloud.names(prefix="runs/shared/"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(cloud.read(name))
    there, here = tmp_path / "runs" / "shared", tmp_path / "run"
    assert_trees_equal(read_arrays_anywhere(there, 10), read_arrays_anywhere(here, 10))
    assert sorted(path.name for path in there.iterdir()) == [
        "checkpoints", "log.txt", "metrics.csv", "metrics.jsonl", "run.json", "tensorboard"]


MODES: dict[str, tuple[Sequence[str], str, str]] = {
    "evaluate": ((f"--workdir={PLACE}",), "", ""),
    "predict": ((f"--workdir={PLACE}", "--images=image.png", "--output=gs://bucket/table.csv"), "", "table.csv"),
    "export": ((f"--workdir={PLACE}",), "file", "runs/shared/export/model.onnx"),
    "report": ((f"--workdir={PLACE}",), "report", "runs/shared/report.html"),
    "report of several": (("--runs=gs://bucket/runs", "--output=gs://bucket/both"), "report", "both/report.html"),
    "analyze": ((f"--workdir={PLACE}", "--against=gs://bucket/runs/plain:best"), "output", "runs/shared/analysis"),
    "inspect": ((f"--workdir={PLACE}", "--against=gs://bucket/runs/plain:10"), "", ""),
    "compress": (("--source=gs://bucket/runs/plain", "--workdir=gs://bucket/small", "--calibration=0",
                  "--config.model.name=resnet14-s8u1"), "", "small/checkpoints/0/commit_success.txt"),
    "train": ((f"{RECIPE}:resnet14-s4u1-double", *FEW, f"--init={PLACE}:best", "--workdir=gs://bucket/tuned",
               "--config.distillation.teacher=gs://bucket/runs/plain"), "", "tuned/checkpoints/10/commit_success.txt"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads_and_writes_buckets(cloud: Emulator, run_json: Any, mode: str) -> None:
    arguments, key, written = MODES[mode]
    result = run_json(f"--mode={mode.split()[0]}", *arguments)
    assert not key or result[key] == f"gs://bucket/{written}"
    assert not written or cloud.names(prefix=written)


def test_weights_on_a_disk_become_a_run_in_a_bucket(cloud: Emulator, run_json: Any) -> None:
    run_json("--mode=export", "--format=pytorch", f"--workdir={PLACE}", "--output=weights")
    run_json("--mode=import", f"{RECIPE}:resnet14-s4u1-double", *FEW, "--weights=weights",
             "--workdir=gs://bucket/imported")
    scores = [run_json("--mode=evaluate", f"--workdir={place}") for place in (PLACE, "gs://bucket/imported")]
    assert scores[0]["test_loss"] == scores[1]["test_loss"]


@pytest.mark.parametrize(("place", "parts"), [
    ("s3://bucket/run", ("s3://bucket/run: must be a directory", "gs://BUCKET/DIRECTORY")),
    ("gs://other/run", ("there is no bucket other", )), ("gs://bucket/none", ("no run.json",))])
def test_places_that_are_wrong_are_told_in_one_line(main: CommandLine, directory: Path, place: str,
                                                    parts: Sequence[str]) -> None:
    for arguments in (("--mode=evaluate", f"--workdir={place}"), ("--mode=report", f"--runs={place}"),
                      (f"{RECIPE}:resnet14", *FEW, f"--init={place}")):
        done = main(*arguments, cwd=directory)
        assert (done.returncode, done.stdout.strip()) == (2, "")
        (line,) = done.stderr.splitlines()
        assert all(part in line for part in ("error: ", place, *parts))
    assert not (directory / place.partition("/")[0]).exists()
