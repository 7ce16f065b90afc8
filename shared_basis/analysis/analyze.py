"""The mode `analyze`: tables and plots of a trained network's bases, coefficients and gradients."""

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
"""The file names of an analysis."""


def analyze(workdir: Place, which: str = "latest", overrides: Mapping[str, Any] | None = None,
            against: str = "", output: str = "", reporter: Reporter | None = None) -> dict[str, Any]:
    """Analyses a checkpoint of `workdir` and writes plots with their data as CSV.

    Args:
      which, overrides: see `Trained.open`.
      against: another checkpoint to compare with: a step of this run, a workdir, or WORKDIR:STEP.
      output: the directory to write to; by default `workdir`/analysis. Files of an earlier analysis are removed.
      reporter: shows messages and warnings; None shows neither.

    Returns:
      `workdir`, `step`, `model`, `output`, `files` (names in it), `notes`; `sets`: by name the result of
      `describe_set`, without singular values, which are in a CSV; `similarity`: by shared array the mean `cosine` and
      `alignment` of the coefficients of two layers, and the alignment expected by `chance`; `gradient_flow`; and, with
      `against`, the same for the other checkpoint under that key.

    Raises:
      UserError: see `Trained.open`; or the directory cannot be written, or Python runs without assertions.
    """
    if not __debug__:  # JAX 0.10 then leaks tracers from the nested gradients
        raise UserError("--mode=analyze needs Python's assertions, which -O and PYTHONOPTIMIZE switch off; unset them.")
    reporter = reporter or Reporter(verbosity="quiet")
    runs = [Trained.open(workdir, which, overrides)]
    if against:
        path, step = inspect.other_checkpoint(workdir, against)
        runs.append(Trained.open(path, step, overrides))
    directory = open_files(output if output else runs[0].run.path / "analysis")
    try:  # before the slow part
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
    """Returns the analyses with distinct labels."""
    if len({each.label for each in analyses}) == len(analyses):
        return analyses
    labels = [f"{each.label} at {each.step}" for each in analyses]
    labels = labels if len(set(labels)) == len(labels) else [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return [dataclasses.replace(each, label=label) for each, label in zip(analyses, labels, strict=True)]


def _write(directory: Files, files: Mapping[str, bytes]) -> None:
    """Writes the files of an analysis, and removes other files of an earlier one.

    Raises:
      UserError: the files cannot be written.
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
