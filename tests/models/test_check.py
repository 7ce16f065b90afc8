"""Networks that do not compute what they declare are refused, by name and with what to do."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import user_error

from shared_basis import BasisConv, Network, Sharing, check_network
from shared_basis.config import ModelConfig
from shared_basis.models import registry
from shared_basis.models.summary import compare_with_plain

ONE = Sharing((("conv", "shared"),), shared_rank=3, unique_rank=1)
SHAPE = (8, 8, 3)


class Own(Network):
    """Two blocks that share a basis; each field makes one thing go wrong."""

    fault: str = ""

    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        if self.fault == "declares nothing":
            return {}
        names = ["basis"] if self.fault == "another name" else [name for _, name in self.sharing.layers]
        group = "bodies" if self.fault == "another group" else "body"
        return {group: dict.fromkeys(names, (3, 3, 4, self.sharing.shared_rank))}

    def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
        return {"body": ("block1", "block2")}

    def basis_layers(self) -> tuple[str, ...]:
        return ("conv",)

    def layer_path(self, group: str, block: str, layer: str) -> tuple[str, ...]:
        if self.fault == "another path":
            return super().layer_path(group, block, layer)
        return (f"{group}_{block}_{layer}",)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        shared = None if self.fault in ("no parameter", "declares nothing") else self.shared_arrays()
        basis = shared["body"]["shared"] if shared and self.fault != "forgotten" else None
        if self.fault == "has no effect":
            basis = jnp.zeros_like(basis)
        rank = 0 if self.fault == "no unique elements" else self.sharing.unique_rank
        if self.fault == "other variables":
            self.variable("cache", "seen", jnp.zeros, ())
        x = BasisConv(4, name="stem")(images, train=train)
        x = BasisConv(4, unique_rank=rank, name="body_block1_conv")(x, basis, train=train)
        basis = None if self.fault == "forgotten once" else basis
        x = BasisConv(4, unique_rank=rank, name="body_block2_conv")(x, basis, train=train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("sharing", [ONE, Sharing(ONE.layers, 3), Sharing(unique_rank=2), Sharing()])
def test_a_network_that_does_what_it_says_is_taken_wherever_its_layers_are(sharing: Sharing) -> None:
    check_network(Own(10, sharing), SHAPE)


@pytest.mark.parametrize(("fault", "parts"), [
    ("forgotten", ("declares bases/body/shared but its logits do not depend on it", "pass it to the layers")),
    ("has no effect", ("declares bases/body/shared but its logits do not depend on it",)),
    ("forgotten once", ("body_block2_conv, which has coefficients for 1", "pass it")),
    ("no parameter", ("declares bases/body/shared [3, 3, 4, 3]", "no such parameter", "call self.shared_arrays()")),
    ("declares nothing", ("should share shared, but shared_shapes() is empty",)),
    ("another name", ("declares body/basis", "layers share shared", "self.sharing.layers")),
    ("another group", ("group 'bodies'", "sharing_blocks() returns body")),
    ("another path", ("body/block1/conv", "layer_path(group, block, layer)", "Layers: body_block1_conv, body_bl")),
    ("no unique elements", ("unique elements", "body_block1_conv has none", "unique_rank=self.sharing.unique_rank")),
    ("other variables", ("variables of cache", "only updates params and batch_stats")),
])
def test_one_that_does_not_is_refused(fault: str, parts: tuple[str, ...]) -> None:
    with user_error("network Own ", *parts):
        check_network(Own(10, ONE, fault=fault), SHAPE)


def test_a_basis_that_is_forgotten_within_a_compiled_block_or_a_loop_is_found_too() -> None:
    class Block(nn.Module):
        uses: bool

        @nn.compact
        def __call__(self, x: jax.Array, basis: jax.Array) -> tuple[jax.Array, None]:
            return BasisConv(4, unique_rank=1, name="conv")(x, basis if self.uses else None, train=False), None

    class Lifted(Own):
        uses: bool = False
        lift: Any = None

        def basis_layers(self) -> tuple[str, ...]:
            return ("conv",) if self.sharing.layers else ()

        def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
            return {"body": ()}

        @nn.compact
        def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
            basis = self.shared_arrays()["body"]["shared"]
            x, _ = self.lift(Block)(self.uses)(nn.Conv(4, (1, 1))(images), basis)
            return nn.Dense(10)(x.mean((1, 2)))

    def scan(block: type[nn.Module]) -> Any:
        return nn.scan(block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True},
                       in_axes=nn.broadcast, length=3)
    shared_alone = Sharing(ONE.layers, 3)
    for lift in (nn.jit, nn.remat, scan):
        check_network(Lifted(10, shared_alone, uses=True, lift=lift), SHAPE)
        with user_error("do not depend on it"):
            check_network(Lifted(10, shared_alone, lift=lift), SHAPE)


def test_the_command_line_refuses_it_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register_network("own", Own)
    counts = compare_with_plain(ModelConfig("own-s3u1"), 10, SHAPE)
    assert counts["groups"]["bases/body"] == {"parameters": 108, "shared_parameters": 108, "macs": 0}
    assert counts["parameters"] == sum(row["parameters"] for row in counts["groups"].values())

    def forgetful(**fields: Any) -> Network:
        return Own(fault="forgotten", **fields)
    registry.register_network("forgetful", forgetful)
    with user_error("network Own declares bases/body/shared"):
        compare_with_plain(ModelConfig("forgetful-s3u1"), 10, SHAPE)
