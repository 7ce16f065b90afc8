"""Bases stacked by `nn.vmap`, `nn.scan` and `nnx.vmap`: each member as if it stood alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shared_basis import (
    BasisGroup,
    add_orthogonality_penalty,
    keep_orthonormal,
    orthogonality_diagnostics,
    orthogonality_penalty,
)

MEMBERS = 3


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def members(tree: Any, axis: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, index=index: np.moveaxis(np.asarray(leaf), axis, 0)[index], tree)
            for index in range(MEMBERS)]


def draw_tree(seed: int, axis: int) -> dict[str, np.ndarray]:
    shapes = {"first": (3, 3, 2, 4), "second": (3, 3, 2, 3), "one": (3, 3, 2, 2), "two": (3, 3, 2, 1)}
    return {name: np.moveaxis(draw(seed + len(name), MEMBERS, *shape), 0, axis) for name, shape in shapes.items()}


def compiled(function: Any, **options: Any) -> Any:
    """Returns `function` as one program, which compiles fast; operation by operation takes much longer."""
    return jax.jit(function, **options, compiler_options={"xla_backend_optimization_level": 0})


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """Basis groups as an argument of a compiled function."""

    groups: tuple[BasisGroup, ...]


@functools.partial(compiled, static_argnums=0)
def update(method: str, params: Any, gradient: Any, static: Static) -> Any:
    link = (add_orthogonality_penalty(2.0, static.groups, "sum") if method == "penalty"
            else keep_orthonormal(static.groups, optax.sgd(0.1)))
    return link.update(gradient, link.init(params), params)[0]


NAMES: dict[str, Any] = {"shared": ["first", "second"], "unique": ["one", "two"]}


@pytest.mark.parametrize("axis", [2, -1])
def test_the_penalty_of_an_ensemble_is_that_of_its_members(axis: int) -> None:
    params = draw_tree(0, axis)

    @compiled
    def measure(params: Any, static: Static) -> Any:
        return {"sum": orthogonality_penalty(params, static.groups, "sum"),
                **orthogonality_diagnostics(params, static.groups)}

    found = measure(params, Static((BasisGroup(**NAMES, stack_axis=axis),)))
    apart = [measure(one, Static((BasisGroup(**NAMES),))) for one in members(params, axis)]
    for name, together in (("sum", sum), ("penalty", np.mean), ("norm_min", min), ("norm_max", max),
                           ("norm_mean", np.mean), ("coherence", max)):
        np.testing.assert_allclose(found[name], together([each[name] for each in apart]), rtol=1e-5)


@pytest.mark.parametrize(("method", "axis"), [("penalty", 0), ("exact", -1)])
def test_updates_of_an_ensemble_are_those_of_its_members(method: str, axis: int) -> None:
    params, gradient = draw_tree(0, axis), draw_tree(10, axis)
    found = update(method, params, gradient, Static((BasisGroup(**NAMES, stack_axis=axis),)))
    for mine, *arrays in zip(*(members(each, axis) for each in (found, params, gradient)), strict=True):
        alone = update(method, *arrays, Static((BasisGroup(**NAMES),)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, alone)


def test_a_stack_of_unique_elements_beside_one_basis_is_that_of_the_layers_of_a_group() -> None:
    params = {"basis": draw(0, 3, 3, 2, 4), "scan": draw(1, 3, 3, 3, 2, 2), "last": draw(2, 1, 3, 3, 2, 1)}
    apart = {"basis": params["basis"], "last": params["last"][0], **{f"l{i}": params["scan"][i] for i in range(3)}}
    stacked = Static((BasisGroup("basis", ["scan", "last"], stack_axis=0),))
    listed = Static((BasisGroup("basis", ["l?", "last"]),))
    for method in ("penalty", "exact"):
        found, expected = update(method, params, params, stacked), update(method, apart, apart, listed)
        np.testing.assert_allclose(found["basis"], expected["basis"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["last"][0], expected["last"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["scan"], np.stack([expected[f"l{i}"] for i in range(3)]), rtol=1e-5, atol=1e-5)


def test_layers_alone_may_be_stacks_of_different_heights() -> None:
    params = {"a": draw(0, 2, 3, 3, 2, 2), "b": draw(1, 4, 3, 3, 5, 1)}
    rows = [layer.reshape(-1, layer.shape[-1]).T for stack in params.values() for layer in stack]
    expected = sum(np.sum((b @ b.T - np.eye(len(b)))**2) for b in rows)
    found = orthogonality_penalty(params, [BasisGroup([], ["a", "b"], stack_axis=0)], "sum")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"must have one size.*and stacks one height"):
        orthogonality_penalty({"a": params["a"], "b": params["a"][:1]}, [BasisGroup(["a", "b"], stack_axis=0)])


def test_kernels_of_three_and_of_one_spatial_axis() -> None:
    cube, line = draw(0, 3, 3, 3, 2, 4), draw(1, 3, 2, 4)
    for name, array, dims in (("cube", cube, 3), ("line", line, 1)):
        found = orthogonality_penalty({name: array}, [BasisGroup(name, num_spatial_dims=dims)], "sum")
        rows = array.reshape(-1, 4).T
        np.testing.assert_allclose(found, np.sum((rows @ rows.T - np.eye(4))**2), rtol=1e-5)
        with pytest.raises(ValueError, match="has more axes than a basis may have"):
            orthogonality_penalty({name: array[None]}, [BasisGroup(name, num_spatial_dims=dims)])


class Layer(nn.Module):
    """A basis and nothing to do with it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        basis = self.param("basis", nn.initializers.normal(), (3, 3, 2, 4))
        return x + jnp.sum(basis), None


def linen(lift: Any, **options: Any) -> Any:
    model = lift(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, **options)()
    return model.init(jax.random.key(0), jnp.zeros(MEMBERS))["params"]


def by_nnx() -> Any:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> nnx.Module:
        module = nnx.Module()
        module.basis = nnx.Param(jax.random.normal(key, (3, 3, 2, 4)))
        return module
    return nnx.state(make(jax.random.split(jax.random.key(0), MEMBERS)))


@pytest.mark.parametrize("make", [
    lambda: linen(nn.vmap, axis_size=MEMBERS), lambda: linen(nn.scan, length=MEMBERS, in_axes=()), by_nnx,
], ids=["nn.vmap", "nn.scan", "nnx.vmap"])
def test_what_flax_stacks_is_refused_and_with_its_axis_made_orthonormal(make: Any) -> None:
    params = make()
    with pytest.raises(ValueError, match=r"basis of shape \[3, 3, 3, 2, 4\] has more axes.*, stack_axis=0\)"):
        add_orthogonality_penalty(1.0, [BasisGroup("basis")]).init(params)
    updates = update("exact", params, params, Static((BasisGroup("basis", stack_axis=0),)))
    for basis in np.asarray(jax.tree.leaves(optax.apply_updates(params, updates))[0]):
        rows = basis.reshape(-1, 4).T
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)
