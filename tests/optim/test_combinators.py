"""Penalty and exact orthogonality within optax's combinators, in each kind of tree, beside leaves of integers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from shared_basis import BasisGroup, add_orthogonality_penalty, keep_orthonormal
from shared_basis.optim.paths import arrays_at, path_of

TREES: dict[str, Callable[[Any], Any]] = {
    "dicts": lambda tree: tree, "FrozenDict": freeze,
    "nnx.State": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))}

GROUPS = [BasisGroup("bases/*", "**/unique")]
NAMED = [("bases", "body"), ("layer", "unique")]


def draw(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"bases": {"body": (3, 3, 2, 4)}, "layer": {"unique": (3, 3, 2, 2), "kernel": (2, 2)}}
    tree = jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes,
                        is_leaf=lambda node: isinstance(node, tuple))
    return {**tree, "table": jnp.zeros(2, jnp.int32)}


LINKS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "penalty": lambda weight: add_orthogonality_penalty(weight, GROUPS),
    "exact": lambda rate: keep_orthonormal(GROUPS, optax.sgd(rate))}


def labels(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda entries, _: "bases" if path_of(entries) in NAMED else "rest", tree)


COMBINATORS: dict[str, Callable[[Callable[[Any], optax.GradientTransformation]], Any]] = {
    "chain": lambda link: optax.chain(optax.identity(), link(0.5), optax.identity()),
    "masked": lambda link: optax.masked(link(0.5), lambda tree: jax.tree.map("bases".__eq__, labels(tree))),
    "partition": lambda link: optax.partition({"bases": link(0.5), "rest": optax.set_to_zero()}, labels),
    "MultiSteps": lambda link: optax.MultiSteps(link(0.5), 2),
    "inject_hyperparams": lambda link: optax.inject_hyperparams(link)(optax.constant_schedule(0.5)),
    "apply_if_finite": lambda link: optax.apply_if_finite(link(0.5), 3),
}


@functools.cache
def alone(method: str) -> dict[Any, np.ndarray]:
    """Returns the updates of the named arrays, in nested dicts, without a combinator."""
    params, link = draw(0), LINKS[method](0.5)
    return {path: np.asarray(array) for path, array in arrays_at(
        link.update(draw(1), link.init(params), params)[0], NAMED).items()}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("combinator", COMBINATORS)
@pytest.mark.parametrize("method", LINKS)
def test_updates_are_those_of_the_link_alone(method: str, combinator: str, tree: str) -> None:
    arrays = draw(0), draw(1)
    if combinator == "apply_if_finite":  # it refuses optax's own sgd, too, beside integers: that makes floats of them
        arrays = tuple({key: part for key, part in each.items() if key != "table"} for each in arrays)
    params, gradient = map(TREES[tree], arrays)
    optimizer = COMBINATORS[combinator](LINKS[method])
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(1 + (combinator == "MultiSteps")):
        updates, state = update(gradient, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for path, array in arrays_at(updates, NAMED).items():
        np.testing.assert_allclose(array, alone(method)[path], rtol=1e-5, atol=1e-6)
    optax.apply_updates(params, updates)  # integers, too


def test_the_penalty_adds_to_the_named_arrays_alone() -> None:
    params, gradient, link = draw(0), draw(1), LINKS["penalty"](0.5)
    gradient["table"] = np.zeros(2, jax.dtypes.float0)  # as jax.grad(…, allow_int=True) makes it
    updates, _ = link.update(gradient, link.init(params), params)
    assert updates["layer"]["kernel"] is gradient["layer"]["kernel"]
    assert updates["table"].dtype == jax.dtypes.float0
    assert not np.allclose(updates["layer"]["unique"], gradient["layer"]["unique"])


def test_the_weight_is_a_hyperparameter_that_a_user_sets() -> None:
    params, zeros = draw(0), jax.tree.map(jnp.zeros_like, draw(0))
    link = optax.inject_hyperparams(add_orthogonality_penalty)(weight=1.0, basis_groups=GROUPS)
    state = link.init(params)
    once, state = link.update(zeros, state, params)
    state.hyperparams["weight"] = jnp.asarray(3.0)
    thrice, _ = link.update(zeros, state, params)
    np.testing.assert_allclose(thrice["bases"]["body"], 3 * once["bases"]["body"], rtol=1e-6)
