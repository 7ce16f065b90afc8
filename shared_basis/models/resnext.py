"""ResNeXt (32 groups of width 4): bottleneck blocks whose grouped 3×3 layers may share filter bases.

With a basis, the coefficients of the 3×3 layer replace the last 1×1 layer, after a ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from shared_basis.errors import UserError
from shared_basis.models.base import PublishedNames, Sharing
from shared_basis.models.resnet import PUBLISHED_SHORTCUT, PUBLISHED_TOP, BottleneckBlock, ResNet
from shared_basis.optim.basis_group import BasisGroup

GROUPS = 32
GROUP_WIDTH = 4
"""Channels per group in the first stage; ranks are multiples of it."""

_PUBLISHED_PLAIN = {
    **{name: f"residual_function.{index}" for name, index in (
        ("first", 0), ("first_norm", 1), ("second", 3), ("second_norm", 4), ("third", 6), ("third_norm", 7))},
    **PUBLISHED_SHORTCUT}
_PUBLISHED_BASIS = {"first": "conv1", "first_norm": "bn1", "second/unique": "basis_conv2", "second/norm": "bn2",
                    "second/coefficients": "conv3", "third_norm": "bn3"}


class ResNeXt(ResNet):
    """ResNeXt-50 32×4d and variants, for small images.

    The shared basis of every group of blocks is a grouped convolution with s / 4 channel groups; the unique elements of
    group g have u · 2^g / 4.

    Raises:
      UserError: (on construction) a rank is not a multiple of 4, or does not divide the channels into groups.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (128, 256, 512, 1024)

    def __post_init__(self) -> None:
        for name, rank in (("shared", self.sharing.shared_rank), ("unique", self.sharing.unique_rank)):
            if rank % GROUP_WIDTH or (rank and self.widths[0] % (rank // GROUP_WIDTH)):
                raise UserError(f"{name} rank {rank}: ResNeXt's filters come in channel groups of {GROUP_WIDTH}, so a "
                                f"rank must be {GROUP_WIDTH} times a divisor of {self.widths[0]}: 4, 8, 16, 32, 64, ….")
        super().__post_init__()

    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """See `Network`: `[3, 3, C / groups, s · 2^g]`."""
        return {f"group{g + 1}": {name: (3, 3, width // self.shared_groups, self.sharing.shared_rank << g)
                                  for _, name in self.sharing.layers} for g, width in enumerate(self.widths)}

    def basis_layers(self) -> tuple[str, ...]:
        """See `Network`."""
        return ("second",)

    def basis_groups(self, elements: str = "shared") -> tuple[BasisGroup, ...]:
        """See `Network`.

        Raises:
          UserError: unique elements should be penalised, but have other channel groups than the shared ones.
        """
        unique_groups = {(self.sharing.unique_rank << g) // GROUP_WIDTH for g in range(len(self.widths))}
        if elements == "shared+unique" and self.sharing.layers and unique_groups - {0, self.shared_groups}:
            raise UserError(f"elements={elements!r}: the unique elements of this ResNeXt have other channel groups "
                            "than its shared ones, so that their products are undefined; set "
                            "--config.orthogonality.elements=shared.")
        return super().basis_groups(elements)

    def basis_is_linear(self) -> bool:
        """See `Network`: there is a ReLU between basis and coefficients."""
        return False

    def published_names(self) -> PublishedNames:
        """See `Network`."""
        return PublishedNames(PUBLISHED_TOP, _PUBLISHED_PLAIN, _PUBLISHED_BASIS)

    def choose_published(self, names: Sequence[str]) -> str:
        """See `Network`: the classifier has a different name than in other ResNets."""
        return names[-1] if names[-1].startswith("linear.") else names[0]

    @property
    def shared_groups(self) -> int:
        """Channel groups of every shared basis."""
        return self.sharing.shared_rank // GROUP_WIDTH or 1

    @property
    def stem_width(self) -> int:
        """Channels of the stem."""
        return self.widths[0] // 2

    @nn.nowrap  # the block becomes a submodule of the calling group
    def block(self, g: int, first: bool, name: str) -> nn.Module:
        """See `ResNet`."""
        width = self.widths[g]
        sharing = Sharing() if first else self.sharing
        unique_groups = (sharing.unique_rank << g) // GROUP_WIDTH or 1
        return BottleneckBlock(
            width, 2 if first and g else 1, sharing, sharing.unique_rank << g, outputs=2 * width, dtype=self.dtype,
            groups=unique_groups if sharing.factorised else GROUPS, shared_groups=self.shared_groups, name=name)
