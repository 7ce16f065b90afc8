"""Metrics as TensorBoard event files, without TensorFlow (the extra `tensorboard`)."""

from __future__ import annotations

import importlib.util
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from shared_basis.errors import UserError
from shared_basis.runtime.files import Files

_BASES = ("penalty", "norm_min", "norm_mean", "norm_max", "coherence")


def require() -> None:
    """Raises `UserError` unless the package that writes event files is installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard: the package tensorboardX is not installed; pip "
                        "install 'shared-basis[tensorboard]', or omit the flag: metrics.csv holds the same values.")


class Events:
    """Event files in a directory, to which lines of metrics.jsonl are appended."""

    def __init__(self, files: Files, directory: str, lines: Sequence[Mapping[str, Any]], step: int) -> None:
        """Continues after `step`, with `lines` up to it; later steps that `directory` contains are superseded.

        Raises:
          OSError: the directory cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        files.make(directory)
        new = not any(name.startswith("events.out.tfevents.") for name in files.names(directory))
        self._files = files
        self._name = f"{directory}/events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{step}.{os.getpid()}"
        began = [] if new else [Event(wall_time=time.time(), step=step + 1,
                                      session_log=SessionLog(status=SessionLog.START))]
        self._append([Event(wall_time=time.time(), file_version="brain.Event:2"), *began,
                      *(event for line in lines if new for event in _events(line))])

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends the numbers of a line of metrics.jsonl at its step.

        Raises:
          OSError: the file cannot be written.
        """
        self._append(_events(line))

    def _append(self, events: Sequence[Any]) -> None:
        # Not the SummaryWriter, whose thread may lose the last events when the process ends.
        self._files.append(self._name, b"".join(_framed(event.SerializeToString()) for event in events))


def _events(line: Mapping[str, Any]) -> list[Any]:
    """Returns the numbers of a line of metrics.jsonl as events at its step."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    return [Event(wall_time=time.time(), step=line["step"], summary=scalar(_tag(name), value))
            for name, value in line.items() if name not in ("step", "epoch") and isinstance(value, (int, float))]


def _framed(data: bytes) -> bytes:
    """Returns `data` as a TFRecord: its length and contents, each with a checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))


def _tag(name: str) -> str:
    """Returns the name of a metric prefixed with its section in TensorBoard."""
    part, _, rest = name.partition("_")
    if part in ("train", "validation", "test") and rest:
        return f"{rest}/{part}"
    return f"bases/{name}" if name in _BASES else f"run/{name}"
