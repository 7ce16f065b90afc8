"""Finds runs near a directory that contains none, to suggest them in error messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from shared_basis.runtime.files import Place, as_path, open_files

LOOKED_AT = 50
"""Maximum number of directory entries to check, as each may be a request to a bucket."""

ABOVE = 5
"""Maximum depth of a checkpoint file below its run."""

SHOWN = 3
"""Maximum number of runs to list in a message."""


def runs_in(place: Place) -> list[str]:
    """Returns the sorted paths of directories in `place` that contain runs, among the first `LOOKED_AT` entries."""
    path = as_path(place)
    names = itertools.islice(sorted(open_files(path).names()), LOOKED_AT)
    return [str(path / name) for name in names if open_files(path / name).exists("run.json")]


def run_around(place: Place) -> str | None:
    """Returns the path of the run that contains `place`, or None."""
    for path in as_path(place).parents[:ABOVE]:
        if str(path).endswith("/"):  # the file system root, or gs://
            break
        if open_files(path).exists("run.json"):
            return str(path)
    return None


def render(runs: Sequence[str]) -> str:
    """Returns the paths of `runs` for a message, abbreviated if there are many."""
    return ", ".join(runs[:SHOWN]) + (f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else "")


def hint(place: Place) -> str:
    """Returns a sentence that suggests runs near `place`, which contains none; empty if there are none nearby."""
    if around := run_around(place):
        return f" It is part of the run in {around}; use that directory."
    if inside := runs_in(place):
        return f" It contains {render(inside)}; use one of them."
    return ""
