"""How photographs become the input of exported files: their metadata, and the lines of docs/export.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
import pytest
from helpers import ROOT, TINY, save_run, write_folder
from PIL import Image

from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.data.images import decode
from shared_basis.data.in_memory import eval_crop
from shared_basis.evaluation import predict
from shared_basis.export import export
from shared_basis.runs.trained import Trained


def example_of(mark: str) -> str:
    """Returns the Python of docs/export.md that follows a mark."""
    return re.search(rf"<!-- {mark} -->\n```python\n(.+?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module", params=["center", "random_resized"])
def photographs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns a run on colour images of 8×8 pixels, and photographs: large and small, lying and standing, turned."""
    root = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    for name, (width, height) in {"large.jpg": (301, 203), "standing.jpg": (64, 201), "small.png": (7, 6),
                                  "odd.jpg": (37, 38), "exact.webp": (8, 8), "grey.png": (19, 40)}.items():
        smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((width, height))
        (smooth.convert("L") if name == "grey.png" else smooth).save(root / "photos" / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(root / "photos" / "large.jpg").save(root / "photos" / "turned.jpg", exif=turned)
    images = write_folder(root / "images", ("cat", "dog", "eel"), 1)
    config = Config(model=ModelConfig(name=TINY), data=DataConfig(
        name="folder", directory=str(images), image_size=8, crop=request.param, mean=(0.4, 0.5, 0.6)))
    return save_run(root / "run", config, {1: 0.5}), root / "photos"


@pytest.mark.parametrize("kind", ["onnx", "stablehlo"])
def test_the_lines_of_the_documentation_give_what_predict_does(photographs: Any, kind: str) -> None:
    run, photos = photographs
    file = Path(export.export(run, kind)["file"])
    if kind == "onnx":
        found = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
        about = {key: json.loads(value) if value[:1] in '[{"' else value for key, value in found.items()}
        session = onnxruntime.InferenceSession(file)
        classify = lambda pixels: session.run(["logits"], {"images": pixels})[0]  # noqa: E731
    else:
        about = json.loads(file.with_name(f"{file.name}.json").read_text())
        classify = jax.jit(jax.export.deserialize(bytearray(file.read_bytes())).call)
    scope: dict[str, Any] = {}
    exec(example_of("pillow"), scope)
    for image in predict.predict(run, [str(photos)])["images"]:
        pixels = scope["read"](image["file"], about)
        assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
        logits = np.asarray(classify(pixels[None]), np.float64)[0]
        probabilities = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose([image["probabilities"][name] for name in about["classes"]], probabilities,
                                   atol=1e-5, err_msg=image["file"])


def test_the_lines_read_what_the_package_reads_to_the_pixel(photographs: Any) -> None:
    run, photos = photographs
    config, shape = Trained.open(run).config.data, (8, 8, 3)
    scope: dict[str, Any] = {}
    exec(example_of("pillow"), scope)
    for path in sorted(photos.iterdir()):
        for channels in (3, 1):
            about = {"resize": export.resizing(config, (*shape[:2], channels))}
            expected = decode(str(path), channels, shape[:2], eval_crop(config, shape))
            np.testing.assert_array_equal(scope["read"](str(path), about), expected, err_msg=str(path))


def test_the_lines_for_torchvision_do_too(photographs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="it is no dependency; by hand it was last run: never")
    run, photos = photographs
    (tmp_path / "DIR").mkdir()
    (tmp_path / "DIR" / "class").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"about": {"resize": export.resizing(Trained.open(run).config.data, (8, 8, 3))}}
    exec(example_of("pillow") + example_of("torchvision"), scope)
    np.testing.assert_array_equal(scope["pixels"][0], scope["read"](scope["images"].imgs[0][0], scope["about"]))


def test_a_file_says_how_images_are_resized() -> None:
    images = DataConfig(name="folder", directory="x", image_size=224, crop="random_resized")
    assert json.loads(re.search(r"```json\n(.+?)\n```", (ROOT / "docs" / "export.md").read_text())[1]) == (
        export.resizing(images, (224, 224, 3)))
    assert export.resizing(DataConfig(), (8, 6, 1)) == {
        "height": 8, "width": 6, "color": "L", "crop": "center", "part": 1.0, "filter": "bilinear, antialiased",
        "shorter_side": 6}
