"""Bases are found, penalised and kept orthonormal in any pytree, whatever its nodes are."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import shared_basis
from shared_basis import BasisConv
from shared_basis.config import Config, OptimizerConfig, OrthogonalityConfig
from shared_basis.errors import RenamedWarning
from shared_basis.models import create_model
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.labels import label_parameters
from shared_basis.optim.optimizer import make_optimizer
from shared_basis.optim.orthonormal import keep_orthonormal
from shared_basis.optim.penalty import add_orthogonality_penalty, orthogonality_diagnostics, orthogonality_penalty


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Parameters:
    bases: Any
    layer: Any


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"bases": {"body": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)},
            "layer": [{"unique": jnp.asarray(rng.normal(size=(18, 2)), jnp.float32)}, {"kernel": jnp.ones((2, 2))}]}


TREES = {
    "dicts": lambda tree: tree,
    "FrozenDict": freeze,
    "nnx.State": lambda tree: nnx.State(jax.tree.map(nnx.Param, {**tree, "layer": dict(enumerate(tree["layer"]))})),
    "dataclass": lambda tree: Parameters(**tree),
    "partitioned": lambda tree: {**tree, "bases": {"body": nn.Partitioned(tree["bases"]["body"], (None,) * 4)}},
}
GROUPS = [BasisGroup(["bases/body"], [("layer", "0", "unique")])]


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> Any:
    return TREES[request.param](arrays())


def test_the_exact_method_works_in_any_tree_as_in_dicts(tree: Any) -> None:
    @jax.jit
    def step(params: Any) -> Any:
        config = Config(optimizer=OptimizerConfig(weight_decay=0.5), orthogonality=OrthogonalityConfig(method="exact"))
        optimizer = make_optimizer(config, GROUPS, lambda count: 0.1)
        gradient = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    changed = step(tree)
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    assert orthogonality_diagnostics(changed, GROUPS)["penalty"] < 1e-10
    for one, other in zip(jax.tree.leaves(changed), jax.tree.leaves(step(arrays())), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_penalty_works_in_any_tree_as_in_dicts(tree: Any) -> None:
    assert orthogonality_penalty(tree, GROUPS) == pytest.approx(orthogonality_penalty(arrays(), GROUPS))
    link = add_orthogonality_penalty(2.0, GROUPS)

    @jax.jit
    def update(params: Any) -> Any:
        return link.update(jax.tree.map(jnp.zeros_like, params), link.init(params), params)[0]
    assert jax.tree.structure(update(tree)) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(update(tree)), jax.tree.leaves(update(arrays())), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_labels_are_those_of_the_paths_in_any_tree(tree: Any) -> None:
    assert jax.tree.leaves(label_parameters(tree)) == ["basis", "basis", "kernel"]


@pytest.mark.slow
def test_the_state_of_an_nnx_module_with_a_basis_trains() -> None:
    class Model(nnx.Module):
        def __init__(self, key: jax.Array) -> None:
            self.basis = nnx.Param(jax.random.normal(key, (3, 3, 2, 4)))
            self.conv = nnx.bridge.ToNNX(BasisConv(3), rngs=nnx.Rngs(0)).lazy_init(
                jnp.ones((1, 4, 4, 2)), self.basis[...], train=True)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.conv(x, self.basis[...], train=True, mutable=["batch_stats"])

    model, groups = Model(jax.random.key(0)), [BasisGroup(["basis"])]
    optimizer = nnx.Optimizer(model, keep_orthonormal(groups, optax.sgd(0.1)), wrt=nnx.Param)
    gradient = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4, 4, 2)))**2))(model)
    optimizer.update(model, gradient)
    assert orthogonality_diagnostics(nnx.state(model, nnx.Param), groups)["penalty"] < 1e-6


def test_the_names_of_version_0_1_still_work_for_one_version() -> None:
    with pytest.warns(RenamedWarning, match="BasisGroup"):
        old = shared_basis.ElementSet
    assert old((("a", "b"),), family="kind") == BasisGroup(["a/b"], reduction_group="kind")
    model = create_model("resnet20-s4u1")
    with pytest.warns(RenamedWarning, match="basis_groups"):
        assert model.element_sets("shared+unique") == model.basis_groups("shared+unique")
