"""The mode `analyze`: its files and their numbers, for runs and for every kind of network."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import save_run, user_error
from PIL import Image
from sample_networks import NETWORKS, SHAPE, random_variables

from shared_basis import draw_basis, plotting
from shared_basis.analysis import analyze, basis_figures, figures, tables
from shared_basis.analysis.bases import BasisSet, basis_sets, describe_set
from shared_basis.analysis.collect import Analysis, training_batch
from shared_basis.analysis.gradient_flow import gradient_flow, layer_paths
from shared_basis.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from shared_basis.runs.trained import Trained
from shared_basis.runtime.reporter import Reporter

CONFIG = Config(model=ModelConfig(name="tiny-s2u1"), data=DataConfig(train_examples=40, test_examples=20),
                train=TrainConfig(batch_size=8))
"""Two layers, first and second of block 2, share the array 'shared' of two elements; each has one of its own."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    one, other = (save_run(root / name, CONFIG, {5: 0.5, 10: 0.25}) for name in ("one", "other"))
    norms = {"stem/kernel": 1.0, "bases/group1/shared": 0.5, "group1/block2/first/coefficients": 2.0}
    (one / "gradients.jsonl").write_text("".join(json.dumps({"step": step, "epoch": step // 5, "norms": {
        path: norm / step for path, norm in norms.items()}}) + "\n" for step in (5, 10)))
    return one, other


@pytest.fixture(scope="module")
def analysed(runs: tuple[Path, Path]) -> dict[str, Any]:
    directory = runs[0] / "analysis"
    directory.mkdir()
    for name in (*EARLIER, *OTHERS):
        (directory / name).write_text("")
    return analyze.analyze(runs[0], against=f"{runs[1]}:5")


