"""Classification of image files with a trained run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shared_basis import data
from shared_basis.data.examples import warn_on_stderr
from shared_basis.data.feeds import Images
from shared_basis.data.folder import FileExamples
from shared_basis.data.listing import SUFFIXES, PassedOver, walk
from shared_basis.errors import UserError, printable
from shared_basis.evaluation.evaluator import require_finite
from shared_basis.runs.trained import Trained
from shared_basis.runtime import memory
from shared_basis.runtime.files import Place, csv_text, write_atomic

SHOWN = 3
"""Number of classes to print per image; the result and the CSV contain all."""


def predict(workdir: Place, images: Sequence[str], which: str = "latest",
            overrides: Mapping[str, Any] | None = None, output: str = "",
            progress: data.Progress = data.no_progress,
            warn: Callable[[str], None] = warn_on_stderr) -> dict[str, Any]:
    """Classifies image files with a checkpoint of `workdir`.

    Images of any size and kind are preprocessed like the run's test images: scaled and centre-cropped to their shape,
    converted to greyscale if necessary, and normalised.

    Args:
      images: image files, and directories of which all image files are used.
      which: the checkpoint: 'latest', 'best' or a step number.
      overrides: see `evaluate`.
      warn: called with a line about each image that is skipped.
      output: a CSV file to write, with file, class, its probability, and the probability of each class.
      progress: called with the number of classified images and the total.

    Returns:
      `workdir`, `step`, `model`, `classes`, and `images`: for each, `file`, `class` and `probabilities` by class.
      Images that cannot be decoded are skipped with a warning if `data.on_broken` is 'skip'.

    Raises:
      UserError: there is no such run, checkpoint or image, an image cannot be decoded, or logits are not finite.
    """
    files = list_images(images, warn)
    trained = Trained.open(workdir, which, overrides)
    spec, config = trained.spec, trained.config
    scaled = dataclasses.replace(config.data, image_size=spec.image_shape[0])
    examples = FileExamples.of("", files, np.zeros(len(files), np.int32))
    with memory.oom_as_user_error(config, "train.eval_batch_size"):
        classify = trained.classifier()
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in Images(spec, {"test": examples}, scaled, warn).batches(
                "test", config.train.eval_batch_size, trained.mesh)():
            logits, labels = np.asarray(classify(batch[0])), np.asarray(batch[1])
            require_finite(np.isfinite(logits[labels >= 0]).all(-1), trained)
            parts.append((np.asarray(jax.nn.softmax(logits)), labels))
            progress(min(len(parts) * len(batch[1]), len(files)), len(files))
    probabilities, labels = (np.concatenate(each)[:len(files)] for each in zip(*parts, strict=True))
    classified = [{"file": file, "class": spec.classes[int(row.argmax())],
                   "probabilities": dict(zip(spec.classes, map(float, row), strict=True))}
                  for file, row, label in zip(files, probabilities, labels, strict=True) if label >= 0]
    if not classified:
        raise UserError(f"none of the {len(files)} images can be decoded; see the warnings.")
    if output:
        write_csv(output, spec.classes, classified)
    return {"workdir": str(trained.run.path), "step": trained.step, "model": config.model.name,
            "classes": list(spec.classes), "images": classified}


def list_images(paths: Sequence[str], warn: Callable[[str], None] = warn_on_stderr) -> list[str]:
    """Returns the image files of `paths`: files as given, and for directories all image files inside, sorted.

    Args:
      warn: called with a line about other files in the directories, if there are any.

    Raises:
      UserError: there are no images, or a path does not exist.
    """
    if not paths:
        raise UserError("no images given: pass files or directories with --images=PATH, which may be repeated.")
    files, others = [], PassedOver()
    for path in map(os.path.expanduser, paths):
        if os.path.isdir(path):
            inside = sorted(walk(Path(path), others))
            if not inside:
                raise UserError(f"--images={path}: no images in this directory; images end in {', '.join(SUFFIXES)}"
                                f"{others.advice}.")
            files += inside
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise UserError(f"--images={path}: no such file or directory.")
    if others.kinds:
        warn(others.render())
    return files


def write_csv(path: Place, classes: Sequence[str], images: Sequence[Mapping[str, Any]]) -> None:
    """Writes a row for each image; the file is either complete or unchanged.

    Raises:
      UserError: the file cannot be written.
    """
    rows = [[image["file"], image["class"], *(f"{image['probabilities'][name]:.6f}" for name in
                                              (image["class"], *classes))] for image in images]
    text = csv_text(["file", "class", "probability", *classes], rows)
    try:
        write_atomic(path, text.encode(errors="backslashreplace"))  # file names may not be valid Unicode
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written ({error.strerror}); choose another file.") from error


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `predict` as human-readable lines."""
    def classes(image: Mapping[str, Any]) -> str:
        best: Callable[[str], float] = image["probabilities"].get
        return ", ".join(f"{name} {100 * image['probabilities'][name]:.1f} %" for name in sorted(
            image["probabilities"], key=best, reverse=True)[:SHOWN])
    names = [printable(image["file"]) for image in result["images"]]
    width = max(map(len, names))
    lines = [f"  {name.ljust(width)}  {classes(image)}" for name, image in zip(names, result["images"], strict=True)]
    return "\n".join([f"{result['model']} at step {result['step']:,} of {result['workdir']}:", *lines]).encode(
        errors="backslashreplace").decode()
