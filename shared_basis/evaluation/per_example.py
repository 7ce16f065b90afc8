"""What a trained network makes of each test image: the confusion matrix, and the images with the highest loss."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence

import numpy as np

from shared_basis.data import feeds
from shared_basis.runs.trained import Trained
from shared_basis.runtime import memory
from shared_basis.runtime.reporter import Reporter

WORST = 24
"""Images with the highest loss that are shown."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A test image, and what the network made of it."""

    name: str
    """What a person finds it by: its file, or its number among the test images."""
    pixels: np.ndarray
    """uint8 `[H, W, C]`, as the network got them."""
    label: int
    predicted: int
    loss: float
    """Cross entropy in nats."""
    probability: float
    """Of the predicted class."""

    @property
    def probability_of_label(self) -> float:
        """The probability of the true class."""
        return float(np.exp(-self.loss))


@dataclasses.dataclass(frozen=True)
class Scores:
    """The test images of a run, scored one by one."""

    step: int
    """Of the checkpoint."""
    confusion: np.ndarray
    """Images int64 `[classes, classes]`, by true class (rows) and predicted class (columns)."""
    worst: Sequence[Image]
    """The images with the highest loss, that first."""
    loss: float
    """The mean over all."""

    @property
    def count(self) -> int:
        """The number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The part that is predicted rightly."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    def pairs(self, most: int) -> list[tuple[int, int, int]]:
        """Returns the `most` frequent confusions as true class, predicted class and images, the most frequent first."""
        wrong = self.confusion * (1 - np.eye(len(self.confusion), dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        found = [(int(row), int(column), int(wrong[row, column]))
                 for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)]
        return [pair for pair in found if pair[2]]


def score(trained: Trained, reporter: Reporter) -> Scores:
    """Scores the run's test images one by one; of their pixels only those of the worst are kept.

    Args:
      reporter: is told of the images and of the progress.

    Raises:
      UserError: the images cannot be found or read, are not those of the run, or do not fit into memory.
    """
    config, classes = trained.config, len(trained.spec.classes)
    confusion, worst, total, first = np.zeros((classes, classes), np.int64), list[Image](), 0.0, 0
    with memory.oom_as_user_error(config, "train.eval_batch_size"):
        source = trained.open_source(reporter)
        images = feeds.load(source, config.data, trained.mesh, reporter)
        classify = trained.classifier()
        show = reporter.progress("scoring test images one by one")
        for pixels, placed in images.batches("test", config.train.eval_batch_size, trained.mesh)():
            labels = np.asarray(placed)
            losses, predicted, probabilities = per_example_metrics(np.asarray(classify(pixels)), labels)
            counts = labels >= 0  # the others only fill the batch, or are broken
            np.add.at(confusion, (labels[counts], predicted[counts]), 1)
            total += float(losses[counts].sum())
            limit = worst[-1].loss if len(worst) == WORST else -np.inf
            candidates = [row for row in np.argsort(-losses, kind="stable")[:WORST]
                          if counts[row] and losses[row] > limit]
            fetched = np.asarray(pixels) if candidates else None
            worst += [Image(source.splits["test"].name(first + int(row)), fetched[row].copy(), int(labels[row]),
                            int(predicted[row]), float(losses[row]), float(probabilities[row]))
                      for row in candidates if fetched is not None]
            worst = sorted(worst, key=lambda image: -image.loss)[:WORST]
            first += len(labels)
            show(int(confusion.sum()), images.count("test"))
        reporter.end_progress()  # where broken images were left out it has not come to its end
    return Scores(trained.step, confusion, worst, total / max(1, int(confusion.sum())))


def per_example_metrics(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each image its cross entropy, the predicted class and its probability, in float64.

    Args:
      logits: `[N, classes]`.
      labels: `[N]`; the cross entropy of an image whose label is −1 is −inf, so that it is never among the worst.
    """
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows, predicted = np.arange(len(labels)), logits.argmax(-1)
    losses = np.where(labels >= 0, -logs[rows, np.maximum(labels, 0)], -np.inf)
    return losses, predicted, np.exp(logs[rows, predicted])


def confusion_csv(scores: Scores, classes: Sequence[str]) -> bytes:
    """Returns the confusion matrix as CSV: a row for each true class, a column for each predicted one."""
    return to_csv([["true \\ predicted", *classes], *(
        [name, *map(str, row)] for name, row in zip(classes, scores.confusion.tolist(), strict=True))])


def errors_csv(scores: Scores, classes: Sequence[str]) -> bytes:
    """Returns the images with the highest loss as CSV."""
    return to_csv([["image", "true", "predicted", "probability of predicted", "probability of true", "loss (nats)"], *(
        [image.name, classes[image.label], classes[image.predicted], f"{image.probability:.6f}",
         f"{image.probability_of_label:.6f}", f"{image.loss:.6f}"] for image in scores.worst)])


def to_csv(rows: Sequence[Sequence[str]]) -> bytes:
    """Returns rows as the file of a table."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode(errors="backslashreplace")
