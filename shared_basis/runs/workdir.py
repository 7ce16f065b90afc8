"""The directory of a run: its record, metrics and checkpoints.

    run.json        configuration, versions, metadata of the data: all that evaluation needs besides a checkpoint
    metrics.jsonl   the evaluations; for this and other metrics files see `shared_basis.runs.metrics`
    log.txt         printed lines with time, process and step; log-1.txt for process 1, …
    checkpoints/    see `shared_basis.runs.checkpoints`
    damaged/        checkpoints that could not be restored
    .lock           held by the process that writes
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from shared_basis.config import FORMAT, Config, from_config_dict, in_present_terms, to_dict
from shared_basis.errors import UserError
from shared_basis.runs import nearby
from shared_basis.runs.continuation import render, require_continuation
from shared_basis.runs.metrics import MetricsFiles
from shared_basis.runs.storage import is_finished
from shared_basis.runtime.distributed import from_main_process, is_main_process, raise_on_all_processes
from shared_basis.runtime.files import Place, absolute

FILES = "names_and_sizes_of_files"
"""The metadata entry that identifies a folder of images: see `shared_basis.data.fingerprint`."""

PACKAGES = ("shared-basis", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect a run's results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout without installation
            found[package] = "unknown"
    return found


def make_record(config: Config, data: Mapping[str, Any], devices: str | None = None,
                own: Mapping[str, str] | None = None, init: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the record of a run as JSON-serialisable data.

    Its directories are absolute, as later commands may run in another working directory.

    Args:
      devices: the devices on which the run begins.
      own: the names of user-supplied functions, by purpose.
      init: the origin of the given initial weights, if any; see `training.start.Start`.
    """
    tree = to_dict(config)
    for field in ("directory", "manual_directory"):
        if tree["data"][field]:
            tree["data"][field] = absolute(tree["data"][field])
    if tree["distillation"]["teacher"]:
        tree["distillation"]["teacher"] = absolute(tree["distillation"]["teacher"])
    return {"config": tree, "data": dict(data), "versions": versions(), "devices": devices, "own": dict(own or {}),
            "init": None if init is None else dict(init), "format": FORMAT}


