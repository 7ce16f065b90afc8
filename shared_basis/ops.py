"""The two operations that the layers are made of, and what they are compiled with, as is fastest on each backend.

Everything that is chosen by backend is chosen here. What is computed does not depend on it, but for rounding: XLA
compiles a convolution and its gradients for accelerators as they stand, while on CPU some forms of the same sum take
several times as long as others (`benchmarks/README.md` has the figures).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any

MOMENTUM = 0.9
"""Of the running statistics of batch normalisation: 0.9 old + 0.1 new, as published."""
EPSILON = 1e-5
"""Added to variances by batch normalisation, as published."""

FEW_FILTERS = 8
"""Up to so many filters, a vector of floats, a convolution on CPU is computed by `_convolve_by_few`."""

_NHWC = ("NHWC", "HWIO", "NHWC")


def compiler_options() -> dict[str, Any]:
    """Returns XLA's options for `jax.jit(…, compiler_options=…)` that suit these operations on the default backend.

    On CPU XLA hands convolutions to YNNPACK, which takes two to five times as long for gradients as Eigen does; sums
    over batch and pixels are faster with it. Empty on other backends, where XLA does not know the option, and where
    the user has set it in `XLA_FLAGS`.
    """
    return _known({"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"})


def quick_compiler_options() -> dict[str, Any]:
    """Returns likewise the options for a program that runs once, such as initialisation: its time is compilation."""
    return _known({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the `options` for CPU that this XLA has and that the user has not set in `XLA_FLAGS`."""
    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in options.items()
            if name not in os.environ.get("XLA_FLAGS", "") and _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:  # experimental options come and go with XLA's versions
        return False
    return True


def convolve(x: Array, kernel: Array, strides: int, padding: int, dtype: Dtype) -> Array:
    """Convolves `x [N, H, W, C]` by `kernel [k, k, C / groups, T]`, zero-padded on all sides; computes in `dtype`."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if jax.default_backend() != "cpu" or x.shape[-1] != kernel.shape[2]:
        return _convolve(x, kernel, strides, padding)
    if kernel.shape[-1] <= FEW_FILTERS and strides == 1:
        return _convolve_by_few(x, kernel, padding)
    return _convolve_on_cpu(x, kernel, strides, padding)


def _convolve(x: Array, kernel: Array, strides: int, padding: int) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), [(padding, padding)] * 2,
                                        dimension_numbers=_NHWC, feature_group_count=x.shape[-1] // kernel.shape[2])


def _convolve_by_few(x: Array, kernel: Array, padding: int) -> Array:
    """Is `_convolve` with stride 1: a matrix product for all taps at once, whose columns are then shifted and added.

    For one filter it takes a third of the time, as there the kernels of a convolution leave most of a vector empty.
    """
    rows, columns, channels, filters = kernel.shape
    height, width = x.shape[1] + 2 * padding - rows + 1, x.shape[2] + 2 * padding - columns + 1
    taps = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    products = jnp.matmul(x, taps, preferred_element_type=jnp.float32)
    products = jnp.pad(products, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    products = products.reshape(*products.shape[:3], rows, columns, filters)
    y = sum(products[:, i:i + height, j:j + width, i, j] for i in range(rows) for j in range(columns))
    return jnp.asarray(y, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_on_cpu(x: Array, kernel: Array, strides: int, padding: int) -> Array:
    """Is `_convolve` for one channel group; differs in how the gradient with respect to the kernel is computed."""
    return _convolve(x, kernel, strides, padding)


def _convolve_on_cpu_fwd(x: Array, kernel: Array, strides: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _convolve_on_cpu_bwd(strides: int, padding: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Computes the kernel's gradient as the convolution that it is: channels as batch, images as channels.

    The input has to be turned round for that. XLA would fuse this with what has computed the input (normalisation,
    ReLU, addition), and compute all of it again in an order that misses the cache at each pixel: twenty times as slow
    as the turn itself. It does not fuse into a matrix product, and one with the identity turns an array round exactly.
    """
    x, kernel = saved
    dx, = jax.linear_transpose(lambda x: _convolve(x, kernel, strides, padding), x)(dy)
    images, height, width, channels = x.shape
    pixels_first = x.transpose(1, 2, 0, 3).reshape(-1, channels)
    turned = jax.lax.dot_general(jnp.eye(channels, dtype=x.dtype), pixels_first, (((1,), (1,)), ((), ())))
    after = [(out - 1) * strides + size - length - padding for out, size, length in zip(
        dy.shape[1:3], kernel.shape[:2], (height, width), strict=True)]
    dk = jax.lax.conv_general_dilated(
        turned.reshape(channels, height, width, images), dy.transpose(1, 2, 0, 3), (1, 1),
        [(padding, after[0]), (padding, after[1])], rhs_dilation=(strides, strides), dimension_numbers=_NHWC)
    return dx, dk.transpose(1, 2, 0, 3)


_convolve_on_cpu.defvjp(_convolve_on_cpu_fwd, _convolve_on_cpu_bwd)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last; statistics and parameters are float32.

    It computes what Flax's does, and keeps `scale`, `bias`, and in `batch_stats` `mean` and `var`, under the same
    names. Its gradient is written out and takes two sums over the batch, where derived ones take three.
    """

    train: bool
    """Whether to normalise by the statistics of the batch and to move the running ones towards them."""
    dtype: Dtype = jnp.float32
    """Type of the result."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `x [..., C]` to the same shape."""
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not self.train:
            return _normalize(x, mean.value, jax.lax.rsqrt(var.value + EPSILON) * scale, bias).astype(self.dtype)
        y, batch_mean, batch_var = _normalize_batch(x, scale, bias)
        if not self.is_initializing():
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * batch_mean
            var.value = MOMENTUM * var.value + (1 - MOMENTUM) * batch_var
        return y.astype(self.dtype)


def _normalize(x: Array, mean: Array, factor: Array, bias: Array) -> Array:
    return (x - mean) * factor + bias


@jax.custom_vjp
def _normalize_batch(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Returns `x [..., C]` normalised over its batch, in float32, and its mean and (biased) variance `[C]`.

    The latter two are for running statistics: no gradient goes through them.
    """
    return _normalize_batch_fwd(x, scale, bias)[0]


def _normalize_batch_fwd(x: Array, scale: Array, bias: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    exact, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean = jnp.mean(exact, axes)
    var = jnp.maximum(jnp.mean(jnp.square(exact), axes) - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(var + EPSILON)
    return (_normalize(x, mean, inverse * scale, bias), mean, var), (x, mean, inverse, scale)


def _normalize_batch_bwd(saved: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = saved
    dy, axes, count = cotangents[0], tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    dbias = jnp.sum(dy, axes)
    dscale = jnp.sum(dy * (x - mean), axes) * inverse
    dx = scale * inverse * (dy - dbias / count - (x - mean) * (inverse * dscale / count))
    return dx.astype(x.dtype), dscale, dbias


_normalize_batch.defvjp(_normalize_batch_fwd, _normalize_batch_bwd)


def batch_norm(train: bool, dtype: Dtype, name: str) -> BatchNorm:
    """Returns batch normalisation as published: ε 1e-5, running average 0.9 old + 0.1 new, float32 statistics."""
    return BatchNorm(train, dtype, name=name)
