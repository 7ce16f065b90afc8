"""Residual networks whose layers may share filter bases within each group (sections 3.1 and 4 of the paper)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp

from shared_basis.models.base import Network, PublishedNames, Sharing, check_rank, global_average, linear_head
from shared_basis.models.group import Group
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.ops import relu_of_product
from shared_basis.nn.types import Array, Dtype

Shared = Mapping[str, Array]
"""The shared array of each layer in a block that uses one."""

EXPANSION = 4
"""Ratio of a bottleneck block's output channels to its width."""

PUBLISHED_TOP = {"stem": "conv1", "stem_norm": "bn1", "head": "fc|linear"}
PUBLISHED_SHORTCUT = {"shortcut": "shortcut.0|downsample.0", "shortcut_norm": "shortcut.1|downsample.1"}
PUBLISHED_BLOCK = {"first": "conv1", "first_norm": "bn1", "second": "conv2", "second_norm": "bn2", "third": "conv3",
                   "third_norm": "bn3", **PUBLISHED_SHORTCUT}
"""Module names in files of the official implementation and of torchvision; see `PublishedNames`."""
_PUBLISHED_BASIS = {
    "first/unique": "basis_conv1", "first/norm": "basis_bn1", "first/coefficients": "coeff_conv1",
    "second/unique": "basis_conv2", "second/norm": "basis_bn2", "second/coefficients": "coeff_conv2"}


