"""Access to arrays of any pytree by path: nested dicts, `FrozenDict`, `nnx.State`, dataclasses, lists.

    Path = ("bases", "body")    the keys, field names and list indices on the way to an array, as strings
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optax
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path, tree_map_with_path

from shared_basis.nn.types import Array, Path, Tree

_BOX = GetAttrKey("value")
"""The last key to the array in an `nnx.Variable` or in Linen's `Partitioned`; omitted from paths here."""


def path_of(entries: tuple[Any, ...]) -> Path:
    """Returns the path for JAX's key entries, as passed by `jax.tree_util.tree_map_with_path`."""
    if len(entries) > 1 and entries[-1] == _BOX:
        entries = entries[:-1]
    return tuple(keystr((entry,), simple=True) for entry in entries)


def leaves_by_path(tree: Tree) -> dict[Path, Any]:
    """Returns the leaves of `tree` by path, in tree order."""
    return {path_of(entries): leaf for entries, leaf in tree_leaves_with_path(tree)}


def glob_matches(path: Path, glob: str) -> bool:
    """Returns whether `glob` matches `path`, key by key; ** matches any number of keys, including none."""
    return _matches("/".join(path).split("/"), glob.split("/"))


def _matches(keys: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not keys
    if pattern[0] == "**":
        return any(_matches(keys[start:], pattern[1:]) for start in range(len(keys) + 1))
    return bool(keys) and fnmatch.fnmatchcase(keys[0], pattern[0]) and _matches(keys[1:], pattern[1:])


def arrays_at(tree: Tree, paths: Iterable[Path]) -> dict[Path, Array]:
    """Returns the arrays of `tree` at `paths`, by path.

    Raises:
      KeyError: a path does not exist.
      ValueError: a path leads to a subtree rather than an array.
    """
    leaves = leaves_by_path(tree)
    found = {}
    for path in paths:
        if path not in leaves:
            raise not_found(path, tree)
        found[path] = leaves[path]
    return found


def not_found(path: Path, tree: Tree) -> Exception:
    """Returns the exception for a `path` at which `tree` has no array."""
    leaves, name = leaves_by_path(tree), "/".join(path)
    below = ["/".join(known) for known in leaves if known[:len(path)] == path]
    if below:
        return ValueError(f"no basis at {name}: it holds {', '.join(below[:3])}{', …' * (len(below) > 3)}; name one "
                          f"array, as in BasisGroup({below[0]!r}), or all of them, as in BasisGroup({name + '/**'!r})")
    masked = tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) and path_of(entries) == path[:len(path_of(entries))]
           for entries, node in masked):
        return KeyError(f"no basis at {name}: a mask of optax.masked or optax.partition excludes it from the updates "
                        "of this link; include it in the mask")
    known = {known[:length] for known in leaves for length in range(len(known) + 1)}
    absent = next(path[:length] for length in range(len(path) + 1) if path[:length] not in known)
    return KeyError(f"no basis at {name}: the parameter tree has no {'/'.join(absent)}{nearest(name, leaves)}")


def nearest(name: str, leaves: Mapping[Path, Any]) -> str:
    """Returns the end of a message, with those `leaves` that could be bases and are similar to `name`."""
    names = ["/".join(path) for path, leaf in leaves.items() if getattr(leaf, "ndim", 0) > 1]
    close = difflib.get_close_matches(name, names, cutoff=0.4)
    if close:
        return f"; nearest: {', '.join(close)}"
    return f"; it has {', '.join(names[:3])}{', …' * (len(names) > 3)}" if names else "; it has no array that is one"


def replace_arrays(tree: Tree, arrays: Mapping[Path, Array]) -> Tree:
    """Returns `tree` with the given `arrays` replaced at their paths."""
    return tree_map_with_path(lambda entries, leaf: arrays.get(path_of(entries), leaf), tree)
