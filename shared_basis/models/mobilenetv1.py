"""MobileNet (Howard et al. 2017, arXiv:1704.04861); its identical blocks may share their 1×1 layer, or its basis."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from shared_basis.models.base import PublishedNames, Sharing, global_average, linear_head
from shared_basis.models.stages import Kernels, StagedNetwork
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.initializers import orthonormal
from shared_basis.nn.ops import relu_of_product
from shared_basis.nn.types import Array, Dtype

STAGES = ((1, 2, 1), (2, 4, 2), (2, 8, 2), (6, 16, 2), (2, 32, 2))
"""By stage: blocks, output channels relative to the stem, and stride of the first block (table 1).

The published table gives the last block stride 2 but 7×7 outputs; as in other implementations, it has stride 1.
"""
STEM = 32
"""Channels of the stem; the published width multiplier is relative to these."""

_PUBLISHED_TOP = {"stem": "conv_stem", "stem_norm": "bn1", "head": "classifier"}
_PUBLISHED_BLOCK = {"first": "conv_dw", "first_norm": "bn1", "second": "conv_pw", "second_norm": "bn2"}
"""Module names in timm's files."""


class SeparableBlock(nn.Module):
    """A 3×3 depthwise layer (`first`) and a 1×1 layer (`second`), each with batch normalisation and ReLU."""

    features: int
    strides: int = 1
    sharing: Sharing = Sharing()
    unique_rank: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, features]`."""
        depthwise = BasisConv(x.shape[-1], 3, self.strides, feature_group_count=x.shape[-1], dtype=self.dtype,
                              name="first")
        x = nn.relu(depthwise(x, train=train, then=batch_norm(train, self.dtype, "first_norm")))
        pointwise = BasisConv(self.features, 1, unique_rank=self.unique_rank, dtype=self.dtype, unique_init=orthonormal,
                              whole_filters=self.sharing.whole_filters, name="second")
        x = pointwise(x, shared.get("second"), train, then=batch_norm(train, self.dtype, "second_norm"))
        return relu_of_product(x) if self.sharing.factorised else nn.relu(x)


class MobileNetV1(StagedNetwork):
    """MobileNet 1.0; its five identical blocks of 512 channels share their 1×1 layer, or a basis of its filters.

    Depthwise filters and batch normalisation belong to each block.
    """

    width: int = STEM
    """Channels of the stem; those of all stages are proportional."""
    stages: tuple[tuple[int, int, int], ...] = STAGES
    """As `STAGES`."""

    def shareable(self) -> dict[str, tuple[int, Kernels]]:
        """See `StagedNetwork`."""
        return {f"stage{s}": (blocks, {"second": (1, 1, factor * self.width, factor * self.width)})
                for s, (blocks, factor, _) in enumerate(self.stages, 1) if blocks > 2}

    def published_names(self) -> PublishedNames:
        """See `Network`: timm's names; its `mobilenetv1_100` has ReLU6 where the paper has ReLU."""
        return PublishedNames(_PUBLISHED_TOP, _PUBLISHED_BLOCK)

    def published_blocks(self, group: str, block: str) -> tuple[str, ...]:
        """See `Network`."""
        return (f"blocks.{int(group.removeprefix('stage')) - 1}.{int(block.removeprefix('block')) - 1}",)

    @nn.nowrap  # the block becomes a submodule of the calling group
    def block(self, s: int, first: bool, name: str) -> nn.Module:
        """Returns a block of stage `s` (counted from 1): the plain first one, or one that shares."""
        _, factor, strides = self.stages[s - 1]
        if first:
            return SeparableBlock(factor * self.width, strides, dtype=self.dtype, name=name)
        return SeparableBlock(factor * self.width, sharing=self.sharing, unique_rank=self.unique_rank(f"stage{s}"),
                              dtype=self.dtype, name=name)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]`; returns float32 logits `[N, num_classes]`. See `ResNet`."""
        x = self.apply_stem(images, self.width, train)
        x = self.apply_stages(x, {f"stage{s}": (blocks, functools.partial(self.block, s))
                                  for s, (blocks, *_) in enumerate(self.stages, 1)}, train)
        return linear_head(self.num_classes, x.shape[-1])(global_average(x))
