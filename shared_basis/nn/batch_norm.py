"""Batch normalisation, alone or fused with adjacent linear maps, as pure functions and a Linen layer.

A basis layer computes norm₂(norm₁(b) A) from the outputs b `[..., R]` of its basis: three affine maps, i.e. b M + c.
Their statistics follow from the mean m and the covariance Σ of b (proof in docs/method.md):

    var₁ = diag Σ        A' = diag(scale₁ / √(var₁ + ε)) A        mean₂ = bias₁ A        var₂ = diag(A'ᵀ Σ A')
    M = A' diag(scale₂ / √(var₂ + ε))        c = (bias₁ A − mean₂) scale₂ / √(var₂ + ε) + bias₂ − m M

so b is read twice and no intermediate result is written; separate norms and products would take five passes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from shared_basis.nn.ops import cross, gram, is_portable, keep, multiply, wide
from shared_basis.nn.types import Array, Dtype

MOMENTUM = 0.9
"""Momentum of the running statistics of batch normalisation: 0.9 old + 0.1 new, as published."""

EPSILON = 1e-5
"""ε that batch normalisation adds to variances, as published."""


class Norm(NamedTuple):
    """The parameters and running statistics of a batch normalisation, each `[C]`."""

    scale: Array
    bias: Array
    mean: Array
    var: Array

    def moved(self, mean: Array, var: Array) -> Norm:
        """Returns a copy with running statistics updated by `mean` and `var` of a batch, in their stored types."""
        return self._replace(mean=_running(self.mean, mean), var=_running(self.var, var))


def normalize(x: Array, norm: Norm, train: bool, dtype: Dtype, axis_name: str | None = None) -> tuple[Array, Norm]:
    """Normalises `x [..., C]` over all axes but the last; statistics are float32, or float64 for float64.

    Args:
      train: whether to use (and update running statistics with) the statistics of the batch, or to use running ones.
      dtype: dtype of the result.
      axis_name: an axis of `jax.shard_map` or `jax.vmap` over which batch statistics are averaged.

    Returns:
      The result, and `norm` with updated running statistics.
    """
    if not train:
        return ((x - norm.mean) * _factor(norm.var, norm.scale) + norm.bias).astype(dtype), norm
    mean, square = _averages([jnp.mean(x, _batch(x), wide(x.dtype)),
                              jnp.mean(jnp.square(x.astype(wide(x.dtype))), _batch(x))], axis_name)
    var = jnp.maximum(square - jnp.square(mean), 0)
    factor = _factor(var, norm.scale)
    # The mean is subtracted before the product, which avoids cancellation in the sums of the gradient.
    center = jax.lax.stop_gradient(mean)
    y = (x - center) * factor + (norm.bias - (mean - center) * factor)
    return y.astype(dtype), norm.moved(mean, var)


def mix(parts: Sequence[Array], norm: Norm, matrix: Array, train: bool, dtype: Dtype, then: Norm | None = None,
        axis_name: str | None = None, one: bool = False) -> tuple[Array, Norm, Norm | None]:
    """Normalises, multiplies by `matrix [ΣC_i, T]` and, with `then`, normalises again, in closed form.

    Args:
      parts: arrays `[..., C_i]`, concatenated along channels.
      train, dtype, axis_name: see `normalize`.
      then: the batch normalisation of T channels that follows.
      one: whether `parts` is a single array with an additional channel of ones. The product bᵀb then includes the mean,
        and the product b M adds the offset, which saves further passes.

    Returns:
      The result `[..., T]`, and `norm` and `then` with updated running statistics.
    """
    if is_portable():
        y, norm = normalize(jnp.concatenate(parts, axis=-1), norm, train, dtype, axis_name)
        y = y @ matrix.astype(dtype)
        if then is not None:
            y, then = normalize(y, then, train, dtype, axis_name)
        return y, norm, then
    mean, var, covariance = norm.mean, norm.var, None
    if train:
        mean, var, covariance = _moments(parts, then is not None, axis_name, one)
        norm = norm.moved(mean, var)
    scaled = _factor(var, norm.scale)[:, None] * matrix
    offset = jnp.sum(norm.bias[:, None] * matrix, 0)  # sums, since matrix products would count as MACs
    if then is not None:
        mean_then, var_then = then.mean, then.var
        if covariance is not None:
            mean_then = offset
            var_then = jnp.maximum(jnp.sum(scaled * _exact_product(covariance, scaled), 0), 0)
            then = then.moved(mean_then, var_then)
        factor = _factor(var_then, then.scale)
        scaled, offset = scaled * factor, (offset - mean_then) * factor + then.bias
    scaled = scaled.astype(dtype)
    # Of the rounded matrix, so that the mean cancels: exactly or, with `one`, up to the rounding of the offset.
    offset = offset - jnp.sum(mean[:, None] * scaled, 0)
    if one:
        scaled, offset = jnp.concatenate([scaled, offset[None].astype(dtype)]), jnp.zeros_like(offset)
    return _affine(tuple(parts), scaled, offset, dtype), norm, then


def _running(old: Array, new: Array) -> Array:
    # Not in the type of a layer that computes in float64, so that a loop over steps can carry the statistics.
    return (MOMENTUM * old + (1 - MOMENTUM) * new).astype(jnp.result_type(old))


def _batch(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _factor(var: Array, scale: Array) -> Array:
    return jax.lax.rsqrt(var + EPSILON) * scale


def _exact_product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _averages(values: list[Array], axis_name: str | None) -> list[Array]:
    """Averages batch statistics over all members of `axis_name`; marks them to be kept by `scan_with_remat`."""
    return [keep(value) for value in (values if axis_name is None else jax.lax.pmean(values, axis_name))]


def _moments(parts: Sequence[Array], joint: bool, axis_name: str | None,
             one: bool) -> tuple[Array, Array, Array | None]:
    """Returns mean `[C]` and (biased) variance `[C]` of the parts' channels and, if `joint`, the covariance."""
    count = parts[0].size // parts[0].shape[-1]
    if one:
        product, = _averages([gram(parts[0]) / count], axis_name)
        return _with_variance(*_central(product))
    mean = jnp.concatenate([jnp.mean(part, _batch(part), wide(part.dtype)) for part in parts])
    if not joint:
        squares = [jnp.mean(jnp.square(part.astype(wide(part.dtype))), _batch(part)) for part in parts]
        mean, square = _averages([mean, jnp.concatenate(squares)], axis_name)
        return mean, jnp.maximum(square - jnp.square(mean), 0), None
    blocks = {(i, j): gram(a) if i == j else cross(a, b)
              for i, a in enumerate(parts) for j, b in enumerate(parts) if i <= j}
    product = jnp.block([[blocks[i, j] if i <= j else blocks[j, i].T for j in range(len(parts))]
                         for i in range(len(parts))])
    mean, product = _averages([mean, product / count], axis_name)
    return _with_variance(mean, product - mean[:, None] * mean)


