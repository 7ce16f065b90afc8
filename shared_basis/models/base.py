"""The base of all networks: sharing, ownership of the shared arrays, the classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shared_basis.errors import UserError, note_renamed
from shared_basis.nn.initializers import he_normal_fan_out, he_normal_templates, init_shared_bases
from shared_basis.nn.ops import prefers_loops
from shared_basis.nn.types import Array, Dtype, Path
from shared_basis.optim.basis_group import BasisGroup

MANY_BLOCKS = 9
"""Minimum number of plain blocks for a loop on CPU (ResNet-110 gains a fifth; a loop over 5 blocks is 8 % slower)."""


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How the blocks of a group share, except for the first block. The default is a plain network."""

    layers: tuple[tuple[str, str], ...] = ()
    """Pairs of a block's layer and the group's shared array that it uses."""
    shared_rank: int = 0
    """s: elements of each shared basis in the first group; 0 if whole filters or templates are shared."""
    unique_rank: int = 0
    """u: unique elements of each layer in the first group."""
    templates: int = 0
    """Number of template kernels per group, if layers combine templates."""
    orthonormal: bool = True
    """Whether the shared arrays are bases: initialised orthonormal, and penalised."""
    separate_means: bool = False
    """Whether the penalty is averaged over each kind of array separately, and the means are added."""

    @property
    def whole_filters(self) -> bool:
        """Whether layers use the shared filters directly."""
        return bool(self.layers) and not self.shared_rank and not self.templates

    @property
    def factorised(self) -> bool:
        """Whether layers have a basis, shared or unique."""
        return bool(self.shared_rank or self.unique_rank)

    def shape(self, kernel: tuple[int, ...], g: int = 0) -> tuple[int, ...]:
        """Returns the shape of the array that layers with kernels `[*k, C / groups, T]` share in group `g`, from 0.

        Bases have s · 2^g elements; whole filters and templates have the shape of the layer's kernel.
        """
        if self.templates:
            return (*kernel, self.templates)
        return (*kernel[:-1], self.shared_rank << g or kernel[-1])


Tensors = Mapping[str, np.ndarray]
"""A PyTorch state dict."""


