"""Signals that request a stop of training: Ctrl-C, SIGTERM (preemption), and those of terminals and schedulers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

# JAX is imported where needed, since the image-reading processes import this module and must start quickly.


STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
                 if hasattr(signal, name))
"""Ctrl-C; preemption; a closed terminal; warnings of SLURM, Grid Engine and others; an exceeded CPU time limit. Windows
has the first two."""


class StopNow(Exception):
    """A stop was requested during an evaluation."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after saving a checkpoint."""

    def __init__(self, signum: int, message: str) -> None:
        """Sets the signal number and the message for the user."""
        super().__init__(message)
        self.exit_code = 128 + signum
        """128 + the signal number, the shell's convention: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""


class StopSignals:
    """A context in which the signals `STOPPING` only request a stop; a second signal has its usual effect.

    Ignored signals, such as SIGHUP under nohup, remain ignored. With several processes, JAX handles SIGTERM and makes
    all of them stop at the same step. Outside of the main thread, signals are left to the program.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._alone = True
        """Whether there is only one process."""
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
            os.write(2, b"\nstopping after this step; a second one stops at once\n")  # a handler must not use print
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def due(self) -> bool:
        """Returns whether to stop now; must be called after every step and batch, by all processes."""
        if self._alone:
            return self.received is not None
        from jax.experimental import multihost_utils

        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self.received = self.received or signal.SIGTERM
            return True
        return False

    def check(self) -> None:
        """Raises `StopNow` if `due`; counts as a call of it."""
        if self.due():
            raise StopNow

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)

    def __exit__(self, *_: Any) -> None:
        self._restore()
