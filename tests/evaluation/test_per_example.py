"""Scores image by image, against the network applied by hand, and the tables of them."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import TINY, cross_entropies, save_run, save_run_without_test_images, user_error, write_folder
from PIL import Image

from shared_basis.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from shared_basis.evaluation import per_example
from shared_basis.evaluation.evaluate import evaluate
from shared_basis.runs.trained import Trained
from shared_basis.runtime.reporter import Reporter

CLASSES = ("a\"b", "b,c", "猫")
QUIET = Reporter(verbosity="quiet")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    images = write_folder(root / "images", CLASSES, 3)
    (images / "test" / CLASSES[0] / "1.png").write_bytes(b"no image")
    config = Config(model=ModelConfig(name=TINY), train=TrainConfig(eval_batch_size=5), data=DataConfig(
        name="folder", directory=str(images), on_broken="skip", workers=0))
    return save_run(root / "run", config, {6: 0.25})


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    """Returns the run with a classifier that tells the images apart."""
    opened = Trained.open(run)
    head = {"kernel": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}
    params = {**opened.variables["params"], "head": head}
    changed = dataclasses.replace(opened, variables={**opened.variables, "params": params})
    head["bias"] = -np.mean([row for row, _ in logits_by_hand(changed).values()], axis=0)
    return changed


def logits_by_hand(trained: Trained) -> dict[str, tuple[np.ndarray, int]]:
    """Returns of each test image, by its file, the logits without the package's reading and batches, and its label."""
    root = Path(trained.config.data.directory) / "test"
    paths = [path for name in CLASSES for path in sorted((root / name).iterdir()) if path.stat().st_size > 20]
    pixels = np.stack([np.asarray(Image.open(path), np.float32) for path in paths])
    logits = np.asarray(jax.jit(lambda variables, pixels: trained.model.apply(
        variables, (pixels / 255 - 0.5) / 0.5, train=False))(trained.variables, pixels), np.float64)
    return {str(path): (row, CLASSES.index(path.parent.name)) for path, row in zip(paths, logits, strict=True)}


def test_logits_that_are_not_numbers_have_no_class(trained: Trained) -> None:
    params = {**trained.variables["params"], "head": {"kernel": np.zeros((4, 3), np.float32),
                                                      "bias": np.float32([0, np.nan, 0])}}
    broken = dataclasses.replace(trained, variables={**trained.variables, "params": params})
    with user_error("step 6", "not finite", "--checkpoint"):
        per_example.score(broken, QUIET)


def test_images_none_of_which_can_be_decoded_are_told(tmp_path: Path) -> None:
    with user_error("none of the images to score can be decoded"):
        per_example.score(Trained.open(save_run_without_test_images(tmp_path)), QUIET)


@pytest.fixture(scope="module")
def scores(trained: Trained) -> per_example.Scores:
    return per_example.score(trained, QUIET, worst=4)  # of 8 images and a broken one in batches of 8


def test_scores_are_those_of_the_network_by_hand(trained: Trained, scores: per_example.Scores) -> None:
    by_hand = logits_by_hand(trained)
    logits, labels = (np.array(each) for each in zip(*by_hand.values(), strict=True))
    losses = cross_entropies(logits, labels)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (labels, logits.argmax(-1)), 1)
    assert len(set(logits.argmax(-1))) > 1
    np.testing.assert_array_equal(scores.confusion, confusion)
    assert (scores.step, scores.count) == (6, 8)
    assert scores.accuracy == pytest.approx(np.mean(logits.argmax(-1) == labels))
    assert scores.loss == pytest.approx(losses.mean(), rel=1e-4)
    files = list(by_hand)
    assert [image.name for image in scores.worst] == [files[place] for place in np.argsort(-losses)[:4]]
    for image in scores.worst:
        row, label = by_hand[image.name]
        shares = np.exp(row) / np.exp(row).sum()
        assert (image.label, image.predicted) == (label, row.argmax())
        assert image.probability == pytest.approx(shares.max(), abs=1e-4)
        assert image.probability_of_label == pytest.approx(shares[label], abs=1e-4)
        np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(image.name)))


def test_scores_add_up_to_the_evaluation(run: Path) -> None:
    result, scores = evaluate(run), per_example.score(Trained.open(run), QUIET)
    assert len(scores.worst) == 8
    assert (result["test_examples"], result["test_accuracy"]) == (scores.count, pytest.approx(scores.accuracy))
    assert result["test_loss"] == pytest.approx(scores.loss, rel=1e-6)


def test_streamed_images_are_scored_alike(trained: Trained, scores: per_example.Scores) -> None:
    config = replace(trained.config, {"data.placement": "stream"})
    streamed = per_example.score(dataclasses.replace(trained, config=config), QUIET, worst=4)
    assert [image.name for image in streamed.worst] == [image.name for image in scores.worst]
    np.testing.assert_array_equal(streamed.confusion, scores.confusion)
    for one, other in zip(streamed.worst, scores.worst, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_confused_pairs_come_by_their_number() -> None:
    scores = per_example.Scores(1, np.array([[50, 3, 0], [7, 60, 3], [0, 0, 9]]), [], 0.0)
    assert scores.pairs(2) == [(1, 0, 7), (0, 1, 3)]
    assert scores.pairs(9) == [(1, 0, 7), (0, 1, 3), (1, 2, 3)]


def test_tables_hold_the_scores(scores: per_example.Scores) -> None:
    head, *rows = csv.reader(io.StringIO(per_example.confusion_csv(scores, CLASSES).decode()))
    assert head[1:] == [row[0] for row in rows] == list(CLASSES)
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], int), scores.confusion)
    errors = list(csv.DictReader(io.StringIO(per_example.errors_csv(scores, CLASSES).decode())))
    assert [row["image"] for row in errors] == [image.name for image in scores.worst]
    for row, image in zip(errors, scores.worst, strict=True):
        assert (row["true"], row["predicted"]) == (CLASSES[image.label], CLASSES[image.predicted])
        assert float(row["loss (nats)"]) == pytest.approx(image.loss, abs=1e-6)
        assert float(row["probability of true"]) == pytest.approx(image.probability_of_label, abs=1e-6)
        assert float(row["probability of predicted"]) == pytest.approx(image.probability, abs=1e-6)
