"""Predictions for image files, against the network applied to each of them by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import TINY, save_run, user_error, write_folder
from PIL import Image

from shared_basis.cli import commands
from shared_basis.config import Config, DataConfig, ModelConfig, replace
from shared_basis.evaluation import predict
from shared_basis.runs.trained import Trained

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    images = write_folder(root / "images", CLASSES, 3)
    config = Config(model=ModelConfig(name=TINY), data=DataConfig(
        name="folder", directory=str(images), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)))
    return save_run(root / "run", replace(config, {"train.eval_batch_size": 5}), {1: 0.5, 2: 0.25})


@pytest.fixture(scope="module")
def by_hand(run: Path) -> Any:
    """Returns a function: the probabilities of one 8×8 image, without the package's reading or batches."""
    trained = Trained.open(run)
    model, variables = trained.model, trained.variables

    @jax.jit
    def classify(pixels: Any) -> Any:
        normal = (pixels / np.float32(255) - np.array([0.4, 0.5, 0.6], np.float32)) / np.array(
            [0.2, 0.3, 0.4], np.float32)
        return jax.nn.softmax(model.apply(variables, normal[None], train=False))[0]
    return lambda pixels: np.asarray(classify(np.asarray(pixels, np.float32)))


def test_classifies_every_image_of_a_directory(run: Path, by_hand: Any) -> None:
    folder = run.parent / "images"
    found = predict.predict(run, [str(folder)])
    files = sorted(map(str, folder.rglob("*.png")))
    assert [image["file"] for image in found["images"]] == files
    assert len(files) == 18  # more than three batches of 5, the last one filled
    for image in found["images"]:
        expected = by_hand(Image.open(image["file"]))
        np.testing.assert_allclose([image["probabilities"][name] for name in CLASSES], expected, atol=1e-5)
        assert image["class"] == CLASSES[int(expected.argmax())]
    assert (found["step"], found["classes"]) == (2, list(CLASSES))


def test_scales_and_crops_as_the_test_images_of_a_run(run: Path, by_hand: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    wide = Image.fromarray(rng.integers(0, 256, (16, 40, 3), dtype=np.uint8))
    wide.save(tmp_path / "wide.png")
    grey = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
    grey.save(tmp_path / "grey.png")
    found = predict.predict(run, [str(tmp_path / "wide.png"), str(tmp_path / "grey.png")])["images"]
    expected = [wide.resize((8, 8), Image.Resampling.BILINEAR, box=(12, 0, 28, 16)), grey.convert("RGB")]
    for image, pixels in zip(found, expected, strict=True):
        np.testing.assert_allclose([image["probabilities"][name] for name in CLASSES], by_hand(pixels), atol=1e-5)


def test_a_run_on_tall_images_classifies_and_scores_others(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for folder, size in (("own/train", (1, 1030)), ("own/test", (1, 1030)), ("other", (2, 2060))):
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", size, (200, 30, 90)).save(tmp_path / folder / name / "0.png")
    run = save_run(tmp_path / "run", Config(model=ModelConfig(name=TINY), data=DataConfig(
        name="folder", directory=str(tmp_path / "own"))), {1: 0.5})
    one, other = predict.predict(run, [str(tmp_path / folder / "cat") for folder in ("own/test", "other")])["images"]
    assert one["probabilities"] == other["probabilities"]
    found = Trained.open(run, overrides={"data.directory": str(tmp_path / "other")}).open_source()
    assert (found.spec.image_shape, len(found.splits["test"])) == ((1030, 1, 3), 2)


def test_logits_that_are_not_numbers_have_no_class(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trained, "classifier", lambda _: lambda images: np.full((len(images), 3), np.inf, np.float32))
    with user_error(str(run), "step 2", "not finite", "--checkpoint"):
        predict.predict(run, [str(run.parent / "images" / "test" / "cat")])


def test_takes_the_checkpoint_that_is_asked_for(run: Path) -> None:
    folder = [str(run.parent / "images" / "test" / "cat")]
    latest, best = (predict.predict(run, folder, which) for which in ("latest", "best"))
    assert (latest["step"], best["step"]) == (2, 1)
    assert latest["images"] != best["images"]


def test_writes_all_probabilities_as_csv(run: Path, tmp_path: Path) -> None:
    found = predict.predict(run, [str(run.parent / "images" / "test")], output=str(tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [image["file"] for image in found["images"]]
    for row, image in zip(rows, found["images"], strict=True):
        assert row["class"] == image["class"]
        assert float(row["probability"]) == pytest.approx(max(image["probabilities"].values()), abs=1e-6)
        assert sum(float(row[name]) for name in CLASSES) == pytest.approx(1, abs=1e-5)


def test_a_broken_image_ends_it_or_is_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run.parent / "images" / "test" / "cat" / "0.png"
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes(good.read_bytes())
    with user_error("a.png", "on_broken=skip"):
        predict.predict(run, [str(tmp_path)])
    found = predict.predict(run, [str(tmp_path)], overrides={"data.on_broken": "skip"})["images"]
    assert [image["file"] for image in found] == [str(tmp_path / "b.png")]
    assert "a.png" in capsys.readouterr().err
    with user_error("none of the 1 images can be decoded"):
        predict.predict(run, [str(tmp_path / "a.png")], overrides={"data.on_broken": "skip"})
    odd = tmp_path / "two\nlines.png"
    odd.write_bytes(good.read_bytes())
    shown = predict.render(predict.predict(run, [str(odd)]))
    assert shown.count("\n") == 1
    assert "two\\nlines.png" in shown


def test_a_mistake_is_told(run: Path, tmp_path: Path) -> None:
    with user_error("--images=PATH"):
        predict.predict(run, [])
    with user_error("absent.png", "no such file"):
        predict.predict(run, [str(tmp_path / "absent.png")])
    with user_error(str(tmp_path), "no images in this directory", ".png"):
        predict.predict(run, [str(tmp_path)])
    with user_error("--config.model.name cannot be changed"):
        predict.predict(run, [str(run.parent)], overrides={"model.name": "resnet20"})
    with user_error("--output=", "cannot be written"):
        predict.predict(run, [str(run.parent / "images")], output=str(tmp_path / "absent" / "out.csv"))
    with user_error("holds no run"):
        predict.predict(tmp_path, [str(run.parent)])


def test_the_mode_predict_takes_files_and_writes_csv(run: Path, tmp_path: Path) -> None:
    files = [str(run.parent / "images" / "test" / name / "0.png") for name in ("cat", "dog")]
    result, text = commands.run("predict", commands.Request(
        Config(), {}, str(run), True, json=True, quiet=True, checkpoint="best", images=files,
        output=str(tmp_path / "out.csv")))
    assert result["step"] == 1
    assert [image["file"] for image in result["images"]] == files
    assert (tmp_path / "out.csv").read_text().count("\n") == 3
    assert text.count("\n") == 2
    with user_error("/no/such/image.png"):
        commands.run("predict", commands.Request(Config(), {}, str(run), True, images=["/no/such/image.png"]))


def test_file_names_that_are_no_text_are_written_and_a_failed_write_leaves_what_was_there(run: Path,
                                                                                         tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    predict.write_csv(table, ["a"], [{"file": "\udcff.png", "class": "a", "probabilities": {"a": 1.0}}])
    assert table.read_text().splitlines()[1] == "\\udcff.png,a,1.000000,1.000000"
    (tmp_path / "folder").mkdir()
    with user_error("--output=", "folder", "cannot be written"):
        predict.write_csv(tmp_path / "folder", ["a"], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out.csv"]
