"""Exported files, against the networks that they are made from; onnxruntime, which knows neither, computes ONNX."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import ROOT, CommandLine, tiny_network, user_environment, user_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from sample_networks import NETWORKS, SHAPE, random_variables

from shared_basis import data
from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.data.augment import normalize
from shared_basis.export import export, graph, stablehlo
from shared_basis.export import onnx as onnx_writer
from shared_basis.export.folding import CHOICES, fold
from shared_basis.export.graph import Node
from shared_basis.export.jaxpr import trace
from shared_basis.models import create_model
from shared_basis.models.base import Network, Sharing
from shared_basis.models.parameters import count_macs
from shared_basis.models.registry import FAMILIES
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.trained import Trained, build_model
from shared_basis.runs.workdir import Workdir, make_record

DATA = DataConfig(name="digits", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def random_images(count: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)


@dataclasses.dataclass
class Traced:
    """A network with random variables, its graph, and its logits of three images, by JAX."""

    model: Network
    variables: Any
    graph: Node
    images: np.ndarray
    logits: np.ndarray


def traced(model: Network, shape: tuple[int, int, int] = SHAPE) -> Traced:
    variables, images = random_variables(model, shape), random_images(3, shape)
    logits = jax.jit(lambda variables, images: model.apply(variables, normalize(images, DATA), train=False))(
        variables, images)
    return Traced(model, variables, read(model, variables, shape), images, np.asarray(logits))


def read(model: Network, variables: Any, shape: tuple[int, int, int] = SHAPE) -> Node:
    return trace(model.clone(scan_blocks=False), variables, shape, lambda x: normalize(x, DATA))


def onnx_logits(output: Node, images: np.ndarray) -> np.ndarray:
    found = onnx_writer.run(onnx_writer.serialise(output, {})[""], images)
    assert found is not None
    return found[0]


def assert_close(actual: Any, desired: Any) -> None:
    np.testing.assert_allclose(actual, desired, atol=1e-5 * max(1.0, float(np.abs(desired).max())), rtol=0)


@functools.cache
def traced_network(name: str) -> Traced:
    return traced(NETWORKS[name])


def named(*names: str) -> list[Any]:
    """Returns `names` as parameters; the MobileNets, which take longest, are slow tests."""
    slow = ("mobilenet", "efficientnet, unique")
    return [pytest.param(name, marks=pytest.mark.slow) if name.startswith(slow) else name for name in names]


@pytest.fixture(scope="module", params=named(*NETWORKS))  # of the module, so that tests of a network follow one another
def network(request: pytest.FixtureRequest) -> Traced:
    return traced_network(request.param)


def test_every_fold_of_every_network_computes_what_the_network_does(network: Traced) -> None:
    for choice in CHOICES:
        assert_close(onnx_logits(fold(network.graph, choice)[0], network.images), network.logits)


@pytest.mark.parametrize("network", ["double", "tied", "densenet"], indirect=True)
def test_kernels_are_initialisers_in_every_fold_as_other_tools_read_them(network: Traced) -> None:
    for choice in CHOICES:
        found = onnx.load_from_string(onnx_writer.serialise(fold(network.graph, choice)[0], {})[""]).graph
        stored = {array.name for array in found.initializer}
        kernels = {node.input[1] for node in found.node if node.op_type in ("Conv", "Gemm")}
        assert kernels - stored == set()


def test_an_unfolded_graph_has_the_macs_of_the_network_and_no_fold_but_composed_has_more(network: Traced) -> None:
    found = {choice: graph.count_macs(fold(network.graph, choice)[0]) for choice in CHOICES}
    of_network = sum(count_macs(network.model, network.variables, SHAPE).values())
    mixing = sum(array.size for name in network.variables["params"].get("bases", {}).values() for array in name.values()
                 if array.ndim == 5) * 2  # two blocks combine each group's templates, which the file need not
    assert found["none"] == found["basis"] == of_network - mixing
    assert found["auto"] == min(found.values())


NORMS_LEFT = {
    "tied": 4,  # of each of two blocks, two: the filters are the other block's too
    "bottleneck": 8,  # second and third of two blocks in each of two groups
    "resnext": 3,  # between basis and ReLU
    "densenet": 6,  # each of five layers and the head normalise what was joined, before ReLU
    "mobilenet": 9, "mobilenet, large images": 18,  # of nine blocks that share one or two 1×1 layers
    "shufflenetv1": 4}  # of two units that share two


def test_tells_which_batch_normalisations_could_not_be_folded(network: Traced) -> None:
    name = next(name for name, model in NETWORKS.items() if model is network.model)
    for choice in ("auto", "basis"):
        assert fold(network.graph, choice)[1].norms_left == NORMS_LEFT.get(name, 0)
    assert fold(network.graph, "none")[1].norms_left == len(
        [path for path, _ in jax.tree_util.tree_flatten_with_path(network.variables["batch_stats"])[0]
         if path[-1].key == "mean"])


def test_a_basis_layer_becomes_one_basis_convolution_and_one_1x1_with_a_bias() -> None:
    output, outcome = fold(traced_network("double").graph, "basis")
    layer = [node for node in graph.ordered(output) if node.scope == "group1/block2/first"]
    assert [node.op for node in layer] == ["conv", "conv"]
    assert [list(node.arrays) for node in layer] == [["kernel", "kernel_more"], ["kernel", "bias"]]
    assert [node.arrays["kernel"].shape for node in layer] == [(3, 3, 4, 1), (1, 1, 3, 4)]
    assert outcome.layers == {"basis": 6, "composed": 0}
    assert {node.op for node in graph.ordered(output)} == {
        "input", "affine", "conv", "clip", "add", "slice", "pad", "mean", "linear"}
    assert [node.scope for node in graph.ordered(output) if node.op == "affine"] == [""]  # normalisation of pixels


@pytest.mark.parametrize("rank", [3, 4])
def test_auto_composes_where_it_takes_fewer_macs(rank: int) -> None:
    """A pixel takes 9·4·R + R·4 as basis and 1×1, and 9·4·4 composed: the least is the former up to R = 3."""
    model = tiny_network(blocks=(3,), sharing=Sharing((("first", "first"), ("second", "second")), rank - 1, 1))
    folded, outcome = fold(read(model, random_variables(model)), "auto")
    assert outcome.layers == ({"basis": 4, "composed": 0} if rank == 3 else {"basis": 0, "composed": 4})
    stem, layer, head = 27 * 4, min(36 * rank + 4 * rank, 36 * 4), 40
    assert graph.count_macs(folded) == 64 * (stem + 2 * 36 * 4 + 4 * layer) + head


def initializers(content: bytes) -> dict[str, np.ndarray]:
    return {array.name: numpy_helper.to_array(array) for array in onnx.load_from_string(content).graph.initializer}


@pytest.mark.parametrize("network", ["double", "single", "shared only", "tied", "bottleneck", "resnext", "densenet",
                                     "mobilenet, large images"], indirect=True)
def test_shared_arrays_are_stored_once(network: Traced) -> None:
    model, variables, output = network.model, network.variables, network.graph
    content = onnx_writer.serialise(fold(output, "basis")[0], {})[""]
    stored = [array.transpose(2, 3, 1, 0) for array in initializers(content).values() if array.ndim == 4]
    for group, arrays in variables["params"]["bases"].items():
        for kind, shared in arrays.items():
            users = sum(array.shape == shared.shape and np.array_equal(array, shared) for array in stored)
            if len(model.sharing_blocks()[group]) > 1 or model.sharing.shared_rank:
                assert users == 1, (group, kind)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert graph.count_numbers(fold(output, "basis")[0]) <= parameters + 6
    assert len(content) < 4 * parameters + 400 * len(onnx.load_from_string(content).graph.node)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 3)]), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 9))
def test_folding_around_a_convolution_changes_nothing(strides_and_padding: tuple[int, int], groups: int, offset: bool,
                                                      seed: int) -> None:
    stride, padding = strides_and_padding
    rng = np.random.default_rng(seed)
    x = Node("input", (6, 7, 4))
    before = Node("affine", (6, 7, 4), (x,), {"scale": rng.normal(size=4), "offset": rng.normal(size=4) * offset})
    size = [(length + 2 * padding - 3) // stride + 1 for length in (6, 7)]
    conv = Node("conv", (*size, 8), (before,), {"kernel": rng.normal(size=(3, 3, 4 // groups, 8))}, {
        "strides": (stride, stride), "padding": ((padding, padding),) * 2, "groups": groups})
    after = Node("affine", (*size, 8), (conv,), {"scale": rng.normal(size=8), "offset": rng.normal(size=8)})
    folded, _ = fold(after, "auto")
    assert [node.op for node in graph.ordered(folded)] == (["input", "affine", "conv"] if offset else ["input", "conv"])
    images = rng.integers(0, 9, (2, 6, 7, 4), dtype=np.uint8)
    expected = graph.compute(fold(after, "none")[0], jnp.asarray(images))
    assert_close(graph.compute(folded, jnp.asarray(images)), expected)
    mean = Node("mean", (8,), (folded,))  # files end in logits
    assert_close(onnx_logits(mean, images), np.mean(expected, axis=(1, 2)))


def save(path: Path, *scales: float, **fields: Any) -> Path:
    """Saves a run with a checkpoint for each of `scales`, which classifies by random variables times the scale."""
    config = Config(model=ModelConfig(**{"name": "tiny-s2u1", **fields}),
                    data=DataConfig(name="digits", mean=(0.3,), std=(0.38,), train_examples=40))
    spec = data.describe(config.data)
    record = make_record(config, {"classes": list(spec.classes), "image_shape": list(spec.image_shape)})
    workdir = Workdir(path)
    workdir.claim(record)
    checkpoints = Checkpoints(workdir.checkpoints)
    for step, scale in enumerate(scales, start=1):
        variables = jax.tree.map(lambda leaf, scale=scale: jnp.asarray(scale * leaf),
                                 random_variables(build_model(config, spec), spec.image_shape))
        checkpoints.save(step, {**variables, "step": jnp.asarray(step)}, record, {"test_accuracy": 1 / step})
    checkpoints.close()
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("export") / "run", 1.0)


@pytest.fixture(scope="module")
def digits(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """All test images, and what the run's network says of them."""
    trained = Trained.open(run)
    test = trained.open_source().splits["test"]
    images = np.stack([pixels for pixels, _ in test.read(range(len(test)))])
    return images, np.asarray(trained.classifier()(jnp.asarray(images)))


