"""How a run begins with given weights, and what is said and refused of them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch_files
from flax.traverse_util import flatten_dict
from helpers import TINY, assert_trees_equal, read_arrays, read_metrics, save_run, user_error, write_folder
from sample_networks import random_variables

from shared_basis import data
from shared_basis.cli import commands
from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, replace
from shared_basis.evaluation.evaluate import evaluate
from shared_basis.export.pytorch import export_weights
from shared_basis.interop.pytorch import to_published
from shared_basis.interop.weights import IMAGENET_MEAN, IMAGENET_STD, find_weights, normalization_of
from shared_basis.models.parameters import init_variables
from shared_basis.runs.trained import Trained, build_model
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.start import Init, Start, compress_run, import_weights
from shared_basis.training.start import make as make_start
from shared_basis.training.train import train

DIGITS = Config(model=ModelConfig(name=TINY), data=DataConfig(train_examples=40, test_examples=20, mean=(0.3,)),
                optimizer=OptimizerConfig(learning_rate=0.01), train=TrainConfig(epochs=1, batch_size=20))


class Listener(Reporter):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(self.text)


def make(config: Config, init: Init, reporter: Reporter) -> Start:
    return make_start(config, data.describe(config.data), init, reporter)


def on_folder(root: Path, **changes: Any) -> Config:
    return replace(DIGITS, {"data.name": "folder", "data.directory": str(root), "data.train_examples": 0,
                            "data.test_examples": 0, "train.batch_size": 4, **changes})


def flat(variables: Any) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(dict(variables)).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of the tiny shared network on the digits, with two checkpoints, the first one the best."""
    return save_run(tmp_path_factory.mktemp("runs") / "digits", DIGITS, {10: 0.5, 20: 0.25})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of twelve classes that are numbers, which sort otherwise as text."""
    return write_folder(tmp_path_factory.mktemp("images") / "numbers", [*map(str, range(12))], 1)


# Runs


def test_the_weights_of_a_run_are_taken_as_they_are(source: Path) -> None:
    for name, step in ((source, 20), (f"{source}:best", 10), (f"{source}:10", 10)):
        start = make(DIGITS, Init(str(name)), Listener())
        expected = read_arrays(source, step)
        assert_trees_equal(start.variables, {kind: expected[kind] for kind in start.variables})
        assert start.init == {"source": str(name), "step": step, "network": TINY, "head": "kept", "budget": None}


@pytest.fixture(scope="module")
def gray(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function from names of classes to a configuration of the digits that are called so."""
    def rename(*names: str) -> pytest.MonkeyPatch:
        patch = pytest.MonkeyPatch()
        patch.setattr("shared_basis.data.digits.CLASSES", names)
        return patch
    return rename


def test_a_classifier_of_other_classes_is_drawn_as_by_training_anew(source: Path, gray: Any) -> None:
    config = replace(DIGITS, {"seed": 3})
    there = flat(read_arrays(source, 20))
    for names in (("a", "b", "c"), ("0", "1", "other"), tuple("abcdefghij")):
        patch = gray(*names)
        try:
            start = make(config, Init(str(source)), Listener())
        finally:
            patch.undo()
        anew = flat(init_variables(build_model(config, start.spec), jax.random.key(3), (8, 8, 1)))
        found = flat(start.variables)
        assert found.keys() == anew.keys()
        for path, array in found.items():
            of_head = path.startswith("params/head/")
            np.testing.assert_array_equal(array, anew[path] if of_head else there[path], err_msg=path)
        assert start.init["head"].startswith("initialised at random: ")


def test_outputs_are_found_by_the_names_of_the_classes(source: Path, gray: Any) -> None:
    patch = gray("7", "0", "3")
    try:
        start = make(DIGITS, Init(str(source)), Listener())
    finally:
        patch.undo()
    head = read_arrays(source, 20)["params"]["head"]
    np.testing.assert_array_equal(start.variables["params"]["head"]["kernel"], np.asarray(head["kernel"])[:, [7, 0, 3]])
    np.testing.assert_array_equal(start.variables["params"]["head"]["bias"], np.asarray(head["bias"])[[7, 0, 3]])
    assert start.init["head"] == "kept, its outputs matched by name among 10"


