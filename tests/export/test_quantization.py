"""Quantised files, against the float32 ones that they are made from, on all test images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import ROOT, CommandLine, save_run_without_test_images, user_error
from onnx import TensorProto, numpy_helper
from sample_networks import random_variables

from shared_basis import data
from shared_basis.cli import commands
from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.data.augment import normalize
from shared_basis.export import export, quantization
from shared_basis.runs.trained import build_model
from shared_basis.training.start import start_run

CONFIG = Config(model=ModelConfig(name="tiny-s2u1"), data=DataConfig(name="digits", mean=(0.3,), std=(0.38,)))


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    source = data.open_source(CONFIG.data, (split,)).splits[split]
    images, labels = zip(*source.read(range(len(source))), strict=True)
    return np.stack(images), np.array(labels)


def save(path: Path, scale: float = 1.0) -> Path:
    """Saves a run whose head is fitted to random features by least squares, times `scale`: skill without training."""
    spec = data.describe(CONFIG.data)
    model, (images, labels) = build_model(CONFIG, spec), digits("train")
    variables = jax.tree.map(np.asarray, random_variables(model, spec.image_shape))
    head = variables["params"]["head"]
    channels = len(head["kernel"])
    head.update(kernel=np.eye(channels, 10, dtype=np.float32), bias=np.zeros(10, np.float32))
    features = np.asarray(jax.jit(lambda x: model.apply(variables, normalize(x, CONFIG.data), train=False))(images))
    inputs = np.concatenate([features[:, :channels], np.ones((len(images), 1))], axis=1)
    weights = np.linalg.lstsq(inputs, np.eye(10)[labels], rcond=None)[0].astype(np.float32)
    head.update(kernel=scale * weights[:-1], bias=scale * weights[-1])
    start_run(CONFIG, path, model, spec, variables)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("quantize") / "run")


def logits(file: bytes | Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["logits"], {"images": images})[0]
    return found


@pytest.mark.parametrize(("choice", "closeness"), [("int8", 0.5), ("float16", 0.01)])
def test_a_quantised_file_says_what_the_network_does_and_how_well(run: Path, choice: str, closeness: float,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []
    convert = getattr(quantization, f"_to_{choice}")
    monkeypatch.setattr(quantization, f"_to_{choice}", lambda *a: (given.append(a[0]), convert(*a))[1])
    result = export.export(run, "onnx", "basis", quantize=choice, tolerance=20)  # features at random are not robust
    file, found = Path(result["file"]), result["quantized"]
    assert file == run / "export" / f"model-{choice}.onnx"
    images, labels = digits("test")
    expected, actual = logits(given[0], images), logits(file, images)
    assert 0 < np.abs(actual - expected).mean() < closeness * np.abs(expected).mean()
    assert len(np.unique(actual)) > 1000  # logits are not rounded
    assert found["test_accuracy"]["float32"] > 0.25  # of ten classes, so that there is something to lose
    assert found["test_accuracy"] == {"float32": float(np.mean(expected.argmax(-1) == labels)),
                                      choice: float(np.mean(actual.argmax(-1) == labels))}
    assert found["same_class"] == np.mean(expected.argmax(-1) == actual.argmax(-1))
    assert found["bytes"] == {"float32": len(given[0]), choice: file.stat().st_size}
    assert (result["bytes"], found["test_examples"]) == (file.stat().st_size, len(labels))
    assert found["calibration"] == (quantization.CALIBRATION_IMAGES if choice == "int8" else 0)
    assert set(found["latency"]) == {"float32", choice}
    assert all(seconds > 0 for seconds in found["latency"].values())
    said = export.render(result)
    assert f"float32 → {choice}" in said
    assert f"and the same class for {100 * found['same_class']:.2f} % of them" in said

    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert (about["quantize"], json.loads(about["classes"])[3]) == (choice, "3")
    stored = {array.name: array for array in model.graph.initializer}
    kernels = [array for array in stored.values() if len(array.dims) == 4]
    assert {array.data_type for array in kernels} == {TensorProto.INT8 if choice == "int8" else TensorProto.FLOAT16}
    assert len(kernels) == 1 + 2 + 1 + 2 * 2  # stem; plain block; shared elements, once; unique ones and coefficients
    of_pixels = [name for node in model.graph.node if node.op_type in ("Mul", "Add") for name in node.input]
    assert {"preprocessing/scale", "preprocessing/offset"} <= set(of_pixels) & set(stored)  # float32 still
    if choice == "int8":
        for array in kernels:
            scales = stored[array.name.replace("_quantized", "_scale")]
            assert list(scales.dims) == [array.dims[0]]  # by output channel
            largest = np.abs(numpy_helper.to_array(array).astype(int)).max(axis=(1, 2, 3))
            assert largest.min() >= 63
            assert largest.max() <= 64  # 2 · 64 · 255 fits into 16 bits, which is all that older processors have


def test_nothing_is_written_that_loses_more_than_is_allowed(tmp_path: Path) -> None:
    """Weights of 1e7 are infinite in float16, and what is not a number classifies nothing."""
    path = save(tmp_path / "run", scale=1e7)
    with user_error("no file was written", "float16 classifies 0.00 %", " images), but only --tolerance=1",
                    "give --tolerance="):
        export.export(path, "onnx", quantize="float16")
    assert not (path / "export").exists()


def test_test_images_none_of_which_can_be_decoded_are_told(tmp_path: Path) -> None:
    run = save_run_without_test_images(tmp_path)
    with user_error("none of the test images can be decoded"):
        export.export(run, "onnx", quantize="float16")
    assert not (run / "export").exists()


def test_a_loss_that_is_just_allowed_is_allowed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 * (95 / 100 - 94 / 100) is 1.0000000000000009.
    monkeypatch.setattr(quantization, "_score", lambda *_: ({"float32": 95, "float16": 94}, 94, 100))
    found = export.export(run, "onnx", "basis", quantize="float16", tolerance=1)["quantized"]
    assert found["test_accuracy"] == {"float32": 0.95, "float16": 0.94}
    with user_error("a loss of 1.00 points (1 images)", "only --tolerance=0.99 is allowed; give --tolerance=1,"):
        export.export(run, "onnx", "basis", quantize="float16", tolerance=0.99)


@pytest.mark.parametrize(("fields", "parts"), [
    ({"quantize": "int8", "format": "stablehlo"}, ("--quantize=int8 requires --format=onnx", "--format=stablehlo")),
    ({"quantize": "float16", "format": "pytorch"}, ("--quantize=float16", "--format=pytorch")),
    ({"quantize": "int8", "tolerance": -1.0}, ("--tolerance=-1", "0 to 100")),
    ({"quantize": "int8", "tolerance": float("nan")}, ("--tolerance=nan", "0 to 100")),
    ({"tolerance": 2.0}, ("--tolerance requires --quantize",)),
    ({"quantize": "int4"}, ("--quantize=int4", "int8, float16"))])
def test_what_cannot_be_quantised_is_refused_before_anything_is_read(fields: dict[str, Any],
                                                                     parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        commands.run("export", commands.Request(Config(), {}, "absent", True, **fields))


def test_a_missing_onnxruntime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with user_error("--quantize needs the package onnxruntime", "pip install 'shared-basis[export]'"):
        export.export(tmp_path, "onnx", quantize="int8")


@pytest.mark.slow
def test_trained_on_digits_and_quantised_from_the_command_line(tmp_path: Path, main: CommandLine) -> None:
    run = tmp_path / "run"
    trained = main("--config=configs/digits_resnet.py", f"--workdir={run}", cwd=ROOT)
    assert trained.returncode == 0, trained.stderr
    for choice, part in (("int8", 0.5), ("float16", 0.6)):
        done = main("--mode=export", f"--workdir={run}", f"--quantize={choice}", "--json", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["quantized"]
        assert found["test_accuracy"]["float32"] > 0.85
        assert found["test_accuracy"][choice] >= found["test_accuracy"]["float32"] - 0.01
        assert found["bytes"][choice] < part * found["bytes"]["float32"]
    wrong = main("--mode=export", f"--workdir={run}", "--quantize=int4", cwd=ROOT)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mobilenetv1w8-s8u1", "shufflenetv2_x0_5-shared++", "efficientnet_b0-shared"])
def test_compact_networks_are_trained_and_quantised(network: str, tmp_path: Path, main: CommandLine) -> None:
    """Depthwise layers, channel shuffle, squeeze and excitation."""
    run = tmp_path / "run"
    trained = main(f"--config=configs/digits_resnet.py:{network}", "--config.data.image_size=16",
                   "--config.train.epochs=6", "--config.optimizer.learning_rate=0.05", f"--workdir={run}", cwd=ROOT)
    assert trained.returncode == 0, trained.stderr
    done = main("--mode=export", f"--workdir={run}", "--quantize=int8", "--tolerance=10", "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    kernels = [array for array in onnx.load(result["file"]).graph.initializer if len(array.dims) == 4]
    assert {array.data_type for array in kernels} == {TensorProto.INT8}
    assert result["quantized"]["test_accuracy"]["float32"] > 0.5
    assert result["quantized"]["same_class"] > 0.9
    assert result["quantized"]["bytes"]["int8"] < 0.5 * result["quantized"]["bytes"]["float32"]
