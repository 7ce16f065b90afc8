"""The script that kills runs: a short turn of it, and that it sees what it is to see."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torture
from helpers import MAIN, save_run, user_environment

from shared_basis.config import Config, ModelConfig


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, MAIN.parent / "tests" / "torture.py", "--kills=3", "--seed=12",
                           f"--write={tmp_path / 'report.md'}"], env=user_environment(), text=True, capture_output=True,
                          timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert done.stdout.endswith(report)
    assert "| **all** | 3 | 0 |" in report
    assert "Against the undisturbed run: equal bit for bit" in report
    phases = [line.split("|")[1:3] for line in report.splitlines() if line.startswith("| ")]
    assert sum(int(count) for name, count in phases if name.strip() in torture.PHASES) == 3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_in_a_bucket_that_is_killed_ends_as_one_that_was_not(tmp_path: Path, processes: int) -> None:
    pytest.importorskip("gcsfs", reason="pip install -e '.[gcs]'")
    done = subprocess.run([sys.executable, MAIN.parent / "tests" / "torture.py", "--bucket", "--kills=3", "--seed=1",
                           f"--processes={processes}", f"--write={tmp_path / 'report.md'}"], env=user_environment(),
                          text=True, capture_output=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "| **all** | 3 | 0 |" in report
    assert "Against the undisturbed run: equal bit for bit" in report


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a workdir with two checkpoints and a line of metrics for each; for reading only."""
    workdir = save_run(tmp_path_factory.mktemp("runs") / "reference", Config(model=ModelConfig(name="resnet14")),
                       {10: 0.5, 20: 0.25})
    lines = [{"step": step, "loss": 1 / step, "images_per_second": step} for step in (10, 20)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def other_arrays(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints" / "20")
    (workdir / "checkpoints" / "10").rename(workdir / "checkpoints" / "20")
    shutil.copytree(workdir / "checkpoints" / "20", workdir / "checkpoints" / "10")


def other_metrics(workdir: Path) -> None:
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.05", "0.05000000000000001"))


def a_line_twice(workdir: Path) -> None:
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])


@pytest.mark.parametrize(("change", "told"), [
    (lambda workdir: None, []),
    (lambda workdir: (workdir / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir(),
     ["30.orbax-checkpoint-tmp is left"]),
    (lambda workdir: shutil.rmtree(workdir / "checkpoints" / "10"), ["checkpoints [20] instead of [10, 20]"]),
    (other_metrics, ["metrics.jsonl"]),
    (a_line_twice, ["metrics.jsonl"]),
], ids=["none", "temporary directory", "checkpoint lost", "metrics", "line twice"])
def test_a_difference_is_told(reference: Path, tmp_path: Path, change: Callable[[Path], None],
                              told: list[str]) -> None:
    change(Path(shutil.copytree(reference, tmp_path / "run")))
    assert torture.differences(tmp_path / "run", reference) == told


def test_other_arrays_are_told_by_name_and_speed_is_not_compared(reference: Path, tmp_path: Path) -> None:
    other_arrays(Path(shutil.copytree(reference, tmp_path / "run")))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"images_per_second": 20', '"images_per_second": 3'))
    found = torture.differences(tmp_path / "run", reference)
    assert "['params']['head']['kernel'] of checkpoint 20" in found
    assert all(name.endswith(" of checkpoint 20") for name in found)
