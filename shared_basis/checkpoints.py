"""Checkpoints of a run: a thin layer over Orbax, whose plain tools can open every one of them.

    workdir/checkpoints/<step>/state    the training state (StandardSave)
    workdir/checkpoints/<step>/run      the run's record: configuration, versions, data facts (JsonSave)
    workdir/checkpoints/<step>/metrics  the evaluation at that step
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from shared_basis.errors import UserError

Tree = Any

BEST_METRIC = "test_accuracy"
"""The best checkpoint is the one of the highest value of this metric."""


class Checkpoints:
    """The checkpoints in `directory`: saved asynchronously, the latest two and the best one kept."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Opens `directory`; creates it unless `read_only`."""
        def metric(metrics: Mapping[str, float]) -> float:
            return metrics[BEST_METRIC]

        keep = preservation_policy.AnyPreservationPolicy([
            preservation_policy.LatestN(2),
            preservation_policy.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False),
        ])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, best_fn=metric, create=not read_only, read_only=read_only)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    @property
    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, rising."""
        return sorted(self._manager.all_steps())

    def find(self, which: str) -> int:
        """Returns the step meant by `which`: 'latest', 'best' or a number.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = self.steps
        if not steps:
            raise UserError(f"{self._manager.directory} holds no checkpoint yet; train first.")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if not which.isdigit() or int(which) not in steps:
            raise UserError(f"checkpoint {which!r}: must be latest, best or one of the steps "
                            f"{', '.join(map(str, steps))}.")
        return int(which)

    def save(self, step: int, state: Tree, record: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts saving `state` and `record` under `step`, unless it is there; returns as soon as both are copied."""
        if step in self._manager.all_steps():
            return
        self._manager.save(step, metrics=None if metrics is None else dict(metrics), args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(dict(record))))

    def restore(self, step: int, target: Tree) -> Tree:
        """Returns the state of `step` with the shapes, dtypes and shardings of the abstract `target`.

        Raises:
          UserError: the checkpoint is damaged or holds other arrays than `target`.
        """
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        except Exception as error:  # Orbax and its storage raise many kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"checkpoint {step} in {self._manager.directory} cannot be restored: {first}") from error
        return restored["state"]

    def restore_variables(self, step: int, target: Tree) -> Tree:
        """Returns `params` and `batch_stats` of `step` like `target`, leaving the optimizer's state unread.

        Raises:
          UserError: as `restore`.
        """
        handlers = ocp.PyTreeCheckpointHandler()
        path = Path(self._manager.directory) / str(step) / "state"
        arguments = ocp.args.PyTreeRestore(
            target, restore_args=jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), target),
            partial_restore=True)
        try:
            with ocp.Checkpointer(handlers) as checkpointer:
                return checkpointer.restore(path, arguments)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"checkpoint {step} in {self._manager.directory} cannot be restored: {first}") from error

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns the evaluation saved with `step`, if there was one."""
        return self._manager.metrics(step)

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk; raises what a save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves to finish and lets go of the directory."""
        self._manager.close()
