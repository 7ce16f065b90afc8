"""The mode `analyze`: what a trained network's bases, coefficients and gradients look like, as tables and pictures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from shared_basis import plotting
from shared_basis.analysis import figures, tables
from shared_basis.analysis.collect import Analysis
from shared_basis.errors import UserError
from shared_basis.runs import inspect
from shared_basis.runs.trained import Trained
from shared_basis.runtime.files import Files, Place, open_files
from shared_basis.runtime.reporter import Reporter

FILES = re.compile(r"((products|filters|coefficients|similarity)_\w+|stem|bases|singular_values|effective_rank|"
                   r"gradient_flow|gradient_training)(\.against)?\.(csv|png)")
"""The names of the files of an analysis."""


def analyze(workdir: Place, which: str = "latest", overrides: Mapping[str, Any] | None = None,
            against: str = "", output: str = "", reporter: Reporter | None = None) -> dict[str, Any]:
    """Analyses a checkpoint of `workdir` and writes pictures, each with its data as CSV beside it.

    Args:
      which, overrides: as in `Trained.open`.
      against: another checkpoint to draw beside it: a step of this run, or a workdir, or WORKDIR:STEP.
      output: the directory to write to; empty is `workdir`/analysis. Files of an earlier analysis in it are removed.
      reporter: prints what is done, and warnings; None prints neither.

    Returns:
      `workdir`, `step`, `model`, `output`, `files` (names in it), `notes`, `sets`: by name `describe_set`, without the
      singular values, which are in a CSV; `similarity`: by shared array the mean `cosine` and `alignment` of the
      coefficients of two layers, and the alignment that `chance` gives; `gradient_flow`; with `against` the same of
      the other under that name.

    Raises:
      UserError: as `Trained.open`, or the directory cannot be written.
    """
    reporter = reporter or Reporter(verbosity="quiet")
    runs = [Trained.open(workdir, which, overrides)]
    if against:
        path, step = inspect.other_checkpoint(workdir, against)
        runs.append(Trained.open(path, step, overrides))
    directory = open_files(output if output else runs[0].run.path / "analysis")
    try:  # before what takes minutes
        directory.make()
    except OSError as error:
        raise _unwritable(directory.path, error) from error
    analyses = _with_distinct_labels([Analysis.of(trained, reporter) for trained in runs])
    reporter.info("drawing …")
    files = tables.csv_files(analyses)
    for name, (paint, size) in figures.paintings(analyses).items():
        files[f"{name}.png"] = plotting.png(paint, size)
    _write(directory, files)
    one, *others = ({"workdir": str(trained.run.path), "step": each.step, "model": each.model, "notes": each.notes,
                     **tables.numbers(each)} for trained, each in zip(runs, analyses, strict=True))
    return {**one, "output": str(directory.path), "files": list(files), **({"against": others[0]} if others else {})}


def _with_distinct_labels(analyses: list[Analysis]) -> list[Analysis]:
    """Returns the analyses with labels that differ."""
    if len({each.label for each in analyses}) == len(analyses):
        return analyses
    labels = [f"{each.label} at {each.step}" for each in analyses]
    labels = labels if len(set(labels)) == len(labels) else [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return [dataclasses.replace(each, label=label) for each, label in zip(analyses, labels, strict=True)]


def _write(directory: Files, files: Mapping[str, bytes]) -> None:
    """Writes the files of an analysis, and removes those of an earlier one that are not among them.

    Raises:
      UserError: they cannot be written.
    """
    try:
        directory.write(files)
        for name in directory.names():
            if FILES.fullmatch(name) and name not in files:
                directory.remove(name)
    except OSError as error:
        raise _unwritable(directory.path, error) from error


def _unwritable(path: PurePath, error: OSError) -> UserError:
    return UserError(f"--output={path}: cannot be written ({error.strerror}); choose another directory with --output.")
