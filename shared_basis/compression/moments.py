"""Measures the moments of the input patches of a network's layers on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from shared_basis.compression.patches import Moments, patch_sums, to_moments
from shared_basis.config import DataConfig
from shared_basis.data.augment import normalize
from shared_basis.data.feeds import Inputs
from shared_basis.nn import ops
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.convolution import Window
from shared_basis.nn.forms import kernel_shape
from shared_basis.nn.types import Array, Path
from shared_basis.runs.trained import Variables


def input_moments(model: nn.Module, variables: Variables, data: DataConfig, layers: Iterable[Path],
                  batches: Iterable[Inputs],
                  progress: Callable[[int], None] = lambda measured: None) -> dict[Path, Moments]:
    """Returns the moments of the input patches of `layers`, convolutions with one channel group, in evaluation mode.

    Args:
      model: must have unrolled blocks; in a loop, layers of several blocks would be combined.
      layers: paths in the parameter tree.
      batches: images uint8 `[N, H, W, C]` and labels `[N]`; images with label −1 do not count.
      progress: called with the number of images measured so far.
    """
    wanted = frozenset(layers)

    @ops.jit_for(jax.default_backend())
    def sums(variables: Variables, images: Array, labels: Array) -> dict[Path, tuple[Array, Array, Array]]:
        found = {}

        def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = context.module.path
            if isinstance(context.module, BasisConv) and context.method_name == "__call__" and path in wanted:
                x, module = args[0], context.module
                size = kernel_shape(module.kernel_size)
                window = Window.of(size, x.shape[1:-1], module.strides, module.padding, module.kernel_dilation)
                found[path] = patch_sums(x, labels >= 0, size, window)
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            model.apply(variables, normalize(images, data), train=False)
        return found

    totals: dict[Path, Moments] = {}
    measured = 0
    for images, labels in batches:
        for path, part in jax.device_get(sums(variables, images, labels)).items():
            moments = to_moments(part)
            totals[path] = totals[path] + moments if path in totals else moments
        measured += int((np.asarray(labels) >= 0).sum())
        progress(measured)
    return totals
