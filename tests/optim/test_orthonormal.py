"""Exact orthogonality: against singular value decompositions, the definition of the tangent space, and long runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, Watcher, read_arrays, read_metrics, tiny_network, user_error
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, OrthogonalityConfig, TrainConfig
from shared_basis.errors import RenamedWarning
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.optimizer import make_optimizer
from shared_basis.optim.orthonormal import keep_orthonormal, polar_factor, tangent
from shared_basis.optim.penalty import orthogonality_diagnostics
from shared_basis.training.train import train

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6))


def matrices(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Returns matrices of singular values between 0.02 and 2."""
    u, s, vh = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return (u * rng.uniform(0.02, 2, s.shape)[..., None, :]) @ vh


@settings(deadline=None, max_examples=5, derandomize=True)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_polar_factor_is_that_of_the_decomposition(shape: tuple[int, int], seed: int) -> None:
    stack = matrices(np.random.default_rng(seed), 3, *shape)
    u, _, vh = np.linalg.svd(stack, full_matrices=False)
    np.testing.assert_allclose(jax.jit(polar_factor)(jnp.asarray(stack, jnp.float32)), u @ vh, atol=3e-5)


@pytest.mark.parametrize(("shape", "least"), [((64, 576), 0.9), ((64, 64), 0.1), ((100, 64), 0.01)])
def test_polar_factor_of_large_matrices_is_orthonormal(shape: tuple[int, int], least: float) -> None:
    u, s, vh = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    found = np.float64(polar_factor(jnp.asarray(u * np.geomspace(least, 1, len(s)) @ vh, jnp.float32)))
    gram = found.T @ found if shape[0] > shape[1] else found @ found.T
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=2e-6)  # rounding does not add up over iterations,
    np.testing.assert_allclose(found, u @ vh, atol=2e-6 / least)  # which small singular values magnify in the factor


@settings(deadline=None, max_examples=4, derandomize=True)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_tangent_is_the_orthogonal_projection(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.asarray(jax.jit(polar_factor)(jnp.asarray(matrices(rng, *shape), jnp.float32)))
    z, other = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    along, rest = np.asarray(tangent(x, z)), np.asarray(tangent(x, other))
    gram = (lambda a, b: a.T @ b) if shape[0] > shape[1] else (lambda a, b: a @ b.T)
    np.testing.assert_allclose(gram(x, along) + gram(along, x), 0, atol=1e-4)  # it is tangent,
    np.testing.assert_allclose(tangent(x, along), along, atol=1e-4)  # stays what it is,
    assert abs(np.sum((z - along) * rest)) < 1e-3  # and what is taken away is orthogonal to all tangents


def test_the_gram_matrix_has_no_derivative_along_a_tangent() -> None:
    rng = np.random.default_rng(0)
    x = polar_factor(jnp.asarray(matrices(rng, 3, 7), jnp.float32))
    z = tangent(x, jnp.asarray(rng.normal(size=(3, 7)), jnp.float32))
    _, derivative = jax.jvp(lambda y: y @ y.T, (x,), (z,))
    np.testing.assert_allclose(derivative, 0, atol=1e-5)
    _, derivative = jax.jvp(lambda y: y @ y.T, (x,), (x,))
    assert np.abs(derivative).max() > 1  # away from the tangent space it has


SETS = (BasisGroup((("bases", "first"), ("bases", "second")), (("one", "unique"), ("two", "unique"))),
        BasisGroup((("wide",),)))
"""Two bases of 3 elements and two layers with 2 unique ones, in 27 dimensions; and 5 elements in 4."""


def random_tree(rng: np.random.Generator) -> dict[str, Any]:
    shapes = {"bases": {"first": (3, 3, 3, 3), "second": (3, 3, 3, 3)}, "one": {"unique": (3, 3, 3, 2)},
              "two": {"unique": (3, 3, 3, 2), "coefficients": (5, 4)}, "wide": (1, 1, 4, 5)}
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes,
                        is_leaf=lambda node: isinstance(node, tuple))


