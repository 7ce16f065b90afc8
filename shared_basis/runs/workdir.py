"""The directory of a run: its record, its metrics, its checkpoints.

    run.json        configuration, versions, data facts: all that evaluation needs beside a checkpoint
    metrics.jsonl   the evaluations; this and further files of metrics: see `shared_basis.runs.metrics`
    log.txt         what was printed, with time, process and step; log-1.txt that of process 1, …
    checkpoints/    see `shared_basis.runs.checkpoints`
    damaged/        checkpoints that could not be restored, set aside
    .lock           held by the process that writes
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
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
"""The data fact of a run on a folder that tells it from others: see `shared_basis.data.fingerprint`."""

PACKAGES = ("shared-basis", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # used from a checkout that is not installed
            found[package] = "unknown"
    return found


def make_record(config: Config, data: Mapping[str, Any], devices: str | None = None,
                own: Mapping[str, str] | None = None, init: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the record of a run: plain data that JSON can hold.

    Directories are absolute in it: later commands may come from another one.

    Args:
      devices: those that it begins on.
      own: the names of the user's own functions, by what they are for.
      init: where the weights come from that it begins with, if it does not begin anew; see `training.start.Start`.
    """
    tree = to_dict(config)
    for field in ("directory", "manual_directory"):
        if tree["data"][field]:
            tree["data"][field] = absolute(tree["data"][field])
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
        """The directory of checkpoints that were set aside."""
        return self.path / "damaged"

    def read_record(self) -> dict[str, Any] | None:
        """Returns the run's record, or None where there is no run.

        Raises:
          UserError: the record cannot be read, or is damaged.
        """
        try:
            record = json.loads(self.files.read("run.json"))
            if not all(isinstance(record["data"][key], list) for key in ("classes", "image_shape")):
                raise TypeError("its data facts are not lists")
            shape = record["data"]["image_shape"]
            if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
                raise TypeError("its image shape is none")
            if not isinstance(record["versions"], dict):
                raise TypeError("its versions are no dict")
            devices, init = record.get("devices"), record.get("init")  # runs of earlier versions did not note them,
            written = record.get("format", 1)  # nor their format
            if not isinstance(written, int):
                raise TypeError("its format is no number")
            if init is not None and not isinstance(init["source"], str):
                raise TypeError("what it began with has no source")
            return {"config": in_present_terms(record["config"], written),
                    **{key: record[key] for key in ("data", "versions")},
                    "devices": devices if isinstance(devices, str) else None, "own": dict(record.get("own", {})),
                    "init": init, "format": FORMAT}
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"workdir {self.path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path / 'run.json'} is damaged ({error}); its copies lie in "
                            f"{self.checkpoints}/<step>/run/metadata.") from error

    def load(self) -> tuple[Config, dict[str, Any]]:
        """Returns the configuration and the record of the run in this directory.

        Raises:
          UserError: there is no run, or its record is damaged or of another version of this package.
        """
        record = self.read_record()
        if record is None:
            raise UserError(f"workdir {self.path} holds no run (no run.json); name a trained one with --workdir."
                            f"{nearby.hint(self.path)}")
        try:
            return from_config_dict(record["config"]), record
        except UserError as error:
            raise UserError(f"{self.path / 'run.json'}: {error}") from error

    @property
    def saved_steps(self) -> list[int]:
        """The steps whose save was finished, rising; their checkpoints may be damaged."""
        return sorted(int(name) for name in self.files.names("checkpoints")
                      if name.isdecimal() and is_finished(self.checkpoints / name))

    @property
    def latest_step(self) -> int:
        """The latest of `saved_steps`; 0 where there is none."""
        return max(self.saved_steps, default=0)

    @contextlib.contextmanager
    def locked(self, patience: float = 2.0, tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Makes the directory and keeps it from other processes that would write to it, until the context ends.

        Args:
          patience, tell: as of `Files.locked`: what a killed run leaves behind may take a moment to end.

        Raises:
          UserError: another process holds it, or the directory cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                self.files.make()
                held.enter_context(self.files.locked(patience, tell))
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def claim(self, record: Mapping[str, Any]) -> None:
        """Makes the directory that of the run `record`, whether it is new or resumes.

        A run that resumes keeps its record, but for the configuration, where that may change.

        Raises:
          UserError: as `require`, or it holds checkpoints without their run, or other runs, or cannot be written.
        """
        saved = self.read_record()
        if saved is not None:
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
                raise UserError(f"workdir {self.path} contains other runs ({nearby.render(others)}); name one of them "
                                "to go on with it, or a directory of its own for a new run, such as "
                                f"{self.path / 'new'}.")
            self.files.make()
            self.files.write({"run.json": json.dumps(record, indent=2) + "\n"})
        except OSError as error:
            raise self._unwritable(error) from error

    def require(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the record in the directory, after making sure that it is that of the run `record`.

        Raises:
          UserError: it holds a run that cannot go on so (see `require_continuation`) or one on other data, or none, as
            where processes of several machines do not see one directory.
        """
        if self.read_record() is None:
            raise UserError(f"workdir {self.path} holds no run.json here, though the first process has written it: it "
                            "must lie on a file system that all machines share; choose another --workdir.")
        config, saved = self.load()
        require_continuation(self.path, from_config_dict(record["config"]), config,
                             record["data"].get("train_examples", 0), self.latest_step)
        ours, theirs = record.get("own", {}), saved["own"]
        self._require_same("choice of your own functions", {
            name: (ours.get(name), theirs.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)})
        self._require_same("data", {key: (_short(record["data"][key]), _short(saved["data"][key]))
                                    for key in record["data"].keys() & saved["data"].keys()
                                    if record["data"][key] != saved["data"][key]})
        return saved

    def _require_same(self, what: str, differing: Mapping[str, tuple[Any, Any]]) -> None:
        if differing:
            raise UserError(f"workdir {self.path} holds a run of another {what} ({render(differing)}); choose another "
                            "--workdir, or the same values.")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"workdir {self.path} cannot be written: {error.strerror}; choose another with --workdir.")


def stored_config(workdir: Place) -> Config | None:
    """Returns the configuration of the run in `workdir`, or None where there is none; the same in all processes.

    The first process alone looks for it: a network's file system may hide a file from those that have looked for it
    in vain.

    Raises:
      UserError: as `Workdir.load`.
    """
    text = ""
    with raise_on_all_processes():
        run = Workdir(workdir)
        if is_main_process() and run.read_record() is not None:
            text = json.dumps(to_dict(run.load()[0]))
    text = from_main_process(text)
    return from_config_dict(json.loads(text)) if text else None


def _short(value: Any) -> Any:
    """Returns `value`, a long list cut down to what a message of one line can hold."""
    return [*value[:3], f"… {len(value)} in all"] if isinstance(value, list) and len(value) > 5 else value
