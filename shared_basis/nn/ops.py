"""The operations that networks are made of, and what they are compiled with, as is fastest on each backend.

Everything that is chosen by backend is chosen here. What is computed does not depend on it, but for rounding: XLA
compiles a convolution and its gradients for accelerators as they stand, while on CPU some forms of the same sum take
several times as long as others (`benchmarks/README.md` has the figures).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
Dtype = Any
Tree = Any

MOMENTUM = 0.9
"""Of the running statistics of batch normalisation: 0.9 old + 0.1 new, as published."""
EPSILON = 1e-5
"""Added to variances by batch normalisation, as published."""

FEW_FILTERS = 8
"""Up to so many filters, a vector of floats, a convolution on CPU is computed by `_convolve_by_few`."""

_NHWC = ("NHWC", "HWIO", "NHWC")
_KEPT = "kept"
"""Names what a loop keeps for its gradient: results of convolutions, and statistics of batches."""


_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it operations are traced as they are written down, in no backend's own form: for programs to export."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


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


def prefers_loops() -> bool:
    """Returns whether many blocks that are alike are better computed in a loop (`loop`) than one after another.

    On CPU it takes less memory and no more time, and compiles such blocks once. Elsewhere it has not been measured.
    Where NaNs are traced (--debug_nans) a loop would hide their place.
    """
    return _suits_cpu() and not jax.config.jax_debug_nans  # type: ignore[attr-defined]


def _suits_cpu() -> bool:
    return jax.default_backend() == "cpu" and not _PORTABLE.get()


def loop(body: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree, inputs: list[Tree]) -> tuple[Tree, list[Tree]]:
    """Returns what `carry, output = body(carry, input)` makes of `carry` over all `inputs`, and the list of outputs.

    The inputs have one structure and one shape. For the gradient the loop keeps no more than the results of
    convolutions and the statistics of batches: all else is computed again from them (rematerialised), which takes less
    time on CPU than writing it to memory and reading it back.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    keeping = jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
    carry, outputs = jax.lax.scan(keeping, carry, stacked)
    return carry, unstack(outputs, len(inputs))


def unstack(tree: Tree, count: int) -> list[Tree]:
    """Returns the `count` trees that the arrays of `tree`, `[count, …]`, hold one after another."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def convolve(x: Array, kernel: Array, strides: int, padding: int, dtype: Dtype) -> Array:
    """Convolves `x [N, H, W, C]` by `kernel [k, k, C / groups, T]`, zero-padded on all sides; computes in `dtype`."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if not _suits_cpu() or x.shape[-1] != kernel.shape[2]:
        y = _convolve(x, kernel, strides, padding)
    elif kernel.shape[-1] <= FEW_FILTERS and strides == 1:
        y = _convolve_by_few(x, kernel, padding)
    else:
        y = _convolve_on_cpu(x, kernel, strides, padding)
    return checkpoint_name(y, _KEPT)


def multiply(x: Array, matrix: Array) -> Array:
    """Returns `x [..., C] @ matrix [C, T]`, in float32.

    On CPU that is one product of matrices: XLA turns round an array of more axes for the matrix's gradient, in one
    fusion with all that has computed it, in an order that misses the cache, which takes as long as the product itself.
    """
    rows = x.reshape(-1, x.shape[-1]) if _suits_cpu() else x
    return jnp.matmul(rows, matrix, preferred_element_type=jnp.float32).reshape(*x.shape[:-1], -1)


def _convolve(x: Array, kernel: Array, strides: int, padding: int) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), [(padding, padding)] * 2,
                                        dimension_numbers=_NHWC, feature_group_count=x.shape[-1] // kernel.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_by_few(x: Array, kernel: Array, padding: int) -> Array:
    """Is `_convolve` with stride 1: a matrix product for all taps at once, whose columns are then shifted and added.

    For one filter it takes a third of the time, as there the kernels of a convolution leave most of a vector empty.
    """
    rows, columns, _, filters = kernel.shape
    height, width = x.shape[1] + 2 * padding - rows + 1, x.shape[2] + 2 * padding - columns + 1
    products = multiply(x, _taps(kernel))
    products = jnp.pad(products, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    products = products.reshape(*products.shape[:3], rows, columns, filters)
    y = sum(products[:, i:i + height, j:j + width, i, j] for i in range(rows) for j in range(columns))
    return jnp.asarray(y, x.dtype)


def _taps(kernel: Array) -> Array:
    """Returns `kernel [k, k, C, T]` as a matrix `[C, k · k · T]`."""
    return kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)


