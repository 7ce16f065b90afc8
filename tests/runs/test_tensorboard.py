"""Event files, as TensorBoard's own reader reads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from helpers import user_error

from shared_basis.runs import tensorboard
from shared_basis.runs.workdir import Workdir

LINES = [{"step": step, "epoch": step // 5, "train_loss": 1 / step, "test_accuracy": 0.5, "test_accuracy_top5": 0.75,
          "penalty": 1e-3 * step, "learning_rate": 0.1} for step in (5, 10, 15)]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the values by tag, as (step, value), that TensorBoard shows."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events: Any = reading.EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def run(tmp_path: Path) -> Workdir:
    pytest.importorskip("tensorboardX")
    return Workdir(tmp_path, tensorboard=True)


def test_each_number_of_a_line_is_a_scalar_at_its_step(run: Workdir) -> None:
    with run.locked():
        run.rewind_metrics(0)
        for line in LINES:
            run.append_metrics(line)
    shown = scalars(run.path / "tensorboard")
    assert set(shown) == {"loss/train", "accuracy/test", "accuracy_top5/test", "bases/penalty", "run/learning_rate"}
    assert all([step for step, _ in values] == [5, 10, 15] for values in shown.values())
    assert [value for _, value in shown["loss/train"]] == pytest.approx([0.2, 0.1, 1 / 15])


def test_what_a_resumed_run_computes_again_is_shown_once(run: Workdir) -> None:
    with run.locked():
        run.rewind_metrics(0)
        for line in LINES:
            run.append_metrics(line)
    resumed = Workdir(run.path, tensorboard=True)
    with resumed.locked():
        resumed.rewind_metrics(10)
        resumed.append_metrics({**LINES[2], "train_loss": 0.03125})
    assert scalars(run.path / "tensorboard")["loss/train"] == [(5, pytest.approx(0.2)), (10, pytest.approx(0.1)),
                                                               (15, 0.03125)]


def test_a_run_that_began_without_has_its_earlier_metrics_too(run: Workdir) -> None:
    for line in LINES[:2]:
        Workdir(run.path).append_metrics(line)
    with run.locked():
        run.rewind_metrics(5)
        run.append_metrics(LINES[2])
    assert [step for step, _ in scalars(run.path / "tensorboard")["loss/train"]] == [5, 15]


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    run = Workdir(tmp_path)
    run.rewind_metrics(0)
    run.append_metrics(LINES[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_a_missing_package_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with user_error("--tensorboard: the package tensorboardX", "'shared-basis[tensorboard]'"):
        tensorboard.require()


def test_a_directory_that_cannot_be_written_is_told(run: Workdir) -> None:
    (run.path / "tensorboard").write_text("in the way")
    with user_error("tensorboard cannot be written: File exists"):
        run.rewind_metrics(0)
