"""How a user names the arrays that hold filter bases: by path, by glob, or by a predicate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shared_basis.nn.types import Array, Path

Predicate = Callable[[Path, Array], bool]
"""Says of the path and the array of a parameter, of which only shape and dtype may be looked at, whether it is one."""


class Glob(str):
    """A pattern over paths with '/' between keys."""


Selector = Path | str | Predicate
"""A path of keys, a glob (a string), or a predicate."""

WILDCARDS = frozenset("*?[")

FORMS = ("a path ('bases/body' or ('bases', 'body')), a glob ('bases/*', '**/unique'), a predicate of path and array, "
         "or a list of these")


@dataclasses.dataclass(frozen=True, init=False)
class BasisGroup:
    """Names, in a tree of parameters, the basis elements of one group that are to be orthonormal together.

        BasisGroup("bases/body")                                      # a path, as a string
        BasisGroup(("bases", "body"))                                 # the same, as a tuple of keys
        BasisGroup(["bases/first", "bases/second"], "**/unique")      # several paths; a glob
        BasisGroup(lambda path, array: path[-1] == "basis")           # a predicate

    The rule: a tuple of keys (strings or integers) is one path, and a list holds several of whatever names one. A
    string is a path with '/' between keys. With `*`, `?` or `[` it is a glob over such paths: `*` stands for a key or
    a part of it, `**` for any number of keys; keys of a tuple are taken literally. Globs and predicates are matched
    against the tree when a link is initialised or a penalty computed, each must match, and what they match must be
    bases: `[k, k, C, s]`, or any `[..., elements]` of real numbers.

    Bases that `nn.vmap`, `nn.scan` or `nnx.vmap` has stacked are refused by their number of axes, unless `stack_axis`
    says which axis counts them. A stack that has no more axes than a basis may have cannot be recognised: of kernels
    of 1-D convolutions (set `num_spatial_dims=1` for these), or of elements that are flattened, `[members, D, s]`.
    """

    shared: tuple[Selector, ...]
    """The arrays of shared elements; in double sharing both of the group."""
    unique: tuple[Selector, ...]
    """One array of unique elements for each layer; empty where unique elements are not to be penalised."""
    reduction_group: str
    """The mean penalty is taken over the basis groups of one reduction group; the means of several are added."""
    stack_axis: int | None
    """The axis that stacks bases, each of them a group of its own; None where there are no stacks.

    All arrays of the group have it: an ensemble. Or only the unique ones have: a stack of layers that share a basis,
    as `nn.scan` makes it. Their sizes say which."""
    num_spatial_dims: int
    """The spatial axes of kernels: bases have at most two more, of channels and of elements."""

    def __init__(self, shared: Selector | Iterable[Selector], unique: Selector | Iterable[Selector] = (),
                 reduction_group: str = "", *, stack_axis: int | None = None, num_spatial_dims: int = 2) -> None:
        if not isinstance(reduction_group, str):
            raise TypeError(f"BasisGroup(reduction_group={reduction_group!r}): must be a string; paths of more bases "
                            "belong in a list, BasisGroup([…])")
        for option, number in (("stack_axis", stack_axis or 0), ("num_spatial_dims", num_spatial_dims)):
            if not isinstance(number, int):
                raise TypeError(f"BasisGroup({option}={_brief(number)}): must be an integer")
        fields = {"shared": _selectors("shared", shared), "unique": _selectors("unique", unique),
                  "reduction_group": reduction_group, "stack_axis": stack_axis, "num_spatial_dims": num_spatial_dims}
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # it is frozen
        if not self.shared and not self.unique:
            raise ValueError(f"BasisGroup names no basis: shared or unique must be {FORMS}")


def checked_groups(basis_groups: Iterable[BasisGroup]) -> tuple[BasisGroup, ...]:
    """Returns `basis_groups` as a tuple.

    Raises:
      TypeError: they are no list of `BasisGroup`.
      ValueError: there is none.
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
    """Returns what `value`, one selector or several, names."""
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
    """Returns `value` as a message shows it: arrays and trees by their type."""
    text = repr(value)
    return f"a {type(value).__name__}" if hasattr(value, "shape") or len(text) > 60 else text
