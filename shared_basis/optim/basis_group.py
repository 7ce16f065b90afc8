"""Which arrays of a tree of parameters are filter bases, and belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from shared_basis.nn.types import Path


@dataclasses.dataclass(frozen=True, init=False)
class BasisGroup:
    """Names, by path in the parameter tree, the basis elements of one group that are to be orthonormal together.

        BasisGroup(["bases/body"])

    A path is a string with '/' between keys, or a tuple of keys: `("bases", "body")`. Each array holds its elements on
    its last axis: `[k, k, C, s]`, or any `[..., elements]`.
    """

    shared: tuple[Path, ...]
    """The arrays of shared elements; in double sharing both of the group."""
    unique: tuple[Path, ...]
    """One array of unique elements for each layer; empty where unique elements are not to be penalised."""
    reduction_group: str
    """The mean penalty is taken over the basis groups of one reduction group; the means of several are added."""

    def __init__(self, shared: Iterable[Path | str], unique: Iterable[Path | str] = (),
                 reduction_group: str = "") -> None:
        for name, value in (("shared", _paths(shared)), ("unique", _paths(unique)),
                            ("reduction_group", reduction_group)):
            object.__setattr__(self, name, value)  # it is frozen


def _paths(paths: Iterable[Path | str]) -> tuple[Path, ...]:
    """Returns paths as tuples of keys; a string alone is one path, and not one for each of its letters."""
    return tuple(tuple(path.split("/")) if isinstance(path, str) else tuple(map(str, path))
                 for path in ([paths] if isinstance(paths, str) else paths))
