"""Classification of image files by a trained run."""

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
from shared_basis.runs.trained import Trained
from shared_basis.runtime import memory
from shared_basis.runtime.files import Place, csv_text, write_atomic

SHOWN = 3
"""Classes that are printed for each image; the result and the CSV hold all."""


def predict(workdir: Place, images: Sequence[str], which: str = "latest",
            overrides: Mapping[str, Any] | None = None, output: str = "",
            progress: data.Progress = data.no_progress,
            warn: Callable[[str], None] = warn_on_stderr) -> dict[str, Any]:
    """Classifies image files by a checkpoint of `workdir`.

    Images of any size and kind are treated as the run's own test images: scaled and cropped at the centre to their
    shape, converted to greyscale if those are, normalised alike.

    Args:
      images: image files and directories; of a directory, all image files within it.
      which: the checkpoint: 'latest', 'best' or the number of a step.
      overrides: as in `evaluate`.
      warn: called with a line about each image that is left out.
      output: a file for the result as CSV: file, class, its probability, and the probability of each class.
      progress: called with how many images are classified, and of how many.

    Returns:
      `workdir`, `step`, `model`, `classes`, and `images`: for each its `file`, `class` and `probabilities` by class. An
      image that cannot be decoded, where `data.on_broken` is 'skip', is left out, with a warning.

    Raises:
      UserError: no such run, checkpoint or image, or an image cannot be decoded.
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
            parts.append((np.asarray(jax.nn.softmax(classify(batch[0]))), np.asarray(batch[1])))
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
    """Returns the image files of `paths`: files as given, and of each directory all those within, sorted.

    Args:
      warn: called with a line about the other files of the directories, if there are any.

    Raises:
      UserError: there are none, or a path does not exist.
    """
    if not paths:
        raise UserError("no image is given: name files or directories with --images=PATH, as often as needed.")
    files, others = [], PassedOver()
    for path in map(os.path.expanduser, paths):
        if os.path.isdir(path):
            inside = sorted(walk(Path(path), others))
            if not inside:
                raise UserError(f"--images={path}: no image in this directory; they end in {', '.join(SUFFIXES)}"
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
    """Writes a row for each image; the file is complete or unchanged.

    Raises:
      UserError: the file cannot be written.
    """
    rows = [[image["file"], image["class"], *(f"{image['probabilities'][name]:.6f}" for name in
                                              (image["class"], *classes))] for image in images]
    text = csv_text(["file", "class", "probability", *classes], rows)
    try:
        write_atomic(path, text.encode(errors="backslashreplace"))  # names of files need not be text
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written ({error.strerror}); choose another file.") from error


def render(result: Mapping[str, Any]) -> str:
    """Returns `predict`'s result as human-readable lines."""
    def classes(image: Mapping[str, Any]) -> str:
        best: Callable[[str], float] = image["probabilities"].get
        return ", ".join(f"{name} {100 * image['probabilities'][name]:.1f} %" for name in sorted(
            image["probabilities"], key=best, reverse=True)[:SHOWN])
    names = [printable(image["file"]) for image in result["images"]]
    width = max(map(len, names))
    lines = [f"  {name.ljust(width)}  {classes(image)}" for name, image in zip(names, result["images"], strict=True)]
    return "\n".join([f"{result['model']} at step {result['step']:,} of {result['workdir']}:", *lines]).encode(
        errors="backslashreplace").decode()
