"""The names of types that signatures use throughout."""

from __future__ import annotations

from typing import Any

import jax

Array = jax.Array
Dtype = Any
Tree = Any
"""A pytree of arrays, such as nested dicts of parameters."""

Path = tuple[str, ...]
"""The keys on the way to a leaf of a tree: of dicts, names of fields, or positions, as strings."""
