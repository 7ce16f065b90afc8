"""What networks of stages have in common, whose blocks after the first may share their 1×1 layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn

from shared_basis.models.base import Group, Network, check_rank
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.types import Array

Kernels = Mapping[str, tuple[int, ...]]
"""By layer of a block, the shape `[*k, C / groups, T]` of its kernel."""


class StagedNetwork(Network):
    """A network of stages, in each of which the blocks after the first are alike, and may share.

    Its subclass answers one question, `shareable`; the answers to those of `Network` follow.

    Raises:
      UserError: (when it is built) the ranks exceed the space of the filters.
    """

    stem: str = "cifar"
    """'imagenet' for large images; for small ones, 'cifar', the first layer has stride 1 and no pooling follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for g, (group, (_, kernels)) in enumerate(self.shareable().items()):
            for size, _, channels, _ in kernels.values():
                check_rank(group, (self.sharing.shared_rank + self.sharing.unique_rank) << g, size, channels)

    def shareable(self) -> dict[str, tuple[int, Kernels]]:
        """Returns by stage how many blocks it has, and the kernels that those after the first have and may share.

        The layers are in the order in which they are shared: the first by `-shared`. Stages that share nothing are
        absent: two blocks and fewer.
        """
        raise NotImplementedError(f"{type(self).__name__} must define shareable(): see docs/extending.md")

    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """See `Network`."""
        return {group: {name: self.sharing.shape(kernels[layer], g) for layer, name in self.sharing.layers}
                for g, (group, (_, kernels)) in enumerate(self.shareable().items())}

    def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
        """See `Network`: all but the first."""
        return {group: tuple(f"block{b}" for b in range(2, blocks + 1))
                for group, (blocks, _) in self.shareable().items()}

    def whole_layers(self) -> tuple[str, ...]:
        """See `Network`."""
        return tuple(next(iter(self.shareable().values()))[1])

    def basis_layers(self) -> tuple[str, ...]:
        """See `Network`."""
        return self.whole_layers()

    def one_basis(self) -> bool:
        """See `Network`."""
        return all(len({kernel[:-1] for kernel in kernels.values()}) == 1 for _, kernels in self.shareable().values())

    def unique_rank(self, stage: str) -> int:
        """Returns how many unique elements each layer of `stage` has that is factorised."""
        stages = list(self.shareable())
        return self.sharing.unique_rank << stages.index(stage) if stage in stages else 0

    @nn.nowrap  # so that modules belong to the network's compact method
    def apply_stem(self, images: Array, features: int, train: bool,
                   activation: Callable[[Array], Array] = nn.relu) -> Array:
        """Returns what the stem makes of `images`: a 3×3 convolution, of stride 2 for large ones, BN, activation."""
        conv = BasisConv(features, 3, 1 if self.stem == "cifar" else 2, dtype=self.dtype, name="stem")
        return activation(conv(images, train=train, then=batch_norm(train, self.dtype, "stem_norm")))

    @nn.nowrap
    def apply_stages(self, x: Array, stages: Mapping[str, tuple[int, Callable[[bool, str], nn.Module]]],
                   train: bool) -> Array:
        """Maps `x` through `stages`, by name how many blocks each has and what makes one (see `Group.make_block`)."""
        bases = self.shared_arrays()
        for stage, (blocks, make) in stages.items():
            x = Group(make, blocks, self.loops(blocks), name=stage)(x, self.shared_by_layer(bases, stage), train=train)
        return x
