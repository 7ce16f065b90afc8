"""Batch normalisation, alone and in closed form with the linear maps around it, as pure functions and a Linen layer.

A basis layer computes norm₂(norm₁(b) A) from the results b `[..., R]` of its basis: three affine maps, so one, b M + c.
Its statistics follow from the mean m and the covariance Σ of b alone (docs/method.md has the proof):

    var₁ = diag Σ        A' = diag(scale₁ / √(var₁ + ε)) A        mean₂ = bias₁ A        var₂ = diag(A'ᵀ Σ A')
    M = A' diag(scale₂ / √(var₂ + ε))        c = (bias₁ A − mean₂) scale₂ / √(var₂ + ε) + bias₂ − m M

so b is read twice and nothing between is written, where norms and product one by one take five passes.
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
"""Of the running statistics of batch normalisation: 0.9 old + 0.1 new, as published."""

EPSILON = 1e-5
"""Added to variances by batch normalisation, as published."""


class Norm(NamedTuple):
    """The arrays of one batch normalisation, `[C]`: its parameters and running statistics."""

    scale: Array
    bias: Array
    mean: Array
    var: Array

    def moved(self, mean: Array, var: Array) -> Norm:
        """Returns it with running statistics that have moved towards `mean` and `var` of a batch."""
        return self._replace(mean=MOMENTUM * self.mean + (1 - MOMENTUM) * mean,
                             var=MOMENTUM * self.var + (1 - MOMENTUM) * var)


def normalize(x: Array, norm: Norm, train: bool, dtype: Dtype, axis_name: str | None = None) -> tuple[Array, Norm]:
    """Normalises `x [..., C]` over all axes but the last; statistics are float32, or float64 for float64.

    Args:
      train: whether by the statistics of the batch, towards which running ones move, or by running ones.
      dtype: type of the result.
      axis_name: an axis of `jax.shard_map` or `jax.vmap` whose members' batches are one.

    Returns:
      The result, and `norm` as it is afterwards.
    """
    if not train:
        return ((x - norm.mean) * _factor(norm.var, norm.scale) + norm.bias).astype(dtype), norm
    mean, square = _averages([jnp.mean(x, _batch(x), wide(x.dtype)),
                              jnp.mean(jnp.square(x.astype(wide(x.dtype))), _batch(x))], axis_name)
    var = jnp.maximum(square - jnp.square(mean), 0)
    factor = _factor(var, norm.scale)
    # The mean is taken off before the product, so that the gradient's sums are of differences, and cancel nothing.
    center = jax.lax.stop_gradient(mean)
    y = (x - center) * factor + (norm.bias - (mean - center) * factor)
    return y.astype(dtype), norm.moved(mean, var)


def mix(parts: Sequence[Array], norm: Norm, matrix: Array, train: bool, dtype: Dtype, then: Norm | None = None,
        axis_name: str | None = None, one: bool = False) -> tuple[Array, Norm, Norm | None]:
    """Normalises, multiplies by `matrix [ΣC_i, T]` and, with `then`, normalises again, in closed form.

    Args:
      parts: `[..., C_i]`, whose channels follow one another.
      train, dtype, axis_name: as in `normalize`.
      then: the batch normalisation of T channels that follows.
      one: whether `parts` is one array that has a further channel, whose values are 1: b and 1 are multiplied together,
        so that the product bᵀb holds the mean and the product b M adds the offset, and no further pass does.

    Returns:
      The result `[..., T]`, and `norm` and `then` as they are afterwards.
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
    offset = jnp.sum(norm.bias[:, None] * matrix, 0)  # sums, as products would count as those of the network
    if then is not None:
        mean_then, var_then = then.mean, then.var
        if covariance is not None:
            mean_then = offset
            var_then = jnp.maximum(jnp.sum(scaled * _exact_product(covariance, scaled), 0), 0)
            then = then.moved(mean_then, var_then)
        factor = _factor(var_then, then.scale)
        scaled, offset = scaled * factor, (offset - mean_then) * factor + then.bias
    scaled = scaled.astype(dtype)
    offset = offset - jnp.sum(mean[:, None] * scaled, 0)  # by the rounded matrix, so that the mean goes exactly
    if one:
        scaled, offset = jnp.concatenate([scaled, offset[None].astype(dtype)]), jnp.zeros_like(offset)
    return _affine(tuple(parts), scaled, offset, dtype), norm, then


