"""Compression of networks and of runs: exact at full rank, as good as it can be below, and what is refused."""

from __future__ import annotations

import csv
import functools
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import TINY, make_images, read_metrics, save_run, tiny_network, user_error, write_folder
from PIL import Image

from configs import digits_resnet
from shared_basis import data
from shared_basis.cli import commands
from shared_basis.compression import compress as compress_module
from shared_basis.compression import factorize, layers, ranks, spectra
from shared_basis.compression.compress import check_target
from shared_basis.compression.factorize import relative_error
from shared_basis.compression.kernels import matrix
from shared_basis.compression.moments import input_moments
from shared_basis.compression.patches import patches
from shared_basis.config import Config, DataConfig, ModelConfig, from_config_dict, replace
from shared_basis.data.augment import normalize
from shared_basis.evaluation.evaluate import evaluate
from shared_basis.models.base import Network, Sharing
from shared_basis.models.densenet import DenseNet
from shared_basis.models.parameters import abstract_variables
from shared_basis.models.registry import FAMILIES, Family, register
from shared_basis.models.resnet import ResNet
from shared_basis.models.summary import count_network
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.convolution import Window
from shared_basis.optim.penalty import orthogonality_penalty
from shared_basis.runs.trained import Trained, build_model
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.start import compress_run, start_run
from shared_basis.training.train import train

if "small" not in FAMILIES:
    register("small", Family(ResNet, ("cifar", "imagenet"), FAMILIES["resnet20"].forms,
                             {"blocks": (2, 3), "widths": (4, 8), "project": False}))

QUIET = Reporter(verbosity="quiet")
SINGLE, DOUBLE = (("first", "shared"), ("second", "shared")), (("first", "first"), ("second", "second"))
SHAPE = (8, 8, 1)
DATA = DataConfig(mean=(0.3,), std=(0.4,))


def sharing(layers: tuple[tuple[str, str], ...], shared: int, unique: int) -> Sharing:
    return Sharing(layers, shared, unique)


def plain_network(**changes: Any) -> Network:
    return tiny_network(sharing=Sharing(), blocks=(3,), scan_blocks=False, **changes)


def dense_network(layers: tuple[tuple[str, str], ...] = (), shared: int = 0, unique: int = 0) -> Network:
    return DenseNet(blocks=(3, 2), growth=2, num_classes=10, sharing=sharing(layers, shared, unique))


def trained_like(network: Network) -> Any:
    """Returns variables that are random, batch statistics too, as a training might leave them."""
    rng = np.random.default_rng(0)
    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1)).astype(np.float32)
    return unflatten_dict({path: draw(path, leaf.shape) for path, leaf in
                           flatten_dict(dict(abstract_variables(network, SHAPE))).items()})


def take_apart(network: Network, count: int = 40) -> tuple[Any, layers.PlainLayers]:
    """Returns the variables of a plain `network`, and its layers measured on random images in two batches."""
    variables = trained_like(network)
    images, labels = make_images(count)
    paths = [path for group in network.basis_layer_paths().values() for path in group]
    half = count // 2
    moments = input_moments(network, variables, DATA, paths,
                            [(jnp.asarray(images[part]), jnp.asarray(labels[part]))
                             for part in (slice(half), slice(half, None))])
    return variables, layers.PlainLayers(flatten_dict(variables), moments)


@pytest.fixture(scope="module")
def resnet() -> tuple[Any, layers.PlainLayers]:
    return take_apart(plain_network())


@functools.cache
def apply(network: Network) -> Any:
    return jax.jit(lambda variables, images: network.apply(variables, normalize(images, DATA), train=False))