EARLIER = ("products_group7.against.csv", "filters_group1_both.csv", "effective_rank.csv")
OTHERS = ("products.csv", "notes.txt", "filters_group1.jpg", "numbers.txt")
"""Files that lie there before: those of an earlier analysis, and others."""


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_every_picture_has_its_data_beside_it(runs: tuple[Path, Path], analysed: dict[str, Any]) -> None:
    directory = runs[0] / "analysis"
    assert analysed["output"] == str(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted([*analysed["files"], *OTHERS])
    pictures = {name.removesuffix(".png") for name in analysed["files"] if name.endswith(".png")}
    assert pictures == {"products_group1", "filters_group1", "coefficients_group1", "similarity_group1", "stem",
                        "singular_values", "effective_rank", "gradient_flow", "gradient_training"}
    for name in pictures:
        with Image.open(directory / f"{name}.png") as picture:
            assert picture.width > 500
        if name != "effective_rank":  # in bases.csv
            assert f"{name}.csv" in analysed["files"]


def test_tables_hold_what_the_arrays_hold(runs: tuple[Path, Path], analysed: dict[str, Any]) -> None:
    directory = runs[0] / "analysis"
    params, stats = (jax.device_get(Trained.open(runs[0]).variables[kind]) for kind in ("params", "batch_stats"))
    names, *products = read(directory / "products_group1.csv")
    elements = ["shared:0", "shared:1", "group1/block2/first:0", "group1/block2/second:0"]
    assert [names[1:], [row[0] for row in products]] == [elements, elements]
    array = params["bases"]["group1"]["shared"].reshape(-1, 2)
    np.testing.assert_allclose(np.array(products)[:2, 1:3].astype(float), array.T @ array, rtol=1e-4)
    filters = read(directory / "filters_group1.csv")[1:]
    assert [row[:2] for row in filters] == [[name, "3x3x4"] for name in elements]
    np.testing.assert_allclose([float(value) for value in filters[0][2:]], array[:, 0], rtol=1e-4)
    layer, layer_stats = (tree["group1"]["block2"]["second"] for tree in (params, stats))
    scale = layer["norm"]["scale"] / np.sqrt(layer_stats["norm"]["var"] + 1e-5)
    coefficients = [row for row in read(directory / "coefficients_group1.csv") if row[0] == "group1/block2/second"]
    assert [row[1] for row in coefficients] == ["unique:0", "shared:0", "shared:1"]
    np.testing.assert_allclose(np.array(coefficients)[:, 2:].astype(float), scale[:, None] * layer["coefficients"],
                               rtol=1e-4)


def test_gradients_are_those_of_each_checkpoint_and_of_the_record(runs: tuple[Path, Path],
                                                                  analysed: dict[str, Any]) -> None:
    directory = runs[0] / "analysis"
    flow = read(directory / "gradient_flow.csv")[1:]
    assert {row[1] for row in flow if row[0] == "one"} == {"0", "5", "10"}
    assert all(float(row[4]) > 0 for row in flow)
    recorded = read(directory / "gradient_training.csv")[1:]
    assert [row[3] for row in recorded[:3]] == ["stem/kernel", "group1/block2/first/coefficients",
                                                "bases/group1/shared"]
    assert recorded[0] == ["one", "5", "1", "stem/kernel", "0.2"]
    assert analysed["gradient_flow"]["0"] == analysed["against"]["gradient_flow"]["0"]  # one seed
    assert analysed["gradient_flow"]["5"] != analysed["gradient_flow"]["10"]
    trained = Trained.open(runs[0])
    images, labels = training_batch(trained, Reporter(verbosity="quiet"))
    assert images.shape == (8, 8, 8, 1)
    variables = trained.model.init(jax.random.key(CONFIG.seed), images[:1], train=False)
    for step, of in (("0", variables), ("10", trained.variables)):
        blocks, _ = gradient_flow(trained.model)(of["params"], of["batch_stats"], images, labels)
        assert analysed["gradient_flow"][step]["blocks"] == pytest.approx(blocks, rel=1e-4)


def test_the_first_batch_of_a_run_that_is_only_imported_has_a_suitable_size(runs: tuple[Path, Path]) -> None:
    trained, quiet = Trained.open(runs[0]), Reporter(verbosity="quiet")

    def batch(**fields: Any) -> tuple[jax.Array, jax.Array]:
        config = replace(CONFIG, {name.replace("__", "."): value for name, value in fields.items()})
        return training_batch(dataclasses.replace(trained, config=config), quiet)
    images, labels = batch(train__batch_size=0)
    assert (images.shape, labels.shape) == ((8, 8, 8, 1), (8,))  # as training chooses for 40 images
    with user_error("only 7 training images"):
        batch(data__train_examples=7)


def test_the_result_is_plain_data_and_its_text_has_a_line_for_each_basis(analysed: dict[str, Any]) -> None:
    assert (analysed["step"], analysed["against"]["step"]) == (10, 5)
    assert json.loads(json.dumps(analysed)) == analysed
    assert not any(isinstance(value, float) and not math.isfinite(value)
                   for basis in analysed["sets"]["group1"] for value in basis.values())
    text = tables.render(analysed)
    for part in ("shared (shared)", "block2/first", "2 + 1", "effective rank", "coefficients of 2 layers on group1",
                 "initialisation: first", f"{len(analysed['files'])} files",
                 "note: no gradients during training: the run did not set --config.train.record_gradients"):
        assert part in text, part


def test_weights_that_a_run_never_had_are_not_its_initialisation(runs: tuple[Path, Path], analysed: dict[str, Any],
                                                                 tmp_path: Path) -> None:
    """A run with given weights has no initialisation once the checkpoint with them is removed."""
    run = shutil.copytree(runs[1], tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "init": {"source": "/weights.pth"}}))
    found = Analysis.of(Trained.open(run), Reporter(verbosity="quiet"))
    assert found.flow.keys() == {5, 10}
    assert any("no gradients at initialisation" in note for note in found.notes)
    assert not any("at initialisation" in note for note in analysed["notes"])
    paint, size = figures.paintings([found])["gradient_flow"]
    drawn: list[str] = []

    def watch(figure: Any) -> None:
        paint(figure)
        drawn.extend(f"{line.get_label()} {line.get_linestyle()}" for line in figure.axes[0].get_lines())
    plotting.png(watch, size)
    assert drawn == ["run, step 10 -"]


