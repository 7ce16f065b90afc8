"""What a trained run says of image files."""

from __future__ import annotations

import csv
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
from shared_basis.data.folder import SUFFIXES, FileExamples
from shared_basis.errors import UserError, printable
from shared_basis.runs.trained import Trained
from shared_basis.runtime import memory

SHOWN = 3
"""Classes that are shown of each image; the result and the CSV hold all."""


def predict(workdir: str | Path, images: Sequence[str], which: str = "latest",
            overrides: Mapping[str, Any] | None = None, output: str = "",
            progress: data.Progress = data.no_progress,
            warn: Callable[[str], None] = warn_on_stderr) -> dict[str, Any]:
    """Classifies image files by a checkpoint of `workdir`.

    Images of any size and kind are treated as the run's own test images: scaled and cropped at the centre to their
    shape, made grey where those are grey, normalised alike.

    Args:
      images: image files, and directories, all image files within which are taken.
      which: the checkpoint: 'latest', 'best' or the number of a step.
      overrides: as in `evaluate`.
      progress: is told how many of the images are classified.
      warn: gets a line about each image that is left out.
      output: a file for the result as CSV: file, class, its probability, and the probability of each class.

    Returns:
      `workdir`, `step`, `model`, `classes`, and `images`: for each its `file`, `class` and `probabilities` by class. An
      image that cannot be decoded, where `data.on_broken` is 'skip', is left out, with a warning.

    Raises:
      UserError: no such run, checkpoint or image, or an image cannot be decoded.
    """
    files = list_images(images)
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
    found = [{"file": file, "class": spec.classes[int(row.argmax())],
              "probabilities": dict(zip(spec.classes, map(float, row), strict=True))}
             for file, row, label in zip(files, probabilities, labels, strict=True) if label >= 0]
    if not found:
        raise UserError(f"none of the {len(files)} images can be decoded; see the warnings.")
    if output:
        write_csv(Path(output), spec.classes, found)
    return {"workdir": str(trained.run.path), "step": trained.step, "model": config.model.name,
            "classes": list(spec.classes), "images": found}


def list_images(paths: Sequence[str]) -> list[str]:
    """Returns the image files that `paths` mean: files as they are, of directories all files within, sorted.

    Raises:
      UserError: there are none, or a path does not exist.
    """
    if not paths:
        raise UserError("no image is given: name files or directories with --images=PATH, as often as needed.")
    files = []
    for path in map(os.path.expanduser, paths):
        if os.path.isdir(path):
            inside = sorted(file for root, _, names in os.walk(path) for name in names
                            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
                            and os.path.isfile(file := os.path.join(root, name)))
            if not inside:
                raise UserError(f"--images={path}: no image in this directory; they end in {', '.join(SUFFIXES)}.")
            files += inside
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise UserError(f"--images={path}: no such file or directory.")
    return files


def write_csv(path: Path, classes: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Writes a line for each image.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "class", "probability", *classes])
            for image in found:
                values = image["probabilities"]
                writer.writerow([image["file"], image["class"], f"{values[image['class']]:.6f}",
                                 *(f"{values[name]:.6f}" for name in classes)])
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written ({error.strerror}); choose another file.") from error


def render(result: Mapping[str, Any]) -> str:
    """Returns `predict`'s result as lines for a person."""
    def classes(image: Mapping[str, Any]) -> str:
        best: Callable[[str], float] = image["probabilities"].get
        return ", ".join(f"{name} {100 * image['probabilities'][name]:.1f} %" for name in sorted(
            image["probabilities"], key=best, reverse=True)[:SHOWN])
    names = [printable(image["file"]) for image in result["images"]]
    width = max(map(len, names))
    lines = [f"  {name.ljust(width)}  {classes(image)}" for name, image in zip(names, result["images"], strict=True)]
    return "\n".join([f"{result['model']} at step {result['step']:,} of {result['workdir']}:", *lines]).encode(
        errors="backslashreplace").decode()
