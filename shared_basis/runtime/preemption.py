"""Signals that ask training to stop: Ctrl-C, and SIGTERM, by which machines are taken away (preemption)."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopNow(Exception):
    """A stop was asked for in the middle of an evaluation."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after saving."""

    def __init__(self, signum: int, message: str) -> None:
        """Takes the signal's number and what to tell the user."""
        super().__init__(message)
        self.exit_code = 128 + signum
        """The shell's convention: 130 for Ctrl-C, 143 for SIGTERM."""


class StopSignals:
    """Within this context Ctrl-C and SIGTERM only ask for a stop; a second signal acts as usual.

    Of several processes JAX takes SIGTERM, and tells all of them at which step to stop, whichever received it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,):
            self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._restore()
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # a handler must not use print
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def due(self) -> bool:
        """Returns whether to stop now; to be asked after every step and batch, in all processes alike."""
        if jax.process_count() == 1:
            return self.received is not None
        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self.received = self.received or signal.SIGTERM
            return True
        return False

    def check(self) -> None:
        """Raises `StopNow` if it is time to stop; counts as asking."""
        if self.due():
            raise StopNow

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)

    def __exit__(self, *_: Any) -> None:
        self._restore()
