"""Kinds of the parameters of any tree, and masks of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shared_basis import BasisGroup, mask_by_kind, parameter_kinds

NORM = {"scale": "norm", "bias": "norm"}
FOREIGN: dict[str, Any] = {
    "filters": "basis", "bases": {"body": "basis"}, "BasisConv_0": {"unique": "basis", "coefficients": "coefficients",
                                                                  "norm": NORM},
    "Conv_0": {"kernel": "kernel", "bias": "bias"}, "BatchNorm_0": NORM, "Embed_0": {"embedding": "other"},
    "steps": "other",
}
"""A tree of nobody here, each parameter by its kind."""
GROUPS = [BasisGroup("filters")]


def params() -> dict[str, Any]:
    arrays = jax.tree.map(lambda _: jnp.ones((2, 2)), FOREIGN)
    return {**arrays, "steps": jnp.ones((), jnp.int32)}


def test_the_kind_of_every_parameter_of_a_tree_that_is_not_ours() -> None:
    assert parameter_kinds(params(), GROUPS) == FOREIGN
    assert parameter_kinds(params())["filters"] == "other"
    with pytest.raises(KeyError, match=r"no basis at filter:.*nearest: filters"):
        parameter_kinds(params(), [BasisGroup("filter")])


def test_the_kinds_in_an_nnx_module() -> None:
    module = nnx.List([nnx.Conv(2, 2, (1, 1), rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))])
    kinds = parameter_kinds(nnx.state(module, nnx.Param))
    assert sorted(jax.tree.leaves(kinds)) == ["bias", "kernel", "norm", "norm"]


@pytest.mark.parametrize("kinds", [("kernel",), ["basis", "norm"], {"other", "bias"}, ()])
def test_weights_of_the_named_kinds_decay(kinds: Any) -> None:
    link = optax.add_decayed_weights(0.5, mask=mask_by_kind(kinds, GROUPS))
    tree = params()
    updates, _ = link.update(jax.tree.map(jnp.zeros_like, tree), link.init(tree), tree)
    for kind, name, update in zip(*map(jax.tree.leaves, (FOREIGN, tree, updates)), strict=True):
        decays = kind in kinds and name.dtype == jnp.float32
        np.testing.assert_array_equal(update, 0.5 * name if decays else 0 * name)
    assert updates["steps"].dtype == jnp.int32


@pytest.mark.parametrize("kinds", ["kernel", ["kernels"]])
def test_kinds_that_there_are_not_are_refused(kinds: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of 'basis', 'coefficients', 'kernel', 'norm'"):
        mask_by_kind(kinds)