@pytest.mark.parametrize("choice", CHOICES)
def test_onnx_says_of_every_test_image_what_the_run_does(run: Path, digits: Any, choice: str, tmp_path: Path) -> None:
    images, logits = digits
    result = export.export(run, "onnx", choice, output=str(tmp_path / "model.onnx"))
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images})[0]
    np.testing.assert_allclose(found, logits, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(-1), logits.argmax(-1))
    assert result["layers"] == {"basis": 2 * (choice != "composed"), "composed": 2 * (choice == "composed")}
    assert result["verified"]["difference"] < 1e-4
    assert result["bytes"] == (tmp_path / "model.onnx").stat().st_size


@pytest.mark.parametrize("batch", [1, 355])
def test_onnx_takes_any_number_of_images(run: Path, digits: Any, batch: int) -> None:
    session = onnxruntime.InferenceSession(export.export(run, "onnx")["file"])
    assert [(tensor.name, tensor.type, tensor.shape) for tensor in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", "tensor(uint8)", ["N", 8, 8, 1]), ("logits", "tensor(float)", ["N", 10])]
    found = session.run(None, {"images": digits[0][:batch]})[0]
    np.testing.assert_allclose(found, digits[1][:batch], atol=1e-4)


def test_onnx_says_what_it_is(run: Path) -> None:
    result = export.export(run, "onnx", "basis")
    assert result["file"] == str(run / "export" / "model.onnx")
    model = onnx.load(result["file"])
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert (about["model"], about["fold"]) == ("tiny-s2u1", "basis")
    assert json.loads(about["classes"]) == [str(digit) for digit in range(10)]
    assert [json.loads(about[name]) for name in ("mean", "std", "image_shape")] == [[0.3], [0.38], [8, 8, 1]]
    assert json.loads(about["versions"])["jax"] == jax.__version__
    assert json.loads(about["macs"]) == result["macs"]
    names = {array.name for array in model.graph.initializer}
    assert {"group1/block2/first/kernel", "group1/block2/first/bias", "head/kernel"} <= names


LOAD = """
import sys, json, numpy, jax
from jax import export
call = export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call
logits = jax.jit(call)(numpy.load("images.npy"))
assert not any(name.startswith(("shared_basis", "flax")) for name in sys.modules)
about = json.load(open("model.stablehlo.json"))
print(json.dumps({"logits": numpy.asarray(logits).tolist(), "one": call(numpy.load("images.npy")[:1]).shape, **about}))
"""


@pytest.mark.parametrize("choice", ["auto", pytest.param("composed", marks=pytest.mark.slow)])
def test_stablehlo_is_computed_without_this_package(run: Path, digits: Any, choice: str, tmp_path: Path) -> None:
    images, logits = digits
    result = export.export(run, "stablehlo", choice, output=str(tmp_path / "model.stablehlo"))
    assert result["verified"]["difference"] < 1e-4
    np.save(tmp_path / "images.npy", images)
    loaded = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, env=user_environment(), text=True,
                            capture_output=True, timeout=300, check=False)
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(found["logits"], -1), logits.argmax(-1))
    assert (found["one"], found["classes"][3], found["mean"]) == ([1, 10], "3", [0.3])


