"""How large gradients are by depth, recorded while training by a link of an optax chain that changes nothing."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shared_basis.nn.types import Array, Path, Tree
from shared_basis.optim.labels import label_parameters
from shared_basis.optim.paths import path_of

RECORDED = ("basis", "coefficients", "kernel")
"""The kinds of parameters whose gradients are recorded: all but those of batch normalisation, and biases."""


class GradientNorms(NamedTuple):
    """Norms of gradients, summed over the steps of the running epoch so far."""

    steps: Array
    """Steps that are summed, int32."""
    sums: Array
    """One for each of `recorded_paths`, float32 `[arrays]`."""


def recorded_paths(params: Tree) -> list[Path]:
    """Returns the paths of the parameters that are recorded, in the order of their norms."""
    labels = jax.tree_util.tree_flatten_with_path(label_parameters(params))[0]
    return [path_of(entries) for entries, label in labels if label in RECORDED]


def gradient_norms(gradient: Tree) -> Array:
    """Returns the norm of each array of `gradient` that is recorded, float32 `[arrays]`."""
    labels = jax.tree.leaves(label_parameters(gradient))
    return jnp.stack([optax.tree.norm(leaf) for leaf, label in zip(jax.tree.leaves(gradient), labels, strict=True)
                      if label in RECORDED])


def record_gradient_norms(steps: int) -> optax.GradientTransformation:
    """Returns the link that sums the norms of the updates it is given, as they are, in its state.

    First in a chain it sees the gradient itself. Sums begin anew every `steps` updates.
    """
    def init(params: Tree) -> GradientNorms:
        return GradientNorms(jnp.zeros((), jnp.int32), jnp.zeros(len(recorded_paths(params))))

    def update(updates: Tree, state: GradientNorms, params: Tree = None) -> tuple[Tree, GradientNorms]:
        del params
        first = state.steps % steps == 0
        norms = gradient_norms(updates)
        return updates, GradientNorms(jnp.where(first, 1, state.steps + 1), jnp.where(first, norms, state.sums + norms))

    return optax.GradientTransformation(init, update)


def recorded_norms(params: Tree, opt_state: optax.OptState) -> dict[str, float]:
    """Returns by path, as 'group1/block2/first/unique', the norms that `opt_state` holds, averaged over its steps."""
    state = optax.tree.get(opt_state, GradientNorms.__name__)
    means = np.asarray(state.sums) / np.float32(state.steps)
    return dict(zip(map("/".join, recorded_paths(params)), map(float, means), strict=True))