def logits(network: Network, variables: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(apply(network)(variables, images))


def compressed(source: layers.PlainLayers, network: Network) -> tuple[Any, list[dict[str, Any]]]:
    arrays, errors = compress_module.factorised(source, network, SHAPE)
    return unflatten_dict(arrays), errors


# The inputs of layers


def test_moments_are_those_of_the_patches_that_count() -> None:
    network = plain_network()
    variables = trained_like(network)
    images, labels = make_images(12)
    labels[[2, 7]] = -1
    path = ("group1", "block2", "first")
    moments = input_moments(network, variables, DATA, [path], [
        (jnp.asarray(images[part]), jnp.asarray(labels[part])) for part in (slice(8), slice(8, None))])[path]
    seen = network.apply(variables, normalize(jnp.asarray(images[labels >= 0]), DATA), train=False,
                         capture_intermediates=lambda module, _: module.path == (*path[:1], "block1"))[1]
    x = np.pad(np.asarray(seen["intermediates"]["group1"]["block1"]["__call__"][0]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = np.array([x[n, i:i + 3, j:j + 3].ravel() for n in range(10) for i in range(8) for j in range(8)])
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.second, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T, bias=True), rtol=1e-3, atol=1e-5)


# Networks


@pytest.mark.parametrize(("layout", "shared", "unique", "measured"), [
    (SINGLE, 36, 0, True), (SINGLE, 2, 4, False), (DOUBLE, 18, 18, True), ((), 0, 36, False), ((), 0, 4, True)])
def test_at_full_rank_the_logits_are_those_of_the_plain_network(
        resnet: tuple[Any, layers.PlainLayers], layout: Any, shared: int, unique: int, measured: bool) -> None:
    """Full is k²C = 36 together, or as many unique elements as a layer has channels, 4."""
    variables, source = resnet
    source = source if measured else layers.PlainLayers(source.arrays, {})
    images = make_images(30)[0][10:]
    network = tiny_network(sharing=sharing(layout, shared, unique), blocks=(3,))
    found, errors = compressed(source, network)
    np.testing.assert_allclose(logits(network, found, images), logits(plain_network(), variables, images), atol=1e-4)
    assert max(layer["filters"] for layer in errors) < 1e-5
    assert len(errors) == 4


def test_at_full_rank_densenet_is_itself_too() -> None:
    variables, source = take_apart(dense_network())
    target = dense_network((("second", "shared"),), 60, 12)
    images = make_images(20)[0]
    np.testing.assert_allclose(logits(target, compressed(source, target)[0], images),
                               logits(dense_network(), variables, images), atol=1e-4)


@pytest.mark.parametrize(("layout", "shared", "unique"), [(SINGLE, 3, 0), (DOUBLE, 3, 1), ((), 0, 2)])
def test_what_is_written_is_orthonormal_and_what_is_not_factorised_is_copied(
        resnet: tuple[Any, layers.PlainLayers], layout: Any, shared: int, unique: int) -> None:
    _, source = resnet
    network = tiny_network(sharing=sharing(layout, shared, unique), blocks=(3,))
    found, errors = compressed(source, network)
    flat = flatten_dict(found)
    expected = flatten_dict(dict(abstract_variables(network, SHAPE)))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in flat.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()}
    sets = network.basis_groups("shared+unique")
    assert not sets or float(orthogonality_penalty(found["params"], sets)) < (1e-10 if layout != DOUBLE else 0.02)
    if shared:  # together, of double sharing too
        assert float(orthogonality_penalty(found["params"], network.basis_groups("shared"))) < 1e-10
    moved = {("batch_stats", *layers.following_norm(tuple(layer["path"].split("/")))) for layer in errors}
    for path in flat.keys() & source.arrays.keys():
        if path[:-1] not in moved:
            np.testing.assert_array_equal(flat[path], source.arrays[path], err_msg=str(path))
    assert len(moved) == 4


