"""A folder of photographs by the command line, as users do; later commands want the workdir alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, CommandLine
from PIL import Image
from sklearn.datasets import load_digits

RUN = "runs/photos-resnet14-s4u1-double"


def write_photos(root: Path, first: int, count: int) -> Path:
    """Writes digits 0, 1 and 7, `count` of each from the `first` on, as JPEG files of several sizes, in one tree."""
    digits = load_digits()
    for digit, name in ((0, "zero"), (1, "one"), (7, "seven")):
        (root / name).mkdir(parents=True)
        chosen = digits.images[digits.target == digit][first:first + count]
        for index, image in enumerate(chosen):
            grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
            grey.convert("RGB").resize((40 + index % 5, 40), Image.Resampling.BICUBIC).save(
                root / name / f"IMG_{index:03}.JPG")
    return root


@pytest.mark.slow
def test_a_folder_of_photographs_is_trained_and_used_with_few_words(main: CommandLine, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 0, 20)
    other = write_photos(tmp_path / "other", 30, 7)

    def said(*arguments: str, code: int = 0, cwd: Path = tmp_path) -> str:
        done = main(*arguments, cwd=cwd)
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stderr if code else done.stdout

    recipe = f"--config={ROOT / 'configs' / 'folder.py'}:resnet14-s4u1-double"
    first = said(recipe, "--images=photos", "--config.train.epochs=6")
    assert "42 training, 12 test and 6 validation images of 32×32×3, 3 classes" in first
    assert "batch size 8, chosen for 42 training images" in first
    assert re.search(r"normalised with mean \(0\.\d+, 0\.\d+, 0\.\d+\) and standard deviation", first)
    assert "best validation epoch" in first
    assert "this run is finished" in said(recipe, "--images=photos", "--config.train.epochs=6")
    (tmp_path / "elsewhere").mkdir()
    assert "this run is finished" in said(f"--workdir={tmp_path / RUN}", cwd=tmp_path / "elsewhere")
    assert "on 12 images" in said("--mode=evaluate", f"--workdir={tmp_path / RUN}", cwd=tmp_path / "elsewhere")
    assert "on 21 images" in said("--mode=evaluate", f"--workdir={RUN}", "--images=other")
    assert said("--mode=predict", f"--workdir={RUN}", f"--images={other}").count(".JPG") == 21
    assert "--init=" in said(f"--workdir={RUN}", "--config.train.epochs=9", code=2)
    assert "this run is finished" in said(f"--workdir={RUN}", "--config.train.evaluate_every=2")
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert "on 12 images" in said("--mode=evaluate", f"--workdir={RUN}", "--images=moved")
    assert "this run is finished" in said(f"--workdir={RUN}", "--images=moved")
    assert "on 12 images" in said("--mode=evaluate", f"--workdir={RUN}")
    exported = json.loads(said("--mode=export", f"--workdir={RUN}", "--format=stablehlo", "--json"))
    assert json.loads(Path(tmp_path, exported["file"] + ".json").read_text())["resize"]["height"] == 32


@pytest.mark.slow
def test_compression_takes_data_and_recipe_of_its_source(main: CommandLine, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 0, 12)
    recipe = f"--config={ROOT / 'configs' / 'folder.py'}:resnet14"
    for arguments in (
            (recipe, "--images=photos", "--config.train.epochs=2", "--workdir=plain"),
            ("--mode=compress", "--source=plain", "--config.model.name=resnet14-s8u1", "--workdir=shared"),
            ("--mode=compress", "--source=plain", f"{recipe}-s4u1", "--images=photos", "--workdir=other"),
            ("--workdir=shared",)):
        done = main(*arguments, cwd=tmp_path)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    plain, shared, other = (json.loads((tmp_path / name / "run.json").read_text())["config"]
                            for name in ("plain", "shared", "other"))
    assert shared == {**plain, "model": {**plain["model"], "name": "resnet14-s8u1"}, "name": "photos-resnet14-s8u1"}
    assert other["data"] == plain["data"]
    assert other["train"]["batch_size"] == plain["train"]["batch_size"]
