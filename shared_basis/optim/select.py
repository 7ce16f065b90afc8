"""Selection of parameters by the patterns in configuration fields: kinds of parameters, and globs of paths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from jax.tree_util import tree_map_with_path

from shared_basis.config import PARAMETER_LABELS, split, split_factors
from shared_basis.errors import UserError
from shared_basis.nn.types import Path, Tree
from shared_basis.optim.labels import label_parameters
from shared_basis.optim.paths import glob_matches, leaves_by_path, path_of

_Value = TypeVar("_Value")


def frozen(params: Tree, patterns: str) -> Tree:
    """Returns a mask like `params` of the parameters that the `patterns` of `train.freeze` freeze.

    Raises:
      UserError: a glob matches nothing.
    """
    entries = [(pattern.removeprefix("!"), not pattern.startswith("!")) for pattern in split(patterns)]
    return _last_match(params, entries, False, "train.freeze")


def rate_factors(params: Tree, entries: str) -> Tree:
    """Returns a tree like `params` with the learning-rate factor of each parameter, from `entries` WHAT=FACTOR.

    Raises:
      UserError: a glob matches nothing.
    """
    return _last_match(params, split_factors(entries), 1.0, "optimizer.learning_rate_factors")


def _last_match(params: Tree, entries: Iterable[tuple[str, _Value]], default: _Value, field: str) -> Tree:
    """Returns a tree like `params` with the value of the last of `entries` whose pattern matches, or `default`.

    A kind that this network lacks matches nothing, so that plain and shared networks can use the same recipe.
    """
    kinds = leaves_by_path(label_parameters(params))
    found: dict[Path, _Value] = dict.fromkeys(kinds, default)
    for pattern, value in entries:
        matching = [path for path, kind in kinds.items() if kind == pattern or glob_matches(path, pattern)]
        if not matching and pattern not in PARAMETER_LABELS:
            shown = [f"{key}/**" if len(path) > 1 else key for path in kinds for key in path[:1]]
            raise UserError(f"{field}={pattern!r}: matches no parameter of this network; give a kind "
                            f"({', '.join(PARAMETER_LABELS)}) or a glob of paths, such as "
                            f"{', '.join(dict.fromkeys(shown))}.")
        found |= dict.fromkeys(matching, value)
    return tree_map_with_path(lambda entries, leaf: found[path_of(entries)], params)
