"""The one exception that carries a message for the user, and what becomes of it on the command line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def printable(text: str, also: str = "") -> str:
    """Returns `text` in one line, with what cannot be printed written out, but for the characters `also`."""
    return "".join(char if char.isprintable() or char in also else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """A mistake that the user can mend; `main.py` prints its message alone, without a traceback, and exits with 2.

    The message says what was wrong, what is allowed and what to do. It is one line, whatever names it holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def end_with(*commands: Callable[[], None]) -> NoReturn:
    """Runs `commands` and ends the process.

    The exit code is 0; 2 for the user's mistake, which is printed in one line; 1, silently, where nobody reads what is
    printed; or 128 + the number of the signal that stopped it (130 for Ctrl-C, 143 for SIGTERM; training catches them,
    to save). A `SystemExit` goes on as it is.
    """
    sys.unraisablehook = lambda unraisable: None  # writes and reads that Orbax abandons print tracebacks by it
    code = 0
    try:
        for command in commands:
            command()
        sys.stdout.flush()
    except UserError as error:
        # Threads of a restore that failed may still print tracebacks: not between these words, nor at the end.
        stderr, sys.stderr = sys.stderr, io.StringIO()
        stderr.write(f"error: {error}\n")
        stderr.flush()
        sys.stdout.flush()
        os._exit(2)
    except BrokenPipeError:  # who reads this, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        code = 1
    except KeyboardInterrupt as interrupt:
        print(*interrupt.args or ["stopped"], file=sys.stderr)
        code = getattr(interrupt, "exit_code", 130)
    sys.exit(code)
