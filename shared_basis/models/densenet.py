"""DenseNet-121 for small images; the 3×3 layers of each dense block may share a filter basis."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from shared_basis.models.base import Network, PublishedNames, Tensors, check_rank, global_average, linear_head
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.types import Array, Dtype

INNER = 4
"""Channels between a dense layer's 1×1 and 3×3 convolutions, as a multiple of the growth rate."""

_PUBLISHED_TOP = {"stem": "conv1", "final_norm": "features.bn", "head": "linear", **{
    name: f"features.transition_layer_{index - 1}.down_sample.{position}" for index in (1, 2, 3)
    for position, name in enumerate((f"transition{index}_norm", f"transition{index}"))}}
_PUBLISHED_PLAIN = {name: f"residual_function.{index}" for name, index in (
    ("input_norm", 0), ("first", 2), ("first_norm", 3), ("second", 5))}
_PUBLISHED_BASIS = {"input_norm": "bn0", "first": "conv1", "first_norm": "bn1", "second/unique": "basis_conv2",
                    "second/norm": "basis_bn2", "second/coefficients": "coeff_conv2"}


class DenseLayer(nn.Module):
    """Appends `growth` channels: BN, ReLU, 1×1 (`first`), BN, ReLU, 3×3 (`second`), concatenated with the input."""

    growth: int
    unique_rank: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Array | None, *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H, W, C + growth]`; `shared` is the dense block's basis, if any."""
        y = nn.relu(batch_norm(train, self.dtype, "input_norm")(x))
        y = BasisConv(INNER * self.growth, 1, dtype=self.dtype, name="first")(y, train=train)
        y = nn.relu(batch_norm(train, self.dtype, "first_norm")(y))
        y = BasisConv(self.growth, unique_rank=self.unique_rank, dtype=self.dtype, name="second")(
            y, shared, train=train)
        return jnp.concatenate([x.astype(y.dtype), y], axis=-1)


class DenseBlock(nn.Module):
    """Dense layers, all of which may share a basis."""

    layers: int
    growth: int
    unique_rank: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Array | None, *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H, W, C + layers · growth]`."""
        for index in range(1, self.layers + 1):
            x = DenseLayer(self.growth, self.unique_rank, self.dtype, name=f"block{index}")(x, shared, train=train)
        return x


class DenseNet(Network):
    """DenseNet: a 3×3 stem, dense blocks (`group1`, …) with transitions between them, a final BN and ReLU.

    All layers of a dense block share its basis; ranks do not grow with depth.

    Raises:
      UserError: (on construction) the ranks exceed the dimension of the filter space.
    """

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    """Number of layers in each dense block."""
    growth: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("every dense block", self.sharing.shared_rank + self.sharing.unique_rank, 3, INNER * self.growth)

    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """See `Network`."""
        shape = (3, 3, INNER * self.growth, self.sharing.shared_rank)
        return {f"group{g + 1}": {name: shape for _, name in self.sharing.layers} for g in range(len(self.blocks))}

    def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
        """See `Network`."""
        return {f"group{g + 1}": tuple(f"block{b + 1}" for b in range(layers)) for g, layers in enumerate(self.blocks)}

    def basis_layers(self) -> tuple[str, ...]:
        """See `Network`."""
        return ("second",)

    def published_names(self) -> PublishedNames:
        """See `Network`."""
        return PublishedNames(_PUBLISHED_TOP, _PUBLISHED_PLAIN, _PUBLISHED_BASIS)

    def published_blocks(self, group: str, block: str) -> tuple[str, ...]:
        """See `Network`: the last block of the plain network has a different name pattern."""
        index, layer = int(group.removeprefix("group")) - 1, int(block.removeprefix("block")) - 1
        return (f"features.dense_block_layer_{index}.bottle_neck_layer_{layer}",
                f"features.dense_block{index}.bottle_neck_layer_{layer}")

    def choose_published(self, names: Sequence[str]) -> str:
        """See `Network`: the last block of the plain network has a different name."""
        last = not self.sharing.factorised and f".dense_block{len(self.blocks) - 1}." in names[-1]
        return names[-1] if last else names[0]

    def adapt_published(self, tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """See `Network`: sets the fourth block's basis to the third's, if the file comes from the official code.

        There, the fourth block uses the third block's basis; its own is in the file but unused.
        """
        used = tensors.get("features.dense_block_layer_3.bottle_neck_layer_0.shared_basis.weight")
        third, fourth = tensors.get("shared_basis_3.weight"), tensors.get("shared_basis_4.weight")
        if used is None or third is None or fourth is None or fourth.shape != third.shape or (
                not np.array_equal(used, third)):
            return dict(tensors), {}
        return {**tensors, "shared_basis_4.weight": third}, {}

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]`; returns float32 logits `[N, num_classes]`. See `ResNet`."""
        bases = self.shared_arrays()
        x = BasisConv(2 * self.growth, dtype=self.dtype, name="stem")(images, train=train)
        for g, layers in enumerate(self.blocks):
            group = f"group{g + 1}"
            if g:
                x = self._transition(x, g, train)
            shared = self.shared_by_layer(bases, group).get("second")
            x = DenseBlock(layers, self.growth, self.sharing.unique_rank, self.dtype, name=group)(
                x, shared, train=train)
        x = nn.relu(batch_norm(train, self.dtype, "final_norm")(x))
        return linear_head(self.num_classes, x.shape[-1])(global_average(x))

    def _transition(self, x: Array, index: int, train: bool) -> Array:
        """Halves channels, height and width: BN, 1×1, average pooling; without ReLU, as published."""
        x = batch_norm(train, self.dtype, f"transition{index}_norm")(x)
        x = BasisConv(x.shape[-1] // 2, 1, dtype=self.dtype, name=f"transition{index}")(x, train=train)
        return nn.avg_pool(x, (2, 2), (2, 2))
