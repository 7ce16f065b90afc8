"""The operations that networks are made of, and what they are compiled with, as is fastest on each backend.

Everything that is chosen by backend is chosen here. What is computed does not depend on it, but for rounding: XLA
compiles a convolution and its gradients for accelerators as they stand, while on CPU some forms of the same sum take
several times as long as others (`benchmarks/README.md` has the figures).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from shared_basis.nn.types import Array, Dtype, Tree

FEW_FILTERS = 8
"""Up to so many filters, a vector of floats, a convolution on CPU is computed by `_convolve_by_few`."""

_NHWC = ("NHWC", "HWIO", "NHWC")
_KEPT = "kept"
_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it operations are traced as they are written down, in no backend's own form: for programs to export."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def is_portable() -> bool:
    """Returns whether operations are being traced within `portable`."""
    return _PORTABLE.get()


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
    """Returns whether many blocks that are alike are better computed by `scan_with_remat` than one after another.

    On CPU it takes less memory and no more time, and compiles such blocks once. Elsewhere it has not been measured.
    Where NaNs are traced (--debug_nans) a loop would hide their place.
    """
    return use_cpu_forms() and not jax.config.jax_debug_nans  # type: ignore[attr-defined]


def use_cpu_forms() -> bool:
    """Returns whether operations are to be traced in the forms that are fast on CPU."""
    return jax.default_backend() == "cpu" and not is_portable()


def scan_with_remat(body: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree,
                    inputs: list[Tree]) -> tuple[Tree, list[Tree]]:
    """Returns what `carry, output = body(carry, input)` makes of `carry` over all `inputs`, and the list of outputs.

    The inputs have one structure and one shape. For the gradient the loop keeps no more than what `keep` was called
    with, the results of convolutions and the statistics of batches: all else is computed again from them
    (rematerialised), which takes less time on CPU than writing it to memory and reading it back.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    remat = jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
    carry, outputs = jax.lax.scan(remat, carry, stacked)
    return carry, unstack(outputs, len(inputs))


def keep(x: Array) -> Array:
    """Marks `x` as what `scan_with_remat` keeps for the gradient, where it would compute it again otherwise."""
    return checkpoint_name(x, _KEPT)


def unstack(tree: Tree, count: int) -> list[Tree]:
    """Returns the `count` trees that the arrays of `tree`, `[count, …]`, hold one after another."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def convolve(x: Array, kernel: Array, strides: int, padding: int, dtype: Dtype) -> Array:
    """Convolves `x [N, H, W, C]` by `kernel [k, k, C / groups, T]`, zero-padded on all sides; computes in `dtype`."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if not use_cpu_forms() or x.shape[-1] != kernel.shape[2]:
        y = _convolve(x, kernel, strides, padding)
    elif kernel.shape[-1] <= FEW_FILTERS and strides == 1:
        y = _convolve_by_few(x, kernel, padding)
    else:
        y = _convolve_on_cpu(x, kernel, strides, padding)
    return keep(y)


def multiply(x: Array, matrix: Array) -> Array:
    """Returns `x [..., C] @ matrix [C, T]`, in float32.

    On CPU that is one product of matrices: XLA turns round an array of more axes for the matrix's gradient, in one
    fusion with all that has computed it, in an order that misses the cache, which takes as long as the product itself.
    """
    rows = x.reshape(-1, x.shape[-1]) if use_cpu_forms() else x
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
