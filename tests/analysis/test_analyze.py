"""Numbers, tables and pictures of bases: known cases, NumPy, and runs of every kind of network."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_images, save_run, tiny_network, user_error
from PIL import Image

from shared_basis import create_model
from shared_basis.analysis import analyze, bases, collect, tables
from shared_basis.analysis.bases import BasisSet, basis_sets, describe_basis, describe_set
from shared_basis.analysis.gradient_flow import by_depth, gradient_flow, layer_paths
from shared_basis.config import Config, DataConfig, ModelConfig, replace
from shared_basis.evaluation import evaluate as evaluate_module
from shared_basis.models.parameters import abstract_variables
from shared_basis.optim.penalty import orthogonality_diagnostics
from shared_basis.runs.trained import Trained


def random_variables(network: Any, size: int = 32, channels: int = 3) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype),
                        dict(abstract_variables(network, (size, size, channels))))


# Known cases

def test_an_orthonormal_basis_has_full_rank_and_no_coherence() -> None:
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(27, 8)))[0].T
    found = describe_basis(rows[:6], rows[6:])
    np.testing.assert_allclose(rows @ rows.T, np.eye(8), atol=1e-12)
    for name, value in {"effective_rank": 8, "stable_rank": 8, "condition": 1, "norm_min": 1, "norm_mean": 1,
                        "norm_max": 1, "coherence_shared": 0, "coherence_between": 0, "coherence_unique": 0,
                        "cosine": 0}.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    assert (found["shared"], found["unique"], len(found["singular_values"])) == (6, 2, 8)


def test_elements_twice_count_once() -> None:
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(27, 4)))[0].T
    found = describe_basis(np.concatenate([rows, rows]), None)
    assert found["effective_rank"] == pytest.approx(4)
    assert found["stable_rank"] == pytest.approx(4)
    assert found["condition"] is None
    assert found["coherence_shared"] == pytest.approx(1)
    assert found["cosine"] == pytest.approx(1)
    assert (found["coherence_between"], found["coherence_unique"]) == (None, None)


def test_effective_rank_is_exp_of_the_entropy_of_singular_values() -> None:
    values = np.array([4.0, 2.0, 1.0, 1.0, 0.0])  # p = 1/2, 1/4, 1/8, 1/8: 1.75 bits
    assert bases.effective_rank(values) == pytest.approx(2**1.75)
    assert bases.stable_rank(values) == pytest.approx(22 / 16)
    assert bases.condition_number(np.array([6.0, 3.0])) == 2


def test_coherence_is_the_largest_product_of_different_elements_and_not_normalised() -> None:
    shared, unique = np.array([[3.0, 0, 0], [0, 2, 0]]), np.array([[1.0, -2, 2]])
    found = describe_basis(shared, unique)
    assert (found["coherence_shared"], found["coherence_between"], found["coherence_unique"]) == (0, 4, None)
    assert found["cosine"] == pytest.approx(2 / 3)
    assert (found["norm_min"], found["norm_max"]) == (2, 3)


def test_a_group_agrees_with_the_diagnostics_of_training() -> None:
    network = create_model("resnet14-s4u1-double")
    variables = random_variables(network)
    sets = network.basis_groups("shared+unique")
    for found, elements in zip(basis_sets(network, variables), sets, strict=True):
        expected = orthogonality_diagnostics(variables["params"], [elements])
        described = describe_set(found)
        joint = next(basis for basis in described if basis["basis"] == "all shared")
        layers = [basis for basis in described if basis["unique"]]
        every = found.all_rows()[0]
        assert len(every) == 2 * (4 << sets.index(elements)) + 2 * (1 << sets.index(elements))
        assert max(joint["norm_max"], *(layer["norm_max"] for layer in layers)) == pytest.approx(
            float(expected["norm_max"]), rel=1e-5)
        between = np.abs(found.shared_rows() @ every.T) * (1 - np.eye(*(len(found.shared_rows()), len(every))))
        assert max(between.max(), *(layer["coherence_unique"] or 0 for layer in layers)) == pytest.approx(
            float(expected["coherence"]), rel=1e-5)


# Coefficients

def test_effective_coefficients_are_what_the_layer_multiplies_by() -> None:
    network = create_model("resnet14-s4u1")
    variables = random_variables(network)
    found = basis_sets(network, variables)[0]
    tree, stats = (variables[kind]["group1"]["block2"]["second"] for kind in ("params", "batch_stats"))
    responses = np.random.default_rng(1).normal(size=(7, 5))
    normalised = (responses - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5) * tree["norm"]["scale"]
    by_layer = normalised @ tree["coefficients"]
    mine = responses @ found.coefficients["group1/block2/second"]
    np.testing.assert_allclose(by_layer - by_layer[:1], mine - mine[:1], rtol=1e-5)
    layers = bases.layers_of(found, "shared")
    assert list(layers) == ["group1/block2/first", "group1/block2/second"]
    np.testing.assert_array_equal(layers["group1/block2/second"], found.coefficients["group1/block2/second"][1:])


def test_cosine_sees_output_channels_and_alignment_does_not() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(6, 12))
    turned = one @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    cosine, alignment = bases.cosines([one, turned, -one]), bases.uncentered_linear_cka([one, turned, -one])
    assert abs(cosine[0, 1]) < 0.5
    assert cosine[0, 2] == pytest.approx(-1)
    np.testing.assert_allclose(alignment, np.ones((3, 3)))
    gram, other = one @ one.T, (two := rng.normal(size=(6, 12))) @ two.T
    assert bases.uncentered_linear_cka([one, two])[0, 1] == pytest.approx(
        (gram * other).sum() / np.sqrt((gram**2).sum() * (other**2).sum()))
    assert bases.mean_off_diagonal(np.array([[1, 0.5], [0.3, 1]])) == pytest.approx(0.4)
    assert bases.mean_off_diagonal(np.ones((1, 1))) is None


def test_the_alignment_by_chance_is_that_of_random_matrices() -> None:
    rng = np.random.default_rng(0)
    for shape, tolerance in (((8, 16), 0.03), ((32, 64), 0.003)):
        matrices = [rng.normal(size=shape) for _ in range(60)]
        mean = bases.mean_off_diagonal(bases.uncentered_linear_cka(matrices))
        assert mean == pytest.approx(bases.chance_alignment(matrices[0]), abs=tolerance)


def test_channels_are_chosen_by_their_norm() -> None:
    array = np.zeros((3, 3, 5, 2))
    for channel, size in enumerate((1, 5, 0, 7, 2)):
        array[..., channel, :] = size
    assert bases.strongest_channels(array, 3).tolist() == [1, 3, 4]
    assert bases.strongest_channels(array, 9).tolist() == [0, 1, 2, 3, 4]


# Networks of every kind

KINDS = {
    "resnet20": 0, "resnet14-s4u1": 3, "resnet20-s8u1-double": 3, "resnet14-s4u0": 3, "resnet14-s0u4": 3,
    "resnet14-tied": 3, "resnet14-template4": 3, "densenet121-s8u4": 4, "resnext50_32x4d-s16u4": 4,
    "mobilenetv2-shared++": 8, "mobilenetv2-shared": 4, "mobilenetv2": 0}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_is_taken_apart_by_its_paths(name: str) -> None:
    network = create_model(name)
    variables = random_variables(network)
    found = basis_sets(network, variables)
    assert len(found) == KINDS[name]
    stored = {(group, array) for group, named in variables["params"].get("bases", {}).items() for array in named}
    assert {(each.name.partition("/")[0], array) for each in found for array in each.shared} == stored
    flat = {"/".join(path) for path in _paths(variables["params"])}
    for what in ("unique", "coefficients"):
        owned = {f"{layer}/{what}" for each in found for layer in getattr(each, what)}
        assert owned == {path for path in flat if path.endswith(f"/{what}")}
    for each in found:
        assert all(array in each.shared or (array == "" and not each.shared) for array in each.uses.values())
        for layer, matrix in each.coefficients.items():
            shared = each.shared[each.uses[layer]].shape[-1] if each.shared else 0
            unique = each.unique[layer].shape[-1] if layer in each.unique else 0
            assert len(matrix) == shared + unique
    assert all(each.comparable for each in found) == ("resnext" not in name)


def _paths(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_layers_come_in_the_order_of_the_computation() -> None:
    paths = ["/".join(path) for path in layer_paths(create_model("densenet121"), (32, 32, 3))]
    assert paths[:3] == ["stem", "group1/block1/first", "group1/block1/second"]
    assert paths.index("group1/block6/second") < paths.index("transition1") < paths.index("group2/block1/first")
    assert paths.index("group2/block9/first") < paths.index("group2/block10/first")
    assert len(paths) == 121
    looped = ["/".join(path) for path in layer_paths(create_model("resnet20-s4u1-double", scan_blocks=True), (8, 8, 3))]
    assert looped[1:5] == ["group1/block1/first", "group1/block1/second", "group1/block2/first", "group1/block2/second"]
    assert len(looped) == 20
    assert by_depth(["b", "a"], {"a/kernel": 1, "bases/x/y": 1, "b/unique": 1, "b/coefficients": 1}) == [
        "b/coefficients", "b/unique", "a/kernel", "bases/x/y"]


# Gradients

def test_gradients_at_blocks_are_those_of_the_network_cut_there() -> None:
    network = tiny_network(blocks=(10,), scan_blocks=True)
    pixels, labels = make_images(6)
    images = jnp.asarray(pixels / np.float32(255))
    variables = network.init(jax.random.key(0), images[:1], train=False)
    params, stats = variables["params"], variables["batch_stats"]
    blocks, parameters = gradient_flow(network)(params, stats, images, labels)
    assert list(blocks) == [f"group1/block{number}" for number in range(1, 11)]  # not in the order of the alphabet

    def loss(params: Any, scale: Any) -> Any:
        logits, _ = network.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), labels]) * scale
    gradient = jax.jit(jax.grad(loss))(params, 1.0)
    for path, norm in parameters.items():
        leaf = gradient
        for key in path.split("/"):
            leaf = leaf[key]
        assert float(norm) == pytest.approx(float(jnp.linalg.norm(leaf.ravel())), rel=1e-4), path

    # The last block's output goes through the mean over pixels to the classifier: by hand.
    def head(features: Any) -> Any:
        logits = features.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(6), labels])
    _, captured = network.clone(scan_blocks=False).apply(
        variables, images, train=True, mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "block10")
    output = captured["intermediates"]["group1"]["block10"]["__call__"][0]
    by_image = np.asarray(jax.grad(head)(output)).reshape(6, -1)
    assert float(blocks["group1/block10"]) == pytest.approx(np.sqrt((by_image**2).sum(1).mean()), rel=1e-4)


# The mode

CONFIG = Config(model=ModelConfig(name="resnet14-s4u1-double"),
                data=DataConfig(train_examples=40, test_examples=20))
CONFIG = replace(CONFIG, {"train.batch_size": 8})


@pytest.fixture(scope="module", autouse=True)
def small_network() -> Iterator[None]:
    """Analyses a network that compiles fast, whatever the name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "build_model", lambda config, spec: tiny_network(len(spec.classes), blocks=(3,)))
        patch.setattr("helpers.build_model", lambda config, spec: tiny_network(len(spec.classes), blocks=(3,)))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    one, other = (save_run(root / name, CONFIG, {5: 0.5, 10: 0.25}) for name in ("one", "other"))
    norms = {"stem/kernel": 1.0, "bases/group1/first": 0.5, "group1/block2/first/coefficients": 2.0}
    (one / "gradients.jsonl").write_text("".join(json.dumps({"step": step, "epoch": step // 5, "norms": {
        path: norm / step for path, norm in norms.items()}}) + "\n" for step in (5, 10)))
    return one, other


