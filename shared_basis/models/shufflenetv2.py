"""ShuffleNet V2 (Ma et al. 2018, arXiv:1807.11164; torchvision's layout), whose units may share their 1×1 layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from shared_basis.errors import UserError
from shared_basis.models.base import PublishedNames, Sharing, global_average, linear_head
from shared_basis.models.shufflenetv1 import UNITS, channel_shuffle, named_stages, pool_stem
from shared_basis.models.stages import Kernels, StagedNetwork
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.initializers import orthonormal
from shared_basis.nn.ops import relu_of_product
from shared_basis.nn.types import Array, Dtype

_PUBLISHED_TOP = {"stem": "conv1.0", "stem_norm": "conv1.1", "neck": "conv5.0", "neck_norm": "conv5.1", "head": "fc"}
_PUBLISHED_BLOCK = {
    "first": "branch2.0", "first_norm": "branch2.1", "second": "branch2.3", "second_norm": "branch2.4",
    "third": "branch2.5", "third_norm": "branch2.6", "shortcut_depthwise": "branch1.0",
    "shortcut_depthwise_norm": "branch1.1", "shortcut": "branch1.2", "shortcut_norm": "branch1.3"}


class ShuffleUnitV2(nn.Module):
    """1×1 (`first`), 3×3 depthwise (`second`) and 1×1 (`third`) layers on half of the channels, then a shuffle.

    The other half is passed through. A unit of stride 2 maps its whole input to both halves: to one by the three
    layers, to the other by a 3×3 depthwise and a 1×1 layer (`shortcut_depthwise` and `shortcut`).
    """

    features: int
    strides: int = 1
    sharing: Sharing = Sharing()
    unique_rank: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, features]`."""
        half = self.features // 2
        if self.strides == 1:
            kept, y = x[..., :half], x[..., half:]
        else:
            kept = self._conv("shortcut_depthwise", x, x.shape[-1], train, depthwise=True)
            kept, y = nn.relu(self._conv("shortcut", kept, half, train)), x
        relu = relu_of_product if self.sharing.factorised else nn.relu
        y = relu(self._conv("first", y, half, train, shared.get("first")))
        y = self._conv("second", y, half, train, depthwise=True)
        y = relu(self._conv("third", y, half, train, shared.get("third")))
        return channel_shuffle(jnp.concatenate([kept.astype(y.dtype), y], axis=-1), 2)

    def _conv(self, name: str, x: Array, features: int, train: bool, shared: Array | None = None,
              depthwise: bool = False) -> Array:
        """Applies a convolution and its batch normalisation to `x`."""
        size, strides, groups = (3, self.strides, features) if depthwise else (1, 1, 1)
        conv = BasisConv(features, size, strides, feature_group_count=groups, dtype=self.dtype, name=name,
                         unique_rank=self.unique_rank if name in ("first", "third") else 0,
                         unique_init=orthonormal, whole_filters=self.sharing.whole_filters)
        return conv(x, shared, train, then=batch_norm(train, self.dtype, f"{name}_norm"))


class ShuffleNetV2(StagedNetwork):
    """ShuffleNet V2; in each stage, units after the first share the first 1×1 layer, or both, or bases of them.

    Raises:
      UserError: (on construction) a width is odd, or see `StagedNetwork`.
    """

    widths: tuple[int, ...] = (116, 232, 464)
    """Output channels of each stage."""
    units: tuple[int, ...] = UNITS
    """Units of each stage."""
    stem_width: int = 24
    neck: int = 1024
    """Channels of the last 1×1 layer."""

    def __post_init__(self) -> None:
        if any(width % 2 for width in self.widths):
            raise UserError(f"width {self.widths[0]}: the units of ShuffleNet V2 halve it; choose an even width.")
        super().__post_init__()

    def shareable(self) -> dict[str, tuple[int, Kernels]]:
        """See `StagedNetwork`."""
        return {stage: (units, dict.fromkeys(("first", "third"), (1, 1, width // 2, width // 2)))
                for stage, (units, width) in named_stages(self.units, self.widths).items() if units > 2}

    def published_names(self) -> PublishedNames:
        """See `Network`."""
        return PublishedNames(_PUBLISHED_TOP, _PUBLISHED_BLOCK)

    def published_blocks(self, group: str, block: str) -> tuple[str, ...]:
        """See `Network`."""
        return (f"{group}.{int(block.removeprefix('block')) - 1}",)

    @nn.nowrap  # the unit becomes a submodule of the calling group
    def block(self, stage: str, width: int, first: bool, name: str) -> nn.Module:
        """Returns a unit of `stage`: the plain first one, or one that shares."""
        if first:
            return ShuffleUnitV2(width, 2, dtype=self.dtype, name=name)
        return ShuffleUnitV2(width, 1, self.sharing, self.unique_rank(stage), self.dtype, name=name)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]`; returns float32 logits `[N, num_classes]`. See `ResNet`."""
        x = pool_stem(self.apply_stem(images, self.stem_width, train), self.stem)
        x = self.apply_stages(x, {stage: (units, functools.partial(self.block, stage, width)) for stage, (units, width)
                                  in named_stages(self.units, self.widths).items()}, train)
        neck = BasisConv(self.neck, 1, dtype=self.dtype, name="neck")
        x = nn.relu(neck(x, train=train, then=batch_norm(train, self.dtype, "neck_norm")))
        return linear_head(self.num_classes, x.shape[-1])(global_average(x))
