"""Convolutions, implemented per platform (see `shared_basis.nn.ops`), and the geometry of their kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shared_basis.nn.ops import keep, multiply, use_cpu_forms, wide
from shared_basis.nn.types import Array, Dtype

FEW_FILTERS = 8
"""Maximum number of filters, one vector of floats, for `_convolve_by_few` on CPU."""


class Window(NamedTuple):
    """The geometry of a convolution: kernel strides, padding and dilation by spatial axis."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Zero padding before and after, by axis."""
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, kernel: Sequence[int], image: Sequence[int], strides: int | Sequence[int] = 1,
           padding: int | str | Sequence[int | tuple[int, int]] | None = None,
           dilation: int | Sequence[int] = 1) -> Window:
        """Returns the window of a kernel of spatial shape `kernel` on images of spatial shape `image`.

        Args:
          padding: zeros on each side, optionally by axis, optionally before and after; or 'SAME' or 'VALID' as in
            `flax.linen.Conv`. None pads half of the (dilated) kernel.

        Raises:
          ValueError: an argument has a different number of axes than the kernel, or `padding` is an invalid string.
        """
        steps, spread = (_by_axis(name, value, len(kernel)) for name, value in (
            ("strides", strides), ("kernel_dilation", dilation)))
        spans = [(size - 1) * factor + 1 for size, factor in zip(kernel, spread, strict=True)]
        if isinstance(padding, str):
            if padding.upper() not in ("SAME", "VALID"):
                raise ValueError(f"padding={padding!r}: must be 'SAME', 'VALID', or numbers of zeros")
            return cls(steps, tuple(jax.lax.padtype_to_pads(image, spans, steps, padding.upper())), spread)
        sides = [span // 2 for span in spans] if padding is None else _by_axis("padding", padding, len(kernel))
        return cls(steps, tuple((side, side) if isinstance(side, int) else tuple(side) for side in sides), spread)


def _by_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise ValueError(f"{name}={value!r}: the kernel has {axes} axes, so it must be one number or {axes} of them")
    return values


def convolve(x: Array, kernel: Array, window: Window, dtype: Dtype, one: bool = False) -> Array:
    """Convolves `x [N, *image, C]` with `kernel [*k, C / groups, T]`, with groups as implied; computes in `dtype`.

    With `one`, the result has an additional channel of ones: a zero filter with a bias, which accelerators add when
    writing the result.
    """
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if one:
        kernel = jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 1) + [(0, 1)])
        return keep(_convolve(x, kernel, window) + jnp.zeros(kernel.shape[-1], dtype).at[-1].set(1))
    return keep(_convolve_by_form(x, kernel, window))


def _convolve_by_form(x: Array, kernel: Array, window: Window) -> Array:
    """`_convolve`, in the form that is fast on the platform that is traced for."""
    if not use_cpu_forms():
        return _convolve(x, kernel, window)
    groups = x.shape[-1] // kernel.shape[-2]
    if groups == x.shape[-1] == kernel.shape[-1]:
        return _convolve_depthwise(x, kernel, window)
    if groups > 1:
        return _convolve_by_group(x, kernel, window, groups)
    if kernel.ndim != 4 or max(window.dilation) > 1:
        return _convolve(x, kernel, window)
    x, kernel = _varying_alike(x, kernel)
    if kernel.shape[-1] <= FEW_FILTERS and max(window.strides) == 1:
        return _convolve_by_few(x, kernel, window)
    return _convolve_on_cpu(x, kernel, window)


def _varying_alike(*arrays: Array) -> list[Array]:
    """Marks `arrays`, within `jax.shard_map`, as varying over every axis over which any of them varies.

    Their gradients vary like this, which JAX requires in advance for functions with custom gradients.
    """
    types = [getattr(jax.typeof(array), "manual_axis_type", None) for array in arrays]
    varies: list[frozenset[str]] = [getattr(kind, "varying", frozenset()) for kind in types]
    missing = [tuple(frozenset().union(*varies) - axes) for axes in varies]
    return [jax.lax.pcast(array, axes, to="varying") if axes else array
            for array, axes in zip(arrays, missing, strict=True)]


