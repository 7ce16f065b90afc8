"""MobileNetV2; the blocks of a stage may share their 1×1 expansions and projections, or bases of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

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
from shared_basis.models.resnet import PUBLISHED_BLOCK, shortcut
from shared_basis.models.stages import Kernels, StagedNetwork
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import EPSILON, batch_norm
from shared_basis.nn.initializers import orthonormal
from shared_basis.nn.types import Array, Dtype

STAGES = ((1, 16, 1, 1), (2, 24, 2, 6), (3, 32, 2, 6), (4, 64, 2, 6), (3, 96, 1, 6), (3, 160, 2, 6), (1, 320, 1, 6))
"""By stage: blocks, output channels, stride of the first block, and expansion."""
SHARING_STAGES = (3, 4, 5, 6)
"""The stages, counted from 1, in which blocks after the first share."""
STEM, NECK = 32, 1280
"""Channels of the stem and of the last 1×1 convolution."""

_PUBLISHED_TOP = {"stem": "pre.0", "stem_norm": "pre.1", "neck": "conv1.0", "neck_norm": "conv1.1",
                  "head": "conv2|classifier.1"}


class InvertedResidual(nn.Module):
    """1×1 expansion (`first`), 3×3 depthwise (`second`), 1×1 projection (`third`); no ReLU after the projection."""

    features: int
    strides: int
    expansion: int
    project: bool
    """Whether a block of stride 1 that changes the width has a 1×1 shortcut; otherwise it has no shortcut."""
    sharing: Sharing = Sharing()
    unique_rank: int = 0
    """The unique rank of each of the two 1×1 layers."""
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, features]`."""
        inner = self.expansion * x.shape[-1]
        y = x
        for layer, features, size in (("first", inner, 1), ("second", inner, 3), ("third", self.features, 1)):
            depthwise = layer == "second"
            y = BasisConv(features, size, self.strides if depthwise else 1, dtype=self.dtype,
                          unique_rank=0 if depthwise else self.unique_rank, unique_init=orthonormal,
                          feature_group_count=inner if depthwise else 1,
                          whole_filters=self.sharing.whole_filters, name=layer)(
                              y, shared.get(layer), train, then=batch_norm(train, self.dtype, f"{layer}_norm"))
            if layer != "third":
                y = nn.relu(y)
        if self.strides == 1 and (self.project or x.shape[-1] == self.features):
            y = y + shortcut(x, self.features, 1, True, self.dtype, train)
        return y