def test_batch_norms_have_the_statistics_of_their_new_inputs(resnet: tuple[Any, layers.PlainLayers]) -> None:
    """In the first block that shares, whose inputs are those of the plain network."""
    variables, source = resnet
    network = tiny_network(sharing=sharing(SINGLE, 3, 1), blocks=(3,), scan_blocks=False)
    found, _ = compressed(source, network)
    _, seen = network.apply(found, normalize(jnp.asarray(make_images(40)[0]), DATA), train=False,
                            capture_intermediates=lambda module, _: module.path == ("group1", "block1"))
    inputs = seen["intermediates"]["group1"]["block1"]["__call__"][0]
    shared = found["params"]["bases"]["group1"]["shared"]

    def outputs(layer: BasisConv, variables: Any, *arrays: Any) -> np.ndarray:
        own = {kind: variables[kind]["group1"]["block2"].get("first", {}) for kind in ("params", "batch_stats")}
        return np.asarray(layer.apply(own, inputs, *arrays, train=False), np.float64).reshape(-1, 4)

    x = outputs(BasisConv(4), variables)  # the layer in the plain network, and the compressed one
    y = outputs(BasisConv(4, unique_rank=1), found, shared)
    norm, stats = found["params"]["group1"]["block2"]["first"]["norm"], found["batch_stats"]["group1"]["block2"]
    before = variables["batch_stats"]["group1"]["block2"]["first_norm"]
    np.testing.assert_allclose(stats["first_norm"]["mean"] - before["mean"], y.mean(0) - x.mean(0), atol=1e-4)
    np.testing.assert_allclose(stats["first_norm"]["var"] / before["var"], y.var(0) / x.var(0), rtol=1e-3)
    elements = np.concatenate([found["params"]["group1"]["block2"]["first"]["unique"], shared], axis=-1)
    products = patches(inputs, (3, 3), Window.of((3, 3), inputs.shape[1:3])) @ matrix(elements)
    products = np.asarray(products, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(stats["first"]["norm"]["mean"], products.mean(0), atol=1e-4)
    np.testing.assert_allclose(stats["first"]["norm"]["var"], products.var(0), rtol=1e-3)
    np.testing.assert_allclose(norm["scale"], np.sqrt(products.var(0) + 1e-5), rtol=1e-3)
    np.testing.assert_allclose(norm["bias"], products.mean(0), atol=1e-4)


def test_measured_on_images_the_activations_err_less_than_by_filters_alone(
        resnet: tuple[Any, layers.PlainLayers]) -> None:
    _, source = resnet
    network = tiny_network(sharing=sharing(DOUBLE, 3, 1), blocks=(3,))
    _, measured = compressed(source, network)
    group = layers.PlainLayers(source.arrays, {}).group(network, "group1")
    bases = group.bases(3)
    for layer in measured:
        path = tuple(layer["path"].split("/"))
        own = factorize.factorise(group.layers[path], group.basis_of(path, bases), 1)
        elements = np.concatenate([own.unique, group.basis_of(path, bases)], axis=1)
        by_filters = relative_error(group.layers[path].kernel, elements @ own.coefficients,
                                    source.layer(path).factor)
        assert layer["activations"] < by_filters


# Runs


def config_of(name: str, **changes: Any) -> Config:
    return replace(from_config_dict(digits_resnet.get_config(name)), {
        "train.epochs": 1, "optimizer.warmup_epochs": 0.0, "train.batch_size": 32, "data.train_examples": 64,
        "data.test_examples": 50, **changes})


def make_run(path: Path, config: Config, change: Any = lambda arrays: arrays) -> Path:
    spec = data.describe(config.data)
    model = build_model(config, spec)
    arrays = change(flatten_dict(trained_like(model)))
    start_run(config, path, model, spec, unflatten_dict(arrays))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "plain", config_of("small"))


def compress(run: Path, workdir: Path, name: str = "small-s4u1", changes: Any = {},  # noqa: B006
             **options: Any) -> dict[str, Any]:
    return compress_run(config_of(name, **changes), workdir, str(run), QUIET, **options)


def test_a_compressed_run_is_trained_on(tmp_path: Path) -> None:
    run, config = make_run(tmp_path / "plain", config_of("tiny")), config_of(TINY)
    request = commands.Request(config, {}, str(tmp_path / "run"), False, quiet=True, source=str(run), calibration=40)
    result, text = commands.run("compress", request)
    workdir = tmp_path / "run-compressed"
    assert (result["workdir"], result["step"], result["calibration"]) == (str(workdir), 0, 40)
    assert [layer["path"] for layer in result["layers"]] == ["group1/block2/first", "group1/block2/second"]
    assert all(0 < layer[kind] < 1 for layer in result["layers"] for kind in ("filters", "activations"))
    assert result["parameters"] < result["plain"]["parameters"]
    assert "outputs on 40 training images" in text
    assert str(workdir) in text
    evaluated = evaluate(workdir)
    assert (evaluated["step"], evaluated["test_accuracy"]) == (0, result["test_accuracy"]["compressed"])
    with user_error("already holds checkpoints"):
        commands.run("compress", request)
    train(config, workdir, QUIET)
    assert [line["step"] for line in read_metrics(workdir)] == [2]


