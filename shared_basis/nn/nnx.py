"""The layer for Flax NNX; its shared basis is an `nnx.Param` that several layers reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from shared_basis.nn.basis_conv import basis_conv
from shared_basis.nn.batch_norm import EPSILON, MOMENTUM, Norm
from shared_basis.nn.convolution import Window, convolve
from shared_basis.nn.forms import Form, check_arrays, check_norm, form_of, kernel_shape, whether_to_train
from shared_basis.nn.initializers import he_normal_fan_out, orthonormal
from shared_basis.nn.types import Array, Dtype


def shared_basis(key: Array | nnx.Rngs, shape: Sequence[int], dtype: Dtype = jnp.float32) -> nnx.Param:
    """Returns a basis `[*k, C, s]` with orthonormal elements (Kang & Kim, section 3.2), for several `BasisConv`.

        body = shared_basis(rngs.params(), (3, 3, 64, 16))
        first = BasisConv(64, 64, body, unique_rank=1, rngs=rngs)
        second = BasisConv(64, 64, body, unique_rank=1, rngs=rngs)

    Args:
      key: a random key, or the `nnx.Rngs` whose `params` stream gives one.
    """
    return nnx.Param(orthonormal(key.params() if isinstance(key, nnx.Rngs) else key, tuple(shape), dtype))


class BasisConv(nnx.Module):
    """The convolution of `shared_basis.BasisConv`, whose documentation says what it computes, as an NNX module.

    The third argument is the shared basis; `kernel_size`, unlike in `flax.nnx.Conv`, is given by name. Layers that hold
    one basis hold one `nnx.Param`; its path in `nnx.state` is the first in alphabetical order.
    """

    def __init__(
        self, in_features: int, out_features: int, shared: nnx.Variable | None = None, *,
        kernel_size: int | Sequence[int] = 3, strides: int | Sequence[int] = 1, unique_rank: int = 0,
        padding: int | str | Sequence[int | tuple[int, int]] | None = None, kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1, shared_feature_group_count: int = 1, whole_filters: bool = False,
        activation: Callable[[Array], Array] | None = None, use_bias: bool = False,
        norm: str | Callable[..., Any] | None = "batch", use_running_average: bool = False,
        axis_name: str | None = None, dtype: Dtype = jnp.float32, param_dtype: Dtype = jnp.float32,
        kernel_init: Callable[..., Array] = he_normal_fan_out, unique_init: Callable[..., Array] = he_normal_fan_out,
        coefficients_init: Callable[..., Array] = he_normal_fan_out,
        bias_init: Callable[..., Array] = nnx.initializers.zeros, rngs: nnx.Rngs,
    ) -> None:
        """Sets C, T and the shared array, which other layers may reference too; other arguments are as in Linen.

        Args:
          norm: 'batch', None, or a callable that returns a normalisation module for a number of channels, such as
            `functools.partial(nnx.GroupNorm, num_groups=4)`.
          use_running_average: what `model.train()` and `model.eval()` set, for calls that do not say it. The flag of a
            single `nnx.BatchNorm`, within this layer or following it, freezes that one alone.

        Raises:
          TypeError: `shared` is not an `nnx.Variable`.
          ValueError: `shared` does not fit, or `norm` is none of these.
        """
        check_norm(norm)
        if not (shared is None or isinstance(shared, nnx.Variable)):
            raise TypeError(f"shared is a {type(shared).__name__}: must be an nnx.Param, such as shared_basis.nnx."
                            "shared_basis returns, or None; give the kernel's size by name, kernel_size=(3, 3)")
        size = kernel_shape(kernel_size)
        self.shared: Any = nnx.data(shared)
        self.form = form_of(None if shared is None else shared[...], unique_rank, whole_filters, len(size))
        self.kernel_size, self.strides, self.padding, self.kernel_dilation = size, strides, padding, kernel_dilation
        self.in_features, self.out_features, self.unique_rank = in_features, out_features, unique_rank
        self.groups = (feature_group_count, shared_feature_group_count)
        self.activation, self.dtype, self.axis_name = activation, dtype, axis_name
        self.use_running_average = use_running_average
        self._check(jnp.zeros((*size, in_features)))

        def drawn(init: Callable[..., Array], *shape: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), shape, param_dtype))
        own = (*size, in_features // feature_group_count)
        if self.form is Form.OWN_KERNEL:
            self.kernel = drawn(kernel_init, *own, out_features)
        if self.form is Form.TEMPLATES and shared is not None:
            templates = shared.shape[-1]
            self.coefficients = drawn(nnx.initializers.normal(templates ** -0.5), templates)
        if self.form is Form.BASIS:
            rank = unique_rank + (0 if shared is None else shared.shape[-1])
            self.unique = drawn(unique_init, *own, unique_rank) if unique_rank else nnx.data(None)
            self.coefficients = drawn(coefficients_init, rank, out_features)
            self._built_in_norm = norm == "batch"
            self.norm: Any = nnx.data(
                nnx.BatchNorm(rank, momentum=MOMENTUM, epsilon=EPSILON, param_dtype=param_dtype, rngs=rngs,
                              use_running_average=use_running_average, axis_name=axis_name) if self._built_in_norm else
                norm(rank, rngs=rngs) if callable(norm) else None)
        self.bias = drawn(bias_init, out_features) if use_bias else nnx.data(None)

    def _check(self, x: Array) -> None:
        check_arrays(x, None if self.shared is None else self.shared[...], self.form, self.kernel_size,
                     self.out_features, *self.groups)

    def __call__(self, x: Array, train: bool | None = None, *, use_running_average: bool | None = None,
                 then: Callable[..., Array] | None = None) -> Array:
        """Maps `x [..., *image, C]` to `[..., *image / strides, T]`; see the Linen module for arguments and errors."""
        self._check(x)
        batch, image = x.shape[:-len(self.kernel_size) - 1], x.shape[-len(self.kernel_size) - 1:]
        window = Window.of(self.kernel_size, image[:-1], self.strides, self.padding, self.kernel_dilation)
        x = x.reshape(-1, *image)
        if not (train is None and use_running_average is None):
            train = whether_to_train(train, use_running_average)
        norm = None
        if self.form is Form.BASIS:
            if isinstance(then, nnx.BatchNorm) and self.bias is None and self._is_joined_by(then, train):
                norm, then = then, None
            y = self._basis_conv(x, window, self._trains(self.norm, train), norm)
        else:
            y = convolve(x, self._kernel(), window, self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if then is not None:
            y = self._bound(then, train)(y)
        return y.reshape(*batch, *y.shape[1:])

    def _is_joined_by(self, norm: nnx.BatchNorm, train: bool | None) -> bool:
        """Returns whether `basis_conv` can fuse the following `norm` with this layer."""
        found = norm.momentum, norm.epsilon, norm.axis, norm.axis_name, norm.dtype or jnp.float32
        return (found == (MOMENTUM, EPSILON, -1, self.axis_name, self.dtype) and norm.use_scale and norm.use_bias
                and self._trains(norm, train) == self._trains(self.norm, train))

    def _trains(self, norm: Any, train: bool | None) -> bool:
        """Returns whether `norm` uses the statistics of the batch, in a call with `train`, None if not given."""
        if train is not None:
            return train
        return not (self.use_running_average or getattr(norm, "use_running_average", False))

    def _bound(self, layer: Callable[..., Array], train: bool | None) -> Callable[[Array], Array]:
        """Returns `layer`; if it is a batch normalisation, one that knows which statistics to use."""
        if isinstance(layer, nnx.BatchNorm):
            return functools.partial(layer, use_running_average=not self._trains(layer, train))
        return layer

    def _kernel(self) -> Array:
        if self.form is Form.OWN_KERNEL:
            return self.kernel[...]
        return self.shared[...] if self.form is Form.WHOLE_FILTERS else self.shared[...] @ self.coefficients[...]

    def _basis_conv(self, x: Array, window: Window, train: bool, then: nnx.BatchNorm | None) -> Array:
        basis = [array[...] for array in (self.unique, self.shared) if array is not None]
        norm: Any = (lambda y: y) if self.norm is None else (
            _read(self.norm) if self._built_in_norm else self._bound(self.norm, train))
        y, moved, moved_then = basis_conv(
            x, basis, norm, self.coefficients[...], window=window, train=train, dtype=self.dtype,
            then=None if then is None else _read(then), activation=self.activation, axis_name=self.axis_name)
        if train and moved is not None:
            _move(self.norm, moved)
        if train and then is not None and moved_then is not None:
            _move(then, moved_then)
        return y


def _read(norm: Any) -> Norm:
    return Norm(norm.scale[...], norm.bias[...], norm.mean[...], norm.var[...])


def _move(norm: nnx.BatchNorm, arrays: Norm) -> None:
    norm.mean[...], norm.var[...] = arrays.mean, arrays.var
