"""Factorises kernels, given as plain arrays, into a shared basis and per-layer factors, in closed form.

The mathematics is in `shared_basis.compression.factorize`. The batch normalisation of `BasisConv` between basis and
coefficients is set to restore the mean and deviation that it removes: an identity at evaluation, nearly so in training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from shared_basis.compression.factorize import Group, Layer, Matrix, factor_of, factorise, relative_error
from shared_basis.compression.patches import Moments, patch_moments
from shared_basis.nn.batch_norm import EPSILON
from shared_basis.nn.types import Array


@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """One layer of `SharedFactors`: the arrays of its `BasisConv`, float32, and the errors of the approximation."""

    unique: np.ndarray
    """`[*k, C, u]`, orthonormal and orthogonal to the shared elements."""
    coefficients: np.ndarray
    """`[u + s, T]`, coefficients of unique elements first."""
    norm: dict[str, np.ndarray]
    """`scale`, `bias`, `mean` and `var` `[u + s]` of the batch normalisation between basis and coefficients, which is
    the identity at evaluation. With activations, `mean` and `var` are those of the basis's outputs on them."""
    mean_shift: np.ndarray
    """`[T]`, the change of the layer's mean outputs on the activations; add it to the running mean of a following batch
    normalisation. 0 without activations."""
    var_ratio: np.ndarray
    """`[T]`, the factor by which output variances change; multiply running variances by it. 1 without activations."""
    filter_error: float
    """‖W − Ŵ‖ / ‖W‖ for the kernel W and its approximation Ŵ."""
    activation_error: float | None
    """The same for the layer's results on the activations; None without them."""
    bias: np.ndarray | None = None
    """`[T]`, of a layer that has a bias: it compensates for the shift of the means, and `mean_shift` is 0."""

    def __repr__(self) -> str:
        return (f"LayerFactors(unique={list(self.unique.shape)}, coefficients={list(self.coefficients.shape)}, "
                f"captured={self.captured:.3f})")

    @property
    def captured(self) -> float:
        """1 minus the squared relative error, in [0, 1]: of the results on activations, or without them of filters."""
        error = self.filter_error if self.activation_error is None else self.activation_error
        return 1 - error**2

    def variables(self, norm: str | None = "batch") -> dict[str, Any]:
        """Returns `params` and `batch_stats` of the layer as a Linen `BasisConv` with the same `norm` holds them.

        Raises:
          ValueError: `norm` is neither 'batch' nor None; other normalisations cannot be made the identity.
        """
        if norm not in ("batch", None):
            raise ValueError(f"norm={norm!r}: must be 'batch' or None, with BasisConv(..., norm=...) likewise; another "
                             "normalisation between basis and coefficients would change the layer's outputs")
        params: dict[str, Any] = {"coefficients": self.coefficients}
        if self.unique.size:
            params["unique"] = self.unique
        if self.bias is not None:
            params["bias"] = self.bias
        if norm is None:
            return {"params": params}
        scale, bias, mean, var = (self.norm[name] for name in ("scale", "bias", "mean", "var"))
        return {"params": {**params, "norm": {"scale": scale, "bias": bias}},
                "batch_stats": {"norm": {"mean": mean, "var": var}}}


@dataclasses.dataclass(frozen=True)
class SharedFactors:
    """Several kernels, factorised into a shared basis and factors for each layer."""

    basis: np.ndarray
    """The shared elements, orthonormal, float32 `[*k, C, s]`."""
    layers: tuple[LayerFactors, ...]
    """The factors of each layer, in the order of the kernels."""

    def __repr__(self) -> str:
        return f"SharedFactors(basis={list(self.basis.shape)}, layers={list(self.layers)})"


