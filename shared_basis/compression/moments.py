"""The moments of the input patches of a network's layers, on some images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.augment import normalize
from shared_basis.data.feeds import Inputs
from shared_basis.nn import ops
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.forms import kernel_shape
from shared_basis.nn.types import Array, Path
from shared_basis.runs.trained import Variables


@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of patches, whose D = k²C entries are those of a kernel `[k, k, C]`; float64."""

    mean: np.ndarray
    """`[D]`."""
    second: np.ndarray
    """The mean of p pᵀ, `[D, D]`: about 0, not about the mean."""

    @property
    def covariance(self) -> np.ndarray:
        """The second moments about the mean, `[D, D]`."""
        return self.second - np.outer(self.mean, self.mean)


def patches(x: Array, size: int) -> Array:
    """Returns the input patches `[N, H, W, size² · C]` of a convolution of stride 1 over `x [N, H, W, C]`."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    return jnp.concatenate([x[:, i:i + height, j:j + width] for i in range(size) for j in range(size)], axis=-1)


def input_moments(model: nn.Module, variables: Variables, data: DataConfig, layers: Iterable[Path],
                  batches: Iterable[Inputs],
                  progress: Callable[[int], None] = lambda measured: None) -> dict[Path, Moments]:
    """Returns the moments of the input patches of `layers`, 3×3 convolutions of stride 1, at evaluation.

    Args:
      model: has its blocks unrolled; in a loop the layers of several blocks are one.
      layers: their paths in the parameter tree.
      batches: images uint8 `[N, H, W, C]` and labels `[N]`; −1 marks an image that does not count.
      progress: called with the number of images measured so far.
    """
    wanted = frozenset(layers)

    @ops.jit_for(jax.default_backend())
    def sums(variables: Variables, images: Array, labels: Array) -> dict[Path, tuple[Array, Array, Array]]:
        found = {}

        def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = context.module.path
            if isinstance(context.module, BasisConv) and context.method_name == "__call__" and path in wanted:
                found[path] = _sums(args[0], labels >= 0, kernel_shape(context.module.kernel_size)[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            model.apply(variables, normalize(images, data), train=False)
        return found

    totals: dict[Path, list[np.ndarray]] = {}
    measured = 0
    for images, labels in batches:
        for path, part in jax.device_get(sums(variables, images, labels)).items():
            exact = [np.asarray(each, np.float64) for each in part]
            totals[path] = [a + b for a, b in zip(totals[path], exact, strict=True)] if path in totals else exact
        measured += int((np.asarray(labels) >= 0).sum())
        progress(measured)
    return {path: Moments(first / count, second / count) for path, (count, first, second) in totals.items()}


def _sums(x: Array, counts: Array, size: int) -> tuple[Array, Array, Array]:
    """Returns the number of patches of the images `x [N, H, W, C]` that count, their sum and that of their products."""
    found = patches(x.astype(jnp.float32) * counts[:, None, None, None], size)
    found = found.reshape(-1, found.shape[-1])
    number = jnp.sum(counts, dtype=jnp.float32) * x.shape[1] * x.shape[2]
    return number, jnp.sum(found, 0), jnp.matmul(found.T, found, precision=jax.lax.Precision.HIGHEST)
