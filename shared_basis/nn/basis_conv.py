"""The method: convolutions through filter bases that are shared by the layers of a residual group.

A k×k convolution from C to T channels is factorised (Kang & Kim, section 3.1) into a *filter basis* of R elements,
each k×k×C, and *coefficients*, a 1×1 convolution R → T. The basis of a layer is hybrid: R = u + s, where s *shared*
elements belong to the group and u *unique* ones to the layer:

    y = coefficients( BN( [unique ∗ x ; shared ∗ x] ) )

Sharing is data, not a class: a layer that is handed a shared array uses it. Plain (R = 0), low rank but not shared
(s = 0), shared only (u = 0), single and double sharing all come out of `BasisConv`. So do whole shared filters, where
neighbouring 1×1 layers are the layer-specific part, and kernels combined from shared templates.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from shared_basis.nn.batch_norm import batch_norm
from shared_basis.nn.ops import convolve, multiply
from shared_basis.nn.types import Array, Dtype

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialisation by fan-out (k²T), as published."""
he_normal_templates = nn.initializers.variance_scaling(
    2.0, "fan_out", "normal", in_axis=-3, out_axis=-2, batch_axis=(-1,))
"""The same for each template of `[k, k, C, T, templates]`."""


def init_shared_bases(key: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Draws the shared bases of one group with orthonormal elements (section 3.2).

    Two bases of one shape (double sharing) are one orthonormal set as long as the filter space can hold it; otherwise
    each is orthonormal by itself. Where a basis has more elements than dimensions, a tight frame takes its place.

    Args:
      shapes: by name, `[k, k, C, elements]`.

    Returns:
      By name, a float32 array of that shape.
    """
    orthonormal = nn.initializers.orthogonal()  # the last axis indexes the elements
    names = sorted(shapes)
    *space, rank = shapes[names[0]]
    if len(set(shapes.values())) == 1 and len(names) * rank <= math.prod(space):
        joint = orthonormal(key, (*space, len(names) * rank), jnp.float32)
        return dict(zip(names, jnp.split(joint, len(names), axis=-1), strict=True))
    keys = jax.random.split(key, len(names))
    return {name: orthonormal(k, shapes[name], jnp.float32) for name, k in zip(names, keys, strict=True)}


class Form(enum.Enum):
    """What the filters of a `BasisConv` are made of."""

    OWN_KERNEL = enum.auto()
    BASIS = enum.auto()
    WHOLE_FILTERS = enum.auto()
    TEMPLATES = enum.auto()


class BasisConv(nn.Module):
    """The one convolution of every variant.

    What it is handed, and its ranks, decide what it computes (see `form`):

    - no shared array and no unique elements: an ordinary convolution with its own `kernel [k, k, C / groups, T]`;
    - a filter basis: `unique [k, k, C / groups, u]` if u > 0, `norm` (scale and bias of R channels) and
      `coefficients [R, T]`; the shared elements `[k, k, C / shared_groups, s]` are the argument;
    - whole filters `[k, k, C, T]` with `whole_filters`: a convolution with them, and no parameter of its own;
    - templates `[k, k, C, T, templates]`: a convolution with the kernel that its `coefficients [templates]` combine.

    Parameters are float32. The owner of shared arrays is the network.
    """

    features: int
    """T, the output channels."""
    kernel_size: int = 3
    strides: int = 1
    unique_rank: int = 0
    """u, the elements that belong to this layer alone."""
    dtype: Dtype = jnp.float32
    """Compute type."""
    padding: int | None = None
    """Zeros added on each side; None is kernel_size // 2."""
    groups: int = 1
    """Channel groups of the layer's own kernel or unique elements."""
    shared_groups: int = 1
    """Channel groups of the shared elements."""
    whole_filters: bool = False
    """Whether a shared array holds the layer's filters themselves and not the elements of a basis."""
    activation: Callable[[Array], Array] | None = None
    """Applied between batch normalisation and coefficients; the method has none, ResNeXt has ReLU."""
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array, shared: Array | None = None, *, train: bool) -> Array:
        """Maps `x [N, H, W, C]` to `[N, H / strides, W / strides, T]`; `shared` is one of the arrays named above.

        Raises:
          ValueError: `shared` does not fit this layer.
        """
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.shared_groups)
        if shared is not None and shared.shape[:3] != shape:
            raise ValueError(f"shared array of shape {shared.shape}: this layer needs {(*shape, '…')}")
        if (form := self.form(shared)) is Form.BASIS:
            y = self._basis_convolve(x, shared, train)
        else:
            y = self._convolve(x, self._kernel(x, shared, form))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y

    @nn.nowrap
    def form(self, shared: Array | None) -> Form:
        """Returns what the layer's filters are made of when it is handed `shared`."""
        if shared is None:
            return Form.BASIS if self.unique_rank else Form.OWN_KERNEL
        if shared.ndim == 5:  # the last axis counts templates, each of which is a whole kernel
            return Form.TEMPLATES
        return Form.WHOLE_FILTERS if self.whole_filters else Form.BASIS

    def _kernel(self, x: Array, shared: Array | None, form: Form) -> Array:
        if shared is None:
            return self.param("kernel", he_normal_fan_out, self._own_shape(x, self.features))
        if form is Form.WHOLE_FILTERS:
            return shared
        mix = self.param("coefficients", nn.initializers.normal(shared.shape[-1] ** -0.5), shared.shape[-1:])
        return shared @ mix

    def _basis_convolve(self, x: Array, shared: Array | None, train: bool) -> Array:
        elements = []
        if self.unique_rank:
            elements.append(self.param("unique", he_normal_fan_out, self._own_shape(x, self.unique_rank)))
        if shared is not None:
            elements.append(shared)
        # Two convolutions: few unique elements have a faster form of their own on CPU, see `shared_basis.nn.ops`.
        found = [self._convolve(x, filters) for filters in elements]
        norm = batch_norm(train, self.dtype, "norm")
        rank = sum(filters.shape[-1] for filters in elements)
        coefficients = self.param("coefficients", he_normal_fan_out, (rank, self.features))
        if self.activation is None:
            return norm.normalize_and_multiply(found, coefficients)
        y = self.activation(norm(jnp.concatenate(found, axis=-1)))
        return multiply(y, coefficients.astype(self.dtype)).astype(self.dtype)

    def _own_shape(self, x: Array, filters: int) -> tuple[int, ...]:
        return (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, filters)

    def _convolve(self, x: Array, kernel: Array) -> Array:
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        return convolve(x, kernel, self.strides, padding, self.dtype)