def test_what_else_does_not_fit_is_listed(source: Path, images: Path) -> None:
    with user_error(f"the run in {source} holds {TINY}, which does not fit: params/stem/kernel is [3, 3, 1, 4] there "
                    "and [3, 3, 3, 4] here. Only the classifier may differ"):
        make(on_folder(images), Init(str(source)), Listener())
    with user_error("params/bases/group1/first is [3, 3, 4, 2] there and [3, 3, 4, 3] here;", "; and ", " more."):
        make(replace(DIGITS, {"model.name": "tiny-s3u1-double"}), Init(str(source)), Listener())
    with user_error("params/group1/block2/first/kernel is missing there and [3, 3, 4, 4] here"):
        make(replace(DIGITS, {"model.name": "tiny"}), Init(str(source)), Listener())


def test_another_normalisation_is_warned_of(source: Path) -> None:
    reporter = Listener()
    make(replace(DIGITS, {"data.mean": (0.5,)}), Init(str(source)), reporter)
    assert 'with a different image normalisation; set --config.data.mean="(0.3,)"' in reporter.text.getvalue()
    assert normalization_of(f"{source}:best") == ((0.3,), (0.5,))


@pytest.mark.parametrize(("init", "parts"), [
    (Init("absent"), ("--init=absent", "no such run or file", "RUN:best")),
    (Init("SOURCE/checkpoints"), ("--init=", "/checkpoints: the directory holds no run", "file of PyTorch weights",
                                   "part of the run in SOURCE")),
    (Init("SOURCE/run.json"), ("--init=", "a file of the run in SOURCE; give the run: --init=SOURCE.")),
    (Init("SOURCE:7"), ("checkpoint '7'", "10, 20")), (Init("SOURCE:worst"), ("checkpoint 'worst'",)),
    (Init("SOURCE", classes="list"), ("--classes=list", "has class names")),
    (Init("SOURCE", calibration=5), ("--calibration=5", "omit it")),
    (Init("SOURCE", measure="macs"), ("--budget_of=macs", "omit it")),
    (Init("SOURCE", budget=0.5), ("--budget=0.5 chooses the ranks, but", "tiny"))])
def test_a_mistake_is_told(source: Path, init: Init, parts: tuple[str, ...]) -> None:
    with user_error(*(part.replace("SOURCE", str(source)) for part in parts)):
        make(DIGITS, Init(init.source.replace("SOURCE", str(source)), init.classes, init.calibration, init.budget,
                          init.measure), Listener())


