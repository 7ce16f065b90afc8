"""Initialisers of kernels and bases."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.nn import initializers

from shared_basis.nn.types import Array

he_normal_fan_out = initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialisation with fan-out (k²T), as published."""
he_normal_templates = initializers.variance_scaling(
    2.0, "fan_out", "normal", in_axis=-3, out_axis=-2, batch_axis=(-1,))
"""He initialisation for each template of `[k, k, C, T, templates]`."""
orthonormal = initializers.orthogonal()
"""Orthonormal elements along the last axis; a tight frame if there are more elements than dimensions."""


def init_shared_bases(key: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Draws shared bases with orthonormal elements (Kang & Kim, section 3.2): of one group, or of a network.

    If all bases have one shape (double sharing), they are one orthonormal set as long as the filter space can hold it;
    otherwise each is orthonormal by itself. A basis with more elements than dimensions is drawn as a tight frame.

    Args:
      shapes: `[k, k, C, elements]` by name.

    Returns:
      A float32 array of each shape, by name.
    """
    names = sorted(shapes)
    *space, rank = shapes[names[0]]
    if len(set(shapes.values())) == 1 and len(names) * rank <= math.prod(space):
        joint = orthonormal(key, (*space, len(names) * rank), jnp.float32)
        return dict(zip(names, jnp.split(joint, len(names), axis=-1), strict=True))
    keys = jax.random.split(key, len(names))
    return {name: orthonormal(k, shapes[name], jnp.float32) for name, k in zip(names, keys, strict=True)}