def shortcut(x: Array, features: int, strides: int, project: bool, dtype: Dtype, train: bool) -> Array:
    """Returns the shortcut for a block's input `x [N, H, W, C]`; must be called within the block's compact method.

    The identity if shapes agree; otherwise a 1×1 convolution with batch normalisation (`project`), or the
    parameter-free option A: subsampling, with zero channels added on both sides.
    """
    missing = features - x.shape[-1]
    if strides == 1 and not missing:
        return x
    if project:
        x = BasisConv(features, 1, strides, dtype=dtype, name="shortcut")(x, train=train)
        return batch_norm(train, dtype, "shortcut_norm")(x)
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class BasicBlock(nn.Module):
    """Two 3×3 layers, `first` and `second`, with batch normalisation and a shortcut."""

    width: int
    strides: int = 1
    sharing: Sharing = Sharing()
    unique_rank: int = 0
    project: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, width]`."""
        y, relu = x, relu_of_product if self.sharing.factorised else nn.relu
        for layer, strides in (("first", self.strides), ("second", 1)):
            conv = BasisConv(self.width, strides=strides, unique_rank=self.unique_rank,
                             whole_filters=self.sharing.whole_filters, dtype=self.dtype, name=layer)
            y = conv(y, shared.get(layer), train, then=batch_norm(train, self.dtype, f"{layer}_norm"))
            if layer == "first":
                y = relu(y)
        return relu(y + shortcut(x, self.width, self.strides, self.project, self.dtype, train))


class BottleneckBlock(nn.Module):
    """A 1×1 layer to `width` channels, a 3×3 layer with the stride, and a 1×1 layer to 4 · `width` channels.

    They are named `first`, `second` and `third`. With `factorised` sharing (ResNeXt), the 3×3 layer is a basis
    convolution with ReLU inside, and the last 1×1 layer holds its coefficients.
    """

    width: int
    strides: int = 1
    sharing: Sharing = Sharing()
    unique_rank: int = 0
    groups: int = 1
    """Channel groups of the 3×3 layer, or of its unique elements."""
    shared_groups: int = 1
    """Channel groups of the shared elements of the 3×3 layer."""
    outputs: int = 0
    """Output channels; 0 means 4 · `width`."""
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, outputs]`."""
        outputs = self.outputs or EXPANSION * self.width
        y = self._conv("first", self.width, 1)(x, train=train)
        y = nn.relu(batch_norm(train, self.dtype, "first_norm")(y))
        if self.sharing.factorised:
            conv = BasisConv(outputs, unique_rank=self.unique_rank, feature_group_count=self.groups, activation=nn.relu,
                             shared_feature_group_count=self.shared_groups, dtype=self.dtype, name="second")
            y = conv(y, shared.get("second"), train=train)
        else:
            y = self._conv("second", self.width, 3)(y, shared.get("second"), train=train)
            y = nn.relu(batch_norm(train, self.dtype, "second_norm")(y))
            y = self._conv("third", outputs, 1)(y, shared.get("third"), train=train)
        y = batch_norm(train, self.dtype, "third_norm")(y)
        return nn.relu(y + shortcut(x, outputs, self.strides, True, self.dtype, train))

    def _conv(self, name: str, features: int, size: int) -> BasisConv:
        return BasisConv(features, size, self.strides if size == 3 else 1, dtype=self.dtype,
                         feature_group_count=self.groups if size == 3 else 1,
                         whole_filters=self.sharing.whole_filters, name=name)


class ResNet(Network):
    """A residual network; the blocks of each group share, except for the plain first one.

    Raises:
      UserError: (on construction) the ranks exceed the dimension of the filter space.
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    """Number of blocks in each group."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the 3×3 layers in each group."""
    stem: str = "cifar"
    """'cifar': 3×3; 'imagenet': 7×7 with stride 2, then max-pooling."""
    bottleneck: bool = False
    """Whether to use bottleneck blocks instead of basic ones."""
    project: bool = True
    """Whether to use projection shortcuts instead of option A."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for g, width in enumerate(self.widths):
            check_rank(f"group {g + 1}", self.sharing.shared_rank + self.sharing.unique_rank, 3, width, g)

    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """See `Network`."""
        def kernel(layer: str, width: int) -> tuple[int, ...]:
            return (1, 1, width, EXPANSION * width) if layer == "third" else (3, 3, width, width)
        return {f"group{g + 1}": {name: self.sharing.shape(kernel(layer, width), g)
                                  for layer, name in self.sharing.layers} for g, width in enumerate(self.widths)}

    def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
        """See `Network`."""
        return {f"group{g + 1}": tuple(f"block{b}" for b in range(2, blocks + 1))
                for g, blocks in enumerate(self.blocks)}

    def basis_layers(self) -> tuple[str, ...]:
        """See `Network`."""
        return ("first", "second")

    def whole_layers(self) -> tuple[str, ...]:
        """See `Network`: the 3×3 layer of a bottleneck block, and its last 1×1."""
        return ("second", "third")

    def published_names(self) -> PublishedNames:
        """See `Network`."""
        return PublishedNames(PUBLISHED_TOP, PUBLISHED_BLOCK, {**PUBLISHED_BLOCK, **_PUBLISHED_BASIS})

    def published_blocks(self, group: str, block: str) -> tuple[str, ...]:
        """See `Network`."""
        return (f"layer{group.removeprefix('group')}.{int(block.removeprefix('block')) - 1}",)

    def choose_published(self, names: Sequence[str]) -> str:
        """See `Network`: torchvision's names if it has this network, plain and for large images."""
        torchvision = self.stem == "imagenet" and self.sharing == Sharing()
        return names[-1] if torchvision and ".downsample." in names[-1] else names[0]

    @property
    def stem_width(self) -> int:
        """Channels of the stem."""
        return self.widths[0]

    @nn.nowrap  # the block becomes a submodule of the calling group
    def block(self, g: int, first: bool, name: str) -> nn.Module:
        """Returns a block of group `g` (counted from 0): the plain first one, or one that shares."""
        width, strides = self.widths[g], 2 if first and g else 1
        sharing = Sharing() if first else self.sharing
        if self.bottleneck:
            return BottleneckBlock(width, strides, sharing, dtype=self.dtype, name=name)
        return BasicBlock(width, strides, sharing, sharing.unique_rank << g, self.project, dtype=self.dtype, name=name)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]` (normalised floats); returns float32 logits `[N, num_classes]`.

        In training mode (`train=True`), batch statistics are used and the collection `batch_stats` must be mutable.
        """
        bases = self.shared_arrays()
        size, strides = (3, 1) if self.stem == "cifar" else (7, 2)
        x = BasisConv(self.stem_width, size, strides, dtype=self.dtype, name="stem")(images, train=train)
        x = nn.relu(batch_norm(train, self.dtype, "stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for g, blocks in enumerate(self.blocks):
            group = f"group{g + 1}"
            make = functools.partial(self.block, g)
            x = Group(make, blocks, self.loops(blocks), name=group)(x, self.shared_by_layer(bases, group), train=train)
        x = global_average(x)
        return linear_head(self.num_classes, x.shape[-1])(x)
