"""The method: convolutions through filter bases that are shared by the layers of a residual group.

A k×k convolution from C to T channels is factorised (Kang & Kim, section 3.1) into a *filter basis* of R elements,
each k×k×C, and *coefficients*, a 1×1 convolution R → T. The basis of a layer is hybrid: R = u + s, where s *shared*
elements belong to the group and u *unique* ones to the layer:

    y = coefficients( BN( [unique ∗ x ; shared ∗ x] ) )

Sharing is data, not a class: a layer that is handed a shared array uses it. Plain (R = 0), low rank but not shared
(s = 0), shared only (u = 0), single and double sharing all come out of `BasisConv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from shared_basis.errors import UserError

Array = jax.Array
Dtype = Any
Path = tuple[str, ...]

he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialisation by fan-out (k²T), as published."""


class ElementSet(NamedTuple):
    """Names, by path in the parameter tree, the basis elements of one group that are to be orthonormal together.

    Each array holds its elements on its last axis: `[k, k, C, s]`, or any `[..., elements]`.
    """

    shared: tuple[Path, ...]
    """The arrays of shared elements; in double sharing both of the group."""
    unique: tuple[Path, ...] = ()
    """One array of unique elements for each layer; empty where unique elements are not to be penalised."""


def check_rank(name: str, rank: int, kernel_size: int, channels: int) -> None:
    """Raises `UserError` unless `rank` filters of `[kernel_size, kernel_size, channels]` can be independent.

    Args:
      name: what the message calls the layer or group.
    """
    space = kernel_size**2 * channels
    if rank > space:
        raise UserError(f"{name}: a basis of {rank} elements does not fit the {space}-dimensional space of its "
                        f"{kernel_size}×{kernel_size}×{channels} filters; choose shared + unique rank at most {space}.")


def init_shared_bases(key: Array, kernel_size: int, channels: int, rank: int, names: Sequence[str]) -> dict[str, Array]:
    """Draws the shared bases of one group with orthonormal elements (section 3.2).

    Bases of several names (double sharing) are one orthonormal set as long as the filter space can hold it; otherwise
    each is orthonormal by itself.

    Returns:
      For each name an array `[kernel_size, kernel_size, channels, rank]`, float32, each element of norm 1.
    """
    orthonormal = nn.initializers.orthogonal()  # the last axis indexes the elements
    shape = (kernel_size, kernel_size, channels)
    if len(names) * rank <= kernel_size**2 * channels:
        joint = orthonormal(key, (*shape, len(names) * rank), jnp.float32)
        return dict(zip(names, jnp.split(joint, len(names), axis=-1), strict=True))
    keys = jax.random.split(key, len(names))
    return {name: orthonormal(k, (*shape, rank), jnp.float32) for name, k in zip(names, keys, strict=True)}


def convolve(x: Array, kernel: Array, strides: int, dtype: Dtype) -> Array:
    """Convolves `x [N, H, W, C]` with `kernel [k, k, C, T]`, padded by k // 2 on each side, computing in `dtype`."""
    pad = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), (strides, strides), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(train: bool, dtype: Dtype, name: str) -> nn.BatchNorm:
    """Returns batch normalisation as published: ε 1e-5, running average 0.9 old + 0.1 new, float32 statistics."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)


class BasisConv(nn.Module):
    """The one convolution of every variant: through a filter basis, or plain where it has none.

    Parameters, all float32: `unique [k, k, C, u]` if u > 0, `norm` (scale and bias of R channels),
    `coefficients [R, T]`; or `kernel [k, k, C, T]` alone where there is neither a shared nor a unique element.
    The shared elements are an argument: their owner is the network.
    """

    features: int
    """T, the output channels."""
    kernel_size: int = 3
    strides: int = 1
    unique_rank: int = 0
    """u, the elements that belong to this layer alone."""
    dtype: Dtype = jnp.float32
    """Compute type."""

    @nn.compact
    def __call__(self, x: Array, shared: Array | None = None, *, train: bool) -> Array:
        """Maps `x [N, H, W, C]` to `[N, H / strides, W / strides, T]`; `shared` is `[k, k, C, s]` or None."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1])
        if shared is not None and shared.shape[:-1] != shape:
            raise ValueError(f"shared basis of shape {shared.shape}: this layer needs {(*shape, 's')}")
        if shared is None and self.unique_rank == 0:
            kernel = self.param("kernel", he_normal_fan_out, (*shape, self.features))
            return convolve(x, kernel, self.strides, self.dtype)
        elements = []
        if self.unique_rank:
            elements.append(self.param("unique", he_normal_fan_out, (*shape, self.unique_rank)))
        if shared is not None:
            elements.append(shared)
        # Two convolutions: concatenating the filters instead gives the same numbers, a quarter slower on two CPU cores.
        y = jnp.concatenate([convolve(x, filters, self.strides, self.dtype) for filters in elements], axis=-1)
        y = batch_norm(train, self.dtype, "norm")(y)
        coefficients = self.param("coefficients", he_normal_fan_out, (y.shape[-1], self.features))
        return y @ coefficients.astype(self.dtype)
