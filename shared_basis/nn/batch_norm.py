"""Batch normalisation, alone and fused with the linear map that follows it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from shared_basis.nn.ops import is_portable, keep, multiply, use_cpu_forms
from shared_basis.nn.types import Array, Dtype

MOMENTUM = 0.9
"""Of the running statistics of batch normalisation: 0.9 old + 0.1 new, as published."""

EPSILON = 1e-5
"""Added to variances by batch normalisation, as published."""


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last; statistics and parameters are float32.

    It computes what Flax's does, and keeps `scale`, `bias`, and in `batch_stats` `mean` and `var`, under the same
    names. Its gradient is written out and takes two sums over the batch, where derived ones take three.
    """

    train: bool
    """Whether to normalise by the statistics of the batch and to move the running ones towards them."""
    dtype: Dtype = jnp.float32
    """Type of the result."""

    def __call__(self, x: Array) -> Array:
        """Maps `x [..., C]` to the same shape."""
        mean, var, scale, bias = self._variables(x.shape[-1])
        if not self.train:
            return _normalize(x, mean.value, _factor(var.value, scale), bias).astype(self.dtype)
        y, *moments = _normalize_batch(x, scale, bias)
        self._move(mean, var, *moments)
        return y.astype(self.dtype)

    def normalize_and_multiply(self, parts: Sequence[Array], matrix: Array) -> Array:
        """Maps `parts [..., C_i]`, whose channels follow one another, to `self(all of them) @ matrix [ΣC_i, T]`.

        Both are linear: factors go into the matrix and the rest into an offset of the product, so that normalised
        arrays are neither written nor read, and gradients need no further sums over the batch. On CPU the parts are not
        written side by side either, but each is multiplied by its rows of the matrix.
        """
        if not use_cpu_forms():
            parts = [jnp.concatenate(parts, axis=-1)]
        if is_portable():
            return self(*parts) @ matrix.astype(self.dtype)
        mean, var, scale, bias = self._variables(len(matrix))
        moments = mean.value, var.value
        if self.train:
            means, variances = zip(*map(_moments, parts), strict=True)
            moments = jnp.concatenate(means), jnp.concatenate(variances)
            self._move(mean, var, *moments)
        scaled = (_factor(moments[1], scale)[:, None] * matrix).astype(self.dtype)
        # By the rounded matrix, so that the mean goes exactly; sums, as products would count as those of the network.
        offset = jnp.sum(bias[:, None] * matrix, 0) - jnp.sum(moments[0][:, None] * scaled, 0)
        *ends, _ = itertools.accumulate(part.shape[-1] for part in parts)
        rows = jnp.split(scaled, ends)
        return sum(map(multiply, parts, rows), offset).astype(self.dtype)

    @nn.compact
    def _variables(self, channels: int) -> tuple[nn.Variable, nn.Variable, Array, Array]:
        return (self.variable("batch_stats", "mean", jnp.zeros, (channels,)),
                self.variable("batch_stats", "var", jnp.ones, (channels,)),
                self.param("scale", nn.initializers.ones, (channels,)),
                self.param("bias", nn.initializers.zeros, (channels,)))

    def _move(self, mean: nn.Variable, var: nn.Variable, batch_mean: Array, batch_var: Array) -> None:
        if not self.is_initializing():
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * batch_mean
            var.value = MOMENTUM * var.value + (1 - MOMENTUM) * batch_var


def _factor(var: Array, scale: Array) -> Array:
    return jax.lax.rsqrt(var + EPSILON) * scale


def _normalize(x: Array, mean: Array, factor: Array, bias: Array) -> Array:
    return (x - mean) * factor + bias


def _moments(x: Array) -> tuple[Array, Array]:
    """Returns the mean and the (biased) variance `[C]` of `x [..., C]`, in float32."""
    exact, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean = keep(jnp.mean(exact, axes))
    square = keep(jnp.mean(jnp.square(exact), axes))
    return mean, jnp.maximum(square - jnp.square(mean), 0)


@jax.custom_vjp
def _normalize_batch(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Returns `x [..., C]` normalised over its batch, in float32, and its mean and (biased) variance `[C]`.

    The latter two are for running statistics: no gradient goes through them.
    """
    return _normalize_batch_fwd(x, scale, bias)[0]


def _normalize_batch_fwd(x: Array, scale: Array, bias: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    mean, var = _moments(x)
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