def _convolve(x: Array, kernel: Array, window: Window) -> Array:
    image = "DHW"[-len(window.strides):]
    layout = (f"N{image}C", f"{image}IO", f"N{image}C")
    return jax.lax.conv_general_dilated(x, kernel, window.strides, window.padding, rhs_dilation=window.dilation,
                                        dimension_numbers=layout, feature_group_count=x.shape[-1] // kernel.shape[-2])


def _convolve_depthwise(x: Array, kernel: Array, window: Window) -> Array:
    """`_convolve` with one filter per channel: the sum over all taps of the shifted input times the tap's scale.

    Unlike for a convolution, XLA vectorises over the channels and fuses the operations before and after, also in the
    gradients (benchmarks/README.md: a step of EfficientNet takes a fifth of the time).
    """
    x_wide, scales = (array.astype(wide(array.dtype)) for array in (x, kernel.squeeze(-2)))
    padded = jnp.pad(x_wide, ((0, 0), *window.padding, (0, 0)))
    *size, _ = scales.shape
    ends = [length - (taps - 1) * spread for length, taps, spread in zip(
        padded.shape[1:-1], size, window.dilation, strict=True)]
    first, *others = (
        padded[:, *(slice(index * spread, index * spread + end, stride) for index, spread, end, stride in zip(
            tap, window.dilation, ends, window.strides, strict=True))] * scales[tap]
        for tap in itertools.product(*map(range, size)))
    return jnp.asarray(sum(others, first), x.dtype)


def _convolve_by_group(x: Array, kernel: Array, window: Window, groups: int) -> Array:
    """`_convolve` with a loop over the channel groups, a convolution each.

    XLA's own gradients of grouped convolutions are naive loops, which take many times as long for the 32 groups of
    ResNeXt. Without the loop it takes as long, but 32 times three convolutions are compiled.
    """
    grouped = (jnp.moveaxis(array.reshape(*array.shape[:-1], groups, -1), -2, 0) for array in (x, kernel))
    y = jax.lax.map(lambda group: _convolve_by_form(group[0], group[1], window), tuple(grouped))
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_by_few(x: Array, kernel: Array, window: Window) -> Array:
    """`_convolve` with stride 1: one matrix product for all taps, whose columns are then shifted and added.

    For a single filter it takes a third of the time, as convolution kernels then leave most of a vector register empty.
    """
    return _shifted_products(x, kernel, window)


def _shifted_products(x: Array, kernel: Array, window: Window) -> Array:
    rows, columns, _, filters = kernel.shape
    products = jnp.pad(multiply(x, _taps(kernel)), ((0, 0), *window.padding, (0, 0)))
    height, width = products.shape[1] - rows + 1, products.shape[2] - columns + 1
    products = products.reshape(*products.shape[:3], rows, columns, filters)
    y = sum(products[:, i:i + height, j:j + width, i, j] for i in range(rows) for j in range(columns))
    return jnp.asarray(y, x.dtype)


def _taps(kernel: Array) -> Array:
    """Reshapes `kernel [k, k, C, T]` to a matrix `[C, k · k · T]`."""
    return kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)


def _convolve_by_few_fwd(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return _shifted_products(x, kernel, window), (x, kernel)


def _convolve_by_few_bwd(window: Window, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Gathers, for each pixel, the gradients of the outputs that it affects; both products use the same matrix.

    The derived gradient would scatter them, which takes four times as long.
    """
    x, kernel = saved
    (rows, columns, channels, filters), (height, width) = kernel.shape, x.shape[1:3]
    sides = [(size - 1 - before, size - 1 - after, 0)
             for size, (before, after) in zip((rows, columns), window.padding, strict=True)]
    dy = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
    shifted = [dy[:, i:i + height, j:j + width] for i in reversed(range(rows)) for j in reversed(range(columns))]
    gathered = jnp.concatenate(shifted, axis=-1)
    dx = multiply(gathered, _taps(kernel).T).astype(x.dtype)
    dtaps = x.reshape(-1, channels).T @ gathered.reshape(-1, gathered.shape[-1])
    return dx, dtaps.reshape(channels, rows, columns, filters).transpose(1, 2, 0, 3)


_convolve_by_few.defvjp(_convolve_by_few_fwd, _convolve_by_few_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_on_cpu(x: Array, kernel: Array, window: Window) -> Array:
    """`_convolve` for one channel group, with custom gradients."""
    return _convolve(x, kernel, window)


def _convolve_on_cpu_fwd(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, window), (x, kernel)


def _convolve_on_cpu_bwd(window: Window, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Computes both gradients as convolutions of arrays that are transposed in advance.

    For the input's gradient, the kernel is transposed: if that happens inside the convolution and within a loop body,
    XLA uses naive loops. For the kernel's gradient, the input is transposed (channels become the batch, images the
    channels): XLA would fuse the transposition with the operations that computed the input (normalisation, ReLU,
    addition) and recompute them in an order that misses the cache at each pixel, twenty times slower than the
    transposition itself. XLA does not fuse into matrix products, and a product with the identity transposes exactly.
    """
    x, kernel = saved
    images, height, width, channels = x.shape
    size, one = kernel.shape[:2], (1, 1)
    before, _ = zip(*window.padding, strict=True)
    after = [(out - 1) * stride + taps - length - pad for out, stride, taps, length, pad in zip(
        dy.shape[1:3], window.strides, size, (height, width), before, strict=True)]
    turned = jax.lax.optimization_barrier(kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    outer = tuple((taps - 1 - pad, taps - 1 - rest) for taps, pad, rest in zip(size, before, after, strict=True))
    layout = ("NHWC", "HWIO", "NHWC")
    dx = jax.lax.conv_general_dilated(dy, turned, one, outer, lhs_dilation=window.strides, dimension_numbers=layout)
    pixels_first = x.transpose(1, 2, 0, 3).reshape(-1, channels)
    channels_first = jax.lax.dot_general(jnp.eye(channels, dtype=x.dtype), pixels_first, (((1,), (1,)), ((), ())))
    dk = jax.lax.conv_general_dilated(
        channels_first.reshape(channels, height, width, images), dy.transpose(1, 2, 0, 3), one,
        tuple(zip(before, after, strict=True)), rhs_dilation=window.strides, dimension_numbers=layout)
    return dx, dk.transpose(1, 2, 0, 3)


_convolve_on_cpu.defvjp(_convolve_on_cpu_fwd, _convolve_on_cpu_bwd)
