"""Checkpoints of a run: a thin layer over Orbax, whose plain tools can open every one of them.

    workdir/checkpoints/<step>/state    the training state (StandardSave)
    workdir/checkpoints/<step>/run      the run's record: configuration, versions, data facts (JsonSave)
    workdir/checkpoints/<step>/metrics  the evaluation at that step
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from shared_basis.errors import UserError
from shared_basis.nn.types import Tree
from shared_basis.runs.metrics import chosen_on
from shared_basis.runs.storage import LatestEvaluated, Manager, tree_handler
from shared_basis.runtime.distributed import is_main_process, raise_on_all_processes
from shared_basis.runtime.files import Place, absolute, as_path, one_line, open_files


class Checkpoints:
    """The checkpoints in `directory`: saved asynchronously. The latest two, the latest two evaluated and the best stay.

    Where there are several processes, each calls every method that writes or restores, in the same order.
    """

    def __init__(self, directory: Place, *, read_only: bool = False, aside: PurePath | None = None,
                 tell: Callable[[str], None] = lambda text: None) -> None:
        """Opens `directory`; creates it unless `read_only`.

        Args:
          aside: where damaged checkpoints are moved, beside `directory`, and `tell` is told; with None they are errors.
        """
        self._directory, self._aside, self._tell = as_path(directory), aside, tell
        self._files = open_files(self._directory.parent)

        def metric(metrics: Mapping[str, float]) -> float:
            return metrics[f"{chosen_on(metrics)}_accuracy"]

        keep = preservation_policy.AnyPreservationPolicy([
            preservation_policy.LatestN(2), LatestEvaluated(2),
            preservation_policy.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False),
        ])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, best_fn=metric, create=not read_only, read_only=read_only,
            cleanup_tmp_directories=not read_only)  # what a killed process has left of a save: the run is locked
        damaged = self._damaged_metrics()  # Orbax reads those of all steps at once
        if damaged and aside is None:
            raise UserError(f"the metrics of a checkpoint in {directory} are damaged: {damaged[0]}; delete that file, "
                            "the state beside it is not affected.")
        for path in damaged:
            self._set_aside(path.parent.parent.name, f"{path} is damaged.")
        try:
            if not read_only:
                self._files.make(self._directory.name)  # raises where a file has that name, which Orbax does not tell
            self._manager = Manager(absolute(str(directory)), options=options)
        except Exception as error:  # Orbax reads the metadata of all steps
            raise UserError(f"checkpoints in {directory} cannot be opened ({one_line(error)}).") from error

    @property
    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, rising."""
        return sorted(self._manager.all_steps())

    def describe(self) -> str:
        """Returns which checkpoints there are, for a message."""
        steps = self.steps
        return (f"checkpoint{'s' * (len(steps) > 1)} {', '.join(map(str, steps))} in {self._manager.directory}" if steps
                else "no checkpoint yet")

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
        if which not in map(str, steps):
            raise UserError(f"checkpoint {which!r}: must be latest, best or one of the steps "
                            f"{', '.join(map(str, steps))}.")
        return int(which)

    def save(self, step: int, state: Tree, record: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts saving `state` and `record` under `step`; returns as soon as both are copied.

        Does nothing if they are there, unless they were saved without the `metrics` that there are now.

        Raises:
          UserError: this save, or the one before, failed.
        """
        try:
            if metrics is not None and step in self.steps and self.metrics(step) is None:
                self._manager.delete(step)  # the checkpoint before it is there until this one is
            self._manager.save(step, metrics=None if metrics is None else dict(metrics), args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(dict(record))))
        except Exception as error:  # also that of the save before, which went on in the background
            raise self._unsaved(error) from error

    def restore(self, step: int, target: Tree) -> Tree:
        """Returns the state of `step` with the shapes, dtypes and shardings of the abstract `target`.

        Raises:
          UserError: the checkpoint is damaged or holds other arrays than `target`.
        """
        return self._read(step, target, whole=True)

    def restore_latest(self, target: Tree) -> Tree:
        """Returns the state of the latest checkpoint that can be restored; damaged ones after it are set aside.

        Raises:
          UserError: there is none, and nothing was moved; or it cannot be moved.
        """
        failures: dict[int, UserError] = {}
        state = None
        for step in reversed(self.steps):
            try:
                with raise_on_all_processes():
                    state = self.restore(step, target)
                break
            except UserError as error:
                failures[step] = error
        if state is None:
            raise next(iter(failures.values()))
        if failures and self._aside is None:
            raise next(iter(failures.values()))
        for damaged, failure in failures.items():
            self._set_aside(str(damaged), str(failure))
        if failures:
            self._manager.reload()
        return state

    def _state(self, step: int) -> Any:
        return self._manager.directory / str(step) / "state"

    def _set_aside(self, step: str, why: str) -> None:
        """Moves a checkpoint out of the way, so that its step can be saved anew."""
        assert self._aside is not None
        with raise_on_all_processes():
            if is_main_process():
                try:
                    there = self._files.names(self._aside.name)
                    new = next(new for number in itertools.count(1) if (new := f"{step}.{number}") not in there)
                    self._files.move(f"{self._directory.name}/{step}", f"{self._aside.name}/{new}")
                except OSError as error:
                    raise UserError(f"the damaged checkpoint {self._directory / step} cannot be moved to {self._aside} "
                                    f"({error.strerror}); move it away.") from error
                self._tell(f"{why} Checkpoint {step} is set aside as {self._aside / new}.")

    def _damaged_metrics(self) -> list[PurePath]:
        """Returns the files of metrics that do not hold the accuracy that chooses the best checkpoint."""
        damaged = []
        for step in self._files.names(self._directory.name):
            name = f"{self._directory.name}/{step}/metrics/metrics"
            try:
                metrics = json.loads(self._files.read(name))
                if not isinstance(metrics[f"{chosen_on(metrics)}_accuracy"], float):
                    damaged.append(self._files.path / name)
            except (FileNotFoundError, NotADirectoryError):
                pass  # it was not evaluated
            except OSError as error:
                raise UserError(f"{self._files.path / name} cannot be read: {error.strerror}.") from error
            except (ValueError, LookupError, TypeError, RecursionError):
                damaged.append(self._files.path / name)
        return damaged

    def _compare(self, step: int, target: Tree, *, whole: bool) -> None:
        """Raises `ValueError` unless the checkpoint holds arrays of the shapes and dtypes of `target`, by name.

        Orbax itself would convert them: a run would go on in another precision.
        """
        stored = self._arrays(step)
        wanted = ocp.tree.to_flat_dict(target)
        for path in [*wanted, *(stored if whole else ())]:
            name = "/".join(path)
            if path not in stored or path not in wanted:
                raise ValueError(f"{name} is {'missing' if path in wanted else 'not of this network'}")
            for what in ("shape", "dtype"):
                there, here = getattr(stored[path], what), getattr(wanted[path], what)
                if there != here:
                    advice = "; is JAX_ENABLE_X64 set otherwise than it was?" if what == "dtype" else ""
                    raise ValueError(f"the {what} of {name} is {there} there and {here} here{advice}")

    def restore_variables(self, step: int, target: Tree) -> Tree:
        """Returns `params` and `batch_stats` of `step` like `target`, leaving the optimizer's state unread.

        Raises:
          UserError: as `restore`.
        """
        return self._read(step, target, whole=False)

    def _read(self, step: int, target: Tree, *, whole: bool) -> Tree:
        """Returns the arrays of `target`, which are all that the checkpoint holds if it is the `whole`."""
        arguments = ocp.args.PyTreeRestore(
            target, restore_args=jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), target),
            partial_restore=not whole)
        try:
            with ocp.Checkpointer(tree_handler()) as checkpointer:
                self._compare(step, target, whole=whole)
                return checkpointer.restore(self._state(step), arguments)
        except Exception as error:  # Orbax and its storage raise many kinds
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        others = ", ".join(str(other) for other in self.steps if other != step)
        return UserError(f"checkpoint {step} in {self._manager.directory} cannot be restored ({one_line(error)}); "
                         f"other checkpoints there: {others or 'none'}.")

    def arrays(self, step: int) -> dict[tuple[str, ...], Any]:
        """Returns by path what Orbax knows of each array of `step` (its shape, its dtype), without reading any.

        Raises:
          UserError: the checkpoint is damaged.
        """
        try:
            return self._arrays(step)
        except Exception as error:
            raise self._damaged(step, error) from error

    def _arrays(self, step: int) -> dict[tuple[str, ...], Any]:
        return ocp.tree.to_flat_dict(tree_handler().metadata(self._state(step)).tree)

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns the evaluation saved with `step`, if there was one."""
        return self._manager.metrics(step)

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk.

        Raises:
          UserError: a save failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unsaved(error) from error

    def _unsaved(self, error: Exception) -> UserError:
        return UserError(f"a checkpoint cannot be saved ({one_line(error)}); complete: {self.describe()}.")

    def close(self) -> None:
        """Waits for saves to finish and lets go of the directory.

        Raises:
          UserError: a save failed.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._unsaved(error) from error
