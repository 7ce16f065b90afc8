"""Selection of the arrays that contain filter bases: by path, by glob, or by a predicate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shared_basis.nn.types import Array, Path

Predicate = Callable[[Path, Array], bool]
"""Maps path and array of a parameter to whether it is selected; may only use the array's shape and dtype."""


class Glob(str):
    """A glob over paths with '/' between keys."""


Selector = Path | str | Predicate
"""A path of keys, a glob (a string), or a predicate."""

WILDCARDS = frozenset("*?[")

FORMS = ("a path ('bases/body' or ('bases', 'body')), a glob ('bases/*', '**/unique'), a predicate of path and array, "
         "or a list of these")


@dataclasses.dataclass(frozen=True, init=False)
class BasisGroup:
    """Selects, in a tree of parameters, the basis elements of a group that should be jointly orthonormal.

        BasisGroup("bases/body")                                      # a path, as a string
        BasisGroup(("bases", "body"))                                 # the same, as a tuple of keys
        BasisGroup(["bases/first", "bases/second"], "**/unique")      # several paths; a glob
        BasisGroup(lambda path, array: path[-1] == "basis")           # a predicate

    Rules: a tuple of keys (strings or integers) is one path; a list contains several selectors. A string is a path with
    '/' between keys. With `*`, `?` or `[` it is a glob over such paths: `*` matches a key or a part of it, `**` any
    number of keys; keys in a tuple are taken literally. Globs and predicates are evaluated when an optimizer is
    initialised or a penalty computed. Each must match something, and only bases: `[k, k, C, s]`, or any
    `[..., elements]` of real numbers.

    Bases stacked by `nn.vmap`, `nn.scan` or `nnx.vmap` are rejected because of their number of axes, unless
    `stack_axis` specifies the stacking axis. Stacks with no more axes than a basis cannot be recognised: those of
    1-D convolution kernels (set `num_spatial_dims=1` for these), or of flattened elements, `[members, D, s]`.
    """

    shared: tuple[Selector, ...]
    """The arrays of shared elements; with double sharing, both of the group."""
    unique: tuple[Selector, ...]
    """One array of unique elements per layer; empty if unique elements should not be penalised."""
    reduction_group: str
    """The mean penalty is taken over the basis groups of a reduction group; the means of several are added."""
    stack_axis: int | None
    """The axis along which bases are stacked, each forming its own group; None without stacks.

    Either all arrays of the group have it (an ensemble), or only the unique ones (a stack of layers that share a basis,
    as created by `nn.scan`); this is determined from their sizes."""
    num_spatial_dims: int
    """The number of spatial axes of kernels; bases have at most two more, for channels and elements."""

    def __init__(self, shared: Selector | Iterable[Selector], unique: Selector | Iterable[Selector] = (),
                 reduction_group: str = "", *, stack_axis: int | None = None, num_spatial_dims: int = 2) -> None:
        if not isinstance(reduction_group, str):
            raise TypeError(f"BasisGroup(reduction_group={reduction_group!r}): must be a string; pass several paths "
                            "as a list, BasisGroup([…])")
        for option, number in (("stack_axis", stack_axis or 0), ("num_spatial_dims", num_spatial_dims)):
            if not isinstance(number, int):
                raise TypeError(f"BasisGroup({option}={_brief(number)}): must be an integer")
        fields = {"shared": _selectors("shared", shared), "unique": _selectors("unique", unique),
                  "reduction_group": reduction_group, "stack_axis": stack_axis, "num_spatial_dims": num_spatial_dims}
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        if not self.shared and not self.unique:
            raise ValueError(f"BasisGroup names no basis: shared or unique must be {FORMS}")


def checked_groups(basis_groups: Iterable[BasisGroup]) -> tuple[BasisGroup, ...]:
    """Returns `basis_groups` as a tuple.

    Raises:
      TypeError: `basis_groups` is not a list of `BasisGroup`.
      ValueError: `basis_groups` is empty.
    """
    if isinstance(basis_groups, BasisGroup):
        raise TypeError("basis_groups is a BasisGroup: must be a list of them, [BasisGroup(…)]")
    if isinstance(basis_groups, str) or not isinstance(basis_groups, Iterable):
        raise TypeError(f"basis_groups={basis_groups!r}: must be a list, [BasisGroup(…)]")
    groups = tuple(basis_groups)
    for group in groups:
        if not isinstance(group, BasisGroup):
            raise TypeError(f"basis_groups holds {_brief(group)}: must be a list of BasisGroup, [BasisGroup(…)]")
    if not groups:
        raise ValueError("basis_groups is empty: name at least one basis")
    return groups


def _selectors(name: str, value: Any) -> tuple[Selector, ...]:
    """Returns the selectors in `value`, which may be a single one or several."""
    if isinstance(value, str) or callable(value):
        return (_selector(name, value),)
    if _is_path(value):
        if any(isinstance(key, str) and ("/" in key or WILDCARDS & set(key)) for key in value):
            raise ValueError(f"BasisGroup({name}={value!r}) can be read as several paths or as one: write "
                             f"{list(value)!r} for several, or [{value!r}] for one, whose keys are taken literally")
        return (_selector(name, value),)
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"BasisGroup({name}={_brief(value)}): must be {FORMS}")
    return tuple(_selector(name, each) for each in value)


def _selector(name: str, value: Any) -> Selector:
    if callable(value):
        return value
    if _is_path(value):
        return tuple(map(str, value))
    if not isinstance(value, str):
        raise TypeError(f"BasisGroup({name}=…) holds {_brief(value)}: must be {FORMS}")
    keys = tuple(value.split("/"))
    if not all(keys):
        raise ValueError(f"BasisGroup({name}={value!r}): a key of the path is empty; write "
                         f"{'/'.join(filter(None, keys)) or 'bases/body'!r}, with one '/' between keys")
    return Glob(value) if WILDCARDS & set(value) else keys


def _is_path(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(
        isinstance(key, (str, int)) and not isinstance(key, Glob) for key in value)


def _brief(value: Any) -> str:
    """Returns `value` for a message, with arrays and trees abbreviated to their type."""
    text = repr(value)
    return f"a {type(value).__name__}" if hasattr(value, "shape") or len(text) > 60 else text