@pytest.fixture(scope="module")
def analysed(runs: tuple[Path, Path]) -> dict[str, Any]:
    return analyze.analyze(runs[0], against=f"{runs[1]}:5")


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_every_picture_has_its_data_beside_it(runs: tuple[Path, Path], analysed: dict[str, Any]) -> None:
    directory = runs[0] / "analysis"
    assert analysed["output"] == str(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted(analysed["files"])
    pictures = {name.removesuffix(".png") for name in analysed["files"] if name.endswith(".png")}
    assert pictures == {"products_group1", "filters_group1", "coefficients_group1", "similarity_group1_first",
                        "similarity_group1_second", "stem", "singular_values", "effective_rank", "gradient_flow",
                        "gradient_training"}
    for name in pictures:
        with Image.open(directory / f"{name}.png") as picture:
            assert picture.width > 500
        if name != "effective_rank":  # in bases.csv
            assert f"{name}.csv" in analysed["files"]


def test_tables_hold_what_the_arrays_hold(runs: tuple[Path, Path], analysed: dict[str, Any]) -> None:
    directory = runs[0] / "analysis"
    trained = Trained.open(runs[0])
    params = jax.device_get(trained.variables["params"])
    names, *table = read(directory / "products_group1.csv")
    assert names[1:] == [row[0] for row in table]
    assert names[1] == "first:0"
    assert names[-1] == "group1/block3/second:0"
    array = params["bases"]["group1"]["first"].reshape(-1, 2)
    np.testing.assert_allclose(np.array(table)[:2, 1:3].astype(float), array.T @ array, rtol=1e-4)
    filters = read(directory / "filters_group1.csv")[1:]
    assert [row[:2] for row in filters[:1]] == [["first:0", "3x3x4"]]
    np.testing.assert_allclose([float(value) for value in filters[0][2:]], array[:, 0], rtol=1e-4)
    assert len(filters) == 2 + 2 + 4
    flow = read(directory / "gradient_flow.csv")[1:]
    assert {row[1] for row in flow if row[0] == "one"} == {"0", "5", "10"}
    assert all(float(row[4]) > 0 for row in flow)
    recorded = read(directory / "gradient_training.csv")[1:]
    assert [row[3] for row in recorded[:3]] == ["stem/kernel", "group1/block2/first/coefficients", "bases/group1/first"]
    assert recorded[0] == ["one", "5", "1", "stem/kernel", "0.2"]
    assert (analysed["step"], analysed["against"]["step"]) == (10, 5)
    assert json.loads(json.dumps(analysed)) == analysed
    assert not any(isinstance(value, float) and not math.isfinite(value)
                   for basis in analysed["sets"]["group1"] for value in basis.values())


def test_the_gradient_at_initialisation_is_that_of_the_seed(runs: tuple[Path, Path], analysed: dict[str, Any]) -> None:
    assert analysed["gradient_flow"]["0"] == analysed["against"]["gradient_flow"]["0"]  # one seed
    assert analysed["gradient_flow"]["5"] != analysed["gradient_flow"]["10"]
    trained = Trained.open(runs[0])
    images, labels = collect.training_batch(trained, lambda text: None)
    variables = trained.model.init(jax.random.key(CONFIG.seed), images[:1], train=False)
    blocks, _ = gradient_flow(trained.model)(variables["params"], variables["batch_stats"], images, labels)
    assert analysed["gradient_flow"]["0"]["blocks"] == pytest.approx(
        {name: float(norm) for name, norm in blocks.items()}, rel=1e-4)


def test_the_text_has_a_line_for_each_basis(analysed: dict[str, Any]) -> None:
    text = tables.render(analysed)
    for part in ("first (shared)", "all shared", "block2/first", "2 + 1", "effective rank",
                 "coefficients of 2 layers on group1/first", "initialisation: first", "files, pictures and their data",
                 "note: no gradients while training: the run was made without --config.train.record_gradients"):
        assert part in text, part


def test_without_its_images_a_run_is_analysed_but_for_gradients(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = analyze.analyze(runs[1], overrides={"data.train_examples": 10**6}, output=str(tmp_path / "a" / "b"))
    assert found["gradient_flow"] == {}
    assert any("for want of images: data.train_examples=1000000" in note for note in found["notes"])
    assert "gradient_flow.png" not in found["files"]
    assert (tmp_path / "a" / "b" / "products_group1.png").exists()


def test_mistakes_are_told(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with user_error("holds no run"):
        analyze.analyze(tmp_path / "absent")
    assert not list(tmp_path.iterdir())
    with user_error("checkpoint '7'", "5, 10"):
        analyze.analyze(runs[0], "7")
    with user_error("holds no run"):
        analyze.analyze(runs[0], against=str(tmp_path))
    (tmp_path / "file").write_text("")
    with user_error(f"--output={tmp_path / 'file'}", "cannot be written"):
        analyze.analyze(runs[0], output=str(tmp_path / "file"))


def test_files_of_an_earlier_analysis_are_removed_and_others_are_not(tmp_path: Path) -> None:
    ours = ["products_group1.against.csv", "gradient_flow.png", "filters_group1_both.csv", "stem.csv"]
    others = ["products.csv", "notes.txt", "filters_group1.jpg", "numbers.txt"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("")
    analyze._remove_others(tmp_path, ["stem.csv"])
    assert {path.name for path in tmp_path.iterdir()} == {"stem.csv", *others}


@pytest.mark.parametrize("name", ["resnet20", "resnet14-tied", "resnet14-template4", "resnet14-s0u4", "resnet14-s4u0",
                                  "resnext50_32x4d-s16u4", "mobilenetv2-shared++"])
def test_pictures_and_tables_of_every_kind(name: str) -> None:
    network = create_model(name)
    variables = random_variables(network)
    sets = basis_sets(network, variables)
    layers = ["/".join(path) for path in layer_paths(network, (32, 32, 3))]
    if len(sets) > 3:  # a group is as good as all
        sets = sets[:2]
    one = collect.Analysis("run ☃", name, 3, sets, {found.name: describe_set(found) for found in sets},
                           variables["params"]["stem"]["kernel"], layers, {}, [], [])
    for _, paint, size in analyze.analysis_figures.paintings([one]).values():
        assert analyze.figures.png(paint, size=size).startswith(b"\x89PNG")
    named = [table for table, rows in tables.tables([one]) if len(list(rows)) > 1]
    assert "stem" in named
    assert ("bases" in named) == bool(sets)
    assert json.dumps(tables.numbers(one))


def test_large_sets_are_cut_down_in_pictures_and_say_so() -> None:
    image, shown = analyze.analysis_figures._tiles(np.ones((3, 3, 128, 64)), analyze.analysis_figures.TILES)
    assert image.shape == (24 * 4, 16 * 4)
    assert shown == "24 of 64 elements, 16 of 128 channels (the strongest)"
    whole = BasisSet("group1", {"a": np.ones((1, 1, 8, 4))}, {"x": "a"}, {}, {})
    assert analyze.analysis_figures._tiles(whole.shared["a"], (1, 1))[1] == "4 elements, 8 channels"
