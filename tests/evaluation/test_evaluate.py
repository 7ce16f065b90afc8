"""Evaluation of runs, whose networks are random: which checkpoint, which images, and what may be overridden."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, save_run, user_error, write_folder
from PIL import Image

from shared_basis.config import Config, DataConfig, ModelConfig, folder_fields
from shared_basis.evaluation import evaluate, predict
from shared_basis.runtime.reporter import Reporter


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
    assert "as in the paper" in evaluate.render(best)
    for which in ("latest", "10", "20"):  # 10 is the best, and was not asked for as such
        other = evaluate.evaluate(run, which)
        assert other["chosen_on"] is None
        assert "best" not in evaluate.render(other)
        assert "as in the paper" not in evaluate.render(other)
    validated = evaluate.render({**best, "chosen_on": "validation"})
    assert "best validation epoch" in validated
    assert "as in the paper" not in validated


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
        evaluate.evaluate(run, overrides={"data.name": "digits", "data.directory": ""})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One tree of other photographs, of several sizes: five cats and five dogs."""
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for index in range(5):
            pixels = np.random.default_rng(index).integers(0, 256, (9 + index, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "tree" / name / f"{index}.png")
    return tmp_path / "tree"


def test_all_of_another_folder_is_scored_and_told(run: Path, tree: Path) -> None:
    text = io.StringIO()
    here = {"data.directory": str(tree)}
    found = evaluate.evaluate(run, "10", here, Reporter(text))
    assert found["test_examples"] == 10
    assert f"{tree} is another folder than the run's own ({run.parent / 'images'})" in text.getvalue()
    assert "moved" not in text.getvalue()
    assert evaluate.evaluate(run, "10", {**here, "data.test": 0.4})["test_examples"] == 4
    assert evaluate.evaluate(run, "10", {**here, "data.test_examples": 3})["test_examples"] == 3


def test_its_images_are_treated_as_predictions_are(run: Path, tree: Path) -> None:
    found = evaluate.evaluate(run, "10", {"data.directory": str(tree)})
    probabilities = [image["probabilities"][Path(image["file"]).parent.name]
                     for image in predict.predict(run, [str(tree)], "10")["images"]]
    assert found["test_loss"] == pytest.approx(-np.log(probabilities).mean(), rel=1e-5)


def test_its_own_folder_by_another_name_is_no_other(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.parent / "images")
    text = io.StringIO()
    evaluate.evaluate(run, "10", {"data.directory": str(tmp_path / "link")}, Reporter(text))
    assert "another folder" not in text.getvalue()


def test_a_folder_that_was_moved_can_be_scored_as_before(run: Path, tree: Path, tmp_path: Path) -> None:
    gone = save_run(tmp_path / "run", Config(model=ModelConfig(name=TINY), data=DataConfig(
        name="folder", directory=str(run.parent / "images"))), {10: 0.9})
    record = (gone / "run.json").read_text()
    (gone / "run.json").write_text(record.replace(str(run.parent / "images"), "/gone"))
    text = io.StringIO()
    evaluate.evaluate(gone, "10", {"data.directory": str(tree)}, Reporter(text))
    assert "if it is the same folder, moved, --config.data.test=0.2 scores only its test part" in text.getvalue()


@pytest.fixture
def drawn(tree: Path, tmp_path: Path) -> Path:
    """Returns the workdir of a run on `tree`, from which its test images are drawn, with checkpoint 10."""
    config = Config(model=ModelConfig(name=TINY), data=DataConfig(name="folder", directory=str(tree), image_size=8))
    return save_run(tmp_path / "drawn", config, {10: 0.9})


def test_a_folder_that_was_moved_is_known_by_its_files(drawn: Path, tree: Path, tmp_path: Path) -> None:
    before = evaluate.evaluate(drawn, "10")
    here = {"data.directory": str(tree.rename(tmp_path / "elsewhere"))}
    text = io.StringIO()
    assert evaluate.evaluate(drawn, "10", here, Reporter(text)) == before
    assert before["test_examples"] == 2
    assert evaluate.evaluate(drawn, "10", {**here, "data.test_examples": 1}, Reporter(text))["test_examples"] == 1
    assert "another folder" not in text.getvalue()
    (tmp_path / "elsewhere" / "cat" / "0.png").rename(tmp_path / "elsewhere" / "cat" / "9.png")
    assert evaluate.evaluate(drawn, "10", here)["test_examples"] == 10


def test_test_images_that_are_drawn_again_are_told(drawn: Path, tree: Path) -> None:
    def told(**overrides: Any) -> str:
        text = io.StringIO()
        evaluate.evaluate(drawn, "10", overrides, Reporter(text))
        return text.getvalue()

    assert "changed" not in told() + told(**{"data.test_examples": 1})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tree / "cat" / "new.png")
    for text in (told(), told(**{"data.directory": f"{tree}/../tree"})):
        assert f"the files in {tree}" in text
        assert "have changed since the run began" in text
        assert "may include training images" in text
    shutil.rmtree(tree / "dog")  # what is left could not be trained on
    assert "have changed" in told()


def test_test_images_of_their_own_may_change(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", classes=("cat", "dog"), count=1)
    config = Config(model=ModelConfig(name=TINY), data=DataConfig(name="folder", directory=str(images)))
    path = save_run(tmp_path / "run", config, {10: 0.9})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / "test" / "cat" / "new.png")
    text = io.StringIO()
    assert evaluate.evaluate(path, "10", reporter=Reporter(text))["test_examples"] == 3
    assert "changed" not in text.getvalue()


def test_a_run_on_other_data_is_scored_on_a_folder(tmp_path: Path, tree: Path) -> None:
    grey = save_run(tmp_path / "grey", Config(model=ModelConfig(name=TINY)), {10: 0.9})
    for old, new in (("cat", "3"), ("dog", "7")):
        (tree / old).rename(tree / new)
    found = evaluate.evaluate(grey, "10", folder_fields(str(tree)))
    assert found["test_examples"] == 10


def test_what_is_not_there_is_told(run: Path, tmp_path: Path) -> None:
    with user_error("checkpoint '7'", "10, 20"):
        evaluate.evaluate(run, "7")
    with user_error("holds no run"):
        evaluate.evaluate(tmp_path)
    assert list(tmp_path.iterdir()) == []