def test_a_run_begins_resumes_without_its_source_and_takes_no_other(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    run, reporter = tmp_path / "run", Listener()
    train(DIGITS, run, reporter, init=f"{copy}:best")
    assert f"starts from step 10 of {copy}:best ({TINY}); the classifier is kept" in reporter.text.getvalue()
    recorded = json.loads((run / "run.json").read_text())["init"]
    assert (recorded["source"], recorded["step"], recorded["head"]) == (f"{copy}:best", 10, "kept")
    assert [line["step"] for line in read_metrics(run)] == [2]
    np.testing.assert_array_equal(read_arrays(run, 0)["params"]["stem"]["kernel"],
                                  read_arrays(source, 10)["params"]["stem"]["kernel"])
    shutil.rmtree(copy)
    shutil.rmtree(run / "checkpoints" / "2")
    for init in (None, f"{copy}:best"):
        train(DIGITS, run, Listener(), init=init)
        assert Trained.open(run).step == 2
        assert Workdir(run).load()[1]["init"] == recorded
        assert json.loads((run / "checkpoints" / "2" / "run" / "metadata").read_text())["init"] == recorded
    with user_error(f"holds a run that began with --init={copy}:best; omit --init"):
        train(DIGITS, run, Listener(), init=str(source))
    with user_error("holds a run that began without --init"):
        train(DIGITS, source, Listener(), init=str(run))
    shutil.rmtree(run / "checkpoints")
    with user_error(f"was started with --init={copy}:best but holds no checkpoint yet"):
        train(DIGITS, run, Listener())


@pytest.mark.slow
def test_a_run_begins_with_given_weights_and_an_optimizer_of_ones_own(source: Path, tmp_path: Path) -> None:
    train(DIGITS, tmp_path / "run", Listener(), init=str(source), optimizer=optax.adabelief)
    assert Trained.open(tmp_path / "run").step == 2


def test_a_wrong_source_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with user_error("does not fit"):
        train(replace(DIGITS, {"model.name": "tiny"}), tmp_path / "run", Listener(), init=str(source))
    assert not (tmp_path / "run").exists()


# Files


def write_weights(path: Path, config: Config, classes: int) -> tuple[Path, Any]:
    """Writes random weights of the network of `config` for colour images, and returns the variables too."""
    spec = data.Spec((8, 8, 3), tuple(map(str, range(classes))))
    model = build_model(config, spec)
    variables = random_variables(model, spec.image_shape)
    return torch_files.save(path, {"state_dict": to_published(variables, model)}), variables


def test_outputs_of_a_file_are_taken_in_order_which_is_said(images: Path, tmp_path: Path) -> None:
    config, reporter = on_folder(images), Listener()
    path, variables = write_weights(tmp_path / "w.pth", config, 12)
    result = import_weights(config, tmp_path / "run", str(path), reporter)
    assert result["head"] == "kept, outputs in the order of the classes"
    assert "warning: " in reporter.text.getvalue()
    assert "2 '10'" in reporter.text.getvalue()
    opened = Trained.open(tmp_path / "run")
    assert_trees_equal(jax.device_get(dict(opened.variables)), variables)
    assert opened.spec.classes[2] == "10"
    assert evaluate(tmp_path / "run")["step"] == 0
    with user_error("already holds checkpoints"):
        import_weights(config, tmp_path / "run", str(path), reporter)


def test_the_folder_of_an_imported_run_is_known_where_it_has_moved(images: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    shutil.copytree(images / "train", tmp_path / "tree" / "here")
    shutil.copytree(images / "test", tmp_path / "tree" / "here", dirs_exist_ok=True, copy_function=lambda old, new: (
        shutil.copy(old, f"{new}.png")))  # two images of each class, one of which is drawn for testing
    config = on_folder(tmp_path / "tree" / "here")
    path, _ = write_weights(tmp_path / "w.pth", config, 12)
    import_weights(config, tmp_path / "run", str(path), Listener())
    (tmp_path / "tree" / "here").rename(tmp_path / "tree" / "there")
    found = evaluate(tmp_path / "run", overrides={"data.directory": str(tmp_path / "tree" / "there")})
    assert found["test_examples"] == 12


def test_a_run_among_its_images_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, it would be a class of the next command."""
    shutil.copytree(images / "train", tmp_path / "tree")
    for name in range(12):
        shutil.copy(tmp_path / "tree" / str(name) / "0.png", tmp_path / "tree" / str(name) / "1.png")
    monkeypatch.chdir(tmp_path / "tree")
    config = on_folder(Path("."))
    path, _ = write_weights(tmp_path / "w.pth", config, 12)
    for begin in (lambda: train(config, "runs/x", Listener()), lambda: train(config, tmp_path / "tree", Listener()),
                  lambda: import_weights(config, "runs/x", str(path), Listener()),
                  lambda: compress_run(config, "runs/x", str(path), Listener())):
        with user_error(str(tmp_path / "tree"), "classes", "--workdir=../runs/"):
            begin()
    assert not Path("runs").exists()


def test_weights_that_are_not_numbers_are_refused(images: Path, tmp_path: Path) -> None:
    config = on_folder(images)
    model = build_model(config, data.Spec((8, 8, 3), tuple(map(str, range(12)))))
    variables = random_variables(model, (8, 8, 3))
    variables["params"]["head"]["bias"][3] = np.nan
    path = torch_files.save(tmp_path / "w.pth", {"state_dict": to_published(variables, model)})
    with user_error(str(path), "params/head/bias is not finite"):
        import_weights(config, tmp_path / "run", str(path), Listener())
    assert not (tmp_path / "run").exists()


def test_a_list_names_the_outputs_of_a_file(images: Path, tmp_path: Path) -> None:
    config, reporter = on_folder(images), Listener()
    path, variables = write_weights(tmp_path / "w.pth", config, 14)
    (tmp_path / "names").write_text("\n".join(map(str, range(14))))
    start = make(config, Init(str(path), str(tmp_path / "names")), reporter)
    order = [int(name) for name in start.spec.classes]
    assert order[:3] == [0, 1, 10]
    np.testing.assert_array_equal(start.variables["params"]["head"]["kernel"],
                                  variables["params"]["head"]["kernel"][:, order])
    assert not reporter.text.getvalue()
    other = make(config, Init(str(path)), reporter)
    assert other.init["head"] == "initialised at random: the weights have 14 outputs and the data 12 classes"


def test_a_file_that_this_package_wrote_names_its_classes_and_normalisation(source: Path, tmp_path: Path,
                                                                             gray: Any) -> None:
    path = tmp_path / "w.safetensors"
    export_weights(source, output=str(path))
    patch, reporter = gray("7", "0", "3"), Listener()
    try:
        start = make(replace(DIGITS, {"data.std": (0.4,)}), Init(str(path)), reporter)
    finally:
        patch.undo()
    assert start.init["head"] == "kept, its outputs matched by name among 10"
    np.testing.assert_array_equal(start.variables["params"]["head"]["bias"],
                                  np.asarray(read_arrays(source, 20)["params"]["head"]["bias"])[[7, 0, 3]])
    assert '--config.data.mean="(0.3,)" --config.data.std="(0.5,)"' in reporter.text.getvalue()
    assert normalization_of(str(path)) == ((0.3,), (0.5,))
    unknown = replace(DIGITS, {"data.mean": (), "data.std": ()})
    import_weights(unknown, tmp_path / "imported", str(path), reporter)
    config, _ = Workdir(tmp_path / "imported").load()
    assert (config.data.mean, config.data.std) == ((0.3,), (0.5,))
    with user_error("--weights=absent: no such file"):
        import_weights(unknown, tmp_path / "none", "absent", reporter)


def test_a_file_of_the_plain_network_is_compressed(images: Path, tmp_path: Path) -> None:
    plain = on_folder(images, **{"model.name": "tiny"})
    path, _ = write_weights(tmp_path / "w.pth", plain, 12)
    config = on_folder(images, **{"model.name": "tiny-s0u4"})  # as many elements as channels: nothing is lost
    start = make(config, Init(str(path), calibration=0), Listener())
    assert start.report is not None
    assert (start.init["network"], start.report["step"], start.report["test_examples"]) == ("tiny", None, 12)
    assert start.report["test_loss"]["compressed"] == pytest.approx(start.report["test_loss"]["plain"], abs=1e-4)
    assert start.network.sharing.unique_rank == 4


def test_a_list_orders_the_outputs_of_a_file_that_is_compressed(images: Path, tmp_path: Path) -> None:
    plain = on_folder(images, **{"model.name": "tiny"})
    path, variables = write_weights(tmp_path / "w.pth", plain, 12)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(12))))  # of the folder: as text, 0 1 10 11 2 …
    config = on_folder(images, **{"model.name": "tiny-s0u4"})
    compress_run(config, tmp_path / "run", str(path), Listener(), calibration=0, classes=str(names))
    order = sorted(range(12), key=str)
    np.testing.assert_array_equal(read_arrays(tmp_path / "run", 0)["params"]["head"]["kernel"],
                                  variables["params"]["head"]["kernel"][:, order])
    request = commands.Request(config, {}, str(tmp_path / "other"), True, quiet=True, source=str(tmp_path / "run"),
                               classes="names.txt")
    with user_error("--classes=names.txt only applies to files of weights; the run in "):
        commands.run("compress", request)


def test_a_budget_is_of_the_network_with_the_new_classes(images: Path, tmp_path: Path) -> None:
    path, _ = write_weights(tmp_path / "w.pth", on_folder(images, **{"model.name": "tiny"}), 1000)
    config = on_folder(images, **{"model.name": "tiny"})
    report = make(config, Init(str(path), calibration=0, budget=0.9), Listener()).report
    assert report is not None
    assert 0.75 < report["parameters"] / report["plain"]["parameters"] <= 0.9


def test_an_interrupted_start_within_a_budget_begins_again(images: Path, tmp_path: Path) -> None:
    config, run = on_folder(images, **{"model.name": "tiny"}), tmp_path / "run"
    init = Init(str(write_weights(tmp_path / "w.pth", config, 12)[0]), calibration=0, budget=0.9)
    train(config, run, Listener(), init=init)
    network = Workdir(run).load()[0].model.name
    assert network != "tiny"
    shutil.rmtree(run / "checkpoints")
    for name in ("metrics.jsonl", "metrics.csv"):
        (run / name).unlink()
    train(config, run, Listener(), init=init)
    assert Trained.open(run).config.model.name == network


def test_a_path_may_have_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:best").mkdir()
    (tmp_path / "a:best" / "run.json").write_text("{}")
    (tmp_path / "w:1").write_bytes(b"")
    assert find_weights(str(tmp_path / "a:best")) == (str(tmp_path / "a:best"), "latest")
    assert find_weights(str(tmp_path / "w:1")) == (str(tmp_path / "w:1"), None)
    assert normalization_of(str(tmp_path / "w:1")) == (IMAGENET_MEAN, IMAGENET_STD)
