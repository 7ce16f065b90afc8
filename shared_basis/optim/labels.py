"""What kind of parameter each one is, by its path."""

from __future__ import annotations

from jax.tree_util import tree_map_with_path

from shared_basis.config import PARAMETER_LABELS
from shared_basis.nn.types import Path, Tree
from shared_basis.optim.paths import path_of


def label_parameters(params: Tree) -> Tree:
    """Returns a tree like `params` that holds the label of every parameter, one of `PARAMETER_LABELS`, by its path.

    Raises:
      ValueError: a parameter is of no known kind.
    """
    return tree_map_with_path(lambda entries, _: _label(path_of(entries)), params)


def _label(path: Path) -> str:
    parent, name = (path[-2] if len(path) > 1 else ""), path[-1]
    if path[0] == "bases" or name == "unique":
        return "basis"
    if name in ("coefficients", "kernel"):
        return name
    if parent.endswith("norm") and name in ("scale", "bias"):
        return "norm"
    if name == "bias":
        return "bias"
    raise ValueError(f"parameter {'/'.join(path)} is of no known kind ({', '.join(PARAMETER_LABELS)})")
