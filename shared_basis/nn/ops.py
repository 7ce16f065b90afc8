"""Platform-dependent tracing and compilation, loops over blocks, and matrix products.

Results do not depend on the implementation, except for rounding. By default, operations are XLA's own, which can be
differentiated, mapped, sharded and exported like those of any Flax layer. Programs compiled only for CPU are traced
with other implementations of the same sums (`forms_for`), since XLA's take several times as long there
(`benchmarks/README.md` has measurements); these do not support forward-mode differentiation.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from shared_basis.nn.types import Array, Dtype, Tree

_KEPT = "kept"
_FORMS = jax.make_user_context("usual")
"""'usual', 'cpu' or 'portable'; part of JAX's trace cache key."""


def forms_for(platform: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that selects the implementations for `platform`: 'cpu', 'gpu' or 'tpu'."""
    return _FORMS("cpu" if platform == "cpu" else "usual")


def portable() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which operations are traced separately, without fusion, for export to graphs."""
    return _FORMS("portable")


def is_portable() -> bool:
    """Returns whether tracing happens within `portable`."""
    return _FORMS.value == "portable"


def use_cpu_forms() -> bool:
    """Returns whether to trace the implementations that are fast on CPU."""
    return _FORMS.value == "cpu"


def prefers_loops() -> bool:
    """Returns whether to compute many identical blocks by `scan_with_remat` rather than unrolled.

    On CPU a loop takes less memory, no more time, and compiles blocks once; not measured on other platforms. Not with
    --debug_nans, as a loop would hide where a NaN occurs.
    """
    return use_cpu_forms() and not jax.config.jax_debug_nans  # type: ignore[attr-defined]


def jit_for(platform: str, *, quick: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator like `jax.jit` that uses the implementations and XLA options for `platform`.

    Args:
      quick: whether the program runs once, like initialisation, so that compilation dominates.
      options: other arguments of `jax.jit`.
    """
    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with forms_for(platform):
                return function(*args, **kwargs)
        chosen = quick_compiler_options(platform) if quick else compiler_options(platform)
        return jax.jit(traced, compiler_options=chosen, **options)
    return decorate


def compiler_options(platform: str | None = None) -> dict[str, Any]:
    """Returns XLA options for `jax.jit(…, compiler_options=…)` that make these operations fast on `platform`.

    On CPU, XLA uses YNNPACK for convolutions, whose gradients take two to five times as long as with Eigen; sums over
    batch and pixels are faster with it. Empty on other platforms, where XLA lacks the option, and if the user has set
    it in `XLA_FLAGS`.

    Args:
      platform: 'cpu', 'gpu' or 'tpu'; None for the platform of JAX's default backend.
    """
    return _known({"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}, platform)


def quick_compiler_options(platform: str | None = None) -> dict[str, Any]:
    """Returns XLA options for a program that runs once, like initialisation, so that compilation dominates."""
    return _known({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}, platform)


def _known(options: dict[str, Any], platform: str | None) -> dict[str, Any]:
    """Returns those CPU `options` that this version of XLA supports and the user has not set in `XLA_FLAGS`."""
    if (platform or jax.default_backend()) != "cpu":
        return {}
    return {name: value for name, value in options.items()
            if name not in os.environ.get("XLA_FLAGS", "") and _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:  # experimental options differ between XLA versions
        return False
    return True


def scan_with_remat(body: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree,
                    inputs: list[Tree]) -> tuple[Tree, list[Tree]]:
    """Computes `carry, output = body(carry, input)` over all `inputs`; returns the final carry and the outputs.

    All inputs have the same structure and shapes. For the gradient, the loop saves only the arrays marked by `keep`,
    the results of convolutions and batch statistics; everything else is recomputed (rematerialised), which takes less
    time on CPU than writing and reading it.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    remat = jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
    carry, outputs = jax.lax.scan(remat, carry, stacked)
    return carry, unstack(outputs, len(inputs))


def keep(x: Array) -> Array:
    """Marks `x` to be saved for the gradient by `scan_with_remat` rather than recomputed."""
    return checkpoint_name(x, _KEPT)


def unstack(tree: Tree, count: int) -> list[Tree]:
    """Splits arrays `[count, …]` of `tree` into `count` trees."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def wide(dtype: Dtype) -> Dtype:
    """Returns the dtype for sums over many values of `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _rows(x: Array) -> Array:
    """Returns `x [..., C]` as a matrix on CPU, unchanged elsewhere.

    For a product on CPU, XLA transposes an array of more axes, fused with the operations that computed it, in an order
    that misses the cache, which takes as long as the product itself.
    """
    return x.reshape(-1, x.shape[-1]) if use_cpu_forms() else x


def multiply(x: Array, matrix: Array, dtype: Dtype = None) -> Array:
    """Returns `x [..., C] @ matrix [C, T]` in `dtype`; None is float32, or float64 for float64."""
    y = jnp.matmul(_rows(x), matrix, preferred_element_type=dtype or wide(x.dtype))
    return y.reshape(*x.shape[:-1], matrix.shape[-1])


def cross(a: Array, b: Array, dtype: Dtype = None) -> Array:
    """Returns `aᵀ b [A, B]`, summed over all axes but the last of `a [..., A]` and `b [..., B]`."""
    a, b = _rows(a), _rows(b)
    axes = tuple(range(a.ndim - 1))
    return jax.lax.dot_general(a, b, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST,
                               preferred_element_type=dtype or wide(a.dtype))


@jax.custom_jvp
def gram(x: Array) -> Array:
    """Returns `cross(x, x)`, with a gradient that needs one product of `x` instead of two."""
    return cross(x, x)


@gram.defjvp
def _gram_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # In the dtype of x, so that the gradient does not use a wider one.
    half = cross(dx, x, x.dtype).astype(wide(x.dtype))
    return gram(x), half + half.T


def relu_of_product(x: Array) -> Array:
    """Returns `max(x, 0)` for a product `x`, which XLA's GPU compiler fuses with the product.

    Its gradient uses the result, which is saved anyway, so that `x` need not be saved. After batch normalisation, whose
    gradient needs `x` too, `flax.linen.relu` takes fewer passes, as it does on CPU.
    """
    return _relu_by_result(x) if _FORMS.value == "usual" else jax.nn.relu(x)


@jax.custom_jvp
def _relu_by_result(x: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.maximum(x, 0))


@_relu_by_result.defjvp
def _relu_by_result_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _relu_by_result(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)
