"""The base of networks of stages, in which blocks after the first may share their 1×1 layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn

from shared_basis.models.base import Network, check_rank
from shared_basis.models.group import Group
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.types import Array

Kernels = Mapping[str, tuple[int, ...]]
"""The kernel shape `[*k, C / groups, T]` of each layer in a block."""


class StagedNetwork(Network):
    """A network of stages; in each of them, blocks after the first are identical and may share.

    Subclasses implement `shareable`, from which the methods of `Network` are derived.

    Raises:
      UserError: (on construction) the ranks exceed the dimension of the filter space.
    """

    stem: str = "cifar"
    """'imagenet' for large images; 'cifar' for small ones: the first layer has stride 1, and no pooling follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = self.sharing.shared_rank + self.sharing.unique_rank
        bounds = [(size**2 * channels >> g, group, size, channels, g)
                  for g, (group, (_, kernels)) in enumerate(self.shareable().items())
                  for size, _, channels, _ in kernels.values()]
        if bounds:
            _, group, size, channels, g = min(bounds)  # a rank within this one is within all
            check_rank(group, rank, size, channels, g)

    def shareable(self) -> dict[str, tuple[int, Kernels]]:
        """Returns, by stage, the number of blocks and the kernels that blocks after the first may share.

        Layers are in the order of sharing: `-shared` shares the first. Stages that cannot share, with at most two
        blocks, are absent.
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
        return tuple(next(iter(self.shareable().values()), (0, {}))[1])

    def basis_layers(self) -> tuple[str, ...]:
        """See `Network`."""
        return self.whole_layers()

    def one_basis(self) -> bool:
        """See `Network`."""
        return all(len({kernel[:-1] for kernel in kernels.values()}) == 1 for _, kernels in self.shareable().values())

    def unique_rank(self, stage: str) -> int:
        """Returns the number of unique elements of each factorised layer in `stage`."""
        stages = list(self.shareable())
        return self.sharing.unique_rank << stages.index(stage) if stage in stages else 0

    @nn.nowrap  # modules become submodules of the network
    def apply_stem(self, images: Array, features: int, train: bool,
                   activation: Callable[[Array], Array] = nn.relu) -> Array:
        """Applies the stem to `images`: a 3×3 convolution, with stride 2 for large images, BN and activation."""
        conv = BasisConv(features, 3, 1 if self.stem == "cifar" else 2, dtype=self.dtype, name="stem")
        return activation(conv(images, train=train, then=batch_norm(train, self.dtype, "stem_norm")))

    @nn.nowrap
    def apply_stages(self, x: Array, stages: Mapping[str, tuple[int, Callable[[bool, str], nn.Module]]],
                   train: bool) -> Array:
        """Applies `stages` to `x`; by name, the number of blocks and the block constructor (see `Group.make_block`)."""
        bases = self.shared_arrays()
        for stage, (blocks, make) in stages.items():
            x = Group(make, blocks, self.loops(blocks), name=stage)(x, self.shared_by_layer(bases, stage), train=train)
        return x