def rows(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1]).T


def assert_orthonormal(params: Any, atol: float = 1e-5) -> None:
    shared = [rows(params["bases"]["first"]), rows(params["bases"]["second"])]
    for layer in ("one", "two"):
        stacked = np.concatenate([*shared, rows(params[layer]["unique"])])
        np.testing.assert_allclose(stacked @ stacked.T, np.eye(8), atol=atol)
    frame = rows(params["wide"])
    np.testing.assert_allclose(frame.T @ frame, np.eye(4), atol=atol)


@pytest.mark.parametrize("optimizer", [pytest.param(optax.sgd(0.3, momentum=0.9), marks=pytest.mark.slow),
                                       pytest.param(optax.adam(0.05), marks=pytest.mark.slow)], ids=["sgd", "adam"])
def test_bases_stay_orthonormal_over_a_long_run_of_large_steps(optimizer: optax.GradientTransformation) -> None:
    rng = np.random.default_rng(0)
    params = random_tree(rng)
    chain = keep_orthonormal(SETS, optax.chain(optax.add_decayed_weights(0.1), optimizer))
    gradients = jax.tree.map(lambda leaf: rng.normal(size=(3000, *leaf.shape)).astype(np.float32), params)

    def step(carry: Any, gradient: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = chain.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None
    (after, _), _ = jax.jit(lambda *start: jax.lax.scan(step, start, gradients))(params, chain.init(params))
    assert_orthonormal(after)
    first = jax.tree.map(lambda leaf: leaf[0], gradients)
    (after_one, _), _ = step((params, chain.init(params)), first)
    assert_orthonormal(after_one)  # though it began anywhere
    np.testing.assert_allclose(  # what is not named is none of its business
        after_one["two"]["coefficients"], step_without(params, first, optimizer)["two"]["coefficients"], rtol=1e-6)


def step_without(params: Any, gradient: Any, optimizer: optax.GradientTransformation) -> Any:
    chain = optax.chain(optax.add_decayed_weights(0.1), optimizer)
    return optax.apply_updates(params, chain.update(gradient, chain.init(params), params)[0])


def test_a_small_step_goes_along_the_projected_gradient() -> None:
    rng = np.random.default_rng(1)
    chain = keep_orthonormal(SETS, optax.sgd(1e-3))
    params, update = random_tree(rng), jax.jit(chain.update)
    params = optax.apply_updates(params, update(jax.tree.map(jnp.zeros_like, params), chain.init(params), params)[0])
    gradient = random_tree(rng)
    updates, _ = update(gradient, chain.init(params), params)
    shared = np.concatenate([rows(params["bases"][name]) for name in ("first", "second")])
    direction = np.concatenate([rows(gradient["bases"][name]) for name in ("first", "second")])
    moved = np.concatenate([rows(updates["bases"][name]) for name in ("first", "second")])
    np.testing.assert_allclose(moved / -1e-3, tangent(shared, direction), atol=3e-2)  # to first order
    assert np.abs(moved / -1e-3 - direction).max() > 0.3  # which the gradient itself is not


def test_weight_decay_leaves_the_bases_alone() -> None:
    params = jax.tree.map(jnp.asarray, random_tree(np.random.default_rng(2)))
    params = {"bases": params["bases"], "layer": {"unique": params["one"]["unique"], "coefficients": jnp.ones((2, 2))}}
    elements = [BasisGroup((("bases", "first"),), (("layer", "unique"),))]
    config = Config(optimizer=OptimizerConfig(weight_decay=0.5), orthogonality=OrthogonalityConfig(method="exact"))
    optimizer = make_optimizer(config, elements, lambda step: 1.0)
    state = optimizer.init(params)
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    (momentum,) = [leaf.trace for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.TraceState))
                   if isinstance(leaf, optax.TraceState)]
    assert not np.any(momentum["bases"]["first"])
    assert not np.any(momentum["layer"]["unique"])
    for leaf, decayed in ((params["bases"]["second"], momentum["bases"]["second"]),
                          (params["layer"]["coefficients"], momentum["layer"]["coefficients"])):
        np.testing.assert_allclose(decayed, 0.5 * leaf, rtol=1e-6)  # the others decay as ever