def factorize_kernels(kernels: Sequence[Array | np.ndarray], shared_rank: int, unique_rank: int = 0, *,
                      activations: Sequence[Array | np.ndarray | Moments] | None = None, centered: bool = False,
                      biases: Sequence[Array | np.ndarray | None] | None = None) -> SharedFactors:
    """Factorises the kernels of several layers by one basis that they share, in closed form (docs/compress.md).

        found = factorize_kernels([first, second], 16, unique_rank=1, activations=[inputs_of_first, inputs_of_second])
        params["bases"]["body"] = found.basis
        params["first"], params["second"] = (layer.variables()["params"] for layer in found.layers)

    Without activations the error of the filters is minimised: the shared elements are the truncated SVD of all kernels
    side by side, each divided by its norm, the unique ones that of a layer's residual, and the coefficients their
    least-squares fit. With activations the error of the layers' results on them is minimised, which preserves much more
    of what the network computes. For double sharing call it once for each basis.

    Args:
      kernels: `[*k, C, T_i]`, of convolutions of one channel group.
      shared_rank: s, the elements of the shared basis; 0 shares nothing.
      unique_rank: u, the elements that each layer has to itself.
      activations: for each kernel the inputs of its layer, `[N, *image, C]`, on images such as those of the training
        set; for other strides and padding than 1 and half of the kernel, their `patch_moments`.
      centered: whether errors are measured about the mean of results. Right where a batch normalisation follows,
        which removes the mean; then add `mean_shift` to its running mean and multiply its running variance by
        `var_ratio`. Where the results of several layers are added before it, add their `mean_shift`, and recalculate
        the running variance by some batches in training mode.
      biases: for each kernel the bias `[T]` of its layer, or None: `variables` then contain it, with which the layer
        must be a `BasisConv(…, use_bias=True)`.

    Raises:
      TypeError: `kernels` is one array, not a list of them.
      ValueError: the kernels do not agree in `[*k, C]`, a rank or an array is invalid, or one of them is not finite.
    """
    space = _check_kernels(kernels)
    _check_ranks(shared_rank, unique_rank, space)
    if activations is None and centered:
        raise ValueError("centered=True requires activations, whose means are used")
    for name, given in (("activations", activations), ("biases", biases)):
        if given is not None and len(given) != len(kernels):
            raise ValueError(f"{len(given)} {name} for {len(kernels)} kernels: give one for each kernel")
    moments = [None] * len(kernels) if activations is None else [
        _moments(f"activations[{index}]", each, space) for index, each in enumerate(activations)]
    layers = {index: measured_layer(np.asarray(kernel), seen, centered)
              for index, (kernel, seen) in enumerate(zip(kernels, moments, strict=True))}
    group = Group(layers, dict.fromkeys(layers, "shared") if shared_rank else {})
    bases = group.bases(shared_rank)
    shared = group.basis_of(0, bases)
    found = [factorize_layer(layer, space, shared, unique_rank, moments[index]) for index, layer in layers.items()]
    if biases is not None:
        found = [_with_bias(index, layer, bias) for index, (layer, bias) in enumerate(zip(found, biases, strict=True))]
    return SharedFactors(_float32(shared, *space, shared_rank), tuple(found))


def _with_bias(index: int, layer: LayerFactors, bias: Array | np.ndarray | None) -> LayerFactors:
    """Returns `layer` with the `bias` that compensates for its mean shift too."""
    if bias is None:
        return layer
    if np.shape(bias) != layer.mean_shift.shape:
        raise ValueError(f"biases[{index}] of shape {list(np.shape(bias))}: must be {list(layer.mean_shift.shape)}, as "
                         "its kernel has output channels, or None")
    return dataclasses.replace(layer, bias=np.asarray(bias, np.float32) - layer.mean_shift,
                               mean_shift=np.zeros_like(layer.mean_shift))


def measured_layer(kernel: np.ndarray, moments: Moments | None, centered: bool) -> Layer:
    """Returns the layer of `kernel`, with errors measured on patches with these `moments`; None compares filters.

    Args:
      centered: whether errors are measured about the mean output, which a following batch normalisation removes.
    """
    weights = matrix(kernel)
    if moments is None:
        return Layer(weights, np.eye(len(weights)))
    return Layer(weights, factor_of(moments.covariance if centered else moments.second))


