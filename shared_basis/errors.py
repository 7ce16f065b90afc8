"""The exception that carries a message for the user, and the note on an earlier name."""

from __future__ import annotations

import warnings


def printable(text: str, also: str = "") -> str:
    """Returns `text` in one line, with what cannot be printed written out, but for the characters `also`."""
    return "".join(char if char.isprintable() or char in also else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """Something invalid that the user can correct; `main.py` prints the message alone, without traceback, and exits 2.

    The message says what was wrong, what is allowed and what to do. It is one line, whatever names it holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RenamedWarning(FutureWarning):
    """Something was used by an earlier name; `main.py` prints it as a note of one line."""


def note_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warns that `old` is now called `new`; `stacklevel` is that of the line to change, as seen by the caller."""
    warnings.warn(RenamedWarning(f"{old} is now {new}; the old name goes with the next version"),
                  stacklevel=stacklevel + 1)