@pytest.mark.slow
def test_without_its_images_a_run_is_analysed_but_for_gradients(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = analyze.analyze(runs[1], overrides={"data.train_examples": 10**6}, output=str(tmp_path / "a" / "b"))
    assert found["gradient_flow"] == {}
    assert any("since the images are not available: data.train_examples=1000000" in note for note in found["notes"])
    assert "gradient_flow.png" not in found["files"]
    assert (tmp_path / "a" / "b" / "products_group1.png").exists()


@pytest.mark.slow
def test_two_checkpoints_of_one_run_have_different_labels(runs: tuple[Path, Path], tmp_path: Path) -> None:
    analyze.analyze(runs[1], against="5", overrides={"data.train_examples": 10**6}, output=str(tmp_path))
    assert {row[0] for row in read(tmp_path / "bases.csv")[1:]} == {"other at 10", "other at 5"}


def test_invalid_arguments_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
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


# Networks of every kind

def analysis_of(name: str) -> Analysis:
    network, variables = NETWORKS[name], random_variables(NETWORKS[name])
    sets = basis_sets(network, variables)[:2]  # a group is as good as all
    return Analysis(label="run ☃", model=name, step=3, sets=sets,
                    described={found.name: describe_set(found) for found in sets},
                    stem=variables["params"]["stem"]["kernel"],
                    layers=["/".join(path) for path in layer_paths(network, SHAPE)], flow={}, recorded=[], notes=[])


@pytest.mark.parametrize("name", [
    name if name == "templates" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_pictures_of_every_kind(name: str) -> None:
    for paint, size in figures.paintings([analysis_of(name)]).values():
        assert plotting.png(paint, size).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NETWORKS)
def test_tables_of_every_kind(name: str) -> None:
    one = analysis_of(name)
    files = tables.csv_files([one, dataclasses.replace(one, label="\udcff")])  # a directory's name need not be text
    assert {"stem.csv", "stem.against.csv"} <= files.keys()
    assert ("bases.csv" in files) == bool(one.sets)
    assert all(content.count(b"\n") > 1 for content in files.values())
    assert json.dumps(tables.numbers(one))


def test_one_basis_of_any_model_is_drawn() -> None:
    basis = np.random.default_rng(0).normal(size=(3, 3, 2, 4))
    found = Image.open(io.BytesIO(draw_basis(jax.numpy.asarray(basis), "mine")))
    assert found.format == "PNG"
    assert len(found.convert("RGB").getcolors(1 << 20)) > 20  # white, text, and the shades of filters
    for shape in ((3, 3, 4), (2, 3, 3, 2, 4), (3, 5, 2, 4), (3, 3, 2, 0)):
        with pytest.raises(ValueError, match=r"must be \[k, k, C, elements\]"):
            draw_basis(np.zeros(shape))


def test_large_sets_are_cut_down_in_pictures_and_say_so() -> None:
    def titles_and_shapes(array: np.ndarray) -> list[tuple[str, tuple[int, ...]]]:
        found = BasisSet("group1", {"a": array}, {"x": "a"}, {}, {})
        panels = []

        def watch(figure: Any) -> None:
            paint(figure)
            panels.extend((axes.get_title(loc="left"), axes.get_images()[0].get_array().shape) for axes in figure.axes)
        paint, _ = basis_figures.filters(analysis_of("plain"), found)
        plotting.png(watch)
        return panels

    rows, columns = basis_figures.TILES
    rng = np.random.default_rng(0)
    (title, shape), = titles_and_shapes(rng.normal(size=(3, 3, 128, 64)))
    assert shape == (rows * 4, columns * 4)
    assert all(part in title for part in (f"{rows} of 64 elements", f"{columns} of 128 channels", "strongest"))
    (title, shape), = titles_and_shapes(rng.normal(size=(1, 1, 8, 4)))
    assert (title, shape) == ("a\n4 elements, 8 channels", (4, 8))
