"""ResNets as users of Flax would write them, from `nn.Conv` and `nn.BatchNorm`, for comparison with this package.

Their variables have the same paths and shapes as this package's networks, so that both can use the same values,
penalty and optimizer. A layer with a basis is one convolution with the concatenated shared and unique filters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from shared_basis.models import Network, create_model
from shared_basis.models.base import Sharing, global_average, linear_head
from shared_basis.models.group import Group
from shared_basis.models.resnet import ResNet
from shared_basis.nn.types import Array, Dtype


def _norm(train: bool, dtype: Dtype, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)


def _conv(features: int, size: int, strides: int, dtype: Dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), strides, padding=size // 2, use_bias=False, dtype=dtype, name=name)


def _convolve(x: Array, kernel: Array) -> Array:
    """Computes `nn.Conv` with a kernel that belongs to another module."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class StockBasisLayer(nn.Module):
    """A 3×3 layer with a filter basis: convolution, batch normalisation, coefficients."""

    features: int
    unique_rank: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, shared: Array | None, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H, W, features]`."""
        init = nn.initializers.he_normal()
        filters = [] if shared is None else [shared]
        if self.unique_rank:
            filters.insert(0, self.param("unique", init, (3, 3, x.shape[-1], self.unique_rank)))
        joined = jnp.concatenate(filters, axis=-1).astype(self.dtype)
        y = _norm(train, self.dtype, "norm")(_convolve(x, joined))
        coefficients = self.param("coefficients", init, (y.shape[-1], self.features)).astype(self.dtype)
        return _convolve(y, coefficients[None, None])


class StockBlock(nn.Module):
    """Two 3×3 layers and a shortcut."""

    width: int
    strides: int
    sharing: Sharing
    unique_rank: int
    project: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, width]`."""
        y = x
        for layer, strides in (("first", self.strides), ("second", 1)):
            if self.sharing.factorised:
                y = StockBasisLayer(self.width, self.unique_rank, self.dtype, name=layer)(y, shared.get(layer), train)
            else:
                y = _conv(self.width, 3, strides, self.dtype, layer)(y)
            y = _norm(train, self.dtype, f"{layer}_norm")(y)
            y = nn.relu(y) if layer == "first" else y
        missing = self.width - x.shape[-1]
        if self.project and (missing or self.strides > 1):
            x = _conv(self.width, 1, self.strides, self.dtype, "shortcut")(x)
            x = _norm(train, self.dtype, "shortcut_norm")(x)
        elif missing or self.strides > 1:
            x = jnp.pad(x[:, ::self.strides, ::self.strides],
                        ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        return nn.relu(y + x)


class StockResNet(ResNet):
    """A `ResNet` of basic blocks in stock modules; ownership of the bases and the penalty are inherited."""

    @nn.nowrap
    def block(self, g: int, first: bool, name: str) -> nn.Module:
        """See `ResNet`."""
        sharing = Sharing() if first else self.sharing
        return StockBlock(self.widths[g], 2 if first and g else 1, sharing, sharing.unique_rank << g, self.project,
                          self.dtype, name=name)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """See `ResNet`."""
        bases = self.shared_arrays()
        size, strides = (3, 1) if self.stem == "cifar" else (7, 2)
        x = _conv(self.stem_width, size, strides, self.dtype, "stem")(images)
        x = nn.relu(_norm(train, self.dtype, "stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for g, blocks in enumerate(self.blocks):
            group = f"group{g + 1}"
            make = functools.partial(self.block, g)
            x = Group(make, blocks, name=group)(x, self.shared_by_layer(bases, group), train=train)
        x = global_average(x)
        return linear_head(self.num_classes, x.shape[-1])(x)


def has_stock(network: str) -> bool:
    """Returns whether `network` has a version in stock modules: ResNets of basic blocks, plain or with filter bases.

    Raises:
      UserError: there is no such network.
    """
    return _is_written(create_model(network))


def _is_written(ours: Network) -> bool:
    return type(ours) is ResNet and not ours.bottleneck and (ours.sharing == Sharing() or ours.sharing.factorised)


def make_stock(ours: Network) -> Network:
    """Returns the network `ours` in stock modules.

    Raises:
      ValueError: there is no such version.
    """
    if not _is_written(ours):
        raise ValueError(f"{type(ours).__name__} with {ours.sharing} has no version in stock modules; see has_stock")
    fields = (field.name for field in dataclasses.fields(ours) if field.init and field.name not in ("parent", "name"))
    return StockResNet(**{name: getattr(ours, name) for name in fields})
