"""EfficientNet-B0 (Tan & Le 2019, arXiv:1905.11946; torchvision's layout), whose blocks may share their 1×1 layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from shared_basis.models.base import (
    PublishedNames,
    Sharing,
    Tensors,
    global_average,
    linear_head,
    unexpected_tensors,
)
from shared_basis.models.stages import Kernels, StagedNetwork
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.initializers import orthonormal
from shared_basis.nn.types import Array, Dtype

STAGES = ((1, 16, 1, 3, 1), (2, 24, 2, 3, 6), (2, 40, 2, 5, 6), (3, 80, 2, 3, 6), (3, 112, 1, 5, 6), (4, 192, 2, 5, 6),
          (1, 320, 1, 3, 6))
"""By stage: blocks, output channels, stride of the first block, depthwise filter size and expansion (table 1)."""
STEM, NECK = 32, 1280
"""Channels of the stem and of the last 1×1 layer."""
SQUEEZE = 4
"""Ratio of a block's input channels to those between its layers `squeeze` and `excite`."""

_PUBLISHED_TOP = {"stem": "features.0.0", "stem_norm": "features.0.1", "neck": "features.8.0",
                  "neck_norm": "features.8.1", "head": "classifier.1"}
_PUBLISHED_BLOCK = {
    "first": "block.0.0", "first_norm": "block.0.1", "second": "block.1.0", "second_norm": "block.1.1",
    "squeeze": "block.2.fc1", "excite": "block.2.fc2", "third": "block.3.0", "third_norm": "block.3.1"}
_FIRST_BLOCK = {"block.0.0": "block.1.0", "block.0.1": "block.1.1", "block.1.fc1": "block.2.fc1",
                "block.1.fc2": "block.2.fc2", "block.2.0": "block.3.0", "block.2.1": "block.3.1"}
"""torchvision's module names in a block without expansion, and the corresponding names in one with expansion."""
_TIMM_TOP = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.8.0", "bn2": "features.8.1",
             "classifier": "classifier.1"}
_TIMM_BLOCK = {"conv_pw": "block.0.0", "bn1": "block.0.1", "conv_dw": "block.1.0", "bn2": "block.1.1",
               "se.conv_reduce": "block.2.fc1", "se.conv_expand": "block.2.fc2", "conv_pwl": "block.3.0",
               "bn3": "block.3.1"}
_TIMM_FIRST_BLOCK = {"conv_dw": "block.1.0", "bn1": "block.1.1", "se.conv_reduce": "block.2.fc1",
                     "se.conv_expand": "block.2.fc2", "conv_pw": "block.3.0", "bn2": "block.3.1"}


