"""Residual networks of basic blocks whose 3×3 layers may share filter bases (section 3.1 and 4 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from shared_basis.basis import (
    Array,
    BasisConv,
    Dtype,
    ElementSet,
    Path,
    batch_norm,
    check_rank,
    init_shared_bases,
)

LAYERS = ("first", "second")
"""The two 3×3 layers of a basic block."""
SINGLE = {"first": "shared", "second": "shared"}
"""Single sharing: which shared basis of the group each layer uses."""
DOUBLE = {"first": "first", "second": "second"}
"""Double sharing: one basis for the first layers, another for the second ones."""


def pytorch_uniform(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32, *, fan_in: int) -> Array:
    """Draws from PyTorch's default range of a linear layer, ±1/√fan_in, for its kernel and its bias alike."""
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def linear_head(num_classes: int, features: int, name: str = "head") -> nn.Dense:
    """Returns the float32 classifier `[N, features]` → `[N, num_classes]` with PyTorch's default initialisation."""
    def init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return pytorch_uniform(key, shape, dtype, fan_in=features)
    return nn.Dense(num_classes, kernel_init=init, bias_init=init, dtype=jnp.float32, name=name)


def zero_padded_shortcut(x: Array, features: int, strides: int) -> Array:
    """The parameter-free option-A shortcut: `x [N, H, W, C]` subsampled, zero channels added on both sides."""
    missing = features - x.shape[-1]
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class BasicBlock(nn.Module):
    """Two 3×3 layers with batch normalisation and a shortcut."""

    features: int
    strides: int = 1
    unique_rank: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, features]`.

        Args:
          shared: the shared basis of each of `LAYERS` that has one.
        """
        y = x
        for layer in LAYERS:
            conv = BasisConv(self.features, strides=self.strides if layer == "first" else 1,
                             unique_rank=self.unique_rank, dtype=self.dtype, name=layer)
            y = conv(y, shared.get(layer), train=train)
            y = batch_norm(train, self.dtype, f"{layer}_norm")(y)
            if layer == "first":
                y = nn.relu(y)
        return nn.relu(y + zero_padded_shortcut(x, self.features, self.strides))


class Group(nn.Module):
    """A residual group: a plain first block, whose stride and input width differ, then blocks that share."""

    features: int
    blocks: int
    strides: int = 1
    unique_rank: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, features]`; `shared` as in `BasicBlock`."""
        x = BasicBlock(self.features, self.strides, dtype=self.dtype, name="block1")(x, {}, train=train)
        for index in range(2, self.blocks + 1):
            block = BasicBlock(self.features, unique_rank=self.unique_rank, dtype=self.dtype, name=f"block{index}")
            x = block(x, shared, train=train)
        return x


class ResNet(nn.Module):
    """A residual network of basic blocks for small images, with filter bases shared within each group.

    The bases are a top-level parameter of their own, `bases/<group>/<basis>` of shape `[3, 3, C, s · 2^g]`, and are
    handed to the blocks as arguments.

    Raises:
      UserError: (when it is built) the ranks exceed the space of the filters.
    """

    blocks: tuple[int, ...]
    """Blocks in each group."""
    widths: tuple[int, ...]
    """Channels of each group."""
    num_classes: int
    shared_rank: int = 0
    """s of the first group; group g has s · 2^g."""
    unique_rank: int = 0
    """u of the first group; group g has u · 2^g."""
    double: bool = False
    """Double sharing: one basis for the first layers of the blocks and another for the second ones."""
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        for g, width in enumerate(self.widths):
            check_rank(f"group {g + 1}", (self.shared_rank + self.unique_rank) << g, 3, width)

    @property
    def sharing(self) -> Mapping[str, str]:
        """Which shared basis of its group each layer of a block uses; empty without shared elements."""
        return {} if not self.shared_rank else DOUBLE if self.double else SINGLE

    def _groups(self) -> Iterator[tuple[int, str]]:
        return ((g, f"group{g + 1}") for g in range(len(self.widths)))

    def _init_bases(self, key: Array) -> dict[str, dict[str, Array]]:
        names = sorted(set(self.sharing.values()))
        keys = jax.random.split(key, len(self.widths))
        return {group: init_shared_bases(keys[g], 3, self.widths[g], self.shared_rank << g, names)
                for g, group in self._groups()}

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Classifies `images [N, H, W, C]` (normalised floats); returns float32 logits `[N, num_classes]`.

        In training (`train=True`) batch statistics are used, and the collection `batch_stats` must be mutable.
        """
        bases = self.param("bases", self._init_bases) if self.sharing else {}
        x = BasisConv(self.widths[0], dtype=self.dtype, name="stem")(images, train=train)
        x = nn.relu(batch_norm(train, self.dtype, "stem_norm")(x))
        for g, group in self._groups():
            shared = {layer: bases[group][basis] for layer, basis in self.sharing.items()}
            x = Group(self.widths[g], self.blocks[g], strides=1 if g == 0 else 2, unique_rank=self.unique_rank << g,
                      dtype=self.dtype, name=group)(x, shared, train=train)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return linear_head(self.num_classes, x.shape[-1])(x)

    def element_sets(self, elements: str = "shared") -> tuple[ElementSet, ...]:
        """Names the basis elements of each group for the orthogonality penalty.

        Args:
          elements: 'shared' alone, or 'shared+unique' for the unique elements of every layer too.
        """
        sets = []
        for g, group in self._groups():
            shared: tuple[Path, ...] = tuple(("bases", group, basis) for basis in sorted(set(self.sharing.values())))
            unique: tuple[Path, ...] = ()
            if self.unique_rank and elements == "shared+unique":
                unique = tuple((group, f"block{b}", layer, "unique")
                               for b in range(2, self.blocks[g] + 1) for layer in LAYERS)
            if shared or unique:
                sets.append(ElementSet(shared, unique))
        return tuple(sets)
