"""Checkpoints of a run: a thin layer over Orbax; plain Orbax can open every checkpoint.

    workdir/checkpoints/<step>/state    the training state (StandardSave)
    workdir/checkpoints/<step>/run      the run's record: configuration, versions, metadata of the data (JsonSave)
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
from shared_basis.runtime.distributed import from_main_process, is_main_process, raise_on_all_processes
from shared_basis.runtime.files import Place, absolute, as_path, one_line, open_files


class Checkpoints:
    """The checkpoints in `directory`, saved asynchronously. Keeps the latest two, the latest two evaluated, the best.

    With several processes, all must call every method that writes or restores, in the same order.
    """

    def __init__(self, directory: Place, *, read_only: bool = False, aside: PurePath | None = None,
                 tell: Callable[[str], None] = lambda text: None) -> None:
        """Opens `directory`; creates it unless `read_only`.

        Args:
          aside: directory to which damaged checkpoints are moved, after calling `tell`; None raises errors instead.
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
            save_interval_steps=0 if read_only else 1,  # Orbax warns otherwise
            cleanup_tmp_directories=not read_only)  # removes partial saves of killed processes; the run is locked
        damaged = self._damaged_metrics()  # Orbax reads the metrics of all steps at once
        if damaged and aside is None:
            raise UserError(f"the metrics of a checkpoint in {directory} are damaged: {damaged[0]}; delete that file, "
                            "the state next to it is not affected.")
        if aside is not None:  # of all processes; one that lists later would not see what the first has moved
            damaged = [as_path(path) for path in json.loads(from_main_process(json.dumps(list(map(str, damaged)))))]
        for path in damaged:
            self._set_aside(path.parent.parent.name, f"{path} is damaged.")
        try:
            if not read_only:
                self._files.make(self._directory.name)  # raises if it is a file, which Orbax does not report
            self._manager = Manager(absolute(str(directory)), options=options)
        except Exception as error:  # Orbax reads the metadata of all steps
            raise UserError(f"checkpoints in {directory} cannot be opened ({one_line(error)}).") from error

    @property
    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, in increasing order."""
        return sorted(self._manager.all_steps())

    def describe(self) -> str:
        """Returns a description of the existing checkpoints, for messages."""
        steps = self.steps
        return (f"checkpoint{'s' * (len(steps) > 1)} {', '.join(map(str, steps))} in {self._manager.directory}" if steps
                else "no checkpoint yet")

    def find(self, which: str) -> int:
        """Returns the step that `which` refers to: 'latest', 'best' or a number.

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
        """Starts saving `state` and `record` as `step`; returns once both are copied.

        Does nothing if that checkpoint exists, unless it was saved without `metrics` and these are now given.

        Raises:
          UserError: this save or the previous one failed.
        """
        try:
            if metrics is not None and step in self.steps and self.metrics(step) is None:
                if self.steps == [step]:
                    return self._add_metrics(step, metrics)
                self._manager.delete(step)  # the previous checkpoint remains until this one is complete
            self._manager.save(step, metrics=None if metrics is None else dict(metrics), args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(dict(record))))
        except Exception as error:  # may come from the previous save, in the background
            raise self._unsaved(error) from error

    def _add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds `metrics` to the only checkpoint, which saving it again would delete before the new one is complete."""
        self._manager.wait_until_finished()
        with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename="metrics")) as checkpointer:
            checkpointer.save(self._manager.directory / str(step) / "metrics", args=ocp.args.JsonSave(dict(metrics)))
        self._manager.reload()

    def restore(self, step: int, target: Tree) -> Tree:
        """Returns the state of `step` with the shapes, dtypes and shardings of the abstract `target`.

        Raises:
          UserError: the checkpoint is damaged or its arrays do not match `target`.
        """
        return self._read(step, target, whole=True)

    def restore_latest(self, target: Tree) -> Tree:
        """Returns the latest checkpoint that can be restored, and sets later, damaged ones aside.

        Raises:
          UserError: none can be restored, and nothing was moved; or a damaged one cannot be moved.
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
        """Moves a damaged checkpoint away, so that its step can be saved again."""
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
        """Returns the metrics files without the accuracy that determines the best checkpoint."""
        damaged = []
        for step in self._files.names(self._directory.name):
            name = f"{self._directory.name}/{step}/metrics/metrics"
            try:
                metrics = json.loads(self._files.read(name))
                if not isinstance(metrics[f"{chosen_on(metrics)}_accuracy"], float):
                    damaged.append(self._files.path / name)
            except (FileNotFoundError, NotADirectoryError):
                pass  # not evaluated
            except OSError as error:
                raise UserError(f"{self._files.path / name} cannot be read: {error.strerror}.") from error
            except (ValueError, LookupError, TypeError, RecursionError):
                damaged.append(self._files.path / name)
        return damaged

    def _compare(self, step: int, target: Tree, *, whole: bool) -> None:
        """Raises `ValueError` unless the checkpoint's arrays have the names, shapes and dtypes of `target`.

        Orbax itself would convert dtypes, and a run would continue in another precision.
        """
        stored = self._arrays(step)
        wanted = ocp.tree.to_flat_dict(target)
        for path in [*wanted, *(stored if whole else ())]:
            name = "/".join(path)
            if path not in stored or path not in wanted:
                raise ValueError(f"{name} is {'missing' if path in wanted else 'not part of this network'}")
            for what in ("shape", "dtype"):
                there, here = getattr(stored[path], what), getattr(wanted[path], what)
                if there != here:
                    advice = "; check that JAX_ENABLE_X64 is set as before" if what == "dtype" else ""
                    raise ValueError(f"the {what} of {name} is {there} there and {here} here{advice}")

    def restore_variables(self, step: int, target: Tree) -> Tree:
        """Returns `params` and `batch_stats` of `step` like `target`, without reading the optimizer state.

        Raises:
          UserError: see `restore`.
        """
        return self._read(step, target, whole=False)

    def _read(self, step: int, target: Tree, *, whole: bool) -> Tree:
        """Restores the arrays of `target`; if `whole`, the checkpoint must not contain any others."""
        arguments = ocp.args.PyTreeRestore(
            target, restore_args=jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), target),
            partial_restore=not whole)
        try:
            with ocp.Checkpointer(tree_handler()) as checkpointer:
                self._compare(step, target, whole=whole)
                return checkpointer.restore(self._state(step), arguments)
        except Exception as error:  # Orbax and storage layers raise many types
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        others = ", ".join(str(other) for other in self.steps if other != step)
        return UserError(f"checkpoint {step} in {self._manager.directory} cannot be restored ({one_line(error)}); "
                         f"other checkpoints there: {others or 'none'}.")

    def arrays(self, step: int) -> dict[tuple[str, ...], Any]:
        """Returns Orbax's metadata of each array of `step` (shape, dtype), keyed by path, without reading the arrays.

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
        """Returns the evaluation saved with `step`, or None."""
        return self._manager.metrics(step)

    def wait(self) -> None:
        """Waits until all saves are complete on disk.

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
        """Waits for pending saves and releases the directory.

        Raises:
          UserError: a save failed.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._unsaved(error) from error
