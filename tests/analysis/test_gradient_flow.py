"""Gradients by depth, against the network cut at its blocks, and the order of depth."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_images, tiny_network
from sample_networks import NETWORKS, random_variables

from shared_basis import BasisConv, Network
from shared_basis.analysis.gradient_flow import block_paths, by_depth, gradient_flow, layer_paths
from shared_basis.analysis.tables import render


def test_layers_come_in_the_order_of_the_computation() -> None:
    paths = ["/".join(path) for path in layer_paths(NETWORKS["densenet"], (8, 8, 3))]
    assert paths == ["stem", *(f"group1/block{block}/{layer}" for block in (1, 2) for layer in ("first", "second")),
                     "transition1", *(f"group2/block{block}/{layer}" for block in (1, 2, 3)
                                      for layer in ("first", "second")), "head"]
    network = tiny_network(blocks=(10,), scan_blocks=True)
    looped = ["/".join(path) for path in layer_paths(network, (8, 8, 1))]
    assert looped == ["stem", *(f"group1/block{block}/{layer}" for block in range(1, 11)  # 10 is not before 2
                                for layer in ("first", "second")), "head"]
    assert ["/".join(path) for path in block_paths(network, (8, 8, 1))] == [
        f"group1/block{block}" for block in range(1, 11)]
    assert by_depth(["b", "a"], {"a/kernel": 1, "bases/x/y": 1, "b/unique": 1, "b/coefficients": 1}) == [
        "b/coefficients", "b/unique", "a/kernel", "bases/x/y"]


class Chain(Network):
    """Two layers that share, in blocks of any name or in none."""

    nested: bool = True

    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {}

    def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
        return {"body": ("unit1", "unit2")}

    def basis_layers(self) -> tuple[str, ...]:
        return ("conv",)

    def layer_path(self, group: str, block: str, layer: str) -> tuple[str, ...]:
        return (group, block, "branch", layer) if self.nested else (f"{block}_{layer}",)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        if self.nested:
            x = Body(name="body")(x)
        else:
            for block in ("unit1", "unit2"):
                x = BasisConv(1, name=f"{block}_conv")(x)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for block in ("unit1", "unit2"):
            x = Unit(name=block)(x)
        return x


class Unit(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.Sequential([BasisConv(1, name="conv")], name="branch")(x)


@pytest.mark.parametrize("nested", [True, False])
def test_blocks_are_those_that_the_network_declares(nested: bool) -> None:
    network = Chain(2, nested=nested)
    params = random_variables(network, (2, 2, 1))["params"]
    blocks, parameters = gradient_flow(network)(params, {}, jnp.ones((1, 2, 2, 1)), jnp.zeros(1, jnp.int32))
    assert list(blocks) == (["body/unit1", "body/unit2"] if nested else [])
    assert len(parameters) == 3
    text = render({"model": "chain", "step": 1, "workdir": "", "sets": {}, "similarity": {}, "notes": [], "files": [],
                   "output": "", "gradient_flow": {"1": {"blocks": blocks, "parameters": parameters}}})
    assert ("gradient at the output of blocks" in text) == nested


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 10])  # in the alphabet 10 precedes 2
def test_gradients_at_blocks_are_those_of_the_network_cut_there(count: int) -> None:
    network = tiny_network(blocks=(count,), scan_blocks=True)
    pixels, labels = make_images(6)
    images = jnp.asarray(pixels / np.float32(255))
    variables = random_variables(network, images.shape[1:])
    params, stats = variables["params"], variables["batch_stats"]
    blocks, parameters = gradient_flow(network)(params, stats, images, labels)
    assert list(blocks) == [f"group1/block{number}" for number in range(1, count + 1)]

    def loss(params: Any) -> Any:
        logits, _ = network.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), labels])
    gradient = jax.jit(jax.grad(loss))(params)
    for path, norm in parameters.items():
        leaf = gradient
        for key in path.split("/"):
            leaf = leaf[key]
        assert norm == pytest.approx(float(np.linalg.norm(leaf)), rel=1e-4), path

    # The last block's output goes through the mean over pixels to the classifier: by hand.
    def head(features: Any) -> Any:
        logits = features.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(6), labels])

    @jax.jit
    def capture(variables: Any) -> Any:
        _, captured = network.clone(scan_blocks=False).apply(
            variables, images, train=True, mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name == f"block{count}")
        return captured["intermediates"]["group1"][f"block{count}"]["__call__"][0]
    by_image = np.asarray(jax.grad(head)(capture(variables))).reshape(6, -1)
    assert blocks[f"group1/block{count}"] == pytest.approx(np.sqrt((by_image**2).sum(1).mean()), rel=1e-4)
