"""What kind of parameter each one is, by its path."""

from __future__ import annotations

from jax.tree_util import DictKey, tree_map_with_path

from shared_basis.nn.types import Tree

LABELS = ("basis", "coefficients", "kernel", "norm", "bias")
"""Kinds of parameters: filter basis elements (shared and unique), coefficients, ordinary kernels, scale and bias of
batch normalisation, and biases of linear layers."""


def label_parameters(params: Tree) -> Tree:
    """Returns a tree like `params` that holds the label (one of `LABELS`) of every parameter, found by its path.

    Raises:
      ValueError: a parameter is of no known kind.
    """
    return tree_map_with_path(lambda path, _: _label(tuple(entry.key for entry in path if isinstance(entry, DictKey))),
                              params)


def _label(path: tuple[str, ...]) -> str:
    parent, name = (path[-2] if len(path) > 1 else ""), path[-1]
    if path[0] == "bases" or name == "unique":
        return "basis"
    if name in ("coefficients", "kernel"):
        return name
    if parent.endswith("norm") and name in ("scale", "bias"):
        return "norm"
    if name == "bias":
        return "bias"
    raise ValueError(f"parameter {'/'.join(path)} is of no known kind ({', '.join(LABELS)})")
