"""The example in PyTorch computes what the network computes whose exported weights it loads."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ROOT, TINY, save_run, write_folder
from PIL import Image
from safetensors.numpy import save_file
from sample_networks import random_variables

from shared_basis import create_model
from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.evaluation.predict import predict
from shared_basis.export.pytorch import export_weights
from shared_basis.interop.pytorch import to_published

EXAMPLE = ROOT / "examples" / "pytorch_resnet.py"
torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra 'bench' brings it",
                            exc_type=ImportError)


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("pytorch_resnet", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_needs_nothing_of_this_package() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 170
    assert "shared_basis import" not in text
    assert "jax" not in text


@pytest.mark.parametrize(("name", "stem", "size"), [
    ("resnet14-s4u1-double", "cifar", 16),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("resnet14", "cifar", 16), ("resnet14-s4u1", "cifar", 16), ("resnet14-s4u0", "cifar", 16),
        ("resnet14-s0u2", "cifar", 16), ("resnet18", "cifar", 16), ("resnet18-s8u2", "imagenet", 40)))])
def test_it_computes_the_logits_of_the_network(example: Any, name: str, stem: str, size: int, tmp_path: Path) -> None:
    model = create_model(name, stem=stem)
    variables = random_variables(model, (32, 32, 3))
    path = tmp_path / "w.safetensors"
    save_file(to_published(variables, model), path, {"format": "pt"})
    network, _ = example.load(str(path))
    counted = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(tensor.numel() for tensor in network.parameters()) == counted  # shared ones once
    images = np.random.default_rng(1).standard_normal((2, size, size, 3), np.float32)
    expected = np.asarray(jax.jit(lambda x: model.apply(variables, x, train=False))(images))
    with torch.inference_mode():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_its_predictions_are_those_of_the_tool(example: Any, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", ["cat", "dog", "owl"], 1)
    run = save_run(tmp_path / "run", Config(model=ModelConfig(name=TINY), data=DataConfig(
        name="folder", directory=str(images), mean=(0.4,), std=(0.3,), image_size=8)), {1: 0.5})
    file = export_weights(run)["file"]
    photos = [tmp_path / name for name in ("small.png", "large.jpg")]  # the large one is decoded at a part of its size
    for photo, size in zip(photos, ((21, 34, 3), (150, 90, 3)), strict=True):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)).save(photo)
    network, about = example.load(file)
    for photo, found in zip(photos, predict(run, list(map(str, photos)))["images"], strict=True):
        with torch.inference_mode():
            probabilities = network(example.read(str(photo), about)).softmax(-1)[0].numpy()
        np.testing.assert_allclose(probabilities, [found["probabilities"][name] for name in about["classes"]],
                                   atol=1e-5)
    said = subprocess.run([sys.executable, str(EXAMPLE), file, str(photo)], capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"{photo}  {about['classes'][int(probabilities.argmax())]} ")