class MobileNetV2(StagedNetwork):
    """MobileNetV2; `-shared` shares the 1×1 expansion, `-shared++` also the 1×1 projection.

    With `s<S>u<U>`, which the paper does not include, each of the two has a basis shared across blocks.

    For small images, the stem is 1×1 with padding 1, stage 6 has stride 1, and shortcuts are projections. For large
    images, the stem is 3×3 with stride 2, and dropout precedes the classifier.
    """

    dropout: float = 0.2
    """Dropout rate before the classifier, with the 'imagenet' stem."""

    def shareable(self) -> dict[str, tuple[int, Kernels]]:
        """See `StagedNetwork`: the expansion, and the projection."""
        return {f"stage{s}": (blocks, {"first": (1, 1, width, expansion * width),
                                       "third": (1, 1, expansion * width, width)})
                for s, (blocks, width, _, expansion) in enumerate(STAGES, 1) if s in SHARING_STAGES}

    def published_names(self) -> PublishedNames:
        """See `Network`."""
        return PublishedNames(_PUBLISHED_TOP, PUBLISHED_BLOCK)

    def published_blocks(self, group: str, block: str) -> tuple[str, ...]:
        """See `Network`: the single block of a stage has no number in its name."""
        stage, index = int(group.removeprefix("stage")), int(block.removeprefix("block")) - 1
        return (f"stage{stage}" if STAGES[stage - 1][0] == 1 else f"stage{stage}.{index}",)

    def choose_published(self, names: Sequence[str]) -> str:
        """See `Network`: shared arrays, and the classifier for large images, have different names."""
        other = ".shared_basis" in names[-1] or (self.stem == "imagenet" and names[-1].startswith("classifier."))
        return names[-1] if other else names[0]

    def adapt_published(self, tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """See `Network`: converts the layouts of torchvision and timm to the official one.

        These lack the 1×1 layer in the first stage and biases before batch normalisation: adds identities and zeros.
        """
        for mark, modules in (("features.", self._torchvision_modules()), ("blocks.", self._timm_modules())):
            if not any(name.startswith(mark) for name in tensors):
                continue
            stem, neck = (theirs for theirs, official in modules.items() if official in ("pre.0", "conv1.0"))
            renamed = {}
            for name, tensor in tensors.items():
                module, _, leaf = name.rpartition(".")
                if module not in modules or name in (f"{stem}.bias", f"{neck}.bias"):
                    raise unexpected_tensors([name])
                renamed[f"{modules[module]}.{leaf}"] = tensor
            return {**renamed, **self._identity()}, {official: theirs for theirs, official in modules.items()}
        return dict(tensors), {}

    def restore_published(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """See `Network`: converts to torchvision's layout, unless the tensors that it lacks have been trained."""
        added = self._identity()
        if self.stem != "imagenet" or self.sharing != Sharing() or not all(
                np.array_equal(tensors[name], tensor) for name, tensor in added.items()):
            return dict(tensors)
        theirs = {official: name for name, official in self._torchvision_modules().items()}
        parts = ((name.rpartition("."), tensor) for name, tensor in tensors.items() if name not in added)
        return {f"{theirs[module]}.{leaf}": tensor for (module, _, leaf), tensor in parts if module in theirs}

    @staticmethod
    def _identity() -> dict[str, np.ndarray]:
        """Returns identity values for the tensors that the official layout has and torchvision's lacks."""
        ones, zeros = np.ones(STEM, np.float32), np.zeros(STEM, np.float32)
        return {"pre.0.bias": zeros, "conv1.0.bias": np.zeros(NECK, np.float32),
                "stage1.conv1.weight": np.eye(STEM, dtype=np.float32)[:, :, None, None],
                "stage1.bn1.weight": ones, "stage1.bn1.bias": zeros, "stage1.bn1.running_mean": zeros,
                "stage1.bn1.running_var": ones * (1 - EPSILON)}  # variance + ε is 1

    def _foreign_blocks(self) -> list[str]:
        """Returns the official names of the blocks after the first stage, in order."""
        return [self.published_blocks(f"stage{stage}", f"block{block}")[0]
                for stage, (count, *_) in enumerate(STAGES[1:], 2) for block in range(1, count + 1)]

    def _torchvision_modules(self) -> dict[str, str]:
        """Returns the official name of each module of torchvision's MobileNetV2."""
        modules = {"features.0.0": "pre.0", "features.0.1": "pre.1", "features.18.0": "conv1.0",
                   "features.18.1": "conv1.1", "classifier.1": "classifier.1",
                   "features.1.conv.0.0": "stage1.conv2", "features.1.conv.0.1": "stage1.bn2",
                   "features.1.conv.1": "stage1.conv3", "features.1.conv.2": "stage1.bn3"}
        for index, prefix in enumerate(self._foreign_blocks(), 2):
            for theirs, official in (("0.0", "conv1"), ("0.1", "bn1"), ("1.0", "conv2"), ("1.1", "bn2"),
                                     ("2", "conv3"), ("3", "bn3")):
                modules[f"features.{index}.conv.{theirs}"] = f"{prefix}.{official}"
        return modules

    def _timm_modules(self) -> dict[str, str]:
        """Returns the official name of each module of timm's mobilenetv2_100."""
        modules = {"conv_stem": "pre.0", "bn1": "pre.1", "conv_head": "conv1.0", "bn2": "conv1.1",
                   "classifier": "classifier.1", "blocks.0.0.conv_dw": "stage1.conv2", "blocks.0.0.bn1": "stage1.bn2",
                   "blocks.0.0.conv_pw": "stage1.conv3", "blocks.0.0.bn2": "stage1.bn3"}
        for official in self._foreign_blocks():
            stage, _, index = official.removeprefix("stage").partition(".")
            for theirs, ours in (("conv_pw", "conv1"), ("bn1", "bn1"), ("conv_dw", "conv2"), ("bn2", "bn2"),
                                 ("conv_pwl", "conv3"), ("bn3", "bn3")):
                modules[f"blocks.{int(stage) - 1}.{index or 0}.{theirs}"] = f"{official}.{ours}"
        return modules

    @nn.nowrap  # the block becomes a submodule of the calling group
    def block(self, s: int, first: bool, name: str) -> nn.Module:
        """Returns a block of stage `s` (counted from 1): the plain first one, or one that shares."""
        _, features, strides, expansion = STAGES[s - 1]
        if self.stem == "cifar" and s == 6:
            strides = 1
        sharing, rank = (Sharing(), 0) if first else (self.sharing, self.unique_rank(f"stage{s}"))
        return InvertedResidual(features, strides if first else 1, expansion, self.stem == "cifar", sharing, rank,
                                self.dtype, name=name)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]`; returns float32 logits `[N, num_classes]`. See `ResNet`.

        With the 'imagenet' stem, training uses the random stream 'dropout'.
        """
        size, strides = (1, 1) if self.stem == "cifar" else (3, 2)
        x = BasisConv(STEM, size, strides, padding=1, use_bias=True, dtype=self.dtype, name="stem")(images, train=train)
        x = nn.relu6(batch_norm(train, self.dtype, "stem_norm")(x))
        x = self.apply_stages(x, {f"stage{s}": (blocks, functools.partial(self.block, s))
                                  for s, (blocks, *_) in enumerate(STAGES, 1)}, train)
        x = BasisConv(NECK, 1, use_bias=True, dtype=self.dtype, name="neck")(x, train=train)
        x = global_average(nn.relu6(batch_norm(train, self.dtype, "neck_norm")(x)))
        if self.stem == "imagenet":
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return linear_head(self.num_classes, x.shape[-1])(x)
