"""The method: convolutions with filter bases that are shared by the layers of a residual group.

A k×k convolution from C to T channels is factorised (Kang & Kim, section 3.1) into a *filter basis* of R elements,
each k×k×C, and *coefficients*, a 1×1 convolution R → T. The basis of a layer is hybrid: R = u + s, where s *shared*
elements belong to the group and u *unique* ones to the layer:

    y = coefficients( BN( [unique ∗ x ; shared ∗ x] ) )

Sharing is data, not a class: a layer that receives a shared array uses it. Plain (R = 0), low-rank without sharing
(s = 0), shared only (u = 0), single and double sharing are all the same layer. So are whole shared filters, where
adjacent 1×1 layers are the layer-specific part, and kernels combined from shared templates.

`basis_conv` is the layer as a function of arrays. `BasisConv` is the Linen module, `shared_basis.nnx` has that for NNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from shared_basis.errors import note_renamed
from shared_basis.nn.batch_norm import BatchNorm, Norm, mix, normalize
from shared_basis.nn.convolution import Window, convolve
from shared_basis.nn.forms import Form, check_arrays, check_norm, form_of, kernel_shape, whether_to_train
from shared_basis.nn.initializers import he_normal_fan_out
from shared_basis.nn.ops import is_portable, multiply, use_cpu_forms
from shared_basis.nn.types import Array, Dtype


def basis_conv(x: Array, basis: Sequence[Array], norm: Norm | Callable[[Array], Array], coefficients: Array, *,
               window: Window, train: bool = False, dtype: Dtype = jnp.float32, then: Norm | None = None,
               activation: Callable[[Array], Array] | None = None,
               axis_name: str | None = None) -> tuple[Array, Norm | None, Norm | None]:
    """Convolves with a basis, as a function of arrays: `then( activation( norm( basis ∗ x ) ) coefficients )`.

    Args:
      x: `[N, *image, C]`.
      basis: arrays of elements `[*k, C / groups, R_i]`; each may have a different number of groups.
      norm: batch normalisation of ΣR_i channels, or any other function.
      coefficients: `[ΣR_i, T]`.
      train: whether to use the statistics of the batch.
      dtype: compute dtype.
      then: the batch normalisation of T channels that follows; fused with this layer if it is linear.
      axis_name: an axis of `jax.shard_map` or `jax.vmap` over which batch statistics are averaged.

    Returns:
      `[N, *image / strides, T]`, and `norm` and `then` with running statistics updated by this batch.
    """
    one_group = all(filters.shape[-2] == x.shape[-1] for filters in basis)
    if joined := one_group and not (use_cpu_forms() or is_portable()):
        basis = [jnp.concatenate(basis, axis=-1)]  # reads x only once
    if isinstance(norm, Norm) and activation is None:
        found = [convolve(x, filters, window, dtype, one=joined) for filters in basis]
        return mix(found, norm, coefficients, train, dtype, then, axis_name, one=joined)
    y, moved = jnp.concatenate([convolve(x, filters, window, dtype) for filters in basis], axis=-1), None
    if isinstance(norm, Norm):
        y, moved = normalize(y, norm, train, dtype, axis_name)
    else:
        y = norm(y)
    y = multiply(y if activation is None else activation(y), coefficients.astype(dtype)).astype(dtype)
    if then is not None:
        y, then = normalize(y, then, train, dtype, axis_name)
    return y, moved, then


class BasisConv(nn.Module):
    """A convolution through a filter basis, which it may share with other layers (Kang & Kim, section 3.1).

        basis = self.param("body", nn.initializers.orthogonal(), (3, 3, 64, 16))    # or init_shared_bases
        y = BasisConv(64, unique_rank=1, unique_init=nn.initializers.orthogonal())(x, basis, train)

    The arguments are those of `flax.linen.Conv` with three differences: `padding=None`, the default, adds half of the
    kernel on each side, as PyTorch's convolutions do (at strides above 1 'SAME' pads differently); `use_bias` is False;
    and `kernel_size=3` means (3, 3), so 1-D and 3-D convolutions need a size for each axis.

    The shared array that it is called with, and `unique_rank`, determine what it computes:

    - no shared array and no unique elements: an ordinary convolution with its own `kernel [*k, C / groups, T]`;
    - a filter basis: `unique [*k, C / groups, u]` if u > 0, `norm` (scale and bias of R channels) and
      `coefficients [R, T]`; the shared elements `[*k, C / shared groups, s]` are passed as argument;
    - whole filters `[*k, C, T]` with `whole_filters`: a convolution with these, without parameters;
    - templates `[*k, C, T, templates]`: a convolution with the combination of templates by `coefficients [templates]`.

    The network owns the shared arrays. Layers can share a basis if their kernel sizes and input channels are equal.

    Attributes:
      features: T, the number of output channels.
      kernel_size: k of a square kernel, or its size by axis, e.g. `(3,)` for 1-D and `(3, 3, 3)` for 3-D convolutions.
      strides: one for all axes, or by axis.
      unique_rank: u, the elements that belong to this layer alone; see `unique_init`.
      dtype: compute type.
      padding: 'SAME', 'VALID' or zeros by axis, as in `flax.linen.Conv`; None pads half of the kernel on each side.
      feature_group_count: channel groups of the layer's own kernel or unique elements.
      shared_feature_group_count: channel groups of the shared elements.
      whole_filters: whether a shared array contains the layer's filters rather than elements of a basis.
      activation: applied between normalisation and coefficients; None in the paper's method, ReLU in ResNeXt.
      use_bias: whether a bias `[T]` is added.
      kernel_dilation: as in `flax.linen.Conv`.
      norm: between basis and coefficients: 'batch' (the method), None, or a callable that returns a normalisation
        module, such as `functools.partial(nn.GroupNorm, num_groups=4)`; it is called with `name='norm'`.
      use_running_average: as in `flax.linen.BatchNorm`, set here or in the call; False for training.
      axis_name: as in `flax.linen.BatchNorm`: an axis over which batch statistics are averaged.
      param_dtype: type of the parameters.
      kernel_init, coefficients_init, bias_init: initialisers.
      unique_init: initialiser of unique elements. With the default, as published, their norms start at √(2C/u). In your
        own network, and wherever the penalty applies to unique elements too, use `nn.initializers.orthogonal()`: their
        norms start at 1, as those of shared elements.
      groups, shared_groups: deprecated names of `feature_group_count` and `shared_feature_group_count`.
    """

    features: int
    kernel_size: int | Sequence[int] = 3
    strides: int | Sequence[int] = 1
    unique_rank: int = 0
    dtype: Dtype = jnp.float32
    padding: int | str | Sequence[int | tuple[int, int]] | None = None
    feature_group_count: int = 1
    shared_feature_group_count: int = 1
    whole_filters: bool = False
    activation: Callable[[Array], Array] | None = None
    use_bias: bool = False
    kernel_dilation: int | Sequence[int] = 1
    norm: str | Callable[..., nn.Module] | None = "batch"
    use_running_average: bool | None = None
    axis_name: str | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = he_normal_fan_out
    unique_init: Callable[..., Array] = he_normal_fan_out
    coefficients_init: Callable[..., Array] = he_normal_fan_out
    bias_init: Callable[..., Array] = nn.initializers.zeros
    groups: int | None = None
    shared_groups: int | None = None

    def __post_init__(self) -> None:
        for old, new in (("groups", "feature_group_count"), ("shared_groups", "shared_feature_group_count")):
            if (value := getattr(self, old)) is not None:
                note_renamed(f"BasisConv({old}=…)", f"BasisConv({new}=…)")
                object.__setattr__(self, new, value)  # modules are frozen
                object.__setattr__(self, old, None)
        check_norm(self.norm)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, shared: Array | None = None, train: bool | None = None, *,
                 use_running_average: bool | None = None, then: Callable[[Array], Array] | None = None) -> Array:
        """Maps `x [..., *image, C]` to `[..., *image / strides, T]`.

        Args:
          shared: one of the arrays described above.
          train: whether to use the statistics of the batch; the inverse of `use_running_average`.
          then: the layer that follows; a `shared_basis.BatchNorm` is fused with this one.

        Raises:
          TypeError: `shared` is not an array, or whether to train is one, such as a traced value.
          ValueError: `x` or `shared` does not fit this layer, or whether to train is not given or contradictory.
        """
        size = kernel_shape(self.kernel_size)
        form = self.form(shared)
        check_arrays(x, shared, form, size, self.features, self.feature_group_count, self.shared_feature_group_count)
        batch, image = x.shape[:-len(size) - 1], x.shape[-len(size) - 1:]
        window = Window.of(size, image[:-1], self.strides, self.padding, self.kernel_dilation)
        x, norm = x.reshape(-1, *image), None
        if form is Form.BASIS:
            if self.norm == "batch":
                train = whether_to_train(train, use_running_average, self.use_running_average)
            if isinstance(then, BatchNorm) and not self.use_bias and (
                    then.train, then.dtype, then.axis_name) == (train, self.dtype, self.axis_name):
                norm, then = then, None
            y = self._basis_conv(x, shared, window, bool(train), norm)
        else:
            y = convolve(x, self._kernel(image[-1], shared, form), window, self.dtype)
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,), self.param_dtype).astype(y.dtype)
        if then is not None:
            y = then(y)
        return y.reshape(*batch, *y.shape[1:])

    @nn.nowrap
    def form(self, shared: Array | None) -> Form:
        """Returns the kind of filters of the layer, given `shared`."""
        return form_of(shared, self.unique_rank, self.whole_filters, len(kernel_shape(self.kernel_size)))

    def _kernel(self, channels: int, shared: Array | None, form: Form) -> Array:
        if shared is None:
            shape = (*kernel_shape(self.kernel_size), channels // self.feature_group_count, self.features)
            return self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if form is Form.WHOLE_FILTERS:
            return shared
        init = nn.initializers.normal(shared.shape[-1] ** -0.5)
        return shared @ self.param("coefficients", init, shared.shape[-1:], self.param_dtype)

    def _basis_conv(self, x: Array, shared: Array | None, window: Window, train: bool,
                    then: BatchNorm | None) -> Array:
        basis = [] if shared is None else [shared]
        if self.unique_rank:
            shape = (*kernel_shape(self.kernel_size), x.shape[-1] // self.feature_group_count, self.unique_rank)
            basis.insert(0, self.param("unique", self.unique_init, shape, self.param_dtype))
        rank = sum(filters.shape[-1] for filters in basis)
        coefficients = self.param("coefficients", self.coefficients_init, (rank, self.features), self.param_dtype)
        batch = None
        if self.norm == "batch":
            batch = BatchNorm(train, self.dtype, self.axis_name, self.param_dtype, name="norm")
        norm = batch.read(rank) if batch else self.norm(name="norm") if callable(self.norm) else lambda y: y
        y, moved, moved_then = basis_conv(
            x, basis, norm, coefficients, window=window, train=train, dtype=self.dtype, activation=self.activation,
            then=then.read(self.features) if then else None,
            axis_name=None if self.is_initializing() else self.axis_name)  # as in `BatchNorm`
        if batch and moved:
            batch.write(moved)
        if then and moved_then:
            then.write(moved_then)
        return y
