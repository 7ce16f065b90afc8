"""The sections of the page of one run."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image as Pillow

from shared_basis.config import OrthogonalityConfig
from shared_basis.evaluation.per_example import Image, Scores
from shared_basis.models.summary import render_saving
from shared_basis.plotting import Picture, data_uri
from shared_basis.report import plots
from shared_basis.report.html import Html, element, join, section, shown, table
from shared_basis.report.output import FOLDER
from shared_basis.report.points import value
from shared_basis.report.run_summary import RunSummary
from shared_basis.runs.metrics import render_outcome
from shared_basis.runtime.reporter import duration

PAIRS = 12
"""Number of most frequent confusions on the page."""

IMAGE_SIDE = 96
"""Images are enlarged by an integer factor to about this many pixels; larger ones are reduced to twice this size."""


def headline(run: RunSummary) -> str:
    """Returns the outcome or the progress of the run, with a warning if its data is incomplete."""
    text = render_outcome(run.outcome) if run.outcome else f"{run.config.model.name}: {_unscored(run.saved)}"
    return f"{text}." + (f" Warning: {run.warning}." if run.warning else "")


def _unscored(step: int | None) -> str:
    """Describes a run without evaluations, given the step of its latest checkpoint."""
    if step is None:
        return "no checkpoint is saved"
    if step == 0:
        return "imported or compressed weights, not trained yet"
    return (f"saved at step {step:,}, without an evaluation in metrics.jsonl: the run was stopped before the first "
            "one, or the file is missing")


def cards(run: RunSummary) -> Html:
    """Returns the key figures."""
    outcome = run.outcome
    saving = {key: f"{abs(100 * share):.1f} % {'fewer' if share > 0 else 'more'} than plain" if share else "as plain"
              for key, share in run.counts["saving"].items()}
    cards = []
    if outcome:
        cards += [(f"{100 - 100 * outcome['test_accuracy']:.2f} %", f"test error after epoch {outcome['epoch']}"),
                  (f"{100 - 100 * outcome['best_test_accuracy']:.2f} %",
                   f"test error of the best {outcome['chosen_on']} epoch, {outcome['best_epoch']}")]
    cards += [(plots.short_number(run.counts[key]), f"{unit}, {saving[key]}")
              for key, unit in (("parameters", "parameters"), ("macs", "MACs"))]
    if outcome:
        cards += [(_time(run.seconds), "training"),
                  (_speed(run), "training images per second")]
    return element("div", *(element("div", element("b", _unbroken(value)), _unbroken(text), class_="card")
                            for value, text in cards), class_="cards")


def _time(seconds: float) -> str:
    """Returns `seconds` as h:mm:ss, or in seconds if below a minute."""
    if math.isnan(seconds):
        return "–"
    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)


def _speed(run: RunSummary) -> str:
    return "–" if math.isnan(run.speed) else f"{run.speed:,.0f}"


def _unbroken(text: str) -> str:
    """Returns `text` with no-break spaces between numbers and percent signs."""
    return text.replace(" %", "\u00a0%")


def learning_curves(run: RunSummary, pictures: Sequence[Picture]) -> Html:
    """Returns the section with `plots.learning_curves` and all evaluations."""
    if not pictures:
        return section("Learning curves", element("p", "Not available: metrics.jsonl contains no evaluation."))
    marked = "; dotted vertical lines mark changes of the learning-rate schedule" if plots.boundaries(
        run.config) else ""
    return section(
        "Learning curves",
        element("p", f"Train: means over the epoch, with augmentation. {_evaluated(run)}{marked}.", class_="soft"),
        element("div", *(shown(each, FOLDER) for each in pictures), class_="panels"), _evaluations(run))


def _evaluated(run: RunSummary) -> str:
    names = " and ".join(name for name in ("validation", "test") if np.isfinite(run.series(f"{name}_loss")).any())
    return f"{names.capitalize()}: all images at the end of the epoch"


def _evaluations(run: RunSummary) -> Html:
    """Returns all evaluations as a collapsed table."""
    names = [name for name in dict.fromkeys(key for line in run.lines for key in line)
             if np.isfinite(run.series(name)).any()]
    whole = [bool((run.series(name) % 1 == 0).all()) for name in names]
    rows = [[f"{value:,.0f}" if exact else "–" if math.isnan(value) else f"{value:.5g}"
             for exact, value in zip(whole, values, strict=True)]
            for values in zip(*(run.series(name) for name in names), strict=True)]
    return element("details", element("summary", f"All {len(rows)} evaluations as a table" if len(rows) > 1 else
                                      "The evaluation as a table"),
                   table([name.replace("_", " ") for name in names], rows, "Evaluations",
                         numbers=range(len(names))))


def filter_bases(run: RunSummary, pictures: Sequence[Picture]) -> Html:
    """Returns the section with `plots.basis_curves`."""
    if not pictures:
        return section("Filter bases", element("p", "No penalty was recorded" + (
            ": metrics.jsonl contains no evaluation." if not run.lines else
            "; the network has no basis elements to which it applies.")))
    config = run.config.orthogonality
    return section(
        "Filter bases", element("p", "For the basis elements in the penalty "
                                     f"(orthogonality.elements={config.elements!r}). {_method(config)} An orthonormal "
                                     "basis has penalty 0, norms 1 and inner products 0.", class_="soft"),
        element("div", *(shown(each, FOLDER) for each in pictures), class_="panels"))


def _method(config: OrthogonalityConfig) -> str:
    """Describes how orthogonality is enforced."""
    if config.method == "penalty":
        return (f"The penalty, the {config.reduction} over pairs, enters the loss with the weight λ = "
                f"{config.weight:g}.")
    return f"The penalty is computed but not part of the loss (orthogonality.method={config.method!r})."


def confusion_matrix(picture: Picture, scores: Scores, run: RunSummary, which: str) -> Html:
    """Returns the section with `plots.confusion` and the most frequent confusions of the checkpoint `which`."""
    classes, totals = run.classes, scores.confusion.sum(1)
    right = int(np.trace(scores.confusion))
    pairs = table(["true class", "predicted as", "images", "share"], [
        (classes[row], classes[column], f"{count:,}", f"{100 * count / totals[row]:.1f} %")
        for row, column, count in scores.pairs(PAIRS)], "Most confused classes", numbers=(2, 3))
    asked = "" if which == str(scores.step) else f" ({which})"
    return section(
        "Confusion matrix",
        element("p", f"The checkpoint of step {scores.step:,}{asked} on {scores.count:,} test images: {right:,} "
                     f"correct ({100 * scores.accuracy:.2f} %), {scores.count - right:,} incorrect, loss "
                     f"{scores.loss:.4f}."),
        element("div", shown(picture, FOLDER), element(
            "div", element("h3", "Most confused classes"),
            pairs if right < scores.count else element("p", "None: all images are classified correctly.")),
            class_="beside"))


def worst_images(scores: Scores, classes: Sequence[str]) -> Html:
    """Returns the section with the images of highest loss."""
    return section(
        "Images with the highest loss",
        element("p", f"The {len(scores.worst)} test images with the highest loss, in decreasing order. p is the "
                     "predicted probability of a class.", class_="soft"),
        element("div", *(_image(image, classes) for image in scores.worst), class_="gallery"))


def _image(image: Image, classes: Sequence[str]) -> Html:
    right = image.label == image.predicted
    truth = element("b", classes[image.label])
    guess = element("b", f"{'✓' if right else '✗'} {classes[image.predicted]}", class_="right" if right else "wrong")
    return element("figure", _pixels(image.pixels, f"test image {image.name}"), element(
        "figcaption", element("div", "true ", truth, f" p\u00a0{image.probability_of_label:.3f}"),
        element("div", "predicted ", guess, f" p\u00a0{image.probability:.3f}"),
        element("div", f"loss {image.loss:.3f}"),
        element("div", short_name(image.name), title=image.name)))


def short_name(name: str) -> str:
    """Returns a file's class directory and name; other image names are returned unchanged."""
    return "/".join(PurePath(name).parts[-2:]) if os.path.isabs(name) else name


