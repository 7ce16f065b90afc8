"""ShuffleNet (Zhang et al. 2018, arXiv:1707.01083), whose units may share their grouped 1×1 layers within a stage."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp

from shared_basis.models.base import Sharing, global_average, linear_head
from shared_basis.models.stages import Kernels, StagedNetwork
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.types import Array, Dtype

UNITS = (4, 8, 4)
"""Units of stages 2, 3 and 4; the stem is stage 1, as published."""
WIDTHS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
"""Output channels of stage 2 by number of channel groups; they double with each stage (table 1)."""
STEM = 24
"""Channels of the stem."""
BOTTLENECK = 4
"""Ratio of a unit's output channels to those of its depthwise layer."""


def channel_shuffle(x: Array, groups: int) -> Array:
    """Interleaves the channels of `x [..., C]`: the first of each of `groups` groups, then the second of each, …."""
    apart = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.swapaxes(apart, -1, -2).reshape(x.shape)


def pool_stem(x: Array, stem: str) -> Array:
    """Applies the 3×3 max-pooling with stride 2 that follows the stem for large images to `x [N, H, W, C]`."""
    return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)]) if stem == "imagenet" else x


def named_stages(units: Sequence[int], widths: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Returns units and output channels of each stage by name, starting with 'stage2'."""
    return {f"stage{s}": each for s, each in enumerate(zip(units, widths, strict=True), 2)}


class ShuffleUnit(nn.Module):
    """A grouped 1×1 layer (`first`), a shuffle, a 3×3 depthwise layer (`second`), a grouped 1×1 layer (`third`).

    The input is added; in a unit of stride 2 it is pooled and concatenated.
    """

    features: int
    groups: int
    first_groups: int
    """Channel groups of the first layer."""
    strides: int = 1
    sharing: Sharing = Sharing()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, features]`."""
        inner = self.features // BOTTLENECK
        outputs = self.features if self.strides == 1 else self.features - x.shape[-1]
        y, kept = x, x
        for layer, features, size, strides, groups in (
                ("first", inner, 1, 1, self.first_groups), ("second", inner, 3, self.strides, inner),
                ("third", outputs, 1, 1, self.groups)):
            conv = BasisConv(features, size, strides, feature_group_count=groups, shared_feature_group_count=groups,
                             whole_filters=self.sharing.whole_filters, dtype=self.dtype, name=layer)
            y = conv(y, shared.get(layer), train, then=batch_norm(train, self.dtype, f"{layer}_norm"))
            if layer == "first":
                y = channel_shuffle(nn.relu(y), self.groups)
        if self.strides == 1:
            return nn.relu(y + kept)
        kept = nn.avg_pool(kept, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return nn.relu(jnp.concatenate([kept.astype(y.dtype), y], axis=-1))


class ShuffleNetV1(StagedNetwork):
    """ShuffleNet 1×; in each stage, units after the first share the first 1×1 layer, or both.

    Layers are grouped, so filters are vectors of C / groups numbers; the penalty compares all of them, as in ResNeXt.
    There is no form with a basis, as coefficients would mix the groups.
    """

    groups: int = 3
    """Channel groups of the 1×1 layers, one of `WIDTHS`."""
    widths: tuple[int, ...] = ()
    """Output channels of each stage; empty for the published ones."""
    units: tuple[int, ...] = UNITS
    """Units of each stage."""

    def stages(self) -> dict[str, tuple[int, int]]:
        """Returns units and output channels of each stage by name."""
        return named_stages(self.units, self.widths or [WIDTHS[self.groups] << s for s in range(len(self.units))])

    def shareable(self) -> dict[str, tuple[int, Kernels]]:
        """See `StagedNetwork`."""
        def kernel(channels: int, features: int) -> tuple[int, ...]:
            return (1, 1, channels // self.groups, features)
        return {stage: (units, {"first": kernel(width, width // BOTTLENECK),
                                "third": kernel(width // BOTTLENECK, width)})
                for stage, (units, width) in self.stages().items() if units > 2}

    def basis_layers(self) -> tuple[str, ...]:
        """See `Network`."""
        return ()

    @nn.nowrap  # the unit becomes a submodule of the calling group
    def block(self, stage: str, width: int, first: bool, name: str) -> nn.Module:
        """Returns a unit of `stage`: the plain first one, or one that shares.

        The first unit of the network has few input channels, so its first layer is not grouped.
        """
        if first:
            groups = 1 if stage == "stage2" else self.groups
            return ShuffleUnit(width, self.groups, groups, 2, dtype=self.dtype, name=name)
        return ShuffleUnit(width, self.groups, self.groups, 1, self.sharing, self.dtype, name=name)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]`; returns float32 logits `[N, num_classes]`. See `ResNet`."""
        x = pool_stem(self.apply_stem(images, STEM, train), self.stem)
        x = self.apply_stages(x, {stage: (units, functools.partial(self.block, stage, width))
                                  for stage, (units, width) in self.stages().items()}, train)
        return linear_head(self.num_classes, x.shape[-1])(global_average(x))