def test_stablehlo_is_for_every_platform_and_has_no_form_of_one(run: Path) -> None:
    file = Path(export.export(run, "stablehlo")["file"])
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
    text = program.mlir_module()
    assert "tensor<?x8x8x1xui8>" in text
    assert set(re.findall(r"custom_call @(\w+)", text)) <= {"shape_assertion"}
    assert b".py" not in file.read_bytes()  # no path of this machine
    convolutions = 1 + 2 + 2 * 2  # stem; the plain block; basis and 1×1 of two layers
    # JAX itself writes down each convolution for each platform.
    assert len(re.findall(r"stablehlo.convolution", text)) in (convolutions, convolutions * len(program.platforms))
    assert "while" not in text
    # Accelerators would otherwise take fewer bits than float32 has, for the head's product too.
    products = re.findall(r"stablehlo\.(?:convolution|dot).*", text)
    assert len(products) > convolutions
    assert [product.count("HIGHEST") for product in products] == [2] * len(products)


def test_a_checkpoint_and_a_precision_are_the_runs(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 1.0, 0.5, dtype="bfloat16", scan_blocks="yes")
    best, latest = (export.export(path, "onnx", which=which, output=str(tmp_path / which))
                    for which in ("best", "latest"))
    assert (best["step"], latest["step"]) == (1, 2)
    assert (tmp_path / "best").read_bytes() != (tmp_path / "latest").read_bytes()
    assert best["verified"]["difference"] <= 1e-5 * best["verified"]["largest"]  # to float32