def factorize_layer(layer: Layer, space: tuple[int, ...], basis: Matrix, unique_rank: int,
                    moments: Moments | None) -> LayerFactors:
    """Returns the factors of `layer` for the shared elements `basis` `[D, s]`.

    Args:
      space: `(*k, C)`, with product D.
      moments: the moments of its input patches; None if not measured.
    """
    own = factorise(layer, basis, unique_rank)
    elements = np.concatenate([own.unique, basis], axis=1)
    approximation = elements @ own.coefficients
    rank, features = own.coefficients.shape
    mean, var, shift, ratio = np.zeros(rank), np.ones(rank), np.zeros(features), np.ones(features)
    if moments is not None:
        mean, var = elements.T @ moments.mean, _variances(elements, moments)
        shift = (approximation - layer.kernel).T @ moments.mean
        ratio = (_variances(approximation, moments) + EPSILON) / (_variances(layer.kernel, moments) + EPSILON)
    return LayerFactors(
        _float32(own.unique, *space, unique_rank), _float32(own.coefficients, rank, features),
        {"scale": _float32(np.sqrt(var + EPSILON), rank), "bias": _float32(mean, rank), "mean": _float32(mean, rank),
         "var": _float32(var, rank)},
        _float32(shift, features), _float32(ratio, features), relative_error(layer.kernel, approximation),
        None if moments is None else relative_error(layer.kernel, approximation, layer.factor))


def matrix(kernel: np.ndarray) -> Matrix:
    """Returns `kernel [*k, C, T]` as float64 `[k² C, T]`."""
    return np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])


def _variances(filters: Matrix, moments: Moments) -> np.ndarray:
    """Returns the variances `[R]` of the products of `filters` `[D, R]` with patches with these `moments`."""
    return np.maximum(np.sum(filters * (moments.covariance @ filters), axis=0), 0)


def _float32(array: np.ndarray, *shape: int) -> np.ndarray:
    return np.asarray(array, np.float32).reshape(shape)


def _check_kernels(kernels: Sequence[Array | np.ndarray]) -> tuple[int, ...]:
    """Returns `(*k, C)` of the kernels."""
    if hasattr(kernels, "ndim"):
        raise TypeError(f"kernels is one array of shape {list(np.shape(kernels))}: must be a list of kernels, one for "
                        "each layer; list(kernels) if its first axis counts layers")
    if not len(kernels):
        raise ValueError("kernels is empty: give the kernels of the layers that share a basis")
    for index, kernel in enumerate(kernels):
        shape, first = list(np.shape(kernel)), list(np.shape(kernels[0]))
        if len(shape) < 3 or not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise ValueError(f"kernels[{index}] of shape {shape} and type {kernel.dtype}: must be floats [*k, C, T], "
                             "such as [3, 3, 64, 64]")
        if shape[:-1] != first[:-1]:
            raise ValueError(f"kernels[{index}] of shape {shape} and kernels[0] of shape {first}: must agree in all "
                             "but the last axis; layers of other kernel sizes or input channels need another basis")
        if not np.isfinite(np.asarray(kernel)).all():
            raise ValueError(f"kernels[{index}] holds NaN or infinity")
    return tuple(np.shape(kernels[0])[:-1])


def _check_ranks(shared: int, unique: int, space: tuple[int, ...]) -> None:
    size = math.prod(space)
    if min(shared, unique) < 0 or not 0 < shared + unique <= size:
        raise ValueError(f"shared_rank={shared} and unique_rank={unique}: must be 0 or more, and together from 1 to "
                         f"{size}, the dimension of filters of shape {list(space)}")


def _moments(name: str, given: Array | np.ndarray | Moments, space: tuple[int, ...]) -> Moments:
    """Returns the patch moments of `given`, for kernels `[*space, T]`."""
    if not isinstance(given, Moments):
        if not len(given.shape) or given.shape[-1] != space[-1]:
            raise ValueError(f"{name} of shape {list(given.shape)}: must be [N, *image, {space[-1]}], the inputs of "
                             f"the layer, as its kernel is of shape {list(space)} by T")
        try:
            given = patch_moments(given, space[:-1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if len(given.total) != math.prod(space):
        raise ValueError(f"{name} are the moments of patches of {len(given.total)} numbers: must be of "
                         f"{math.prod(space)}, for a kernel of shape {list(space)} by T")
    return given
