"""Records gradient norms by depth during training, in a link of an optax chain that leaves updates unchanged."""

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
"""The kinds of parameters whose gradients are recorded: all but batch normalisation and biases."""


class GradientNorms(NamedTuple):
    """Gradient norms, summed over the steps of the current epoch so far."""

    steps: Array
    """Number of summed steps, int32."""
    sums: Array
    """The sum for each of `recorded_paths`, float32 `[arrays]`."""


def recorded_paths(params: Tree) -> list[Path]:
    """Returns the paths of the recorded parameters, in the order of their norms."""
    labels = jax.tree_util.tree_flatten_with_path(label_parameters(params))[0]
    return [path_of(entries) for entries, label in labels if label in RECORDED]


def gradient_norms(gradient: Tree) -> Array:
    """Returns the norm of each recorded array of `gradient`, float32 `[arrays]`."""
    labels = jax.tree.leaves(label_parameters(gradient))
    return jnp.stack([optax.tree.norm(leaf) for leaf, label in zip(jax.tree.leaves(gradient), labels, strict=True)
                      if label in RECORDED])


def record_gradient_norms(steps: int) -> optax.GradientTransformation:
    """Returns the link that sums the norms of incoming updates in its state and returns them unchanged.

    As the first link of a chain, it receives the gradient itself. The sums are reset every `steps` updates.
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
    """Returns the norms in `opt_state`, averaged over its steps, by path such as 'group1/block2/first/unique'."""
    state = optax.tree.get(opt_state, GradientNorms.__name__)
    means = np.asarray(state.sums) / np.float32(state.steps)
    return dict(zip(map("/".join, recorded_paths(params)), map(float, means), strict=True))
