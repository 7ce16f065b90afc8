"""Longer runs: a finished run with more epochs is, bit for bit, the one that had as many from the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, Watcher, assert_trees_equal, read_arrays, read_metrics, user_error

from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, replace
from shared_basis.runs.workdir import Workdir
from shared_basis.training.train import train

SHORT = Config(
    model=ModelConfig(name=TINY), data=DataConfig(train_examples=40, test_examples=30, pad=1, flip=True),
    optimizer=OptimizerConfig(learning_rate=0.05, boundaries=(1.0,), factors=(0.1,)),
    train=TrainConfig(epochs=2, batch_size=8))
LONG = replace(SHORT, {"train.epochs": 4})


def run(workdir: Path, config: Config) -> str:
    reporter = Watcher()
    train(config, workdir, reporter)
    return reporter.text.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns the workdir of a run that was given more epochs when it was finished, what it said then, and that of one
    which had them from the start."""
    root = tmp_path_factory.mktemp("runs")
    run(root / "short", SHORT)
    said = run(root / "short", LONG)
    run(root / "long", LONG)
    return root / "short", said, root / "long"


def test_a_run_with_more_epochs_is_the_run_that_had_them_from_the_start(runs: Any) -> None:
    longer, said, whole = runs
    for step in (15, 20):
        assert_trees_equal(read_arrays(longer, step), read_arrays(whole, step))
    assert read_metrics(longer) == read_metrics(whole)
    assert "resumes with train.epochs=4; it was 2" in said
    assert "resumes at step 10 of 20" in said


def test_its_record_and_the_checkpoints_have_the_new_configuration(runs: Any) -> None:
    longer, _, _ = runs
    assert Workdir(longer).load()[0] == LONG
    saved = json.loads((longer / "checkpoints" / "20" / "run" / "metadata").read_text())
    assert saved["config"]["train"]["epochs"] == 4
    assert "this run is finished" in run(longer, LONG)


def test_intervals_and_the_evaluation_s_batch_may_change(runs: Any) -> None:
    longer, _, _ = runs
    said = run(longer, replace(LONG, {"train.evaluate_every": 3, "train.eval_batch_size": 7}))
    assert "this run is finished" in said
    assert Workdir(longer).load()[0].train == TrainConfig(epochs=4, batch_size=8, evaluate_every=3, eval_batch_size=7)
    run(longer, LONG)


def test_another_past_is_refused_and_nothing_changes(runs: Any) -> None:
    longer, _, _ = runs
    before = (longer / "run.json").read_bytes()
    for change, part in (({"train.epochs": 3}, "has trained 4 epochs"), ({"optimizer.factors": (0.5,)}, "--init="),
                         ({"train.epochs": 8, "optimizer.schedule": "cosine", "optimizer.boundaries": (),
                           "optimizer.factors": ()}, "--init=")):
        with user_error(part):
            run(longer, replace(LONG, change))
    assert (longer / "run.json").read_bytes() == before