@pytest.mark.slow
def test_a_budget_names_the_network_and_its_run(run: Path, tmp_path: Path) -> None:
    result = compress(run, tmp_path / "new", "small", budget=0.8, calibration=0)
    assert result["parameters"] <= 0.8 * result["plain"]["parameters"]
    config = Trained.open(tmp_path / "new").config
    assert config == config_of(result["model"])  # the recipe for this network trains on


@pytest.mark.slow
def test_images_are_scored_before_and_after(run: Path, tmp_path: Path) -> None:
    result = compress(run, tmp_path / "new", "small-s0u4", calibration=0)  # as many elements as channels
    assert result["test_accuracy"]["plain"] == result["test_accuracy"]["compressed"]
    assert result["test_loss"]["plain"] == pytest.approx(result["test_loss"]["compressed"], abs=1e-4)
    assert (result["test_examples"], result["calibration"]) == (50, 0)
    assert all(layer["activations"] is None for layer in result["layers"])
    text = compress_module.render(result)
    assert "small-s0u4" in text
    assert "relative errors of each layer's filters:" in text
    images = make_images(8)[0]
    new, old = Trained.open(tmp_path / "new"), Trained.open(run)
    np.testing.assert_allclose(new.classifier()(images), old.classifier()(images), atol=1e-4)


def test_test_images_that_are_drawn_again_are_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", [*map(str, range(10))], 4) / "train"  # from which test images are drawn
    fields = {"data.name": "folder", "data.directory": str(root), "data.train_examples": 0, "data.test_examples": 0}
    config = replace(config_of("small"), fields)
    origin = layers.open_plain(save_run(tmp_path / "source", config, {0: 0.5}))

    def told() -> str:
        text = io.StringIO()
        layers.load_images(config, origin, 0, True, Reporter(text))
        return text.getvalue()

    assert "changed" not in told()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "3" / "new.png")
    assert "have changed since the run began" in told()


@pytest.fixture(scope="module")
def candidates(run: Path) -> ranks.Candidates:
    trained = layers.open_plain(str(run))
    plain = layers.extract_layers(trained, trained.config, None, QUIET)
    return ranks.Candidates(plain, trained.config.model, trained.spec)


@pytest.mark.parametrize(("sharing", "shared", "unique"), [("single", 9, 4), ("double", 5, 0), ("single", 0, 3)])
def test_costs_are_those_that_are_counted(candidates: ranks.Candidates, sharing: str, shared: int, unique: int) -> None:
    counts = count_network(ModelConfig(candidates.name(sharing, shared, unique)), 10, SHAPE)
    for measure in ranks.MEASURES:
        assert candidates.cost(sharing, measure, shared, unique) == counts[measure]


@pytest.mark.parametrize("measure", ranks.MEASURES)
def test_the_network_within_a_budget_captures_most(candidates: ranks.Candidates, measure: str) -> None:
    best = 0.0
    for budget in (0.7, 0.8):
        lines: list[str] = []
        name = ranks.choose(candidates, budget, measure, lines.append)
        sharing = "double" if name.endswith("-double") else "single"
        shared, unique = map(int, name.removesuffix("-double").rpartition("-s")[2].split("u"))
        assert candidates.cost(sharing, measure, shared, unique) <= budget * candidates.plain_cost(measure)
        captured = candidates.mean_captured(sharing, shared, unique)
        assert all(float(line.split(", ")[-1].split(" %")[0]) <= 100 * captured + 0.006 for line in lines)
        assert len(lines) >= 3
        assert captured >= best
        best = captured


@pytest.mark.parametrize("measure", [pytest.param("parameters", marks=pytest.mark.slow), "macs"])
def test_the_smallest_budget_that_a_message_names_is_enough(candidates: ranks.Candidates, measure: str) -> None:
    with user_error(f"--budget=0.01 of {measure}: the smallest network has ") as caught:
        ranks.choose(candidates, 0.01, measure, lambda line: None)
    least = float(str(caught.value).split("the smallest network has ")[1].split(" ")[0])
    assert ranks.choose(candidates, least, measure, lambda line: None) in ("small-s0u1", "small-s1u0")
    with user_error(f"the smallest network has {least} "):
        ranks.choose(candidates, least - 0.001, measure, lambda line: None)


