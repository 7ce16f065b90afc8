"""A run as far as it is known without its network and its images: its record, its metrics, its counts."""

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
    """A run as far as it is known without its network and its images."""

    path: PurePath
    config: Config
    record: Mapping[str, Any]
    """See `shared_basis.runs.workdir.make_record`."""
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl: the evaluations, in the order of their epochs."""
    counts: Mapping[str, Any]
    """See `shared_basis.models.summary.compare_with_plain`."""
    damaged: int
    """Lines of metrics.jsonl that are no evaluation, and are left out."""

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, by label."""
        return [str(name) for name in self.record["data"]["classes"]]

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What training returned: the counts, the last evaluation, and the best one; None without any evaluation."""
        return {**self.counts, **last_and_best(self.lines)} if self.lines else None

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The configuration where it is not the default: values and defaults by dotted path."""
        return differences(self.config, Config())

    @property
    def epoch(self) -> int:
        """The epoch of the last evaluation; 0 without any."""
        return self.lines[-1]["epoch"] if self.lines else 0

    @property
    def steps_per_epoch(self) -> int:
        """Updates an epoch, as the last evaluation tells."""
        return self.lines[-1]["step"] // self.lines[-1]["epoch"]

    @property
    def saved(self) -> int | None:
        """The step of the latest checkpoint, if there is one."""
        with contextlib.closing(Checkpoints(self.path / "checkpoints", read_only=True)) as checkpoints:
            return max(checkpoints.steps, default=None)

    @property
    def warning(self) -> str:
        """Why the figures may be incomplete, or ''."""
        return (f"{self.damaged} damaged line{'s' * (self.damaged > 1)} of {self.path / 'metrics.jsonl'} left out: the "
                "last evaluation that can be read need not be the run's last") if self.damaged else ""

    @property
    def seconds(self) -> float:
        """Seconds of training, NaN where they are not known: the images trained on, over the images per second.

        Compilation, evaluations and what a process does before its second step are left out. A run that was
        interrupted counts as if its last process had done all of it.
        """
        if not self.lines:
            return math.nan
        speed = self.series("images_per_second")[-1]
        images = self.lines[-1]["step"] * self.config.train.batch_size
        return images / speed if speed > 0 else math.nan

    def series(self, name: str) -> np.ndarray:
        """Returns a metric at each evaluation, float64; NaN where it is missing or no finite number."""
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
    """Counts a network once, as compared runs often have the same."""
    return summary.compare_with_plain(config, num_classes, image_shape)