class Lopsided(nn.Module):
    """Every operation, with heights, widths and both ends of them all different."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(6, (3, 2), (2, 1), ((0, 2), (1, 0)), dtype=jnp.float32, name="first")(images[:, 1:10, ::2])
        x = nn.max_pool(x, (3, 2), (1, 2), ((2, 0), (0, 1)))
        x = nn.relu6(3 - 2 * jnp.pad(x, ((0, 0), (0, 1), (2, 0), (1, 0))))
        x = nn.avg_pool(x, (2, 3), (1, 2), ((1, 0), (2, 1)))
        x = jnp.concatenate([x, jnp.minimum(x / 2, 0.25)], axis=-1)
        return nn.Dense(10, name="head")((x - 1).mean((1, 2)))


def test_heights_are_not_taken_for_widths_nor_the_beginning_for_the_end() -> None:
    model, shape = Lopsided(), (11, 14, 3)
    variables, images = random_variables(model, shape), random_images(3, shape)
    expected = model.apply(variables, normalize(jnp.asarray(images), DATA), train=False)
    output = fold(trace(model, variables, shape, lambda x: normalize(x, DATA)), "auto")[0]
    assert {node.op for node in graph.ordered(output)} == {
        "input", "affine", "slice", "conv", "max_pool", "pad", "clip", "average_pool", "concat", "mean", "linear"}
    assert_close(onnx_logits(output, images), expected)
    assert_close(graph.compute(output, jnp.asarray(images)), expected)


class Split(nn.Module):
    """Slices pooled features, which have no height and width."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(6, (3, 3), dtype=jnp.float32, name="first")(images).mean((1, 2))
        first, second = x[:, :2], x[:, 2:]
        return nn.Dense(10, name="head")(jnp.concatenate([second[:, ::2], first], axis=-1))


