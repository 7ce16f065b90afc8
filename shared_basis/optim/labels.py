"""Kinds of parameters, for this package's networks and for any tree, and masks by kind as used by optax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map_with_path

from shared_basis.config import PARAMETER_LABELS
from shared_basis.nn.types import Path, Tree
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.find import find_groups, paths_of
from shared_basis.optim.paths import leaves_by_path, path_of

KINDS = (*PARAMETER_LABELS, "other")
"""The kinds of parameters of any tree."""


def label_parameters(params: Tree) -> Tree:
    """Returns a tree like `params` with the label of each parameter, one of `PARAMETER_LABELS`.

    These are the kinds that a configuration can name. They are those of `parameter_kinds`, except that each 'other'
    parameter is labelled by its axes, so that every parameter of any network has a label: 'kernel' for two axes or
    more, such as an embedding, and 'bias' for vectors and scalars.
    """
    def label(kind: str, leaf: Any) -> str:
        return kind if kind in PARAMETER_LABELS else "kernel" if jnp.ndim(leaf) > 1 else "bias"
    return jax.tree.map(label, parameter_kinds(params), params)


def parameter_kinds(params: Tree, basis_groups: Iterable[BasisGroup] = ()) -> Tree:
    """Returns a tree like `params`, which may be any tree of arrays, with the kind of each parameter.

    The result can be passed to `optax.partition` and `count_by_kind`. The kinds are 'basis': arrays selected by
    `basis_groups`, arrays under `bases` and those named `unique`; 'coefficients' and 'kernel', by name; 'norm': each
    `scale`, and the `bias` next to it; 'bias'; and 'other' for everything else.

    Raises:
      KeyError, ValueError, TypeError: `basis_groups` select no bases in `params`; see `orthogonality_penalty`.
    """
    groups = tuple(basis_groups)
    named = set(paths_of(find_groups(params, groups))) if groups else set()
    scaled = {path[:-1] for path in leaves_by_path(params) if path[-1:] == ("scale",)}

    def kind(entries: tuple[Any, ...], leaf: Any) -> str:
        path = path_of(entries)
        return "basis" if path in named else _label(path, norm=path[:-1] in scaled)
    return tree_map_with_path(kind, params)


def mask_by_kind(kinds: Collection[str], basis_groups: Iterable[BasisGroup] = ()) -> Callable[[Tree], Tree]:
    """Returns a function from parameters to a mask that selects some `kinds`, except integer arrays.

        optax.adamw(1e-3, weight_decay=1e-4, mask=mask_by_kind(["kernel", "coefficients"], basis_groups))

    Args:
      kinds: some of 'basis', 'coefficients', 'kernel', 'norm', 'bias', 'other'.
      basis_groups: select the bases, as in `parameter_kinds`.

    Raises:
      ValueError: one of `kinds` is unknown.
    """
    unknown = [kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind not in KINDS]
    if isinstance(kinds, str) or unknown:
        raise ValueError(f"kinds={kinds!r}: must be a list of {', '.join(map(repr, KINDS))}")
    groups = tuple(basis_groups)

    def mask(params: Tree) -> Tree:
        found = leaves_by_path(parameter_kinds(params, groups))
        return tree_map_with_path(lambda entries, leaf: found[path_of(entries)] in kinds and jnp.issubdtype(
            jnp.result_type(leaf), jnp.inexact), params)
    return mask


def _label(path: Path, norm: bool) -> str:
    """Returns the kind of the parameter at `path`; `norm` is whether a scale or bias belongs to a normalisation."""
    name = path[-1] if path else ""
    if path[:1] == ("bases",) or name == "unique":
        return "basis"
    if name in ("coefficients", "kernel"):
        return name
    if norm and name in ("scale", "bias"):
        return "norm"
    return "bias" if name == "bias" else "other"
