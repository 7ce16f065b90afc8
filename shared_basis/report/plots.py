"""The plots of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from shared_basis.config import Config
from shared_basis.evaluation.per_example import Image, Scores
from shared_basis.optim.optimizer import learning_rate_schedule
from shared_basis.plotting import (
    BACKGROUND,
    COLORS,
    DASHES,
    INK,
    MARKERS,
    POSITIVE,
    Picture,
    drawable,
    label_lines,
    picture,
    png,
    set_log,
)
from shared_basis.report.run_summary import RunSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_CLASSES = 20
"""Maximum number of classes for a confusion matrix with class names and counts."""

CELLS = 250
"""Number of rows for a confusion matrix of more classes; each shows the maximum over several classes."""

_SPLITS = ("train", "validation", "test")


def learning_curves(run: RunSummary) -> list[Picture]:
    """Returns plots of loss, accuracy and learning rate over the epochs; empty for a run without evaluations."""
    if not run.lines:
        return []
    return [_curves(run, "loss", "Loss", "cross entropy (nats per image)",
                    [(split, f"{split}_loss") for split in _SPLITS]),
            _curves(run, "accuracy", "Accuracy", "accuracy (%)",
                    [(split, f"{split}_accuracy") for split in _SPLITS], scale=100),
            _learning_rate(run)]


def basis_curves(run: RunSummary) -> list[Picture]:
    """Returns plots of penalty, norms and coherence of the filter bases over the epochs; empty if there are none."""
    if not np.isfinite(run.series("penalty")).any():
        return []
    norms = [("largest", "norm_max"), ("mean", "norm_mean"), ("smallest", "norm_min")]
    return [_curves(run, "penalty", "Orthogonality penalty", "penalty (before its weight λ)",
                    [("penalty", "penalty")], log=True),
            _curves(run, "norms", "Norms of basis elements", "Euclidean norm (1 if orthonormal)", norms),
            _curves(run, "coherence", "Largest inner product (coherence)", "of two elements (0 if orthonormal)",
                    [("coherence", "coherence")])]


def _curves(run: RunSummary, name: str, title: str, unit: str, metrics: Sequence[tuple[str, str]], scale: float = 1,
            log: bool = False) -> Picture:
    """Plots `metrics`, pairs of label and name, over the epochs; a label's index determines colour, dash and marker."""
    epochs = run.series("epoch")
    series = [(place, label, scale * run.series(metric)) for place, (label, metric) in enumerate(metrics)]
    series = [entry for entry in series if np.isfinite(entry[2]).any()]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        if log and all((values[np.isfinite(values)] > 0).all() for _, _, values in series):
            set_log(axes, "y")
        for place, label, values in series:
            axes.plot(epochs, values, label=label, color=COLORS[place], linestyle=DASHES[place],
                      marker=MARKERS[place], markevery=-(-len(epochs) // 12))
        axes.locator_params("x", integer=True)
        _mark_boundaries(axes, run, named=False)
        if len(series) > 1:
            label_lines(axes)

    text = "; ".join(f"{label} {_first_and_last(values)}" for _, label, values in series)
    return picture(name, f"{title} over {run.epoch} epochs: {text}.", paint)


def _first_and_last(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"from {known[0]:.4g} to {known[-1]:.4g}"


def _learning_rate(run: RunSummary) -> Picture:
    """Plots the learning rate over the epochs: the schedule as a line, the values at evaluations as points."""
    config, steps = run.config, run.steps_per_epoch
    schedule = learning_rate_schedule(config.optimizer, config.train.epochs, steps)
    updates = np.unique(np.linspace(0, run.epoch * steps - 1, 1000).astype(np.int32))
    rates = np.asarray(jax.vmap(schedule)(updates))
    piecewise = bool(config.optimizer.factors)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set(title="Learning rate", xlabel="epoch", ylabel="learning rate")
        axes.plot((updates + 1) / steps, np.where(rates > 0, rates, np.nan) if piecewise else rates,
                  color=COLORS[0], label="schedule")
        axes.plot(run.series("epoch"), run.series("learning_rate"), color=COLORS[1], linestyle="",
                  marker=MARKERS[0], label="at evaluations")
        axes.locator_params("x", integer=True)
        if piecewise:
            set_log(axes, "y")
        _mark_boundaries(axes, run, named=True)
        axes.legend()

    named = "; ".join(f"{text} at epoch {epoch:g}" for epoch, text in boundaries(config))
    return picture("learning_rate", f"Learning rate over {run.epoch} epochs, {_first_and_last(rates)}"
                                    f"{f'; {named}' if named else ''}.", paint)


def boundaries(config: Config) -> list[tuple[float, str]]:
    """Returns the epochs at which the learning-rate schedule changes, with a description of the change."""
    warmup = [(config.optimizer.warmup_epochs, "warm-up ends")] if config.optimizer.warmup_epochs else []
    return warmup + [(epoch, f"× {factor:g}") for epoch, factor in zip(
        config.optimizer.boundary_epochs(config.train.epochs), config.optimizer.factors, strict=True)]


def _mark_boundaries(axes: Axes, run: RunSummary, named: bool) -> None:
    """Draws a vertical line at each past change of the learning rate."""
    for epoch, text in boundaries(run.config):
        if epoch <= run.epoch:
            axes.axvline(epoch, color=INK, linewidth=0.8, linestyle=(0, (2, 3)), label=f"_{text}", zorder=1)
            if named:
                axes.annotate(text, (epoch, 0), (3, 4), xycoords=axes.get_xaxis_transform(),
                              textcoords="offset points", fontsize=8.5)


def count_bars(run: RunSummary) -> list[Picture]:
    """Returns plots of parameters and MACs by group, compared with the plain network."""
    return [_bars(run, "parameters", "Parameters by group", "parameters"),
            _bars(run, "macs", "MACs by group", "multiply-accumulates of one image")]


def _bars(run: RunSummary, key: str, title: str, unit: str) -> Picture:
    groups, plain = run.counts["groups"], run.counts["plain"]
    alone = run.counts["model"] == plain["model"]
    kinds = [(run.counts["model"], groups)] + ([] if alone else [(f"plain {plain['model']}", plain["groups"])])

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import EngFormatter
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=unit)
        places, height = np.arange(len(groups)), 0.8 / len(kinds)
        for number, (label, rows) in enumerate(kinds):
            values = [rows[name][key] for name in groups]
            bars = axes.barh(places + (number - (len(kinds) - 1) / 2) * height, values, height * 0.92, label=label,
                             color=COLORS[0] if not number else BACKGROUND,
                             edgecolor=COLORS[0 if not number else 5], hatch="" if not number else "////")
            axes.bar_label(bars, [short_number(value) for value in values], padding=3, fontsize=8)
        axes.set_yticks(places, list(groups))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.14)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(axis="x", nbins=5)
        figure.legend(loc="outside lower center", ncols=1)

    text = "; ".join(f"{name} {row[key]:,}" + ("" if alone else f" against {plain['groups'][name][key]:,}")
                     for name, row in groups.items())
    return picture(key, f"{title}, {'' if alone else 'compared with the plain network: '}{text}.", paint,
                   (4.8, 1.6 + 0.42 * len(groups)))


def short_number(value: float) -> str:
    """Returns a count with three digits and a unit, e.g. 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def class_labels(classes: Sequence[str]) -> list[str]:
    """Returns class labels for plots: their names, or 'class <number>' if the font lacks a character."""
    return [drawable(name, f"class {number}") for number, name in enumerate(classes)]


def confusion(scores: Scores, classes: Sequence[str]) -> Picture:
    """Plots the confusion matrix: with names and counts, or as an overview if there are many classes."""
    totals = np.maximum(scores.confusion.sum(1, keepdims=True), 1)
    shares = 100 * scores.confusion / totals
    text = (f"Confusion matrix of {scores.count} test images in {len(classes)} classes; {100 * scores.accuracy:.2f} % "
            "are on its diagonal, i.e. correct.")
    many = len(classes) > NAMED_CLASSES

    def paint(figure: Figure) -> None:
        from matplotlib.colors import PowerNorm
        axes = figure.add_subplot()
        axes.set(title="Confusion matrix", xlabel="predicted class", ylabel="true class")
        # The root makes single confusions visible next to a diagonal of nearly 100 %.
        image = axes.imshow(_pooled(shares), cmap=POSITIVE, norm=PowerNorm(0.5, 0, 100), interpolation="nearest",
                            extent=(-0.5, len(classes) - 0.5, len(classes) - 0.5, -0.5))
        axes.grid(False)
        figure.colorbar(image, ax=axes, label="share of the true class (%)", location="bottom", shrink=0.9,
                        ticks=[0, 1, 5, 10, 25, 50, 100])
        if many:
            axes.set(xlabel="predicted class (number)", ylabel="true class (number)")
            return
        labels = class_labels(classes)
        axes.set_xticks(range(len(classes)), labels, rotation=90 if max(map(len, labels)) > 2 else 0)
        axes.set_yticks(range(len(classes)), labels)
        for row, column in np.argwhere(scores.confusion):
            axes.text(column, row, f"{scores.confusion[row, column]}", ha="center", va="center", fontsize=8,
                      color=BACKGROUND if shares[row, column] > 25 else INK)

    side = 4.4 if many else 1.2 + 0.36 * max(8, len(classes))
    return picture("confusion", text, paint, (side, side + 0.8), colors=None)


def _pooled(shares: np.ndarray) -> np.ndarray:
    """Returns block-wise maxima if there are more rows and columns than a plot can show."""
    block = -(-len(shares) // CELLS)
    padded = np.pad(shares, (0, -len(shares) % block))
    return padded.reshape(len(padded) // block, block, len(padded) // block, block).max((1, 3))


def worst_images(scores: Scores, classes: Sequence[str]) -> bytes:
    """Returns a PNG file of the images with the highest loss, with their true and predicted classes."""
    labels, columns = class_labels(classes), 6
    rows = max(1, -(-len(scores.worst) // columns))

    def caption(image: Image) -> str:
        return (f"true {labels[image.label]}\npredicted {labels[image.predicted]}\n"
                f"p = {image.probability:.3f}, loss {image.loss:.2f}")

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")  # it would measure every caption, which is slow
        for place, image in enumerate(scores.worst):
            row, column = divmod(place, columns)
            axes = figure.add_axes(((column + 0.08) / columns, 1 - (row + 0.99) / rows, 0.84 / columns, 0.68 / rows))
            axes.imshow(image.pixels.squeeze(-1) if image.pixels.shape[-1] == 1 else image.pixels, cmap="gray", vmin=0,
                        vmax=255, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(caption(image), fontsize=7)

    return png(paint, (1.6 * columns, 2 * rows), colors=None)
