"""Reports, against the network applied to each image by hand, and against means taken by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import (
    ROOT,
    TINY,
    CommandLine,
    Watcher,
    cross_entropies,
    save_run,
    user_environment,
    user_error,
    write_folder,
)
from PIL import Image

from shared_basis import BasisConv, Network, plotting
from shared_basis.cli import commands
from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, replace
from shared_basis.evaluation import per_example
from shared_basis.models import registry
from shared_basis.report import compare, html, output, plots, run_report, run_summary, sections
from shared_basis.report import points as points_module
from shared_basis.runs import metrics
from shared_basis.runs.trained import Trained
from shared_basis.runs.workdir import Workdir, make_record
from shared_basis.runtime.reporter import Reporter

CLASSES = ("$a_b$ & \"c\"", "<script>alert(1)<", "猫")
"""Names of directories, which become classes; sorted, as the classes are."""

LINES = [{"step": 2 * epoch, "epoch": epoch, "learning_rate": 0.1, "train_loss": 2 / epoch, "train_accuracy": epoch / 8,
          "validation_loss": 3 / epoch, "validation_accuracy": accuracy, "validation_accuracy_top5": 1.0,
          "test_loss": 2.5 / epoch, "test_accuracy": 0.1234 * epoch, "test_accuracy_top5": 1.0,
          "penalty": 10.0 ** -epoch, "norm_min": 0.9, "norm_mean": 1.0, "norm_max": 1.1, "coherence": 0.4 / epoch,
          "images_per_second": 50.0 * epoch} for epoch, accuracy in ((1, 0.5), (2, 0.75), (3, 0.625))]


def write_metrics(workdir: Path, lines: list[dict[str, Any]]) -> None:
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run with a random network, and hand-written metrics, one of them damaged; for reading only."""
    root = tmp_path_factory.mktemp("run")
    images = write_folder(root / "images", CLASSES, 3)
    config = Config(
        name="x", model=ModelConfig(name=TINY), data=DataConfig(name="folder", directory=str(images)),
        optimizer=OptimizerConfig(warmup_epochs=0.5, boundaries=(2.0, 40.0), factors=(0.1, 0.5)),
        train=TrainConfig(eval_batch_size=5, batch_size=4))
    workdir = save_run(root / "run", config, {1: 0.5, 6: 0.25})
    write_metrics(workdir, LINES)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "epoch": 4, "test_accu\n{"step": 8, "epoch": "4", "test_accuracy": null}\n[]\n')
    return workdir


@pytest.fixture(scope="module")
def logits(run: Path) -> dict[str, Any]:
    """Returns of each test image, by its file, the logits without the package's reading and batches, and its label."""
    trained = Trained.open(run)
    apply = jax.jit(lambda pixels: trained.model.apply(trained.variables, (pixels / 255 - 0.5) / 0.5, train=False))
    paths = [path for label, name in enumerate(CLASSES)
             for path in sorted((run.parent / "images" / "test" / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(path), np.float32) for path in paths])
    found = np.asarray(apply(np.pad(pixels, ((0, 3), (0, 0), (0, 0), (0, 0)))))[:len(paths)]
    return {str(path): (row, CLASSES.index(path.parent.name)) for path, row in zip(paths, found, strict=True)}


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Returns the directory of the report of `run`, and its result."""
    directory = tmp_path_factory.mktemp("report")
    return directory, run_report.report(run, output=str(directory))


class Page(HTMLParser):
    """Reads a page and makes sure that it is well-formed and needs nothing but itself."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.links: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).replace("\xa0", " ").split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert re.match(r"data:image/(png|jpeg);base64,", attributes["src"])
            assert attributes["alt"]
            self.images.append(attributes)
        else:
            assert "src" not in attributes
        if "href" in attributes:
            self.links.append(attributes["href"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th", "div", "b", "p", "h1", "h2", "h3", "summary"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


# One run

def test_scores_are_those_of_the_network_by_hand(run: Path, logits: Any) -> None:
    # Of 9 images in batches of 8, so that each batch matters.
    found = per_example.score(Trained.open(run), Reporter(verbosity="quiet"), worst=4)
    rows, labels = (np.array(each) for each in zip(*logits.values(), strict=True))
    losses = cross_entropies(rows - rows.max(-1, keepdims=True), labels)
    confusion = np.zeros((3, 3), int)
    for label, row in zip(labels, rows, strict=True):
        confusion[label, row.argmax()] += 1
    np.testing.assert_array_equal(found.confusion, confusion)
    assert (found.step, found.count) == (6, 9)
    assert found.accuracy == pytest.approx(np.mean(rows.argmax(-1) == labels))
    assert found.loss == pytest.approx(losses.mean(), rel=1e-4)
    names = list(logits)
    assert [image.name for image in found.worst] == [names[place] for place in np.argsort(-losses)[:4]]
    for image in found.worst:
        row, label = logits[image.name]
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert (image.label, image.predicted) == (label, row.argmax())
        assert image.probability == pytest.approx(shares.max(), abs=1e-4)
        assert image.probability_of_label == pytest.approx(shares[label], abs=1e-4)
        np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(image.name)))


