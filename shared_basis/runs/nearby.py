"""Runs near a directory that holds none: what whoever named it may have meant."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from shared_basis.runtime.files import Place, as_path, open_files

LOOKED_AT = 50
"""Entries of a directory that are looked at: each may be a request to a bucket."""

ABOVE = 5
"""How far a file of a checkpoint lies below its run, at most."""

SHOWN = 3
"""Runs that a message lists."""


def runs_in(place: Place) -> list[str]:
    """Returns the paths of the directories in `place` that hold runs, sorted; of the first `LOOKED_AT` entries."""
    path = as_path(place)
    names = itertools.islice(sorted(open_files(path).names()), LOOKED_AT)
    return [str(path / name) for name in names if open_files(path / name).exists("run.json")]


def run_around(place: Place) -> str | None:
    """Returns the path of the run that `place` is a part of, or None."""
    for path in as_path(place).parents[:ABOVE]:
        if str(path).endswith("/"):  # the root, or that of all buckets
            break
        if open_files(path).exists("run.json"):
            return str(path)
    return None


def render(runs: Sequence[str]) -> str:
    """Returns the paths of `runs` for a message, of many the first ones."""
    return ", ".join(runs[:SHOWN]) + (f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else "")


def hint(place: Place) -> str:
    """Returns a sentence about the runs near `place`, which holds none, to end a message with; empty if none is."""
    if around := run_around(place):
        return f" It is part of the run in {around}: name that."
    if inside := runs_in(place):
        return f" It contains {render(inside)}: name one of them."
    return ""
