"""The parts of a run that need neither its network nor its images: record, metrics and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from shared_basis.config import Config, ModelConfig, differences
from shared_basis.models import summary
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.metrics import evaluations, last_and_best, number
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.files import Place


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """The record, metrics and counts of a run."""

    path: PurePath
    config: Config
    record: Mapping[str, Any]
    """See `shared_basis.runs.workdir.make_record`."""
    lines: Sequence[Mapping[str, Any]]
    """The evaluations in metrics.jsonl, ordered by epoch."""
    counts: Mapping[str, Any]
    """See `shared_basis.models.summary.compare_with_plain`."""
    damaged: int
    """Number of lines in metrics.jsonl that are not valid evaluations and are ignored."""

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, by label."""
        return [str(name) for name in self.record["data"]["classes"]]

    @property
    def outcome(self) -> dict[str, Any] | None:
        """The result of training: counts, the last and the best evaluation; None without evaluations."""
        return {**self.counts, **last_and_best(self.lines)} if self.lines else None

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Configuration fields that are not the defaults: (value, default) by dotted path."""
        return differences(self.config, Config(), locations=True)

    @property
    def epoch(self) -> int:
        """The epoch of the last evaluation; 0 if there is none."""
        return self.lines[-1]["epoch"] if self.lines else 0

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch, derived from the last evaluation."""
        return self.lines[-1]["step"] // self.lines[-1]["epoch"]

    @property
    def saved(self) -> int | None:
        """The step of the latest checkpoint, or None."""
        with contextlib.closing(Checkpoints(self.path / "checkpoints", read_only=True)) as checkpoints:
            return max(checkpoints.steps, default=None)

    @property
    def warning(self) -> str:
        """Why the results may be incomplete, or an empty string."""
        return (f"{self.damaged} damaged line{'s' * (self.damaged > 1)} of {self.path / 'metrics.jsonl'} ignored: the "
                "last readable evaluation may not be the run's last") if self.damaged else ""

    @property
    def speed(self) -> float:
        """Images per second of training, as last measured; NaN if unknown.

        A process that resumes only to finish an evaluation measures none.
        """
        return next((speed for speed in reversed(self.series("images_per_second").tolist()) if speed > 0), math.nan)

    @property
    def seconds(self) -> float:
        """Seconds of training, from the images trained on and the images per second; NaN if unknown.

        Excludes compilation, evaluations and the time before the second step of a process. An interrupted run counts as
        if its last process had performed all of it.
        """
        if not self.lines:
            return math.nan
        images = self.lines[-1]["step"] * self.config.train.batch_size
        return images / self.speed

    def series(self, name: str) -> np.ndarray:
        """Returns a metric at each evaluation, float64; NaN where it is missing or not finite."""
        return np.array([number(line.get(name)) for line in self.lines])


def load_run_summary(workdir: Place) -> RunSummary:
    """Returns the summary of the run in `workdir`.

    Raises:
      UserError: there is no run, or its record is damaged.
    """
    run = Workdir(workdir)
    config, record = run.load()
    counts = _count(config.model, len(record["data"]["classes"]), tuple(record["data"]["image_shape"]))
    known, written = run.read_metrics()
    lines = evaluations(known)
    return RunSummary(run.path, config, record, lines, counts, written - len(lines))


@functools.cache
def _count(config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Counts a network; cached, as compared runs often use the same one."""
    return summary.compare_with_plain(config, num_classes, image_shape)
