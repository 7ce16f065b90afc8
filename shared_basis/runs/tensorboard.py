"""Metrics as TensorBoard event files, without TensorFlow (the extra `tensorboard`)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_basis.errors import UserError

_BASES = ("penalty", "norm_min", "norm_mean", "norm_max", "coherence")


def require() -> None:
    """Raises `UserError` unless the package that writes event files is installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard: the package tensorboardX, which writes event files, is not installed; pip "
                        "install -e '.[tensorboard]', or leave it out: metrics.csv holds the same.")


class Events:
    """Event files in a directory, to which lines of metrics.jsonl are added."""

    def __init__(self, directory: Path, lines: Sequence[Mapping[str, Any]], step: int) -> None:
        """Goes on after `step`, up to which the run has `lines`; what the directory holds of later steps is void.

        Raises:
          OSError: the directory cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        new = not any(directory.glob("events.out.tfevents.*"))
        # Not its SummaryWriter, a thread of which may lose what was written last when the process ends.
        self._writer = EventsWriter(str(directory / "events"), f".{step}.{os.getpid()}")
        if new:
            for line in lines:
                self.add(line)
        else:
            self._writer.write_event(Event(wall_time=time.time(), step=step + 1,
                                           session_log=SessionLog(status=SessionLog.START)))

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds the numbers of a line of metrics.jsonl, at its step, and has them on disk.

        Raises:
          OSError: they cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in line.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                self._writer.write_event(Event(wall_time=time.time(), step=line["step"],
                                               summary=scalar(_tag(name), value)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # of a full disk it was told
            self._writer.close()


def _tag(name: str) -> str:
    """Returns the name of a metric with the section of TensorBoard's page that it belongs to."""
    part, _, rest = name.partition("_")
    if part in ("train", "validation", "test") and rest:
        return f"{rest}/{part}"
    return f"bases/{name}" if name in _BASES else f"run/{name}"