def test_pooled_features_are_sliced() -> None:
    model = Split()
    variables, images = random_variables(model, SHAPE), random_images(3, SHAPE)
    expected = model.apply(variables, normalize(jnp.asarray(images), DATA), train=False)
    output = fold(trace(model, variables, SHAPE, lambda x: normalize(x, DATA)), "auto")[0]
    assert_close(onnx_logits(output, images), expected)


class Bounded(nn.Module):
    """Clips to many bounds and slices at many places, some of them alike."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(12, (3, 3), dtype=jnp.float32, name="first")(images)
        for bound in (1.75, 1.5, 1.25, 1.5, 1.75, 1.25):
            x = 2 * jnp.clip(x - 0.5, 0, bound)
        parts = [x[:, :2, begin:begin + 3] for begin in (0, 1, 2, 1, 0, 4)]
        return nn.Dense(10, name="head")(jnp.concatenate(parts, axis=-1).mean((1, 2)))


def test_bounds_and_places_of_an_onnx_file_are_each_stored_once() -> None:
    model = Bounded()
    variables, images = random_variables(model, SHAPE), random_images(3, SHAPE)
    expected = model.apply(variables, normalize(jnp.asarray(images), DATA), train=False)
    content = onnx_writer.serialise(fold(trace(model, variables, SHAPE, lambda x: normalize(x, DATA)), "none")[0], {})
    found = onnx_writer.run(content[""], images)
    assert found is not None
    assert_close(found[0], expected)
    stored = initializers(content[""]).values()
    assert sorted(float(array) for array in stored if not array.ndim) == [0, 1.25, 1.5, 1.75]
    integers = [tuple(array) for array in stored if array.dtype == np.int64]
    assert {(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 4)} < set(integers)
    assert len(set(integers)) == len(integers)


class Strange(nn.Module):
    """A network with an operation that no graph holds."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        return nn.Dense(10)(jnp.tanh(images).mean((1, 2)))


def test_an_operation_that_cannot_be_exported_is_named() -> None:
    variables = random_variables(Strange(), SHAPE)
    with user_error("operation tanh", "float32[1,8,8,3]", "Strange", "cannot be exported"):
        trace(Strange(), variables, SHAPE, lambda images: images / 255.0)


