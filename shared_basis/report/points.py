"""Groups runs into points of a comparison: runs that differ only in the seed form one point."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from shared_basis.config import differences
from shared_basis.errors import UserError
from shared_basis.report.run_summary import RunSummary, load_run_summary
from shared_basis.runtime.files import open_files

LABELS = ("name", "seed", "train.record_gradients", "train.checkpoint_minutes", "data.placement", "data.workers")
"""Configuration fields in which the runs of a point may differ: the name, the seed, what is only recorded or saved, and
how images are read."""

BEYOND = ("init", "own")
"""Entries of a run's record, besides its configuration, that affect the result: see `value`."""

SHOWN = 5
"""Maximum number of fields in a label; further ones are only counted."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a value over runs."""

    mean: float
    """NaN if the value is unknown for a run."""
    deviation: float
    """With denominator n − 1; NaN for a single run."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the mean and standard deviation of `values` (at least one)."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


@dataclasses.dataclass(frozen=True)
class Point:
    """Runs that differ only in the seed and have reached the same epoch; each may have its own initial weights."""

    runs: Sequence[RunSummary]
    label: str
    """The network, and the fields that distinguish the point from others."""

    @property
    def first(self) -> RunSummary:
        """A run that represents the point."""
        return self.runs[0]

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return int(self.first.counts["parameters"])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return int(self.first.counts["macs"])

    @property
    def seconds(self) -> Spread:
        """Seconds of training: see `RunSummary.seconds`."""
        return Spread.of([run.seconds for run in self.runs])

    @property
    def error(self) -> Spread:
        """The test error after the last epoch in %; NaN without evaluations."""
        return self._errors("test_accuracy")

    @property
    def best_error(self) -> Spread:
        """The test error of the best epoch in %; NaN without evaluations. `chosen_on` is the split that chose it."""
        return self._errors("best_test_accuracy")

    @property
    def chosen_on(self) -> str | None:
        """'validation', or 'test', the published protocol; None without evaluations."""
        outcome = self.first.outcome
        return outcome["chosen_on"] if outcome else None

    def _errors(self, name: str) -> Spread:
        return Spread.of([100 - 100 * run.outcome[name] if run.outcome else math.nan for run in self.runs])


def find_runs(directories: Sequence[str]) -> list[PurePath]:
    """Returns the workdirs in `directories`, each once: the directories themselves, or runs directly inside them.

    Raises:
      UserError: a directory neither is a run nor contains one.
    """
    found: dict[str, PurePath] = {}
    for files in map(open_files, directories):
        inside = [files.path] if files.exists("run.json") else [
            files.path / name for name in files.names() if files.exists(f"{name}/run.json")]
        if not inside:
            raise UserError(f"--runs={files.path}: neither a run (no run.json) nor a directory of runs.")
        for path in inside:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def group(runs: Sequence[RunSummary]) -> tuple[list[Point], list[str]]:
    """Groups runs into points, sorted by parameters; also returns the fields in which points differ: see `value`."""
    groups: list[list[RunSummary]] = []
    for run in runs:
        alike = next((each for each in groups if _alike(each[0], run)), None)
        if alike is None:
            groups.append([run])
        else:
            alike.append(run)
    first = groups[0][0]
    fields = list(dict.fromkeys(name for each in groups for name in _differing(each[0], first)))
    points = [Point(each, _label(each[0], groups, fields)) for each in groups]
    return sorted(points, key=lambda point: (point.parameters, point.label)), fields


def _alike(one: RunSummary, other: RunSummary) -> bool:
    return (not _differing(one, other) and one.epoch == other.epoch
            and one.record["data"] == other.record["data"])


def _differing(one: RunSummary, other: RunSummary) -> list[str]:
    """Returns the fields in which two runs differ, except `LABELS`, and locations of the same images."""
    fields = [name for name in differences(one.config, other.config,
                                           locations=one.record["data"] != other.record["data"]) if name not in LABELS]
    return [*fields, *(name for name in BEYOND if value(one, name) != value(other, name))]


def _label(run: RunSummary, groups: Sequence[Sequence[RunSummary]], fields: Sequence[str]) -> str:
    """Returns the name of the network and the fields that distinguish it from others with the same name."""
    name = run.config.model.name
    rivals = [each[0] for each in groups if each[0] is not run and each[0].config.model.name == name]
    parts = [f"{field.rpartition('.')[2]} {value(run, field)}" for field in fields
            if any(value(rival, field) != value(run, field) for rival in rivals)]
    if any(rival.epoch != run.epoch and rival.config.train.epochs == run.config.train.epochs for rival in rivals):
        parts.append(f"{run.epoch} evaluated" if "train.epochs" in fields else f"{run.epoch} epochs")
    if len(parts) > SHOWN:
        parts = [*parts[:SHOWN - 1], f"and {len(parts) - SHOWN + 1} more fields"]
    return f"{name} ({', '.join(parts)})" if parts else name


def value(run: RunSummary, field: str) -> str:
    """Returns a field as text: one of the run's configuration, by dotted path, or one of `BEYOND`.

    'init' does not name the source of the initial weights, since each seed may have its own.
    """
    if field == "own":
        return ", ".join(f"{purpose} {name}" for purpose, name in run.record["own"].items()) or "–"
    if field == "init":
        init = run.record["init"]
        return "random" if init is None else ", ".join((
            str(init.get("network")), f"classifier {init.get('head')}",
            *([f"budget {init['budget']:g}"] if init.get("budget") else [])))
    found = operator.attrgetter(field)(run.config)
    if isinstance(found, tuple):
        return ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in found) or "–"
    return f"{found:g}" if isinstance(found, float) else str(found) or "–"


def gather_points(directories: Sequence[str]) -> tuple[list[Point], list[str]]:
    """Returns the points of the runs in `directories` and the fields in which they differ: see `find_runs`, `group`.

    Raises:
      UserError: see `find_runs`; or the record of a run is damaged.
    """
    return group([load_run_summary(path) for path in find_runs(directories)])


def as_result(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Returns points as JSON-serialisable data; unknown values are None."""
    def spread(name: str, found: Spread) -> Mapping[str, float | None]:
        return {key: None if math.isnan(number) else number for key, number in (
            (f"{name}_mean", found.mean), (f"{name}_deviation", found.deviation))}

    return [{"label": point.label, "n": len(point.runs), "seeds": [run.config.seed for run in point.runs],
             "epoch": point.first.epoch, "epochs": point.first.config.train.epochs, "parameters": point.parameters,
             "macs": point.macs, **spread("seconds", point.seconds), **spread("test_error", point.error),
             **spread("best_test_error", point.best_error), "chosen_on": point.chosen_on,
             "workdirs": [str(run.path) for run in point.runs]} for point in points]
