"""Input patches of convolutions and their moments, which define the metric for comparing kernels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from shared_basis.nn.convolution import Window
from shared_basis.nn.forms import kernel_shape
from shared_basis.nn.types import Array

CHUNK = 2**24
"""Maximum number of patch entries in memory at once, unless a single image has more."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of patches with D = k²C entries, ordered as in a kernel `[*k, C]`; moments of batches can be added."""

    count: float
    """The number of patches."""
    total: np.ndarray
    """The sum of patches, float64 `[D]`."""
    products: np.ndarray
    """The sum of p pᵀ, float64 `[D, D]`."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> np.ndarray:
        """The mean patch, `[D]`."""
        return self.total / self.count

    @property
    def second(self) -> np.ndarray:
        """The mean of p pᵀ, `[D, D]`: the second moment about 0."""
        return self.products / self.count

    @property
    def covariance(self) -> np.ndarray:
        """The covariance, `[D, D]`: the second moment about the mean."""
        return self.second - np.outer(self.mean, self.mean)


def patch_moments(x: Array | np.ndarray, kernel_size: int | Sequence[int] = 3, strides: int | Sequence[int] = 1,
                  padding: int | str | Sequence[int | tuple[int, int]] | None = None,
                  kernel_dilation: int | Sequence[int] = 1) -> Moments:
    """Returns the moments of the input patches of a convolution on `x [N, *image, C]`; see `factorize_kernels`.

    Moments of several batches can be added: `patch_moments(one) + patch_moments(other)`.

    Args:
      x: images or activations.
      kernel_size: the kernel size of the convolution, as in `BasisConv`.
      strides: the strides of the convolution.
      padding: the padding of the convolution.
      kernel_dilation: the dilation of the convolution.

    Raises:
      ValueError: `x` has a wrong number of axes, no patch, NaN or infinity; or the arguments are inconsistent.
    """
    size = kernel_shape(kernel_size)
    if len(x.shape) != len(size) + 2:
        raise ValueError(f"inputs of shape {list(x.shape)}: a kernel of shape {list(size)} needs "
                         f"{len(size) + 2} axes: images, space and channels")
    window = Window.of(size, x.shape[1:-1], strides, padding, kernel_dilation)
    entries = math.prod(x.shape[1:]) * math.prod(size)
    step = max(1, CHUNK // max(entries, 1))
    found: Moments | None = None
    for begin in range(0, len(x), step):
        chunk = jnp.asarray(x[begin:begin + step])
        part = to_moments(_jitted_sums(chunk, jnp.ones(len(chunk)), size, window))
        found = part if found is None else found + part
    if found is None or not found.count:
        raise ValueError(f"inputs of shape {list(x.shape)}: a kernel of shape {list(size)} yields no patches")
    if not np.isfinite(found.products).all():
        raise ValueError("inputs hold NaN or infinity, or numbers whose squares are too large for float32")
    return found


def to_moments(sums: tuple[Array, Array, Array]) -> Moments:
    """Converts the result of `patch_sums` to `Moments`."""
    count, total, products = (np.asarray(each, np.float64) for each in sums)
    return Moments(float(count), total, products)


def patch_sums(x: Array, counts: Array, size: tuple[int, ...], window: Window) -> tuple[Array, Array, Array]:
    """Returns the number of patches of `x [N, *image, C]`, their sum and the sum of p pᵀ, in float32.

    Args:
      counts: `[N]`, 1 for images that count and 0 for others.
    """
    found = patches(x.astype(jnp.float32) * jnp.expand_dims(counts, tuple(range(1, x.ndim))), size, window)
    number = jnp.sum(counts, dtype=jnp.float32) * math.prod(found.shape[1:-1])
    found = found.reshape(-1, found.shape[-1])
    return number, jnp.sum(found, 0), jnp.matmul(found.T, found, precision=jax.lax.Precision.HIGHEST)


_jitted_sums = functools.partial(jax.jit, static_argnames=("size", "window"))(patch_sums)


def patches(x: Array, size: tuple[int, ...], window: Window) -> Array:
    """Returns the input patches `[N, *image / strides, D]` of a convolution with kernels of shape `size`."""
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    spans = [(taps - 1) * factor for taps, factor in zip(size, window.dilation, strict=True)]
    shifted = [x[:, *(slice(tap * factor, max(0, length - span) + tap * factor, stride)
                      for tap, factor, length, span, stride in zip(
                          taps, window.dilation, x.shape[1:-1], spans, window.strides, strict=True))]
               for taps in itertools.product(*map(range, size))]
    return jnp.concatenate(shifted, axis=-1)
