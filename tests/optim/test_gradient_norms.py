"""The link that records norms of gradients: of which parameters, and their means over the steps of an epoch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shared_basis.optim.gradient_norms import (
    GradientNorms,
    gradient_norms,
    record_gradient_norms,
    recorded_norms,
    recorded_paths,
)

TREE = {"stem": {"kernel": jnp.array([3.0, 4.0])}, "stem_norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "bases": {"group1": {"first": jnp.full((2, 2), 2.0)}},
        "group1": {"block2": {"first": {"unique": jnp.array([1.0]), "coefficients": jnp.array([[6.0, 8.0]])}}}}
NAMES = ["bases/group1/first", "group1/block2/first/coefficients", "group1/block2/first/unique", "stem/kernel"]


def test_norms_are_those_of_bases_coefficients_and_kernels() -> None:
    assert ["/".join(path) for path in recorded_paths(TREE)] == NAMES
    np.testing.assert_allclose(gradient_norms(TREE), [4, 10, 1, 5])


def test_the_link_changes_nothing_and_averages_over_the_steps_of_an_epoch() -> None:
    chain = optax.chain(record_gradient_norms(3), optax.scale(-0.1))
    state = chain.init(TREE)
    for factor in (1.0, 2.0, 6.0, 5.0):
        updates, state = chain.update(jax.tree.map(lambda leaf, factor=factor: factor * leaf, TREE), state, TREE)
        jax.tree.map(lambda a, b, factor=factor: np.testing.assert_allclose(a, -0.1 * factor * b), updates, TREE)
        if factor == 6:  # the third
            assert recorded_norms(TREE, state) == pytest.approx(dict(zip(NAMES, (12, 30, 3, 15), strict=True)))
    assert recorded_norms(TREE, state) == pytest.approx(dict(zip(NAMES, (20, 50, 5, 25), strict=True)))  # a new epoch
    assert isinstance(state[0], GradientNorms)