def _pixels(pixels: np.ndarray, text: str) -> Html:
    """Returns an image uint8 `[H, W, C]` as an element, enlarged with square pixels."""
    height, width, channels = pixels.shape
    picture, file = Pillow.fromarray(pixels.squeeze(-1) if channels == 1 else pixels), io.BytesIO()
    times = max(1, round(IMAGE_SIDE / max(height, width)))
    if max(height, width) <= IMAGE_SIDE:
        picture.save(file, "png")
        return element("img", src=data_uri(file.getvalue()), alt=text, width=str(width * times),
                       height=str(height * times), class_="small")
    picture.thumbnail((2 * IMAGE_SIDE, 2 * IMAGE_SIDE))
    picture.save(file, "jpeg", quality=85)
    return element("img", src=data_uri(file.getvalue(), "jpeg"), alt=text, width=str(picture.width),
                   height=str(picture.height))


def counts(run: RunSummary, pictures: Sequence[Picture]) -> Html:
    """Returns the section with `plots.count_bars` and a table of the counts."""
    own, plain = run.counts, run.counts["plain"]
    rows = [[name, f"{row['parameters']:,}", f"{row['shared_parameters']:,}", f"{row['macs']:,}",
             f"{plain['groups'][name]['parameters']:,}", f"{plain['groups'][name]['macs']:,}"]
            for name, row in own["groups"].items()]
    shared = sum(row["shared_parameters"] for row in own["groups"].values())
    rows.append(["total", f"{own['parameters']:,}", f"{shared:,}", f"{own['macs']:,}", f"{plain['parameters']:,}",
                 f"{plain['macs']:,}"])
    return section(
        "Parameters and multiply-accumulates", element("p", _unbroken(render_saving(dict(own))) + "."),
        element("div", *(shown(each, FOLDER) for each in pictures), class_="panels"),
        table(["group", "parameters", "of these shared", "MACs", "plain parameters", "plain MACs"], rows,
              "Parameters and MACs by group", numbers=range(1, 6)),
        element("p", "MACs: multiply-accumulates of convolutions and linear layers for one image.", class_="soft"))


