"""Weights for PyTorch: read again they are the run's own, and PyTorch's networks compute the same with them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import TINY, assert_trees_equal, save_run, user_error
from safetensors import safe_open
from safetensors.numpy import load_file
from sample_networks import random_variables

from shared_basis.analysis.collect import Analysis
from shared_basis.cli import commands
from shared_basis.config import Config, DataConfig, ModelConfig, replace
from shared_basis.export.export import export
from shared_basis.export.pytorch import export_weights
from shared_basis.interop.pytorch import load_pytorch_weights, to_published
from shared_basis.models import create_model
from shared_basis.runs.trained import Trained
from shared_basis.runtime.reporter import Reporter

CONFIG = Config(model=ModelConfig(name=TINY), data=DataConfig(name="folder", directory="images", image_size=8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of the tiny network on colour images, with two checkpoints."""
    from helpers import write_folder
    root = tmp_path_factory.mktemp("runs")
    write_folder(root / "images", ["cat", "dog", "owl"], 1)
    return save_run(root / "run", replace(CONFIG, {"data.directory": str(root / "images")}), {10: 0.5, 20: 0.25})


def request(workdir: Path, **fields: Any) -> commands.Request:
    return commands.Request(Config(), {}, str(workdir), True, quiet=True, format="pytorch", **fields)


def test_weights_that_are_not_finite_are_neither_exported_nor_analysed(run: Path, monkeypatch: Any) -> None:
    opened = Trained.open(run, "best")
    variables = jax.device_get(dict(opened.variables))
    variables["params"]["head"]["bias"] = np.full(3, np.nan, np.float32)
    spoilt = dataclasses.replace(opened, variables=variables)
    monkeypatch.setattr(Trained, "open", lambda *_: spoilt)
    for function in (export_weights, lambda workdir: Analysis.of(spoilt, Reporter())):
        with user_error(str(run), "params/head/bias of checkpoint 10 is not finite"):
            function(run)
    with user_error(str(run), "step 10: the logits of ", "are not finite"):
        export(run, "onnx")


def test_what_is_exported_is_imported_again(run: Path, tmp_path: Path) -> None:
    result, text = commands.run("export", request(run, checkpoint="best"))
    path = run / "export" / "model.safetensors"
    assert (result["file"], result["step"], result["format"]) == (str(path), 10, "pytorch")
    assert result["bytes"] == path.stat().st_size
    assert f"{result['parameters']:,} parameters (the layout repeats shared arrays for each block); the file" in text
    opened = Trained.open(run, "best")
    variables = jax.device_get(dict(opened.variables))
    assert_trees_equal(load_pytorch_weights(path, opened.model), variables)
    tensors = load_file(path)
    assert len(tensors) == result["tensors"]
    np.testing.assert_array_equal(tensors["layer1.1.shared_basis_2.weight"], tensors["shared_basis_1_2.weight"])
    np.testing.assert_array_equal(tensors["fc.weight"], variables["params"]["head"]["kernel"].T)
    assert int(tensors["bn1.num_batches_tracked"]) == 10
    with safe_open(path, "numpy") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
    assert about == {"model": TINY, "stem": "cifar", "step": 10, "classes": ["cat", "dog", "owl"],
                     "image_shape": [8, 8, 3], "mean": [0.5], "std": [0.5],
                     "resize": {"height": 8, "width": 8, "color": "RGB", "crop": "center", "part": 1.0,
                                "filter": "bilinear, antialiased", "shorter_side": 8}}


def test_the_file_goes_where_it_is_asked_to_or_nowhere(run: Path, tmp_path: Path) -> None:
    assert export_weights(run, output=str(tmp_path / "here.safetensors"))["step"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["here.safetensors"]
    with user_error("cannot be written", "--output=FILE"):
        export_weights(run, output=str(tmp_path / "absent" / "w.safetensors"))
    with user_error("--fold=none", "the weights unchanged"):
        commands.run("export", request(run, fold="none"))


def test_a_network_that_pytorch_does_not_have_is_refused(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(name="tiny-tied"), data=DataConfig())
    run = save_run(tmp_path / "run", config, {1: 0.5})
    with user_error("the official implementation has no such network"):
        export_weights(run)
    assert not (run / "export").exists()


# Against the networks of benchmarks in PyTorch, which have names of their own

LAYERS = {"1": "first", "2": "second", "3": "third"}


def bench_name(official: str, shared: list[str]) -> str:
    """Returns what benchmarks' network calls the tensor `official`; `shared` are the names of its shared arrays."""
    if match := re.fullmatch(r"shared_basis_(\d)(?:_(\d))?\.weight", official):
        return f"bases.group{match[1]}.{shared[int(match[2] or 1) - 1]}.weight"
    name = re.sub(r"^conv1\.", "stem.", official)
    name = re.sub(r"^bn1\.", "stem_norm.", name)
    name = re.sub(r"^fc\.", "head.", name)
    name = re.sub(r"^layer", "group", name).replace(".downsample.", ".shortcut.")
    for pattern, ours in ((r"\.conv(\d)\.", ".{}."), (r"\.bn(\d)\.", ".{}_norm."),
                          (r"\.basis_conv(\d)\.", ".{}.unique."), (r"\.basis_bn(\d)\.", ".{}.norm."),
                          (r"\.coeff_conv(\d)\.", ".{}.coefficients.")):
        name = re.sub(pattern, lambda match, ours=ours: ours.format(LAYERS[match[1]]), name)  # type: ignore[misc]
    return name


@pytest.mark.parametrize(("name", "stem", "size"), [
    ("resnet14-s4u1-double", "cifar", 16),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("resnet14-s4u1", "cifar", 16), ("resnet18", "imagenet", 40), ("resnet18-s8u2", "imagenet", 40),
        ("resnet50-shared++", "imagenet", 40)))])
def test_pytorch_computes_the_same_with_them(name: str, stem: str, size: int) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; the extra 'bench' brings it",
                                exc_type=ImportError)
    from benchmarks import pytorch_networks
    model = create_model(name, stem=stem)
    variables = random_variables(model, (32, 32, 3))
    theirs = pytorch_networks.create(name, 10, stem, "shared")
    shared = sorted(next(iter(model.shared_shapes().values()), {}))
    owned = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    for official, tensor in to_published(variables, model).items():
        if ".shared_basis" not in official:  # the blocks' copies: here they are one module
            with torch.no_grad():
                owned.pop(bench_name(official, shared)).copy_(torch.from_numpy(tensor))
    assert not owned
    images = np.random.default_rng(1).standard_normal((2, size, size, 3), np.float32)
    expected = np.asarray(jax.jit(lambda x: model.apply(variables, x, train=False))(images))
    with torch.inference_mode():
        logits = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
