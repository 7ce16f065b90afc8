"""Evaluation of runs, whose networks are random: which checkpoint, which images, and what may be overridden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import TINY, save_run, user_error, write_folder

from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.evaluation import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run on two classes of four images, with checkpoints 10 (the best) and 20."""
    root = tmp_path_factory.mktemp("runs")
    images = write_folder(root / "images", classes=("cat", "dog"), count=2)
    return save_run(root / "run", Config(model=ModelConfig(name=TINY),
                                         data=DataConfig(name="folder", directory=str(images))), {10: 0.9, 20: 0.1})


def test_a_run_is_scored_by_its_workdir_alone(run: Path) -> None:
    latest, best = evaluate.evaluate(run), evaluate.evaluate(str(run), "best")
    assert (latest["step"], best["step"]) == (20, 10)
    assert latest["test_loss"] != best["test_loss"]
    assert latest["test_examples"] == 4
    assert latest["model"] == TINY
    assert json.loads(json.dumps(latest)) == latest
    text = evaluate.render(latest)
    assert "\n" not in text
    assert f"{100 * latest['test_accuracy']:.2f} %" in text


def test_only_the_best_checkpoint_is_called_best_with_the_images_that_chose_it(run: Path) -> None:
    best = evaluate.evaluate(run, "best")
    assert best["chosen_on"] == "test"
    assert "best test epoch" in evaluate.render(best)
    assert "published" in evaluate.render(best)
    for which in ("latest", "10", "20"):  # 10 is the best, and was not asked for as such
        other = evaluate.evaluate(run, which)
        assert other["chosen_on"] is None
        assert "best" not in evaluate.render(other)
        assert "published" not in evaluate.render(other)
    validated = evaluate.render({**best, "chosen_on": "validation"})
    assert "best validation epoch" in validated
    assert "published" not in validated


def test_the_images_and_the_batch_size_may_change(run: Path, tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "images", classes=("cat", "dog"), count=3)
    moved = evaluate.evaluate(run, "10", {"data.directory": str(elsewhere), "train.eval_batch_size": 4})
    assert (moved["step"], moved["test_examples"]) == (10, 6)


@pytest.mark.parametrize("field", ["model.name", "seed", "train.batch_size", "optimizer.learning_rate", "name"])
def test_other_fields_may_not_change(run: Path, field: str) -> None:
    with user_error(f"--config.{field}", "cannot be changed", "data", "train.eval_batch_size"):
        evaluate.evaluate(run, overrides={"data.flip": True, field: 1})


def test_other_data_is_refused(run: Path, tmp_path: Path) -> None:
    others = write_folder(tmp_path / "others", classes=("cat", "cow"), count=2)
    with user_error("other classes", "'cow'", "cat, dog", str(others)):
        evaluate.evaluate(run, overrides={"data.directory": str(others)})
    with user_error("other image shape", "the run was trained on"):
        evaluate.evaluate(run, overrides={"data.image_size": 16})
    with user_error("other classes", "digits"):
        evaluate.evaluate(run, overrides={"data.name": "digits"})


def test_what_is_not_there_is_told(run: Path, tmp_path: Path) -> None:
    with user_error("checkpoint '7'", "10, 20"):
        evaluate.evaluate(run, "7")
    with user_error("holds no run"):
        evaluate.evaluate(tmp_path)
    assert list(tmp_path.iterdir()) == []
