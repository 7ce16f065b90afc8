"""Random numbers of blocks in a loop: each block draws its own, and the gradient sees the same ones again."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shared_basis import StagedNetwork
from shared_basis.nn.ops import forms_for


class Masks(StagedNetwork):
    """Adds the weights of each of four blocks, some of them dropped."""

    def shareable(self) -> dict[str, tuple[int, dict[str, tuple[int, ...]]]]:
        return {}

    @nn.nowrap
    def block(self, first: bool, name: str) -> nn.Module:
        return Block(name=name)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        return self.apply_stages(images, {"stage1": (4, self.block)}, train)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, shared: Any, *, train: bool) -> jax.Array:
        weight = self.param("weight", nn.initializers.normal(), x.shape)
        return x + nn.Dropout(0.5, deterministic=not train)(weight)


def test_blocks_in_a_loop_drop_out_each_for_itself() -> None:
    images = jnp.ones((1, 4, 4, 2))
    loop, unrolled = (Masks(10, scan_blocks=scan_blocks) for scan_blocks in (True, False))
    variables = loop.init(jax.random.key(0), images, train=True)

    with forms_for("cpu"):
        y, pull = jax.vjp(lambda params: loop.apply({"params": params}, images, train=True,
                                                    rngs={"dropout": jax.random.key(1)}), variables["params"])
        kept = pull(jnp.ones_like(y))[0]["stage1"]  # 2 where a weight was kept, 0 where it was dropped
    masks = [np.asarray(block["weight"]) for block in kept.values()]
    assert len({mask.tobytes() for mask in masks}) == 4
    assert all(set(mask.flat) == {0, 2} for mask in masks)
    weights = [block["weight"] for block in variables["params"]["stage1"].values()]
    np.testing.assert_allclose(y, images + sum(mask * weight for mask, weight in zip(masks, weights, strict=True)),
                               rtol=1e-5)
    np.testing.assert_allclose(loop.apply(variables, images, train=False),
                               unrolled.apply(variables, images, train=False), rtol=1e-6)
