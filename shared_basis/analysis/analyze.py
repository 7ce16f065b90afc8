"""The mode `analyze`: what a trained network's bases, coefficients and gradients look like, as tables and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_basis import plotting
from shared_basis.analysis import figures
from shared_basis.analysis.collect import _OURS, Analysis
from shared_basis.analysis.tables import Table, numbers, tables
from shared_basis.errors import UserError
from shared_basis.runs import inspect
from shared_basis.runs.trained import Trained


def analyze(workdir: str | Path, which: str = "latest", overrides: Mapping[str, Any] | None = None,
            against: str = "", output: str = "", tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Analyses a checkpoint of `workdir` and writes pictures, each with its data as CSV beside it.

    Args:
      which, overrides: as in `Trained.open`.
      against: another checkpoint to draw beside it: a step of this run, or a workdir, or WORKDIR:STEP.
      output: the directory to write to; empty is `workdir`/analysis. Files of an earlier analysis in it are removed.
      tell: is given what is going on, line by line.

    Returns:
      `workdir`, `step`, `model`, `output`, `files` (names in it), `notes`, `sets`: by name `describe_set`, without the
      singular values, which are in a CSV; `similarity`: by shared array the mean `cosine` and `alignment` of the
      coefficients of two layers, and the alignment that `chance` gives; `gradient_flow`; with `against` the same of
      the other under that name.

    Raises:
      UserError: as `Trained.open`, or the directory cannot be written.
    """
    runs = [Trained.open(workdir, which, overrides)]
    if against:
        path, step = inspect.other_checkpoint(workdir, against)
        runs.append(Trained.open(path, step, overrides))
    directory = Path(os.path.expanduser(output) if output else Path(workdir) / "analysis")
    try:  # before what takes minutes
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from error
    analyses = _labelled([Analysis.of(trained, tell) for trained in runs])
    tell("drawing …")
    written: list[str] = []
    for name, table in tables(analyses):
        _write(directory / f"{name}.csv", _csv(table), written)
    for name, (_, paint, size) in figures.paintings(analyses).items():
        _write(directory / f"{name}.png", plotting.png(paint, size=size), written)
    _remove_others(directory, written)
    one, *others = ({"workdir": str(trained.run.path), "step": each.step, "model": each.model, "notes": each.notes,
                     **numbers(each)} for trained, each in zip(runs, analyses, strict=True))
    return {**one, "output": str(directory), "files": written, **({"against": others[0]} if others else {})}


def _remove_others(directory: Path, written: Sequence[str]) -> None:
    """Removes the files of an earlier analysis that this one has not written again, as they tell of another one."""
    try:
        for path in directory.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in written:
                path.unlink()
    except OSError as error:
        raise _unwritable(directory, error) from error


def _labelled(analyses: list[Analysis]) -> list[Analysis]:
    """Returns the analyses with labels that differ."""
    if len({each.label for each in analyses}) == len(analyses):
        return analyses
    labels = [f"{each.label} at {each.step}" for each in analyses]
    labels = labels if len(set(labels)) == len(labels) else [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return [dataclasses.replace(each, label=label) for each, label in zip(analyses, labels, strict=True)]


# Tables


def _csv(table: Table) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _write(path: Path, content: bytes, written: list[str]) -> None:
    """Writes a file whole or not at all, and notes its name."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    written.append(path.name)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--output={path}: cannot be written ({error.strerror}); choose another directory with --output.")


# Text