class Workdir(MetricsFiles):
    """The directory of one run."""

    @property
    def checkpoints(self) -> PurePath:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def damaged(self) -> PurePath:
        """The directory to which damaged checkpoints are moved."""
        return self.path / "damaged"

    def read_record(self) -> dict[str, Any] | None:
        """Returns the run's record, or None if there is no run.

        Raises:
          UserError: the record cannot be read or is damaged.
        """
        try:
            record = json.loads(self.files.read("run.json"))
            if not all(isinstance(record["data"][key], list) for key in ("classes", "image_shape")):
                raise TypeError("its data entries are not lists")
            shape = record["data"]["image_shape"]
            if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
                raise TypeError("its image shape is invalid")
            if not isinstance(record["versions"], dict):
                raise TypeError("its versions are not a dict")
            devices, init = record.get("devices"), record.get("init")  # absent in runs of earlier versions,
            written = record.get("format", 1)  # as is the format
            if not isinstance(written, int):
                raise TypeError("its format is not a number")
            if init is not None and not isinstance(init["source"], str):
                raise TypeError("its init has no source")
            return {"config": in_present_terms(record["config"], written),
                    **{key: record[key] for key in ("data", "versions")},
                    "devices": devices if isinstance(devices, str) else None, "own": dict(record.get("own", {})),
                    "init": init, "format": FORMAT}
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"workdir {self.path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path / 'run.json'} is damaged ({error}); copies are in "
                            f"{self.checkpoints}/<step>/run/metadata.") from error

    def load(self) -> tuple[Config, dict[str, Any]]:
        """Returns the configuration and the record of the run in this directory.

        Raises:
          UserError: there is no run, or its record is damaged or from another version of this package.
        """
        record = self.read_record()
        if record is None:
            raise UserError(f"workdir {self.path} holds no run (no run.json); pass a trained run with --workdir."
                            f"{nearby.hint(self.path)}")
        try:
            return from_config_dict(record["config"]), record
        except UserError as error:
            raise UserError(f"{self.path / 'run.json'}: {error}") from error

    @property
    def saved_steps(self) -> list[int]:
        """The steps whose saves finished, in increasing order; their checkpoints may be damaged."""
        return sorted(int(name) for name in self.files.names("checkpoints")
                      if name.isdecimal() and is_finished(self.checkpoints / name))

    @property
    def latest_step(self) -> int:
        """The latest of `saved_steps`; 0 if there is none."""
        return max(self.saved_steps, default=0)

    @property
    def has_begun(self) -> bool:
        """Whether the run has a checkpoint, or was given initial weights; if not, another may take its place."""
        record = self.read_record()
        return record is not None and (record["init"] is not None or bool(self.saved_steps))

    @contextlib.contextmanager
    def locked(self, patience: float = 2.0, tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Creates the directory and locks it against other processes that write, until the context ends.

        Args:
          patience, tell: see `Files.locked`; waits briefly, as processes of a killed run may take a moment to end.

        Raises:
          UserError: another process holds the lock, or the directory cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                self.files.make()
                held.enter_context(self.files.locked(patience, tell))
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def claim(self, record: Mapping[str, Any]) -> None:
        """Assigns the directory to the run `record`, whether new or resumed.

        A resumed run keeps its record, except for configuration fields that may change. The record of a run that has
        not begun is replaced, as nothing would be lost.

        Raises:
          UserError: see `require`; or the directory holds checkpoints but no run.json, or other runs, or is read-only.
        """
        saved = self.read_record()
        if saved is not None and self.has_begun:
            self.require(record)
            record = {**saved, "config": record["config"], "data": {**record["data"], **saved["data"]}}
            if record == saved:
                return
        try:
            if saved is None and self.files.names("checkpoints"):
                raise UserError(f"workdir {self.path} holds checkpoints and no run.json; copy "
                                f"{self.checkpoints}/<step>/run/metadata to {self.path / 'run.json'}, or choose "
                                "another --workdir.")
            if saved is None and (others := nearby.runs_in(self.path)):
                raise UserError(f"workdir {self.path} contains other runs ({nearby.render(others)}); use one of them "
                                "to resume it, or a separate directory for a new run, such as "
                                f"{self.path / 'new'}.")
            self.files.make()
            self.files.write({"run.json": json.dumps(record, indent=2) + "\n"})
        except OSError as error:
            raise self._unwritable(error) from error

    def require_outside(self, images: str) -> None:
        """Checks that the directory is not in the directory `images`, where its own would become classes.

        Raises:
          UserError: it is.
        """
        root = Path(os.path.realpath(absolute(images)))
        if isinstance(self.path, Path) and Path(os.path.realpath(self.path)).is_relative_to(root):
            outside = os.path.relpath(root.parent / "runs" / self.path.name)
            raise UserError(f"workdir {self.path} is in the folder of images {root}, whose directories are classes; "
                            f"choose one outside of it, such as --workdir={outside}.")

    def require(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the stored record after checking that it belongs to the run `record`.

        Raises:
          UserError: the directory holds a run that cannot resume like this (see `require_continuation`), a run on other
            data, or no run, e.g. because machines do not share the directory.
        """
        if self.read_record() is None:
            raise UserError(f"workdir {self.path} holds no run.json here, though the first process has written it: it "
                            "must be on a file system that all machines share; choose another --workdir.")
        config, saved = self.load()
        require_continuation(self.path, from_config_dict(record["config"]), config,
                             record["data"].get("train_examples", 0), self.latest_step)
        ours, theirs = record.get("own", {}), saved["own"]
        self._require_same("functions of your own", {
            name: (ours.get(name), theirs.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)})
        self._require_same("data", {key: (abbreviate(record["data"][key]), abbreviate(saved["data"][key]))
                                    for key in record["data"].keys() & saved["data"].keys()
                                    if record["data"][key] != saved["data"][key]})
        return saved

    def _require_same(self, what: str, differing: Mapping[str, tuple[Any, Any]]) -> None:
        if differing:
            raise UserError(f"workdir {self.path} holds a run with other {what} ({render(differing)}); choose another "
                            "--workdir, or use the same values.")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"workdir {self.path} cannot be written: {error.strerror}; choose another with --workdir.")


def stored_config(workdir: Place, *, begun: bool = False) -> Config | None:
    """Returns the configuration of the run in `workdir`, or None if there is none; the same in all processes.

    Only the first process looks for the record, since a network file system may hide a new file from processes that
    looked for it before it existed.

    Args:
      begun: whether to ignore a run that has not begun; see `Workdir.has_begun`.

    Raises:
      UserError: see `Workdir.load`.
    """
    text = ""
    with raise_on_all_processes():
        run = Workdir(workdir)
        if is_main_process() and (run.has_begun if begun else run.read_record() is not None):
            text = json.dumps(to_dict(run.load()[0]))
    text = from_main_process(text)
    return from_config_dict(json.loads(text)) if text else None


def abbreviate(value: Any) -> Any:
    """Returns `value`, with long lists abbreviated for a one-line message."""
    return [*value[:3], f"… {len(value)} in all"] if isinstance(value, list) and len(value) > 5 else value