class MobileBlock(nn.Module):
    """1×1 expansion (`first`), depthwise layer (`second`), squeeze and excitation, 1×1 projection (`third`).

    Without an expansion there is no `first`. The input is added if shapes agree.
    """

    features: int
    strides: int
    kernel_size: int
    expansion: int
    sharing: Sharing = Sharing()
    unique_rank: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, features]`."""
        inner, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = nn.silu(self._pointwise("first", y, inner, shared, train))
        depthwise = BasisConv(inner, self.kernel_size, self.strides, feature_group_count=inner, dtype=self.dtype,
                              name="second")
        y = nn.silu(depthwise(y, train=train, then=batch_norm(train, self.dtype, "second_norm")))
        y = self._excited(y, x.shape[-1] // SQUEEZE, train)
        y = self._pointwise("third", y, self.features, shared, train)
        return x + y if self.strides == 1 and x.shape[-1] == self.features else y

    def _pointwise(self, layer: str, x: Array, features: int, shared: Mapping[str, Array], train: bool) -> Array:
        """Applies a 1×1 layer that may share, and its batch normalisation, to `x`."""
        conv = BasisConv(features, 1, unique_rank=self.unique_rank, whole_filters=self.sharing.whole_filters,
                         unique_init=orthonormal, dtype=self.dtype, name=layer)
        return conv(x, shared.get(layer), train, then=batch_norm(train, self.dtype, f"{layer}_norm"))

    def _excited(self, x: Array, channels: int, train: bool) -> Array:
        """Squeeze and excitation: scales the channels of `x` by factors from two 1×1 layers with `channels` between."""
        means = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        y = BasisConv(channels, 1, use_bias=True, dtype=self.dtype, name="squeeze")(means, train=train)
        y = BasisConv(x.shape[-1], 1, use_bias=True, dtype=self.dtype, name="excite")(nn.silu(y), train=train)
        return x * nn.sigmoid(y)


class EfficientNet(StagedNetwork):
    """EfficientNet-B0; in stages of at least three blocks, those after the first share the expansion, or both 1×1.

    Bases of these layers can be shared instead. Squeeze and excitation, depthwise filters and batch normalisation are
    per block. Stochastic depth, used in the published training, is not implemented.
    """

    dropout: float = 0.2
    """Dropout rate before the classifier, with the 'imagenet' stem."""
    stages: tuple[tuple[int, int, int, int, int], ...] = STAGES
    """As `STAGES`."""

    def shareable(self) -> dict[str, tuple[int, Kernels]]:
        """See `StagedNetwork`."""
        return {f"stage{s}": (blocks, {"first": (1, 1, width, expansion * width),
                                       "third": (1, 1, expansion * width, width)})
                for s, (blocks, width, _, _, expansion) in enumerate(self.stages, 1) if blocks > 2}

    def published_names(self) -> PublishedNames:
        """See `Network`."""
        return PublishedNames(_PUBLISHED_TOP, _PUBLISHED_BLOCK)

    def published_blocks(self, group: str, block: str) -> tuple[str, ...]:
        """See `Network`."""
        return (f"features.{group.removeprefix('stage')}.{int(block.removeprefix('block')) - 1}",)

    def adapt_published(self, tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """See `Network`: renames torchvision's first block, and all of timm's layout, to the names of other blocks."""
        modules = self._renamed_modules(timm="conv_stem.weight" in tensors)
        ours, found = set(modules.values()), {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            if module in ours:
                raise unexpected_tensors([name])
            found[f"{modules.get(module, module)}.{leaf}"] = tensor
        return found, {official: theirs for theirs, official in modules.items()}

    def restore_published(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """See `Network`: the inverse of `adapt_published` for torchvision's layout."""
        theirs = {official: module for module, official in self._renamed_modules(timm=False).items()}
        parts = ((name.rpartition("."), tensor) for name, tensor in tensors.items())
        return {f"{theirs.get(module, module)}.{leaf}": tensor for (module, _, leaf), tensor in parts}

    def _renamed_modules(self, timm: bool) -> dict[str, str]:
        """Returns our name for each module of timm's layout, or of torchvision's where it differs."""
        modules = dict(_TIMM_TOP) if timm else {}
        for s, (blocks, *_, expansion) in enumerate(self.stages, 1):
            with_expansion, without = (_TIMM_BLOCK, _TIMM_FIRST_BLOCK) if timm else ({}, _FIRST_BLOCK)
            for b in range(blocks):
                theirs = f"blocks.{s - 1}.{b}" if timm else f"features.{s}.{b}"
                modules |= {f"{theirs}.{name}": f"features.{s}.{b}.{official}" for name, official in (
                    with_expansion if expansion > 1 else without).items()}
        return modules

    @nn.nowrap  # the block becomes a submodule of the calling group
    def block(self, s: int, first: bool, name: str) -> nn.Module:
        """Returns a block of stage `s` (counted from 1): the plain first one, or one that shares."""
        _, features, strides, size, expansion = self.stages[s - 1]
        if first:
            return MobileBlock(features, strides, size, expansion, dtype=self.dtype, name=name)
        return MobileBlock(features, 1, size, expansion, self.sharing, self.unique_rank(f"stage{s}"), self.dtype,
                           name=name)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]`; returns float32 logits `[N, num_classes]`. See `ResNet`.

        With the 'imagenet' stem, training uses the random stream 'dropout'.
        """
        x = self.apply_stem(images, STEM, train, nn.silu)
        x = self.apply_stages(x, {f"stage{s}": (blocks, functools.partial(self.block, s))
                                  for s, (blocks, *_) in enumerate(self.stages, 1)}, train)
        neck = BasisConv(NECK, 1, dtype=self.dtype, name="neck")
        x = global_average(nn.silu(neck(x, train=train, then=batch_norm(train, self.dtype, "neck_norm"))))
        if self.stem == "imagenet":
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return linear_head(self.num_classes, x.shape[-1])(x)