def _batch(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _factor(var: Array, scale: Array) -> Array:
    return jax.lax.rsqrt(var + EPSILON) * scale


def _exact_product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _averages(values: list[Array], axis_name: str | None) -> list[Array]:
    """Returns averages over a batch as those over all members of `axis_name`, kept by loops."""
    return [keep(value) for value in (values if axis_name is None else jax.lax.pmean(values, axis_name))]


def _moments(parts: Sequence[Array], joint: bool, axis_name: str | None,
             one: bool) -> tuple[Array, Array, Array | None]:
    """Returns the mean `[C]` and the (biased) variance `[C]` of the parts' channels, and if `joint` the covariance."""
    count = parts[0].size // parts[0].shape[-1]
    if one:
        product, = _averages([gram(parts[0]) / count], axis_name)
        return _central(product[:-1, -1], product[:-1, :-1])
    mean = jnp.concatenate([jnp.mean(part, _batch(part), wide(part.dtype)) for part in parts])
    if not joint:
        squares = [jnp.mean(jnp.square(part.astype(wide(part.dtype))), _batch(part)) for part in parts]
        mean, square = _averages([mean, jnp.concatenate(squares)], axis_name)
        return mean, jnp.maximum(square - jnp.square(mean), 0), None
    blocks = {(i, j): gram(a) if i == j else cross(a, b)
              for i, a in enumerate(parts) for j, b in enumerate(parts) if i <= j}
    product = jnp.block([[blocks[i, j] if i <= j else blocks[j, i].T for j in range(len(parts))]
                         for i in range(len(parts))])
    return _central(*_averages([mean, product / count], axis_name))


def _central(mean: Array, product: Array) -> tuple[Array, Array, Array]:
    """Returns the mean, the variance and the covariance of what has this `mean [C]` and mean `product [C, C]`."""
    covariance = product - mean[:, None] * mean
    return mean, jnp.maximum(jnp.diagonal(covariance), 0), covariance


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _affine(parts: tuple[Array, ...], matrix: Array, offset: Array, dtype: Dtype) -> Array:
    """Returns the product of `parts [..., C_i]`, side by side, and `matrix [ΣC_i, T]`, plus `offset [T]`."""
    products = map(multiply, parts, _by_part(matrix, parts))
    return sum(products, offset).astype(dtype)


@_affine.defjvp
def _affine_jvp(dtype: Dtype, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Is the derived one, with products in the type of the parts: so that gradients read and write no wider one."""
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

    It computes what Flax's does, and keeps `scale`, `bias`, and in `batch_stats` `mean` and `var`, under the same
    names, in float32.
    """

    train: bool
    """Whether to normalise by the statistics of the batch and to move the running ones towards them."""
    dtype: Dtype = jnp.float32
    """Type of the result."""
    axis_name: str | None = None
    """An axis of `jax.shard_map` or `jax.vmap` whose members' batches are one."""
    param_dtype: Dtype = jnp.float32

    def __call__(self, x: Array) -> Array:
        """Maps `x [..., C]` to the same shape."""
        y, norm = normalize(x, self.read(x.shape[-1]), self.train, self.dtype, self.axis_name)
        self.write(norm)
        return y

    @nn.compact
    def read(self, channels: int) -> Norm:
        """Returns the arrays, for `channels` channels."""
        shape, dtype = (channels,), self.param_dtype
        return Norm(self.param("scale", nn.initializers.ones, shape, dtype),
                    self.param("bias", nn.initializers.zeros, shape, dtype),
                    self.variable("batch_stats", "mean", jnp.zeros, shape, wide(dtype)).value,
                    self.variable("batch_stats", "var", jnp.ones, shape, wide(dtype)).value)

    def write(self, norm: Norm) -> None:
        """Takes over the running statistics of `norm`, if they have moved."""
        if self.train and not self.is_initializing():
            self.put_variable("batch_stats", "mean", norm.mean)
            self.put_variable("batch_stats", "var", norm.var)


def batch_norm(train: bool, dtype: Dtype, name: str) -> BatchNorm:
    """Returns the batch normalisation `name` of a network."""
    return BatchNorm(train, dtype, name=name)