def _convolve_by_few_fwd(x: Array, kernel: Array, padding: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolve_by_few(x, kernel, padding), (x, kernel)


def _convolve_by_few_bwd(padding: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Gathers for each pixel the gradients of the results that it went into; both products take the same matrix.

    The derived gradient scatters them instead, and takes four times as long.
    """
    x, kernel = saved
    (rows, columns, channels, filters), (height, width) = kernel.shape, x.shape[1:3]
    before, left = rows - 1 - padding, columns - 1 - padding
    dy = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), (before, before, 0), (left, left, 0), (0, 0, 0)])
    shifted = [dy[:, i:i + height, j:j + width] for i in reversed(range(rows)) for j in reversed(range(columns))]
    gathered = jnp.concatenate(shifted, axis=-1)
    dx = multiply(gathered, _taps(kernel).T).astype(x.dtype)
    dtaps = x.reshape(-1, channels).T @ gathered.reshape(-1, gathered.shape[-1])
    return dx, dtaps.reshape(channels, rows, columns, filters).transpose(1, 2, 0, 3)


_convolve_by_few.defvjp(_convolve_by_few_fwd, _convolve_by_few_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_on_cpu(x: Array, kernel: Array, strides: int, padding: int) -> Array:
    """Is `_convolve` for one channel group; differs in how its gradients are computed."""
    return _convolve(x, kernel, strides, padding)


def _convolve_on_cpu_fwd(x: Array, kernel: Array, strides: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _convolve_on_cpu_bwd(strides: int, padding: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Computes both gradients as the convolutions that they are, of arrays that are turned round beforehand.

    The kernel, for the input's gradient: XLA takes one that is turned within the convolution by naive loops when that
    is in the body of a loop. The input, for the kernel's gradient, whose batch are the channels and whose channels
    are the images: XLA would fuse turning it with what has computed it (normalisation, ReLU, addition), and compute all
    of that again in an order that misses the cache at each pixel: twenty times as slow as the turn itself. It does not
    fuse into a matrix product, and one with the identity turns an array round exactly.
    """
    x, kernel = saved
    images, height, width, channels = x.shape
    rows, columns = kernel.shape[:2]
    after = [(out - 1) * strides + size - length - padding for out, size, length in zip(
        dy.shape[1:3], (rows, columns), (height, width), strict=True)]
    turned = jax.lax.optimization_barrier(kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    dx = jax.lax.conv_general_dilated(
        dy, turned, (1, 1), [(size - 1 - padding, size - 1 - rest)
                             for size, rest in zip((rows, columns), after, strict=True)],
        lhs_dilation=(strides, strides), dimension_numbers=_NHWC)
    pixels_first = x.transpose(1, 2, 0, 3).reshape(-1, channels)
    channels_first = jax.lax.dot_general(jnp.eye(channels, dtype=x.dtype), pixels_first, (((1,), (1,)), ((), ())))
    dk = jax.lax.conv_general_dilated(
        channels_first.reshape(channels, height, width, images), dy.transpose(1, 2, 0, 3), (1, 1),
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

    def __call__(self, x: Array) -> Array:
        """Maps `x [..., C]` to the same shape."""
        mean, var, scale, bias = self._variables(x.shape[-1])
        if not self.train:
            return _normalize(x, mean.value, _factor(var.value, scale), bias).astype(self.dtype)
        y, *moments = _normalize_batch(x, scale, bias)
        self._move(mean, var, *moments)
        return y.astype(self.dtype)

    def followed_by(self, parts: Sequence[Array], matrix: Array) -> Array:
        """Maps `parts [..., C_i]`, whose channels follow one another, to `self(all of them) @ matrix [ΣC_i, T]`.

        Both are linear: factors go into the matrix and the rest into an offset of the product, so that normalised
        arrays are neither written nor read, and gradients need no further sums over the batch. On CPU the parts are not
        written side by side either, but each is multiplied by its rows of the matrix.
        """
        if not _suits_cpu():
            parts = [jnp.concatenate(parts, axis=-1)]
        if _PORTABLE.get():
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
    mean = checkpoint_name(jnp.mean(exact, axes), _KEPT)
    square = checkpoint_name(jnp.mean(jnp.square(exact), axes), _KEPT)
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
