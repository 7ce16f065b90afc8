"""The exception for errors that the user can correct, and the warning about renamed options."""

from __future__ import annotations

import warnings


def printable(text: str, also: str = "") -> str:
    """Returns `text` on one line: unprintable characters are escaped, except those in `also`."""
    return "".join(char if char.isprintable() or char in also else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """An error that the user can correct; `main.py` prints only its message, without a traceback, and exits with 2.

    The message states what is invalid, what is allowed and what to do. It is always a single line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RenamedWarning(FutureWarning):
    """A deprecated name was used; `main.py` prints this as a one-line note."""


def note_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warns that `old` is now called `new`; `stacklevel` selects the line to change, counted from the caller."""
    warnings.warn(RenamedWarning(f"{old} is now {new}; the old name will be removed in the next version"),
                  stacklevel=stacklevel + 1)
