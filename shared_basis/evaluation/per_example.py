"""Per-image evaluation: the confusion matrix, and the images with the highest loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluator import Metrics, require_finite, score_examples
from shared_basis.nn.types import Array
from shared_basis.runs.trained import Trained
from shared_basis.runtime import memory
from shared_basis.runtime.files import csv_text
from shared_basis.runtime.reporter import Reporter

WORST = 24
"""Number of images with the highest loss to keep."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A test image and its prediction."""

    name: str
    """The path of its file, or its index among the test images."""
    pixels: np.ndarray
    """uint8 `[H, W, C]`, the network's input before normalisation."""
    label: int
    predicted: int
    loss: float
    """Cross entropy in nats."""
    probability: float
    """The probability of the predicted class."""

    @property
    def probability_of_label(self) -> float:
        """The probability of the true class."""
        return float(np.exp(-self.loss))


@dataclasses.dataclass(frozen=True)
class Scores:
    """The per-image evaluation of a run on its test images."""

    step: int
    """The step of the checkpoint."""
    confusion: np.ndarray
    """Number of images, int64 `[classes, classes]`, by true class (rows) and predicted class (columns)."""
    worst: Sequence[Image]
    """The images with the highest loss, in decreasing order."""
    loss: float
    """The mean loss over all images."""

    @property
    def count(self) -> int:
        """The number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions, in [0, 1]."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    def pairs(self, most: int) -> list[tuple[int, int, int]]:
        """Returns the `most` frequent confusions as (true class, predicted class, images), in decreasing order."""
        wrong = self.confusion * (1 - np.eye(len(self.confusion), dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        found = [(int(row), int(column), int(wrong[row, column]))
                 for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)]
        return [pair for pair in found if pair[2]]


def score(trained: Trained, reporter: Reporter, worst: int = WORST) -> Scores:
    """Evaluates the run on each of its test images.

    Args:
      reporter: shows the source of the images and progress.
      worst: how many images with the highest loss to keep, with their pixels.

    Raises:
      UserError: the images cannot be found or read, do not match the run, or do not fit into memory; or their logits
        are not finite.
    """
    config, classes = trained.config, len(trained.spec.classes)
    confusion, kept, total, first = np.zeros((classes, classes), np.int64), list[Image](), 0.0, 0
    with memory.oom_as_user_error(config, "train.eval_batch_size"):
        source = trained.open_source(reporter)
        images = feeds.load(source, trained.images, trained.mesh, reporter)
        classify, judge = trained.classifier(), jax.jit(_judge)
        show = reporter.progress("scoring test images one by one")
        for pixels, labels in images.batches("test", config.train.eval_batch_size, trained.mesh)():
            found = jax.device_get(judge(classify(pixels), labels))
            counted = np.flatnonzero(found["count"])  # the others are padding or broken
            require_finite(found["finite"][counted], trained)
            np.add.at(confusion, (found["label"][counted], found["predicted"][counted]), 1)
            total += float(found["loss"].sum(dtype=np.float64))
            limit = kept[-1].loss if len(kept) == worst else -np.inf
            order = counted[np.argsort(-found["loss"][counted], kind="stable")][:worst]
            candidates = [row for row in order if found["loss"][row] > limit]
            fetched = np.asarray(pixels) if candidates else np.empty(0)
            kept += [Image(source.splits["test"].name(first + int(row)), fetched[row].copy(), int(found["label"][row]),
                           int(found["predicted"][row]), float(found["loss"][row]), float(found["probability"][row]))
                     for row in candidates]
            kept = sorted(kept, key=lambda image: -image.loss)[:worst]
            first += len(labels)
            show(int(confusion.sum()), images.count("test"))
        reporter.end_progress()  # not ended yet if broken images were skipped
    if not confusion.sum():
        raise UserError("none of the images to score can be decoded.")
    return Scores(trained.step, confusion, kept, total / int(confusion.sum()))


def _judge(logits: Array, labels: Array) -> Metrics:
    """Returns `score_examples`, and for each image `[N]` its `label`, the `predicted` class, its `probability`, and
    whether the logits are `finite`."""
    return {**score_examples(logits, labels), "label": labels, "predicted": jnp.argmax(logits, -1),
            "probability": jnp.max(jax.nn.softmax(logits), -1), "finite": jnp.isfinite(logits).all(-1)}


def confusion_csv(scores: Scores, classes: Sequence[str]) -> bytes:
    """Returns the confusion matrix as CSV: one row per true class, one column per predicted class."""
    return to_csv([["true \\ predicted", *classes], *(
        [name, *map(str, row)] for name, row in zip(classes, scores.confusion.tolist(), strict=True))])


def errors_csv(scores: Scores, classes: Sequence[str]) -> bytes:
    """Returns the images with the highest loss as CSV."""
    return to_csv([["image", "true", "predicted", "probability of predicted", "probability of true", "loss (nats)"], *(
        [image.name, classes[image.label], classes[image.predicted], f"{image.probability:.6f}",
         f"{image.probability_of_label:.6f}", f"{image.loss:.6f}"] for image in scores.worst)])


def to_csv(rows: Sequence[Sequence[str]]) -> bytes:
    """Returns a table, starting with its header, as a CSV file; file names may not be valid Unicode."""
    return csv_text(rows[0], rows[1:]).encode(errors="backslashreplace")