def _with_variance(mean: Array, covariance: Array) -> tuple[Array, Array, Array]:
    return mean, jnp.maximum(jnp.diagonal(covariance), 0), covariance


@jax.custom_jvp
def _central(product: Array) -> tuple[Array, Array]:
    """Returns mean `[C]` and covariance `[C, C]` from the mean of products `[C + 1, C + 1]` with a channel of ones."""
    mean = product[:-1, -1]
    return mean, product[:-1, :-1] - mean[:, None] * mean


@_central.defjvp
def _central_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    """The JVP with a barrier at the mean.

    In the gradient it keeps sums over channels out of the kernel that transposes `[C, C]`, where XLA would compute them
    anew for each element (benchmarks/README.md: 21 µs on a GPU, ten times as long as such kernels take otherwise).
    """
    (product,), (dproduct,) = primals, tangents
    mean, covariance = _central(product)
    dmean = jax.lax.optimization_barrier(dproduct[:-1, -1])
    half = dmean[:, None] * mean
    return (mean, covariance), (dmean, dproduct[:-1, :-1] - half - half.T)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _affine(parts: tuple[Array, ...], matrix: Array, offset: Array, dtype: Dtype) -> Array:
    """Returns the concatenated `parts [..., C_i]` times `matrix [ΣC_i, T]`, plus `offset [T]`."""
    products = map(multiply, parts, _by_part(matrix, parts))
    return sum(products, offset).astype(dtype)


@_affine.defjvp
def _affine_jvp(dtype: Dtype, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The JVP with products in the dtype of the parts, so that gradients do not use a wider one."""
    (parts, matrix, _), (dparts, dmatrix, doffset) = primals, tangents
    products = [multiply(x, rows, x.dtype) for x, rows in (
        *zip(dparts, _by_part(matrix, parts), strict=True), *zip(parts, _by_part(dmatrix, parts), strict=True))]
    return _affine(*primals, dtype), sum((p.astype(doffset.dtype) for p in products), doffset).astype(dtype)


def _by_part(matrix: Array, parts: Sequence[Array]) -> list[Array]:
    """Returns the rows of `matrix` that multiply each part."""
    *ends, _ = itertools.accumulate(part.shape[-1] for part in parts)
    return jnp.split(matrix, ends)


class BatchNorm(nn.Module):
    """Batch normalisation as published, as a Linen layer: ε 1e-5, running average 0.9 old + 0.1 new.

    Computes the same as Flax's, with `scale`, `bias` and, in `batch_stats`, `mean` and `var` under the same names, in
    float32.
    """

    train: bool
    """Whether to use the statistics of the batch and update the running ones."""
    dtype: Dtype = jnp.float32
    """Dtype of the result."""
    axis_name: str | None = None
    """An axis of `jax.shard_map` or `jax.vmap` over which batch statistics are averaged."""
    param_dtype: Dtype = jnp.float32

    def __call__(self, x: Array) -> Array:
        """Maps `x [..., C]` to the same shape."""
        # As in Flax, the axis need not exist while initialising, which stores no statistics.
        axis_name = None if self.is_initializing() else self.axis_name
        y, norm = normalize(x, self.read(x.shape[-1]), self.train, self.dtype, axis_name)
        self.write(norm)
        return y

    @nn.compact
    def read(self, channels: int) -> Norm:
        """Returns the parameters and running statistics for `channels` channels."""
        shape, dtype = (channels,), self.param_dtype
        return Norm(self.param("scale", nn.initializers.ones, shape, dtype),
                    self.param("bias", nn.initializers.zeros, shape, dtype),
                    self.variable("batch_stats", "mean", jnp.zeros, shape, wide(dtype)).value,
                    self.variable("batch_stats", "var", jnp.ones, shape, wide(dtype)).value)

    def write(self, norm: Norm) -> None:
        """Stores the running statistics of `norm`, if they were updated."""
        if self.train and not self.is_initializing():
            self.put_variable("batch_stats", "mean", norm.mean)
            self.put_variable("batch_stats", "var", norm.var)


def batch_norm(train: bool, dtype: Dtype, name: str) -> BatchNorm:
    """Returns the batch normalisation `name` of a network."""
    return BatchNorm(train, dtype, name=name)