def run_facts(run: RunSummary) -> Html:
    """Returns the section with the properties of the run and its environment."""
    data, config = run.record["data"], run.config
    images = ", ".join(f"{data[f'{name}_examples'] - data.get(f'{name}_broken', 0)} {name}"
                       for name in ("train", "validation", "test") if f"{name}_examples" in data)
    shape = "×".join(map(str, data["image_shape"]))
    less = (", excluding those that cannot be decoded" if config.data.on_broken == "skip" and not any(
        name.endswith("_broken") for name in data) else "")
    rows = [("workdir", str(run.path)),
            ("data", f"{config.data.name}: {images + ' ' if images else ''}images of {shape}, {len(run.classes)} "
                     f"classes{less}"),
            ("epochs", f"{run.epoch} of {config.train.epochs} evaluated" + (
                "" if run.epoch == config.train.epochs else "; the run is not finished")),
            ("devices", run.record["devices"] or "not recorded")]
    if init := run.record["init"]:
        rows.append(("initial weights", f"{init['source']}: {value(run, 'init')}"))
    if run.record["own"]:
        rows.append(("functions of your own", value(run, "own")))
    if run.lines:
        rows += [("steps", f"{run.lines[-1]['step']:,}, of {config.train.batch_size} images each"),
                 ("speed", f"{_speed(run)} training images per second"),
                 ("time of training",
                  f"{_time(run.seconds)} (without compilation and evaluations)")]
    changed = [(path, _value(value), _value(default)) for path, (value, default) in run.changed.items()]
    versions = [(str(name), str(version)) for name, version in run.record["versions"].items()]
    return section("The run", element(
        "div",
        element("div", element("h3", "Summary"), table(["property", "value"], rows, "Properties of the run"),
                element("h3", "Versions at the start"), table(["package", "version"], versions, "Versions")),
        element("div", element("h3", "Configuration, non-default fields"),
                table(["field", "value", "default"], changed, "Changed fields")),
        class_="beside"))


def _value(value: Any) -> Html:
    """Returns a field's value in Python syntax."""
    return element("code", repr(value))


def file_list(names: Sequence[str]) -> Html:
    """Returns the section that lists the files next to the page."""
    return section("Files", element("p", "Files next to this page: ", join(
        piece for name in names for piece in (element("a", f"{FOLDER}/{name}", href=f"{FOLDER}/{name}"), " ")),
        "; the evaluations are in metrics.jsonl."))
