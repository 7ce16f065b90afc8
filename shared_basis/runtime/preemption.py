"""Signals that ask training to stop: Ctrl-C, SIGTERM (preemption), and those that terminals and schedulers send."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

# JAX is imported where it is used: processes that read images know the signals, and are to start quickly.


STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
                 if hasattr(signal, name))
"""Ctrl-C; preemption; a terminal that is closed; warnings of SLURM, Grid Engine and others; a limit of CPU time that is
reached. Windows has the first two."""


class StopNow(Exception):
    """A stop was asked for in the middle of an evaluation."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after saving."""

    def __init__(self, signum: int, message: str) -> None:
        """Takes the signal's number and what to tell the user."""
        super().__init__(message)
        self.exit_code = 128 + signum
        """The shell's convention: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""


class StopSignals:
    """Within this context the signals `STOPPING` only ask for a stop; a second one acts as usual.

    What is ignored, as SIGHUP under nohup, stays so. Of several processes JAX takes SIGTERM, and tells all of them at
    which step to stop, whichever received it. Outside of the main thread signals are left to the program.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._alone = True
        """Whether there is one process."""
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        import jax

        self._alone = jax.process_count() == 1
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                ignored = signum != signal.SIGINT and signal.getsignal(signum) == signal.SIG_IGN
                if not ignored and (signum != signal.SIGTERM or self._alone):
                    self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._restore()
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; once more stops at once\n")  # a handler must not use print
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def due(self) -> bool:
        """Returns whether to stop now; to be asked after every step and batch, in all processes alike."""
        if self._alone:
            return self.received is not None
        from jax.experimental import multihost_utils

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
