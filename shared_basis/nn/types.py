"""Type aliases for signatures."""

from __future__ import annotations

from typing import Any

import jax

Array = jax.Array
Dtype = Any
Tree = Any
"""A pytree of arrays, such as nested dicts of parameters."""

Path = tuple[str, ...]
"""The keys on the way to a leaf of a tree (dict keys, field names, positions), as strings."""
