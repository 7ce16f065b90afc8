"""How operations are traced and compiled for a platform, loops over blocks, and products of matrices.

What is computed does not depend on the form, but for rounding. As written down, operations are XLA's own: they can be
differentiated, mapped, sharded and exported as those of any Flax layer. A program that is compiled for CPU alone is
traced in other forms of the same sums (`forms_for`), as XLA's take several times as long there
(`benchmarks/README.md` has the figures); these cannot be differentiated in forward mode.
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
"""'usual', 'cpu' or 'portable'; JAX keeps what is traced in one apart from what is traced in another."""


def forms_for(platform: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which operations are traced in the forms that suit `platform`: 'cpu', 'gpu' or 'tpu'."""
    return _FORMS("cpu" if platform == "cpu" else "usual")


def portable() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which each operation is traced by itself, none fused with another: for graphs to export."""
    return _FORMS("portable")


def is_portable() -> bool:
    """Returns whether operations are being traced within `portable`."""
    return _FORMS.value == "portable"


def use_cpu_forms() -> bool:
    """Returns whether operations are to be traced in the forms that are fast on CPU."""
    return _FORMS.value == "cpu"


def prefers_loops() -> bool:
    """Returns whether many blocks that are alike are better computed by `scan_with_remat` than one after another.

    On CPU it takes less memory and no more time, and compiles such blocks once. Elsewhere it has not been measured.
    Where NaNs are traced (--debug_nans) a loop would hide their place.
    """
    return use_cpu_forms() and not jax.config.jax_debug_nans  # type: ignore[attr-defined]


def jit_for(platform: str, *, quick: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Returns `jax.jit` as a decorator: traces in the forms, and compiles with XLA's options, that suit `platform`.

    Args:
      quick: whether the program runs once, such as initialisation: its time is compilation.
      options: further arguments of `jax.jit`.
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
    """Returns XLA's options for `jax.jit(…, compiler_options=…)` that suit these operations on `platform`.

    On CPU XLA hands convolutions to YNNPACK, which takes two to five times as long for gradients as Eigen does; sums
    over batch and pixels are faster with it. Empty on other platforms, where XLA does not know the option, and where
    the user has set it in `XLA_FLAGS`.

    Args:
      platform: 'cpu', 'gpu' or 'tpu'; None is that of JAX's default backend.
    """
    return _known({"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}, platform)


def quick_compiler_options(platform: str | None = None) -> dict[str, Any]:
    """Returns likewise the options for a program that runs once, such as initialisation: its time is compilation."""
    return _known({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}, platform)


def _known(options: dict[str, Any], platform: str | None) -> dict[str, Any]:
    """Returns those of the `options` for CPU that this XLA has and that the user has not set in `XLA_FLAGS`."""
    if (platform or jax.default_backend()) != "cpu":
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


def wide(dtype: Dtype) -> Dtype:
    """Returns the type of sums over many values of `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _rows(x: Array) -> Array:
    """Returns `x [..., C]` as a matrix on CPU, as it is elsewhere.

    On CPU XLA turns round an array of more axes for a product, in one fusion with all that has computed it, in an order
    that misses the cache, which takes as long as the product itself.
    """
    return x.reshape(-1, x.shape[-1]) if use_cpu_forms() else x


def multiply(x: Array, matrix: Array, dtype: Dtype = None) -> Array:
    """Returns `x [..., C] @ matrix [C, T]` in `dtype`; None is float32, or float64 for float64."""
    y = jnp.matmul(_rows(x), matrix, preferred_element_type=dtype or wide(x.dtype))
    return y.reshape(*x.shape[:-1], matrix.shape[-1])


def cross(a: Array, b: Array, dtype: Dtype = None) -> Array:
    """Returns the sums of products `aᵀ b [A, B]` over all axes but the last of `a [..., A]` and `b [..., B]`."""
    a, b = _rows(a), _rows(b)
    axes = tuple(range(a.ndim - 1))
    return jax.lax.dot_general(a, b, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST,
                               preferred_element_type=dtype or wide(a.dtype))


@jax.custom_jvp
def gram(x: Array) -> Array:
    """Returns `cross(x, x)`; its gradient takes one product of `x` where the derived one takes two."""
    return cross(x, x)


@gram.defjvp
def _gram_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # In the type of x, so that the gradient's product reads and writes no wider one.
    half = cross(dx, x, x.dtype).astype(wide(x.dtype))
    return gram(x), half + half.T


def relu_of_product(x: Array) -> Array:
    """Returns `max(x, 0)` of a product `x`, which XLA's GPU compiler then takes as it writes the product.

    Its gradient goes by the result, which is kept anyway, so that `x` need not be. After batch normalisation, whose
    gradient reads `x` too, `flax.linen.relu` takes fewer passes, as it does on CPU.
    """
    return _relu_by_result(x) if _FORMS.value == "usual" else jax.nn.relu(x)


@jax.custom_jvp
def _relu_by_result(x: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.maximum(x, 0))


@_relu_by_result.defjvp
def _relu_by_result_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _relu_by_result(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)
