"""Arrays of any pytree by their path: nested dicts, `FrozenDict`, `nnx.State`, dataclasses, lists.

    Path = ("bases", "body")    the keys on the way, names of fields and positions in lists as strings
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path, tree_map_with_path

from shared_basis.nn.types import Array, Path, Tree

_BOX = GetAttrKey("value")
"""The last key to an array that an `nnx.Variable`, or Linen's `Partitioned`, holds: no part of a path here."""


def path_of(entries: tuple[Any, ...]) -> Path:
    """Returns the path of JAX's key entries, as `jax.tree_util.tree_map_with_path` hands them out."""
    if len(entries) > 1 and entries[-1] == _BOX:
        entries = entries[:-1]
    return tuple(keystr((entry,), simple=True) for entry in entries)


def arrays_at(tree: Tree, paths: Iterable[Path]) -> dict[Path, Array]:
    """Returns the arrays of `tree` at `paths`, by path.

    Raises:
      KeyError: there is nothing at a path.
      ValueError: a path ends at a part of the tree that holds arrays, and not at one of them.
    """
    arrays = {path_of(entries): leaf for entries, leaf in tree_leaves_with_path(tree)}
    found = {}
    for path in paths:
        if path not in arrays:
            raise _not_found(path, arrays)
        found[path] = arrays[path]
    return found


def _not_found(path: Path, arrays: Iterable[Path]) -> Exception:
    below = ["/".join(known) for known in arrays if known[:len(path)] == path]
    name = "/".join(path)
    if below:
        return ValueError(f"no basis at {name}: it holds {', '.join(below[:3])}{', …' * (len(below) > 3)}; name one "
                          f"array, as in BasisGroup(shared=[{below[0]!r}])")
    known = {known[:length] for known in arrays for length in range(len(known) + 1)}
    absent = next(path[:length] for length in range(len(path) + 1) if path[:length] not in known)
    return KeyError(f"no basis at {name}: the parameter tree has no {'/'.join(absent)}")


def replace_arrays(tree: Tree, arrays: Mapping[Path, Array]) -> Tree:
    """Returns `tree` with the arrays of `arrays` in place of those at their paths; all else is the same."""
    return tree_map_with_path(lambda entries, leaf: arrays.get(path_of(entries), leaf), tree)
