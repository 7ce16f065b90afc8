"""Finds the arrays that basis groups select in a tree of parameters, and splits them into elements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shared_basis.nn.ops import wide
from shared_basis.nn.types import Array, Path, Tree
from shared_basis.optim.basis_group import BasisGroup, Selector, checked_groups
from shared_basis.optim.paths import glob_matches, leaves_by_path, nearest, not_found

Shape = tuple[int, ...]

Rows = tuple[list[Array], list[Array]]
"""Elements as rows: those of each shared array, and the unique ones of each layer."""


@dataclasses.dataclass(frozen=True)
class FoundGroup:
    """The arrays that a `BasisGroup` selects in a tree."""

    shared: tuple[Path, ...]
    unique: tuple[Path, ...]
    reduction_group: str
    shared_axis: int | None
    """The axis of all arrays that enumerates groups, the members of an ensemble; None for a single group."""
    unique_axis: int | None
    """The same axis for unique arrays; without `shared_axis` it enumerates layers of one group."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of all arrays."""
        return (*self.shared, *self.unique)

    def sizes(self, arrays: Mapping[Path, Array]) -> dict[Path, tuple[int, int]]:
        """Returns, by path, the number of elements of a basis and the size D of an element."""
        axes = {**dict.fromkeys(self.shared, self.shared_axis), **dict.fromkeys(self.unique, self.unique_axis)}
        shapes = {path: _member(arrays[path].shape, axis) for path, axis in axes.items()}
        return {path: (shape[-1], math.prod(shape[:-1])) for path, shape in shapes.items()}

    def rows(self, arrays: Mapping[Path, Array]) -> Rows:
        """Returns the elements as rows, float32 or wider: `[s, D]` for each shared array, and `[u, D]` for each layer.

        If `shared_axis` is not None, all of them are stacked, `[members, …]`; see `over_members`.
        """
        shared = [_rows(arrays[path], self.shared_axis) for path in self.shared]
        unique = [_rows(arrays[path], self.unique_axis) for path in self.unique]
        if self.unique_axis is not None and self.shared_axis is None:
            unique = [layer for stack in unique for layer in stack]
        return shared, unique

    def arrays(self, rows: Rows, like: Mapping[Path, Array]) -> dict[Path, Array]:
        """Converts `rows` back to arrays by path, with shapes and dtypes as in `like`."""
        shared, unique = rows
        if self.unique_axis is not None and self.shared_axis is None:
            layers, axis = iter(unique), self.unique_axis
            unique = [jnp.stack([next(layers) for _ in range(like[path].shape[axis])]) for path in self.unique]
        parts = [*zip(self.shared, shared, strict=True), *zip(self.unique, unique, strict=True)]
        axes = [self.shared_axis] * len(self.shared) + [self.unique_axis] * len(self.unique)
        return {path: _array(part, like[path].shape, axis).astype(like[path].dtype)
                for (path, part), axis in zip(parts, axes, strict=True)}

    def over_members(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Lifts `function` of the rows of one group to the (possibly stacked) result of `rows`."""
        return function if self.shared_axis is None else jax.vmap(function)


def _rows(array: Array, axis: int | None) -> Array:
    if axis is None:
        rows = jnp.reshape(array, (-1, array.shape[-1])).T
        return rows.astype(wide(rows.dtype))
    array = jnp.moveaxis(array, axis, 0)
    rows = jnp.reshape(array, (array.shape[0], -1, array.shape[-1]))
    return jnp.swapaxes(rows, 1, 2).astype(wide(rows.dtype))


def _array(rows: Array, shape: Shape, axis: int | None) -> Array:
    if axis is None:
        return rows.T.reshape(shape)
    stack = jnp.swapaxes(rows, 1, 2).reshape(shape[axis], *_member(shape, axis))
    return jnp.moveaxis(stack, 0, axis)


def alike(arrays: Sequence[Array]) -> list[list[int]]:
    """Returns, for each shape, the indices of the arrays with that shape."""
    found: dict[Shape, list[int]] = {}
    for index, array in enumerate(arrays):
        found.setdefault(array.shape, []).append(index)
    return list(found.values())


def find_groups(params: Tree, basis_groups: Iterable[BasisGroup]) -> list[FoundGroup]:
    """Returns the arrays that each of `basis_groups` selects in `params`, which may be abstract.

    Raises:
      KeyError: a path does not exist, or a glob or predicate matches nothing.
      ValueError: a selected leaf cannot be a basis, is selected twice, or is a stack; or `basis_groups` is empty.
      TypeError: `basis_groups` is not a list of `BasisGroup`.
    """
    leaves = leaves_by_path(params)
    found = [_find(group, leaves, params) for group in checked_groups(basis_groups)]
    check_named_once(((group.reduction_group, path) for group in found for path in group.paths),
                     "name it once, or in groups of different reduction_group")
    return found


def check_named_once(named: Iterable[tuple[str, Path]], advice: str) -> None:
    """Raises a ValueError if an item of `named` occurs twice."""
    seen = set()
    for each in named:
        if each in seen:
            raise ValueError(f"the basis {'/'.join(each[1])} is named twice, by its path or by globs and predicates "
                             f"that also match it: {advice}")
        seen.add(each)


def paths_of(groups: Iterable[FoundGroup]) -> list[Path]:
    """Returns the paths of all arrays in `groups`, without duplicates."""
    return list(dict.fromkeys(path for group in groups for path in group.paths))


def _find(group: BasisGroup, leaves: Mapping[Path, Any], tree: Tree) -> FoundGroup:
    shared, unique = ([path for selector in selectors for path in _matches(selector, leaves, tree)]
                      for selectors in (group.shared, group.unique))
    for path in (*shared, *unique):
        _check_elements("/".join(path), leaves[path])
    shapes = {path: tuple(leaves[path].shape) for path in (*shared, *unique)}
    axis = group.stack_axis
    # Either all arrays are stacks, or only unique ones are: element sizes are consistent in only one of these cases.
    members = not unique or (axis is not None and _one_size(shapes, dict.fromkeys(shapes, axis)))
    axes = {path: axis if members or path in unique else None for path in shapes}
    for path in [path for path in shapes if axis is None or axes[path] is not None]:
        _check_axes("/".join(path), shapes[path], axes[path], group)
    if shared and not _one_size(shapes, axes):
        raise ValueError(_different_sizes(shapes, axes))
    for path in shapes:
        _check_axes("/".join(path), shapes[path], axes[path], group)
    return FoundGroup(tuple(shared), tuple(unique), group.reduction_group, axes[shared[0]] if shared else None,
                      axes[unique[0]] if unique else None)


def _matches(selector: Selector, leaves: Mapping[Path, Any], tree: Tree) -> list[Path]:
    """Returns the paths that `selector` matches, in tree order."""
    if isinstance(selector, tuple):
        if selector not in leaves:
            raise not_found(selector, tree)
        return [selector]
    if isinstance(selector, str):
        found = [path for path in leaves if glob_matches(path, selector)]
        what = f"the glob {selector!r} matches"
    else:
        found = [path for path, leaf in leaves.items() if hasattr(leaf, "shape") and selector(path, leaf)]
        what = f"the predicate {getattr(selector, '__name__', selector)} selects"
    if not found:
        raise KeyError(f"{what} no array of the parameter tree{nearest(str(selector), leaves)}")
    return found


# What can be a basis

def _check_elements(name: str, leaf: Any) -> None:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(f"{name} cannot be a basis: it is not an array but {leaf!r}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{name} cannot be a basis: its dtype is {leaf.dtype}, but elements must be real numbers")
    if leaf.ndim < 2:
        raise ValueError(f"{name} cannot be a basis: its shape {list(leaf.shape)} is that of a bias or a scale; "
                         "elements are on the last of at least 2 axes, [k, k, C, elements]")


def _check_axes(name: str, shape: Shape, axis: int | None, group: BasisGroup) -> None:
    most = group.num_spatial_dims + 2
    if axis is not None and not -len(shape) <= axis < len(shape):
        raise ValueError(f"{name} of shape {list(shape)} has no axis {axis}: check stack_axis")
    if axis is not None and len(shape) < 3:
        raise ValueError(f"{name} of shape {list(shape)} cannot be a stack of bases, which have at least 2 axes: give "
                         "stack_axis only to groups of stacks")
    if len(shape) - (axis is not None) > most:
        more = "specify the stacking axis, as in BasisGroup(…, stack_axis=0)" if axis is None else (
            "stacks of stacks must be reshaped to one")
        raise ValueError(
            f"{name} of shape {list(shape)} has more axes than {'a basis' if axis is None else 'a stack of bases'} may "
            f"have, {most + (axis is not None)}: if nn.vmap, nn.scan or nnx.vmap stacked bases, {more}; if kernels "
            f"have more than {group.num_spatial_dims} spatial axes, set e.g. BasisGroup(…, num_spatial_dims=3)")


def _member(shape: Shape, axis: int | None) -> Shape:
    """Returns the shape of one basis in a stack."""
    if axis is None:
        return shape
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1:]


def _one_size(shapes: Mapping[Path, Shape], axes: Mapping[Path, int | None]) -> bool:
    """Returns whether the elements of all arrays have the same size, and all stacks the same height."""
    stacked = {path: axis for path, axis in axes.items() if axis is not None}
    if any(not -len(shapes[path]) <= axis < len(shapes[path]) for path, axis in stacked.items()):
        return False
    heights = {shapes[path][axis] for path, axis in stacked.items()}
    sizes = {math.prod(_member(shape, axes[path])[:-1]) for path, shape in shapes.items()}
    return len(sizes) == 1 and (len(heights) <= 1 or len(stacked) < len(shapes))


def _different_sizes(shapes: Mapping[Path, Shape], axes: Mapping[Path, int | None]) -> str:
    described = {"/".join(path): list(shape) for path, shape in shapes.items()}
    listed = list({str(shape): f"{name} {shape}" for name, shape in described.items()}.values())
    if any(axis is not None for axis in axes.values()):
        hint = "; check stack_axis"
    elif len({len(shape) for shape in shapes.values()}) > 1:
        hint = "; if unique elements are a stack of layers, as from nn.scan, set BasisGroup(…, stack_axis=0)"
    else:
        hint = "; use a separate BasisGroup for each size"
    return (f"the elements of a group are multiplied with each other, so all axes but the last must have one size, "
            f"and stacks one height: {', '.join(listed[:4])}{hint}")