def test_elements_that_cannot_all_be_orthogonal_are_refused() -> None:
    params = {"bases": {"first": np.ones((1, 1, 4, 3))}, "one": {"unique": np.ones((1, 1, 4, 2))}}
    sgd = optax.sgd(0.1)
    link = keep_orthonormal([BasisGroup((("bases", "first"),), (("one", "unique"),))], sgd)
    with user_error("3 shared elements and the 2 of one/unique", "4 dimensions", "elements=shared"):
        link.init(params)
    with pytest.raises(KeyError, match="no basis at bases/absent"):
        keep_orthonormal([BasisGroup((("bases", "absent"),))], sgd).init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        link.update(params, (sgd.init(params), optax.EmptyState()))
    with pytest.raises(ValueError, match="at least one basis"):
        keep_orthonormal([], sgd)
    with pytest.raises(TypeError, match=r"optimizer is a float: must be an optax transformation"):
        keep_orthonormal(SETS, 0.1)
    with pytest.raises(ValueError, match=r"the basis wide is named twice.*so name it in one"):
        keep_orthonormal([BasisGroup("wide"), BasisGroup("wide", reduction_group="b")], sgd).init({"wide": np.eye(4)})


def test_as_a_link_it_works_for_one_version_and_says_what_it_is_now() -> None:
    params = {"wide": np.float32([[3.0, 1.0], [0.0, 2.0], [1.0, 0.0]])}
    with pytest.warns(RenamedWarning, match=r"keep_orthonormal\(basis_groups, optimizer\)"):
        chain = optax.chain(optax.sgd(0.1), keep_orthonormal([BasisGroup("wide")]))
    new = keep_orthonormal([BasisGroup("wide")], optax.sgd(0.1))
    np.testing.assert_array_equal(*(each.update(params, each.init(params), params)[0]["wide"] for each in (chain, new)))
    assert jax.tree.structure(chain.init(params)) == jax.tree.structure(new.init(params))


def test_layers_of_different_unique_rank_are_each_orthonormal_and_apart_from_the_shared_elements() -> None:
    rng = np.random.default_rng(3)
    shapes = {"basis": (3, 3, 2, 3), "one": (3, 3, 2, 2), "two": (18, 4), "three": (3, 3, 2, 2)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    groups = [BasisGroup("basis", ["one", "two", "three"])]
    optimizer = keep_orthonormal(groups, optax.sgd(0.1))
    updates, _ = optimizer.update(jax.tree.map(np.ones_like, params), optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    for name in ("one", "two", "three"):
        stacked = np.concatenate([rows(after["basis"]), rows(after[name])])
        np.testing.assert_allclose(stacked @ stacked.T, np.eye(len(stacked)), atol=1e-5)
    assert np.abs(rows(after["one"]) @ rows(after["three"]).T).max() > 0.05  # layers need not be, with each other


CONFIG = Config(
    model=ModelConfig(name=TINY, dtype="bfloat16"), data=DataConfig(train_examples=44, test_examples=30, pad=1),
    orthogonality=OrthogonalityConfig(method="exact", elements="shared+unique"),
    optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine"),
    train=TrainConfig(epochs=4, batch_size=8, evaluate_every=2))


@pytest.mark.slow
def test_training_on_four_devices_keeps_bases_orthonormal(tmp_path: Path) -> None:
    assert jax.device_count() >= 4
    train(CONFIG, tmp_path, Watcher())
    for line in read_metrics(tmp_path):
        assert line["coherence"] < 1e-5
        assert (line["norm_min"], line["norm_max"]) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5))
    state = read_arrays(tmp_path, 20)
    groups = tiny_network(10).basis_groups("shared+unique")
    assert orthogonality_diagnostics(state["params"], groups)["penalty"] < 1e-11
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state["opt_state"]))
