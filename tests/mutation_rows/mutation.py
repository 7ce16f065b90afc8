"""What a row of the tables of mutations says."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """A small change of the package."""

    name: str
    """Begins with the area that it belongs to."""
    old: str
    """Occurs exactly once in the package."""
    new: str
    words: tuple[str, ...]
    """The test files whose path contains one of them run first."""