def test_what_a_network_captures_is_what_it_has(run: Path, candidates: ranks.Candidates) -> None:
    trained = layers.open_plain(str(run))
    network = build_model(config_of("small-s5u2-double"), trained.spec)
    _, errors = compress_module.factorised(layers.extract_layers(trained, trained.config, None, QUIET), network, SHAPE)
    assert [layer["path"] for layer in errors] == [
        f"{group}/block{block}/{layer}" for group, block in (("group1", 2), ("group2", 2), ("group2", 3))
        for layer in ("first", "second")]
    assert candidates.mean_captured("double", 5, 2) == pytest.approx(
        1 - np.mean([layer["filters"] ** 2 for layer in errors]), abs=1e-6)


@pytest.mark.slow
def test_spectra_are_written_as_a_table_and_a_picture(run: Path, tmp_path: Path) -> None:
    found = spectra.write_spectra(str(run), QUIET, calibration=30, output=str(tmp_path / "here.csv"))
    with (tmp_path / "here.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["rows"])
    assert {row["group"] for row in rows} == {"group1", "group2", "all"}
    at = {(row["sharing"], row["group"], int(row["S"]), int(row["U"])): float(row["captured"]) for row in rows}
    for (sharing, group, shared, unique), captured in at.items():
        assert 0 <= captured <= 1
        if unique:
            assert captured >= at[sharing, group, shared, 0]
        if sharing == "single" and shared == 8 and not unique:
            assert captured > at[sharing, group, 4, unique]
    for row in rows:
        assert len(row["captured"]) == len("0.123456")
        if row["group"] == "all":
            assert float(row["parameters"]) > 0
            assert row["shared_elements"] == ""
        else:
            assert int(row["shared_elements"]) == int(row["S"]) * (2 if row["group"] == "group2" else 1)
    with Image.open(tmp_path / "here.png") as picture:
        assert picture.size[0] > picture.size[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.csv", "here.png"]
    assert "single U=1" in spectra.render(found)
    assert "30 training images" in spectra.render(found)


# What is refused


@pytest.mark.parametrize(("name", "advice"), [
    ("resnet20", "--config.model.name=resnet20-s16u1-double, or"),
    ("mobilenetv2", "--config.model.name=mobilenetv2-s16u1, or"),
    ("mobilenetv2-tied", "compress to s<S>u<U>."), ("resnet20-tied", "compress to s<S>u<U> or s<S>u<U>-double.")])
def test_networks_to_compress_to_are_those_that_exist(name: str, advice: str) -> None:
    with user_error(advice):
        check_target(config_of(name), None, "parameters")


@pytest.mark.parametrize(("name", "options", "parts"), [
    ("small", {}, ("small is plain", "small-s16u1-double")),
    ("small-tied", {}, ("small-tied", "not a low-rank form")),
    ("resnet20-s4u1", {}, ("resnet20-s4u1 cannot be computed from small", "depths and widths")),
    ("resnext50_32x4d-s64u4", {}, ("resnext50_32x4d cannot be compressed", "ReLU")),
    ("resnet50-shared", {"changes": {"model.stem": "imagenet"}}, ("resnet50 cannot be compressed", "whole filters")),
    ("small-s40u0", {}, ("basis of 40 elements", "36")),
    ("small-s4u1", {"calibration": 65}, ("--calibration=65", "at most 64")),
    ("small-s4u1", {"calibration": -1}, ("--calibration=-1", "0 for none")),
    ("small-s4u1", {"budget": 0.5}, ("--budget=0.5 chooses the ranks", "small")),
    ("small", {"budget": 0.0}, ("--budget=0", "above 0 and at most 1")),
    ("small", {"budget": 1.5}, ("--budget=1.5", "above 0 and at most 1")),
    ("small", {"budget": float("nan")}, ("--budget=nan", "above 0 and at most 1")),
    ("small", {"budget": 0.01}, ("--budget=0.01 of parameters", "smallest", "0.")),
    ("small-s4u1", {"measure": "macs"}, ("--budget_of=macs", "--budget=0.5")),
    ("small", {"budget": 0.5, "measure": "bytes"}, ("--budget_of=bytes", "parameters, macs")),
    ("small-s4u1", {"which": "7"}, ("checkpoint '7'",)),
    ("small-s4u1", {"changes": {"data.mean": (0.5,)}}, ("data.mean=(0.5,)", "(0.3,)")),
    ("small-s4u1", {"changes": {"model.stem": "imagenet"}}, ("model.stem='imagenet'", "must equal 'cifar'")),
])
def test_a_mistake_is_told_and_nothing_is_written(run: Path, tmp_path: Path, name: str, options: Any,
                                                  parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        compress(run, tmp_path / "new", name, **{"calibration": 20, **options})
    assert not (tmp_path / "new").exists()


def test_a_source_that_is_not_plain_not_there_or_not_finite_is_told(run: Path, tmp_path: Path) -> None:
    with user_error("--source=RUN"):
        compress_run(config_of("small-s4u1"), tmp_path / "new", "", QUIET)
    with user_error("holds no run"):
        compress(tmp_path / "nowhere", tmp_path / "new")
    shared = make_run(tmp_path / "shared", config_of("small-s2u1"))
    with user_error("holds small-s2u1, which already shares", "plain small"):
        compress(shared, tmp_path / "new")

    def spoil(arrays: Any) -> Any:
        arrays["params", "group1", "block2", "first", "kernel"][0, 0, 0, 0] = np.nan
        return arrays
    with user_error("params/group1/block2/first/kernel of checkpoint 0 is not finite"):
        compress(make_run(tmp_path / "nan", config_of("small"), spoil), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_images_of_other_channels_are_told(run: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", [f"{i}" for i in range(3)], 4)
    with user_error("the images of data.name='folder' have 3 channels, but the weights of the run in", "require 1."):
        compress(run, tmp_path / "new", changes={"data.name": "folder", "data.directory": str(folder),
                                                 "data.train_examples": 0, "data.test_examples": 0})
    assert not (tmp_path / "new").exists()


def test_other_classes_have_a_new_classifier_and_no_scores(run: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_basis.data.digits.CLASSES", tuple("abcdefghijkl"))
    result = compress(run, tmp_path / "new", calibration=0)
    assert result["head"] == "initialised at random: 'a' is not among the 10 classes of the weights"
    assert result["test_accuracy"] is result["test_examples"] is None
    assert "not scored before training: the classifier is initialised at random" in compress_module.render(result)
    new = Trained.open(tmp_path / "new")
    assert new.variables["params"]["head"]["kernel"].shape == (8, 12)


@pytest.mark.slow
def test_activations_that_overflow_are_told(tmp_path: Path) -> None:
    def enlarge(arrays: Any) -> Any:
        arrays["params", "group1", "block1", "second_norm", "scale"][:] = 1e30
        return arrays
    source = make_run(tmp_path / "large", config_of("small"), enlarge)
    with user_error("the inputs of group1/block2/", "--calibration=0"):
        compress(source, tmp_path / "new", calibration=20)


def test_a_run_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    before = (run / "run.json").read_bytes()
    with user_error("already holds checkpoints"):
        compress(run, run)
    assert (run / "run.json").read_bytes() == before


def test_spectra_need_a_table_to_write(run: Path, tmp_path: Path) -> None:
    with user_error("--output=x.png", ".csv"):
        spectra.write_spectra(str(run), QUIET, output="x.png")
    with user_error("does not exist"):
        spectra.write_spectra(str(run), QUIET, output=str(tmp_path / "no" / "x.csv"))


def test_spectra_of_a_file_are_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    file.write_bytes(b"weights")
    for output in ("", str(tmp_path / "x.csv")):
        with user_error(f"--source={file}", "--spectra needs a run", f"--mode=import --weights={file}"):
            commands.run("compress", commands.Request(Config(), {}, "absent", False, source=str(file), spectra=True,
                                                      output=output))