def test_invalid_arguments_are_named(run: Path, tmp_path: Path) -> None:
    with user_error("format='tflite'", "onnx, stablehlo"):
        export.export(run, "tflite")
    with user_error("fold='all'", "auto, basis, composed, none"):
        export.export(run, "onnx", "all")
    with user_error(str(tmp_path / "absent" / "model.onnx"), "cannot be written", "--output=FILE"):
        export.export(run, "onnx", output=str(tmp_path / "absent" / "model.onnx"))
    (tmp_path / "file").write_text("")
    with user_error(str(tmp_path / "file" / "model.onnx"), "cannot be written", "--output=FILE"):
        export.export(run, "onnx", output=str(tmp_path / "file" / "model.onnx"))
    with user_error("cannot be written", "--output=FILE"):
        export.export(run, "onnx", output=str(tmp_path / ("x" * 253)))
    (tmp_path / "file").unlink()
    with user_error(str(tmp_path), "s a directory"):
        export.export(run, "onnx", output=str(tmp_path))
    with user_error("holds no run"):
        export.export(tmp_path, "onnx")
    with user_error("--config.model.name cannot be changed"):
        export.export(run, "onnx", overrides={"model.name": "resnet20"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnx"), ("stablehlo", "flatbuffers")])
def test_a_missing_package_is_named_before_anything_is_read(kind: str, package: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with user_error(f"needs the package {package}", "pip install 'shared-basis[export]'"):
        export.export(tmp_path, kind)


def test_says_when_it_could_not_be_verified(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = export.export(run, "onnx", output=str(tmp_path / "model.onnx"))
    assert result["verified"] is None
    assert "not verified" in export.render(result)


@pytest.mark.parametrize("fault", [1.0, np.nan])
def test_writes_nothing_that_computes_something_else(run: Path, tmp_path: Path, fault: float,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(file: bytes, images: np.ndarray) -> tuple[np.ndarray, str]:
        logits, by = onnx_writer.run(file, images)
        return logits + fault, by
    monkeypatch.setitem(export.FORMATS, "wrong", SimpleNamespace(
        require_packages=lambda: None, serialise=onnx_writer.serialise, run=wrong))
    with user_error("no file was written", "differ from the network's", "--fold=none"):
        export.export(run, "wrong", output=str(tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_finished_leaves_the_file_that_was_there(run: Path, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.stablehlo").write_text("before")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with user_error("cannot be written", "No space left on device"):
        export.export(run, "stablehlo", output=str(tmp_path / "model.stablehlo"))
    assert [file.name for file in tmp_path.iterdir()] == ["model.stablehlo"]
    assert (tmp_path / "model.stablehlo").read_text() == "before"


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, main: CommandLine) -> None:
    run = save(tmp_path / "run", 1.0, name="resnet14-s4u1")  # the command knows no network of the tests
    done = main("--mode=export", f"--workdir={run}", "--format=onnx", "--fold=composed", "--json",
                "--output=model.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["layers"], result["norms_left"]) == ({"basis": 0, "composed": 6}, 0)
    assert result["macs"]["exported"] > result["macs"]["network"]
    assert result["bytes"] == (tmp_path / "model.onnx").stat().st_size
    wrong = main("--mode=export", f"--workdir={run}", "--format=tflite", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert "stablehlo" in wrong.stderr


@pytest.mark.parametrize("kind", export.FORMATS)
def test_the_documented_recipe_loads_the_file(kind: str, run: Path, digits: Any, tmp_path: Path) -> None:
    """It runs elsewhere, without this package; the commands that write files are tested with those of all pages."""
    export.export(run, kind)
    page = (ROOT / "docs" / "export.md").read_text()
    recipe, = re.findall(rf"```python\n([^`]*model\.{kind}\b.+?)```", page, re.DOTALL)
    np.save(tmp_path / "images.npy", digits[0][:5])
    code = ["import numpy, sys", "images = numpy.load('images.npy')", recipe.replace("runs/NAME", str(run)),
            "assert classes == list('0123456789') and 'shared_basis' not in sys.modules",
            "numpy.save('logits.npy', numpy.asarray(logits))"]
    loaded = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, env=user_environment(), text=True,
                            capture_output=True, timeout=300, check=False)
    assert loaded.returncode == 0, loaded.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), digits[1][:5], atol=1e-4)


NAMES = [f"{base}{sharing}" for base, family in FAMILIES.items() for sharing in (
    "", *(f"-{form.replace('<S>', '8').replace('<U>', '4').replace('<k>', '4')}" for form in family.forms))]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_registered_network_is_exported(name: str) -> None:
    for stem in FAMILIES[name.partition("-")[0]].stems:
        shape = (32, 32, 3) if stem == "cifar" else (64, 64, 3)
        found = traced(create_model(name, stem=stem), shape)
        for choice in CHOICES:
            assert_close(onnx_logits(fold(found.graph, choice)[0], found.images), found.logits)


def test_a_channel_shuffle_is_a_reshape_a_transpose_and_a_reshape() -> None:
    output, _ = fold(traced_network("shufflenetv1").graph, "auto")
    nodes = [node for node in graph.ordered(output) if node.op in ("reshape", "transpose")]
    assert [node.op for node in nodes] == ["reshape", "transpose", "reshape"] * 3  # one in each unit
    assert [node.shape for node in nodes[3:6]] == [(4, 4, 2, 4), (4, 4, 4, 2), (4, 4, 8)]
    model = onnx.load_model_from_string(onnx_writer.serialise(output, {})[""])
    perms = [list(node.attribute[0].ints) for node in model.graph.node if node.op_type == "Transpose"]
    assert perms == [[0, 3, 1, 2], *[[0, 2, 1, 3, 4]] * 3]  # of the pixels, and of N, groups, channels, height, width


@pytest.mark.parametrize("name", ["densenet", "shufflenetv2", "efficientnet"])
def test_stablehlo_computes_what_pooling_shuffling_and_exciting_networks_do(name: str) -> None:
    found = traced_network(name)
    files = stablehlo.serialise(fold(found.graph, "auto")[0], {})
    assert_close(stablehlo.run(files[""], found.images)[0], found.logits)
