"""Arrays of any pytree by their path: nested dicts, `FrozenDict`, `nnx.State`, dataclasses, lists.

    Path = ("bases", "body")    the keys on the way, names of fields and positions in lists as strings
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
"""The last key to an array that an `nnx.Variable`, or Linen's `Partitioned`, holds: no part of a path here."""


def path_of(entries: tuple[Any, ...]) -> Path:
    """Returns the path of JAX's key entries, as `jax.tree_util.tree_map_with_path` hands them out."""
    if len(entries) > 1 and entries[-1] == _BOX:
        entries = entries[:-1]
    return tuple(keystr((entry,), simple=True) for entry in entries)


def leaves_by_path(tree: Tree) -> dict[Path, Any]:
    """Returns the leaves of `tree` by path, in its order."""
    return {path_of(entries): leaf for entries, leaf in tree_leaves_with_path(tree)}


def glob_matches(path: Path, glob: str) -> bool:
    """Returns whether `glob` matches `path`, key by key; ** stands for any number of keys, none too."""
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
      KeyError: there is nothing at a path.
      ValueError: a path ends at a part of the tree that holds arrays, and not at one of them.
    """
    leaves = leaves_by_path(tree)
    found = {}
    for path in paths:
        if path not in leaves:
            raise not_found(path, tree)
        found[path] = leaves[path]
    return found


def not_found(path: Path, tree: Tree) -> Exception:
    """Returns what is raised where `tree` has no array at `path`."""
    leaves, name = leaves_by_path(tree), "/".join(path)
    below = ["/".join(known) for known in leaves if known[:len(path)] == path]
    if below:
        return ValueError(f"no basis at {name}: it holds {', '.join(below[:3])}{', …' * (len(below) > 3)}; name one "
                          f"array, as in BasisGroup({below[0]!r}), or all of them, as in BasisGroup({name + '/**'!r})")
    masked = tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) and path_of(entries) == path[:len(path_of(entries))]
           for entries, node in masked):
        return KeyError(f"no basis at {name}: a mask of optax.masked or optax.partition leaves it out of what this "
                        "link is given; put it into the mask")
    known = {known[:length] for known in leaves for length in range(len(known) + 1)}
    absent = next(path[:length] for length in range(len(path) + 1) if path[:length] not in known)
    return KeyError(f"no basis at {name}: the parameter tree has no {'/'.join(absent)}{nearest(name, leaves)}")


def nearest(name: str, leaves: Mapping[Path, Any]) -> str:
    """Returns the end of a message that names those of `leaves` that may be bases and were perhaps meant by `name`."""
    names = ["/".join(path) for path, leaf in leaves.items() if getattr(leaf, "ndim", 0) > 1]
    close = difflib.get_close_matches(name, names, cutoff=0.4)
    if close:
        return f"; nearest: {', '.join(close)}"
    return f"; it has {', '.join(names[:3])}{', …' * (len(names) > 3)}" if names else "; it has no array that is one"


def replace_arrays(tree: Tree, arrays: Mapping[Path, Array]) -> Tree:
    """Returns `tree` with the arrays of `arrays` in place of those at their paths; all else is the same."""
    return tree_map_with_path(lambda entries, leaf: arrays.get(path_of(entries), leaf), tree)