@dataclasses.dataclass(frozen=True)
class PublishedNames:
    """Module names in published PyTorch state dicts; '|' separates the names in different versions."""

    top: Mapping[str, str]
    """Names of top-level modules, such as 'stem'."""
    plain: Mapping[str, str]
    """Names of modules within a plain block, or within one that shares whole filters."""
    factorised: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of modules, 'layer/unique' and 'layer/coefficients', within a block whose layers have a basis."""


def unexpected_tensors(names: Iterable[str]) -> UserError:
    """Returns the error for tensors of a state dict that the network does not have."""
    return UserError(f"unexpected tensors: {', '.join(sorted(names))}.")


class Network(nn.Module):
    """Base class of all networks; owns the shared arrays as top-level parameters `bases/<group>/<name>`.

    Architectures override methods: always `shared_shapes`, `sharing_blocks` and `basis_layers`; if the defaults do not
    apply, `layer_path`, `whole_layers`, `one_basis`, `basis_is_linear` and the names in published files.
    `models.stages.StagedNetwork` implements most of them for networks of stages; `models.check.check_network` verifies
    them against the network's computation.
    """

    num_classes: int
    sharing: Sharing = Sharing()
    dtype: Dtype = jnp.float32
    """Compute type."""
    scan_blocks: bool | None = None
    """Whether identical blocks of a group are computed in a loop; None chooses by network and backend."""

    def loops(self, blocks: int) -> bool:
        """Returns whether a group of `blocks`, of which the first one differs, is computed in a loop."""
        if self.scan_blocks is None:
            return prefers_loops() and (self.sharing.factorised or blocks >= MANY_BLOCKS)
        return self.scan_blocks

    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Returns the shape of each shared array by group and name; groups that share nothing are absent."""
        raise NotImplementedError(f"{type(self).__name__} must define shared_shapes(): see docs/extending.md")

    def sharing_blocks(self) -> dict[str, tuple[str, ...]]:
        """Returns, by group, the names of the blocks that share or have a basis."""
        raise NotImplementedError(f"{type(self).__name__} must define sharing_blocks(): see docs/extending.md")

    def basis_layers(self) -> tuple[str, ...]:
        """Returns the layers of these blocks that are factorised if the network is."""
        raise NotImplementedError(f"{type(self).__name__} must define basis_layers(): see docs/extending.md")

    def layer_path(self, group: str, block: str, layer: str) -> Path:
        """Returns the parameter path of `layer` in a block of `sharing_blocks`."""
        return (group, block, layer)

    def basis_layer_paths(self) -> dict[str, dict[Path, str]]:
        """Returns, by group, the paths of the layers that are factorised if the network is, with the layers' names."""
        layers = self.basis_layers()
        return {group: {self.layer_path(group, block, layer): layer for block in blocks for layer in layers}
                for group, blocks in self.sharing_blocks().items()}

    def whole_layers(self) -> tuple[str, ...]:
        """Returns the layers of a block whose filters can be shared as a whole: `-shared` shares the first, others all.

        Empty if the network supports neither.
        """
        return ()

    def one_basis(self) -> bool:
        """Returns whether the filters of `basis_layers` have one size within a group, so that a single basis suffices.

        Otherwise each layer name has its own basis (or templates), shared across blocks.
        """
        return True

    def basis_is_linear(self) -> bool:
        """Returns whether factorised layers are linear in their basis elements and can be fitted in closed form."""
        return True

    def published_names(self) -> PublishedNames:
        """Returns the module names in published PyTorch state dicts.

        Raises:
          UserError: there are no published weights.
        """
        raise UserError(f"{type(self).__name__} has no published weights.")

    def published_blocks(self, group: str, block: str) -> tuple[str, ...]:
        """Returns the possible names of a block in published PyTorch state dicts."""
        raise NotImplementedError

    def adapt_published(self, tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Converts a published state dict to the layout of `published_names`, if it has another layout.

        Returns:
          The tensors by name, and the original name of each renamed module.

        Raises:
          UserError: the state dict contains a tensor that the network does not have.
        """
        return dict(tensors), {}

    def choose_published(self, names: Sequence[str]) -> str:
        """Selects one of a tensor's `names`, which differ between versions, for writing a state dict."""
        return names[0]

    def restore_published(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """Converts a state dict with `published_names` to the layout that `adapt_published` accepts, if possible."""
        return dict(tensors)

    def shared_arrays(self) -> Mapping[str, Mapping[str, Array]]:
        """Returns the shared arrays by group and name; must be called once, within the compact method."""
        shapes = {group: named for group, named in self.shared_shapes().items() if named}
        if not shapes:
            return {}

        def init(key: Array) -> dict[str, dict[str, Array]]:
            keys = jax.random.split(key, len(shapes))
            return {group: self._init_group(k, named) for k, (group, named) in zip(keys, shapes.items(), strict=True)}
        return self.param("bases", init)

    def _init_group(self, key: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        if self.sharing.orthonormal:
            return init_shared_bases(key, shapes)
        init = he_normal_templates if self.sharing.templates else he_normal_fan_out
        keys = jax.random.split(key, len(shapes))
        return {name: init(k, shape, jnp.float32) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def shared_by_layer(self, bases: Mapping[str, Mapping[str, Array]], group: str) -> dict[str, Array]:
        """Returns the shared array of each layer that uses one, for blocks of `group`."""
        return {layer: bases[group][name] for layer, name in self.sharing.layers} if group in bases else {}

    def basis_groups(self, elements: str = "shared") -> tuple[BasisGroup, ...]:
        """Returns the basis elements of each group that the orthogonality penalty applies to.

        Args:
          elements: 'shared', or 'shared+unique' to include the unique elements of every layer.

        Raises:
          UserError: `elements` has another value.
        """
        if elements not in ("shared", "shared+unique"):
            raise UserError(f"elements={elements!r}: must be 'shared' or 'shared+unique'.")
        if not self.sharing.orthonormal:
            return ()
        groups: list[BasisGroup] = []
        uses = dict(self.sharing.layers)
        for group, named in self.shared_shapes().items():
            shared: tuple[Path, ...] = tuple(("bases", group, name) for name in sorted(named))
            unique: dict[Path, str | None] = {}
            if self.sharing.unique_rank and elements == "shared+unique":
                unique = {(*path, "unique"): uses.get(layer) for path, layer in self.basis_layer_paths()[group].items()}
            if self.sharing.separate_means:
                groups += [BasisGroup((path,), tuple(own for own, name in unique.items() if name == path[-1]),
                                      reduction_group=path[-1]) for path in shared]
            elif shared or unique:
                groups.append(BasisGroup(shared, tuple(unique)))
        return tuple(groups)

    def element_sets(self, elements: str = "shared") -> tuple[BasisGroup, ...]:
        """Calls `basis_groups`; deprecated name of version 0.1."""
        note_renamed("Network.element_sets", "Network.basis_groups")
        return self.basis_groups(elements)


def linear_head(num_classes: int, features: int) -> nn.Dense:
    """Returns the float32 classifier `[N, features]` → `[N, num_classes]` with PyTorch's default initialisation."""
    def init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(features**-0.5), features**-0.5)
    return nn.Dense(num_classes, kernel_init=init, bias_init=init, dtype=jnp.float32, name="head")


def global_average(x: Array) -> Array:
    """Returns the float32 means `[N, C]` of `x [N, H, W, C]`."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def check_rank(name: str, rank: int, kernel_size: int, channels: int, doublings: int = 0) -> None:
    """Raises `UserError` if a rank exceeds the dimension of filters `[kernel_size, kernel_size, channels]`.

    Args:
      name: the name of the layer or group for the message.
      rank: the rank in the first group, which doubles with each further one.
      doublings: the number of groups before this one.
    """
    space = kernel_size**2 * channels
    if rank << doublings > space:
        raise UserError(f"{name}: a basis of {rank << doublings} elements does not fit the {space}-dimensional space "
                        f"of its {kernel_size}×{kernel_size}×{channels} filters; choose shared + unique rank at most "
                        f"{space >> doublings}{', as it doubles with each group' * (doublings > 0)}.")