def test_streamed_images_are_scored_alike(run: Path) -> None:
    resident, streamed = (per_example.score(
        Trained.open(run, "latest", {"data.placement": placement, "data.workers": 0}), Reporter(verbosity="quiet"))
        for placement in ("device", "stream"))
    assert [image.name for image in streamed.worst] == [image.name for image in resident.worst]
    np.testing.assert_array_equal(streamed.confusion, resident.confusion)
    for one, other in zip(streamed.worst, resident.worst, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_confused_pairs_come_by_their_number() -> None:
    confusion = np.array([[50, 3, 0], [7, 60, 3], [0, 0, 9]])
    assert per_example.Scores(1, confusion, [], 0.0).pairs(3) == [(1, 0, 7), (0, 1, 3), (1, 2, 3)]
    assert per_example.Scores(1, confusion, [], 0.0).pairs(9) == [(1, 0, 7), (0, 1, 3), (1, 2, 3)]


def test_the_page_stands_alone_and_escapes_names(written: Any) -> None:
    directory, result = written
    page = Page(directory / "report.html")
    assert (result["report"], result["missing"], result["step"]) == (str(directory / "report.html"), None, 6)
    content = (directory / "report.html").read_text()
    assert "<script" not in content
    assert "://" not in content
    assert len(content) < 2_000_000
    for name in CLASSES:
        assert name in page.text
    assert {(directory / link).is_file() for link in page.links} == {True}
    assert set(page.links) == {str(Path(path).relative_to(directory)) for path in result["files"]}
    assert len([image for image in page.images if image["class"] == "small"]) == 9


@pytest.mark.parametrize(("name", "short"), [
    ("/data/photos/test/cat/1.png", "cat/1.png"),
    ("example 12 of 'test' in /data/tfds/cifar10/3.0.2",) * 2, ("12", "12")])
def test_images_are_named_by_class_and_file_or_as_the_data_set_has_it(name: str, short: str) -> None:
    assert sections.short_name(name) == short


def test_the_page_says_what_the_run_was(run: Path, written: Any) -> None:
    text = Page(written[0] / "report.html").text
    known = Workdir(run).load()[1]["versions"]
    for part in (
        "37.02 % test accuracy after 3 epochs, 24.68 % after 2 (best validation epoch; use it with --checkpoint=best)",
        "62.98 % test error after epoch 3",
        "75.32 % test error of the best validation epoch, 2", "epochs 3 of 300 evaluated; the run is not finished",
        "model.name 'tiny-s2u1-double' 'resnet20-s16u1-double'", "optimizer.boundaries (2.0, 40.0) ()",
        "step 6 (latest) on 9 test images", "All 3 evaluations as a table", "6, of 4 images each",
        "150 training images per second", "0.16 s", *(f"{name} {version}" for name, version in known.items()),
    ):
        assert part in text, part
    counts = run_summary.load_run_summary(run).counts
    for row in (counts, counts["plain"], *counts["groups"].values()):
        assert f"{row['parameters']:,}" in text
        assert f"{row['macs']:,}" in text


def test_the_files_beside_the_page_hold_what_it_shows(written: Any, logits: Any) -> None:
    folder = written[0] / "report"
    assert {path.name for path in folder.iterdir()} == set(run_report.FILES)
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 600
    with (folder / "confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == list(CLASSES)
    assert sum(int(cell) for row in rows for cell in row[1:]) == 9
    with (folder / "errors.csv").open(newline="") as file:
        entries = list(csv.DictReader(file))
    assert {entry["image"] for entry in entries} == set(logits)
    losses = [float(entry["loss (nats)"]) for entry in entries]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_another_checkpoint_is_scored_and_named(run: Path, tmp_path: Path) -> None:
    result = run_report.report(run, "best", output=str(tmp_path))
    assert result["step"] == 1
    assert "The checkpoint of step 1 (best)" in Page(tmp_path / "report.html").text
    with user_error("'7'", "latest, best or one of the steps 1, 6"):
        run_report.report(run, "7", output=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_without_its_images_a_run_is_reported_in_part(run: Path, written: Any, tmp_path: Path) -> None:
    shutil.copytree(written[0], tmp_path / "report")  # of an earlier report, whose confusion matrix is not this one's
    workdir = shutil.copytree(run, tmp_path / "run")
    record = json.loads((workdir / "run.json").read_text())
    record["config"]["data"]["directory"] = str(tmp_path / "gone")
    (workdir / "run.json").write_text(json.dumps(record))
    (tmp_path / "report" / "report" / "mine.txt").write_text("kept")
    result = run_report.report(workdir, output=str(tmp_path / "report"))
    text = Page(tmp_path / "report" / "report.html").text
    assert str(tmp_path / "gone") in result["missing"]
    assert "The confusion matrix and single images are not available" in text
    assert result["missing"] in text
    assert "without confusion matrix and images" in run_report.render(result)
    assert {path.name for path in (tmp_path / "report" / "report").iterdir()} == set(run_report.FILES) - {
        "confusion.png", "confusion.csv", "errors.png", "errors.csv"} | {"mine.txt"}
    result = run_report.report(workdir)
    assert result["removed"] == []
    with user_error("nowhere"):  # images that the user names must be there
        run_report.report(workdir, overrides={"data.directory": str(tmp_path / "nowhere")},
                          output=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_run_without_metrics_is_reported(run: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(run, tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    run_report.report(workdir)
    text = Page(workdir / "report.html").text
    assert f"saved at step {LINES[-1]['step']}, without an evaluation in metrics.jsonl" in text
    assert "on 9 test images" in text
    assert not (workdir / "report" / "loss.png").exists()
    assert (workdir / "report" / "confusion.png").is_file()


@pytest.mark.slow
def test_damaged_lines_are_left_out(run: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(run / "run.json", workdir)
    odd = [{**LINES[0], "test_loss": "high"}, {**LINES[0], "epoch": 0}, {**LINES[0], "step": True},
           {**LINES[0], "validation_accuracy": None}, {**LINES[0], "images_per_second": math.nan}]
    strange = {**LINES[2], "penalty": "small", "train_loss": math.inf, "note": "<b>"}
    write_metrics(workdir, [LINES[0], *odd, LINES[1], strange])
    found = run_summary.load_run_summary(workdir)
    assert [line["epoch"] for line in found.lines] == [1, 2, 3]
    np.testing.assert_array_equal(found.series("penalty"), [0.1, 0.01, math.nan])
    assert run_report.compose(found, None, "latest", "gone")[1].keys() >= {"loss.png", "penalty.png"}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epo')  # what a killed run leaves
    result = run_report.report(workdir, scoring=False)
    assert f"6 damaged lines of {workdir / 'metrics.jsonl'} ignored" in Page(workdir / "report.html").text
    assert "warning: 6 damaged lines" in run_report.render(result)
    assert "warning: 6 damaged lines" in compare.render(
        compare.compare([str(workdir)], str(tmp_path / "compared")))


def test_a_run_that_is_not_trained_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(run / "run.json", workdir)
    assert "no checkpoint is saved" in sections.headline(run_summary.load_run_summary(workdir))
    monkeypatch.setattr(run_summary.RunSummary, "saved", 0)
    assert "imported or compressed weights" in sections.headline(run_summary.load_run_summary(workdir))


def test_boundaries_of_the_learning_rate_are_named(run: Path) -> None:
    found = run_summary.load_run_summary(run)
    assert plots.boundaries(found.config) == [(0.5, "warm-up ends"), (2.0, "× 0.1"), (40.0, "× 0.5")]
    without = dataclasses.replace(found, config=replace(
        found.config, {"optimizer.warmup_epochs": 0.0, "optimizer.boundaries": (), "optimizer.factors": ()}))
    reached = dataclasses.replace(found, config=replace(found.config, {"optimizer.boundaries": (2.0, 3.5)}))
    loss, with_two, none = (plots.learning_curves(each)[0].png for each in (found, reached, without))
    assert loss == with_two  # 3.5 and 40 were not reached, and are not marked
    assert loss != none


def test_a_run_says_how_it_began_and_which_images_it_used(run: Path) -> None:
    found = run_summary.load_run_summary(run)
    text = sections.run_facts(found)
    assert "data.directory" in text
    assert "initial weights" not in text
    init = {"source": "/w.pth", "step": None, "network": "resnet20", "head": "kept", "budget": None}
    text = sections.run_facts(dataclasses.replace(found, record={
        **found.record, "init": init, "own": {"loss": "mine.focal"}}))
    assert "/w.pth: resnet20, classifier kept" in text
    assert "loss mine.focal" in text


def test_images_that_are_skipped_as_they_are_read_are_not_passed_off_as_seen(run: Path) -> None:
    said = "excluding those that cannot be decoded"
    found = run_summary.load_run_summary(run)
    skips = dataclasses.replace(found, config=replace(found.config, {"data.on_broken": "skip"}))
    counted = dataclasses.replace(skips, record={**found.record, "data": {**found.record["data"], "test_broken": 1}})
    assert [said in sections.run_facts(each) for each in (found, skips, counted)] == [False, True, False]


def test_a_group_that_is_no_module_is_counted_beside_a_plain_network_without_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat(Network):
        def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
            return {"body": {name: (3, 3, 1, self.sharing.shared_rank) for _, name in self.sharing.layers}}

        def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
            return {"body": ("block1", "block2")}

        def basis_layers(self) -> tuple[str, ...]:
            return ("conv",)

        def layer_path(self, group: str, block: str, layer: str) -> tuple[str, ...]:
            return (f"{group}_{block}_{layer}",)

        @nn.compact
        def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
            basis = self.shared_arrays().get("body", {}).get("shared")
            x = images
            for block in self.sharing_blocks()["body"]:
                x = BasisConv(1, unique_rank=self.sharing.unique_rank, name=f"body_{block}_conv")(x, basis, train=train)
            return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))

    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register_network("flat", Flat)
    found = run_summary.load_run_summary(make_run(tmp_path / "run", (0.5,), model__name="flat-s3u1"))
    assert "bases/body" in sections.counts(found, [])
    assert [f"bases/body {size} against 0" in each.text for each, size in zip(
        plots.count_bars(found), (27, 0), strict=True)] == [True, True]


def test_time_is_images_over_speed(run: Path) -> None:
    assert run_summary.load_run_summary(run).seconds == pytest.approx(6 * 4 / 150)


def test_the_speed_is_the_last_one_measured(run: Path) -> None:
    """A process that only finishes the last evaluation has trained no step, and writes 0 images per second."""
    found = run_summary.load_run_summary(run)
    lines = [*LINES[:2], {**LINES[2], "images_per_second": 0.0}]
    resumed, never = dataclasses.replace(found, lines=lines), dataclasses.replace(found, lines=lines[2:])
    assert resumed.seconds == pytest.approx(6 * 4 / 100)
    assert [math.isnan(each) for each in (never.speed, never.seconds)] == [True, True]
    for part in (sections.cards, sections.run_facts):
        assert "100" in part(resumed)
        assert all(speed not in part(resumed) + part(never) for speed in (
            "<b>0</b>", "<td>0 training", "nan"))
    assert "images/s" not in metrics.render_line(lines[2], 3)
    assert "150 images/s" in metrics.render_line(LINES[2], 3)


def test_an_overview_of_many_classes_keeps_single_confusions() -> None:
    confusion = np.eye(1000, dtype=np.int64) * 50
    confusion[17, 803] = 1
    names = [str(number) for number in range(1000)]

    def draw(confusion: np.ndarray) -> bytes:
        return plots.confusion(per_example.Scores(1, confusion, [], 0.0), names).png
    pictures = [np.asarray(Image.open(io.BytesIO(draw(matrix))), int) for matrix in (
        confusion, np.eye(1000, dtype=np.int64) * 50)]
    assert (np.abs(pictures[0] - pictures[1]).max(-1) > 8).any()


def test_what_cannot_be_written_is_named_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with user_error(str(tmp_path / "file"), "cannot be written", "--output=DIR"):
        output.write_report(tmp_path / "file", b"page", {"loss.png": b"1"}, [])
    (tmp_path / "report.html").mkdir()
    with user_error("cannot be written"):
        output.write_report(tmp_path, b"page", {"loss.png": b"1"}, [])
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_after_training_a_failure_is_a_warning(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Watcher()
    workdir = shutil.copytree(run, tmp_path / "run")
    assert run_report.after_training(workdir, told, scoring=False) == str(workdir / "report.html")
    assert "several processes" in Page(workdir / "report.html").text
    assert f"--mode=report --workdir={workdir}" in told.text.getvalue()
    for failure in (OSError(28, "No space left on device"), ValueError("odd\nlines"), MemoryError()):
        def fail(*_: Any, failure: Exception = failure, **__: Any) -> None:
            raise failure
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", fail)
            assert run_report.after_training(workdir, told, scoring=False) is None
        line = told.text.getvalue().splitlines()[-1]
        assert line.startswith("warning: the run was saved, but the report failed (")
        assert f"--mode=report --workdir={workdir}" in line


# Pictures

def test_pictures_leave_the_settings_of_matplotlib_alone_and_do_not_heed_them() -> None:
    import matplotlib
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40}):
        inside = dict(matplotlib.rcParams)
        strange = plotting.png(lambda figure: figure.add_subplot().set(title=r"$\frac$") and None)
        assert dict(matplotlib.rcParams) == inside
    assert strange == plotting.png(lambda figure: figure.add_subplot().set(title=r"$\frac$") and None)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_drawing_imports_neither_pyplot_nor_a_window() -> None:
    code = ("import sys; from shared_basis import plotting; "
            "from shared_basis.report import compare, run_report; "
            "assert 'matplotlib' not in sys.modules; plotting.png(lambda figure: figure.add_subplot() and None); "
            "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=user_environment(), check=True,
                   timeout=300)


def test_names_that_the_font_lacks_are_numbered() -> None:
    assert plots.class_labels(("a$b_", "猫", "", "two\nlines", "\udcff", "n" * 40)) == [
        "a$b_", "class 1", "class 2", "class 3", "class 4", "n" * 17 + "…"]


def test_without_matplotlib_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with user_error("pip install matplotlib"):
        plotting.png(lambda figure: None)


def test_labels_at_the_ends_of_lines_do_not_meet() -> None:
    heights: list[float] = []

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for shift in (0.0, 0.001, 0.002, math.nan):
            axes.plot([1, 2, 3], [1, 2, 3 + shift], label=f"line {shift}")
        plotting.label_lines(axes)
        heights.extend(axes.transData.transform(text.xy)[1] + text.xyann[1] * plotting.DPI / 72 for text in axes.texts)

    plotting.png(paint)
    assert len(heights) == 4
    assert np.diff(sorted(heights)).min() >= 10.9 * plotting.DPI / 72


def test_markup_escapes_text_and_attributes() -> None:
    assert html.element("p", "<b>&\"", html.element("b", "x"), class_="\"><script>") == (
        '<p class="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;&quot;<b>x</b></p>')
    assert html.element("p", "a\x00\ud800b") == "<p>a\\x00\\ud800b</p>"


# Several runs

def make_run(workdir: Path, accuracies: tuple[float, ...], speed: float = 100.0, init: dict[str, Any] | None = None,
             own: dict[str, str] | None = None, **fields: Any) -> Path:
    """Makes a workdir with an evaluation for each of `accuracies`, and no network."""
    config = replace(Config(model=ModelConfig(name="resnet14"), train=TrainConfig(epochs=2, batch_size=8)), {
        name.replace("__", "."): value for name, value in fields.items()})
    Workdir(workdir).claim(make_record(config, {"classes": list("abc"), "image_shape": [8, 8, 1]}, None, own, init))
    write_metrics(workdir, [{"step": 5 * epoch, "epoch": epoch, "test_loss": 1.0, "test_accuracy": accuracy,
                             "images_per_second": speed} for epoch, accuracy in enumerate(accuracies, start=1)])
    return workdir


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Returns a directory of runs: three seeds, a basis network, another rate, an unfinished and an unscored run."""
    for seed, (accuracies, speed) in enumerate((((0.5, 0.90), 100.0), ((0.95, 0.93), 50.0), ((0.8, 0.84), 25.0))):
        make_run(tmp_path / f"plain{seed}", accuracies, speed, seed=seed, name=f"plain{seed}")
    make_run(tmp_path / "basis", (0.6, 0.75), model__name="resnet14-s4u1")
    make_run(tmp_path / "fast", (0.6, 0.7), optimizer__learning_rate=0.5)
    make_run(tmp_path / "short", (0.6,), seed=3)
    make_run(tmp_path / "none", (), model__name="resnet20")
    return tmp_path


@pytest.mark.slow
def test_the_run_of_workdir_is_compared_with_those_of_runs(several: Path, tmp_path: Path) -> None:
    runs = [str(several / "fast")]
    for given, count in ((True, 2), (False, 1)):
        result, _ = commands.run("report", commands.Request(Config(), {}, str(several / "basis"), given, runs=runs,
                                                            output=str(tmp_path / "comparison")))
        assert len([path for point in result["points"] for path in point["workdirs"]]) == count


def test_seeds_are_one_point_with_mean_and_deviation(several: Path) -> None:
    points, fields = points_module.gather_points([str(several)])
    found = {point.label: point for point in points}
    assert set(found) == {
        "resnet14-s4u1", "resnet14 (learning_rate 0.1, 2 epochs)", "resnet14 (learning_rate 0.5, 2 epochs)",
        "resnet14 (learning_rate 0.1, 1 epochs)", "resnet20"}
    assert sorted(fields) == ["model.name", "optimizer.learning_rate"]
    assert [point.parameters for point in points] == sorted(point.parameters for point in points)
    seeds = found["resnet14 (learning_rate 0.1, 2 epochs)"]
    assert sorted(run.config.seed for run in seeds.runs) == [0, 1, 2]
    # Errors 10, 7, 16 %: mean 11, deviations −1, −4, 5, squares 1 + 16 + 25 = 42, over n − 1 = 2: √21.
    assert seeds.error.mean == pytest.approx(11)
    assert seeds.error.deviation == pytest.approx(math.sqrt(21))
    # Best errors 10, 5, 16 %: mean 31/3.
    assert seeds.best_error.mean == pytest.approx(31 / 3)
    # 10 steps of 8 images: 0.8, 1.6 and 3.2 seconds.
    assert seeds.seconds.mean == pytest.approx(5.6 / 3)
    alone = found["resnet14-s4u1"]
    assert (alone.error.mean, math.isnan(alone.error.deviation)) == (pytest.approx(25), True)
    assert math.isnan(found["resnet20"].error.mean)


def test_what_does_not_change_the_outcome_makes_no_point_and_epochs_are_told_once(tmp_path: Path) -> None:
    make_run(tmp_path / "one", (0.5, 0.9))
    make_run(tmp_path / "two", (0.5, 0.8), seed=1, train__record_gradients=True, data__workers=1)
    make_run(tmp_path / "longer", (0.5, 0.8, 0.9), train__epochs=3)
    points, fields = points_module.gather_points([str(tmp_path)])
    assert {point.label: len(point.runs) for point in points} == {"resnet14 (epochs 2)": 2, "resnet14 (epochs 3)": 1}
    assert fields == ["train.epochs"]
    make_run(tmp_path / "unfinished" / "run", (0.5,), train__epochs=3)  # of one configuration with "longer"
    assert {point.label for point in points_module.gather_points([str(tmp_path), str(tmp_path / "unfinished")])[0]} == {
        "resnet14 (epochs 2)", "resnet14 (epochs 3, 3 evaluated)", "resnet14 (epochs 3, 1 evaluated)"}


@pytest.mark.slow
def test_runs_that_began_or_trained_otherwise_are_other_points(tmp_path: Path) -> None:
    def init(source: str, network: str = "resnet14", head: str = "kept", budget: float | None = None) -> dict[str, Any]:
        return {"source": source, "step": 3, "network": network, "head": head, "budget": budget}
    make_run(tmp_path / "scratch", (0.5,))
    make_run(tmp_path / "warm0", (0.6,), init=init("/a"))
    make_run(tmp_path / "warm1", (0.7,), init=init("/b"), seed=1)  # a seed with its own source
    make_run(tmp_path / "budget", (0.6,), init=init("/a", budget=0.25))
    make_run(tmp_path / "head", (0.6,), init=init("/a", head="initialised at random"))
    make_run(tmp_path / "own", (0.8,), own={"optimizer": "optax.adabelief"})
    points, fields = points_module.gather_points([str(tmp_path)])
    assert {point.label: len(point.runs) for point in points} == {
        "resnet14 (init random, own –)": 1, "resnet14 (init resnet14, classifier kept, own –)": 2,
        "resnet14 (init resnet14, classifier kept, budget 0.25, own –)": 1,
        "resnet14 (init resnet14, classifier initialised at random, own –)": 1,
        "resnet14 (init random, own optimizer optax.adabelief)": 1}
    assert sorted(fields) == ["init", "own"]
    compare.compare([str(tmp_path)], str(tmp_path / "out"))
    assert "optimizer optax.adabelief" in Page(tmp_path / "out" / "report.html").text


def test_points_name_their_images_unless_they_were_only_moved(tmp_path: Path) -> None:
    for name, data in (("cats", "one"), ("dogs", "two"), ("moved", "one")):
        run = make_run(tmp_path / name, (0.5,), data__name="folder", data__directory=f"/{name}")
        record = json.loads((run / "run.json").read_text())
        record["data"]["names_and_sizes_of_files"] = data
        (run / "run.json").write_text(json.dumps(record))
    points, fields = points_module.gather_points([str(tmp_path)])
    assert {point.label: len(point.runs) for point in points} == {
        "resnet14 (directory /cats)": 2, "resnet14 (directory /dogs)": 1}
    assert fields == ["data.directory"]


def test_errors_of_many_magnitudes_are_drawn_on_a_logarithmic_axis(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    scales: list[tuple[str, str]] = []
    save = Figure.savefig

    def watch(figure: Any, *given: Any, **options: Any) -> None:
        scales.append((figure.axes[0].get_xscale(), figure.axes[0].get_yscale()))
        save(figure, *given, **options)
    monkeypatch.setattr(Figure, "savefig", watch)
    make_run(tmp_path / "good", (0.995,))
    make_run(tmp_path / "other seed", (0.6,), seed=1, model__name="resnet20")  # its bar reaches below 0
    make_run(tmp_path / "bad", (0.99,), model__name="resnet20")
    compare.compare([str(tmp_path)], str(tmp_path / "out"))
    assert scales == [("linear", "log")] * 3


def test_the_comparison_page_holds_points_and_runs(several: Path) -> None:
    result = compare.compare([str(several)], str(several / "out"))
    page = Page(several / "out" / "report.html")
    assert "7 runs compared" in page.text
    for part in ("point network error (%) best (%)",  # what matters is seen without scrolling
                 "11.00 ± 4.58", "1.9 ± 1.2", "25.00", "1 of 2", "best test epoch, chosen on the test images",
                 *(str(several / name) for name in ("plain0", "plain1", "basis", "none"))):
        assert part in page.text, part
    assert {path.name for path in (several / "out" / "report").iterdir()} == set(compare.FILES)
    assert len(page.images) == 3
    for number, point in enumerate(result["points"], start=1):  # as in the table and beside the points
        if point["test_error_mean"] is not None:
            assert f"{number}: {point['label']}" in page.images[0]["alt"]
    rows = list(csv.DictReader(io.StringIO((several / "out" / "report" / "comparison.csv").read_text())))
    assert [int(row["n"]) for row in rows] == [point["n"] for point in result["points"]]
    assert sum(map(int, (row["n"] for row in rows))) == 7
    json.dumps(result, allow_nan=False)
    assert "n = 3" in compare.render(result)


def test_runs_are_found_once_and_a_mistake_is_told(several: Path) -> None:
    twice = points_module.find_runs([str(several / "basis"), str(several), str(several / "fast" / ".." / "basis")])
    assert len(twice) == 7
    (several / "loop").symlink_to("loop")
    assert len(points_module.find_runs([str(several)])) == 7
    with user_error("--runs=/no/such/directory", "neither a run"):
        points_module.find_runs(["/no/such/directory"])
    (several / "basis" / "run.json").write_text("{")
    with user_error("basis", "damaged"):
        points_module.gather_points([str(several)])


def test_runs_without_evaluations_are_compared_in_a_table(tmp_path: Path) -> None:
    compare.compare([str(make_run(tmp_path / "one", ()))], str(tmp_path / "out"))
    text = Page(tmp_path / "out" / "report.html").text
    assert "1 run compared" in text
    assert "No run has been evaluated" in text


# From the command line

SMALL = (f"--config={ROOT / 'configs' / 'digits_resnet.py'}:resnet14-s4u1-double", "--config.train.epochs=2",
         "--config.data.train_examples=200", "--config.train.batch_size=40")
"""As in test_end_to_end.py, so that the compiled programs are there already."""


def parse_json(done: subprocess.CompletedProcess[str]) -> Mapping[str, Any]:
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_training_ends_with_a_report(main: CommandLine, tmp_path: Path) -> None:
    done = main(*SMALL, "--report", "--workdir=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-3] == "report: run/report.html"
    assert "2 of 2" in Page(tmp_path / "run" / "report.html").text


@pytest.mark.slow
def test_reports_from_the_command_line(main: CommandLine, tmp_path: Path) -> None:
    make_run(tmp_path / "run", (0.5, 0.75))  # without a checkpoint, hence in part
    result = parse_json(main("--mode=report", "--workdir=run", "--output=there", "--json", cwd=tmp_path))
    assert result["report"] == "there/report.html"
    assert "2 of 2" in Page(tmp_path / result["report"]).text
    several = parse_json(main("--mode=report", "--runs=run", "--json", cwd=tmp_path))
    assert several["report"] == "comparison/report.html"
    assert several["points"][0]["n"] == 1


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--workdir=absent"], ["absent", "holds no run"]),
    (["--runs=absent"], ["--runs=absent", "neither a run"]),
    (["--runs=absent", "--checkpoint=best"], ["--runs", "--checkpoint"]),
])
def test_mistakes_are_told(main: CommandLine, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    done = main("--mode=report", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert all(part in done.stderr for part in parts)
    assert not list(tmp_path.iterdir())
