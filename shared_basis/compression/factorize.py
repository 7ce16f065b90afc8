"""Closed-form factorisation of plain kernels into filter bases; only NumPy in float64, no networks or files.

A kernel `[k, k, C, T]` is a matrix W `[D, T]`, D = k²C, whose columns are filters: it maps an input patch p to Wᵀp.
With a basis E `[D, R]`, whose columns are elements, and coefficients A `[R, T]`, the factorised layer maps it to
(E A)ᵀp. The error of a layer is measured in a metric Σ `[D, D]`:

    error = trace((W − E A)ᵀ Σ (W − E A)) = ‖M (W − E A)‖²,    Σ = MᵀM

Σ = I compares filters; the second moment of the layer's input patches compares its outputs. Given Σ:

- the coefficients for any elements are their least-squares fit;
- given the shared elements, the best u unique ones are the truncated SVD of the residual of M W after fitting them;
- the best s shared elements of several layers are the truncated SVD of their stacked kernels M [W₁ W₂ …], if they have
  the same metric. With different metrics it is a weighted low-rank approximation without a closed form; the mean of
  the metrics is used instead, but only to choose the shared elements.

A change of basis within its span does not change E A, so all elements of a layer are made orthonormal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Matrix = np.ndarray

RIDGE = 1e-4
"""Ridge added to Σ's diagonal, as a fraction of its mean, since patches may not span the space or be too few."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A plain layer, and the metric for the error of its factorised form."""

    kernel: Matrix
    """W, float64 `[D, T]`."""
    factor: Matrix
    """M, invertible, float64 `[D, D]`."""

    @functools.cached_property
    def weighted_kernel(self) -> Matrix:
        """M W, `[D, T]`, whose squared norm is the layer's energy."""
        return self.factor @ self.kernel

    @property
    def energy(self) -> float:
        """The error of an approximation by 0."""
        return float(np.sum(self.weighted_kernel**2))


@dataclasses.dataclass(frozen=True)
class Factorised:
    """The parameters of a factorised layer."""

    unique: Matrix
    """`[D, u]`, orthonormal columns, orthogonal to the shared elements."""
    coefficients: Matrix
    """`[u + s, T]`, coefficients of unique elements first."""


def factor_of(metric: Matrix) -> Matrix:
    """Returns M, upper triangular and invertible, with MᵀM = `metric` plus a small multiple of I (`RIDGE`)."""
    size = len(metric)
    ridge = RIDGE * np.trace(metric) / size or 1.0
    try:
        return np.linalg.cholesky(metric + ridge * np.eye(size)).T
    except np.linalg.LinAlgError:  # rounding errors of float32 sums can make it indefinite
        return np.linalg.cholesky(metric + (abs(ridge) - 2 * np.linalg.eigvalsh(metric)[0]) * np.eye(size)).T


def shared_directions(layers: Sequence[Layer]) -> Matrix:
    """Returns orthonormal columns `[D, D]` whose first s are the shared basis of rank s, for every s.

    The basis is optimal for all `layers` together, with errors relative to their energies. If metrics differ, it is
    optimal in their mean, each scaled to trace 1.
    """
    if all(layer.factor is layers[0].factor for layer in layers):
        factor = layers[0].factor
    else:
        factor = np.linalg.cholesky(sum(
            (layer.factor.T @ layer.factor / np.sum(layer.factor**2) for layer in layers),
            np.zeros_like(layers[0].factor))).T
    stacked = factor @ np.concatenate([layer.kernel / np.sqrt(layer.energy or 1.0) for layer in layers], axis=1)
    directions = np.linalg.eigh(stacked @ stacked.T)[1][:, ::-1]
    return np.linalg.qr(np.linalg.solve(factor, directions))[0]


def orthonormal_together(bases: Sequence[Matrix]) -> list[Matrix]:
    """Returns the nearest bases that are jointly orthonormal, for `bases` `[D, s]` that are each orthonormal.

    A single basis is returned unchanged, as are bases of different spaces or with more elements than dimensions.
    """
    if len(bases) == 1 or len({len(basis) for basis in bases}) > 1:
        return list(bases)
    stacked = np.concatenate(bases, axis=1)
    if stacked.shape[1] > len(stacked):
        return list(bases)
    left, _, right = np.linalg.svd(stacked, full_matrices=False)  # the polar factor is the nearest orthonormal set
    return np.split(left @ right, len(bases), axis=1)


def residual(layer: Layer, basis: Matrix) -> Matrix:
    """Returns the residual `[D, T]` of M W after its least-squares fit by `basis` `[D, s]`."""
    span = np.linalg.qr(layer.factor @ basis)[0]
    return layer.weighted_kernel - span @ (span.T @ layer.weighted_kernel)


def remaining_energy(layer: Layer, basis: Matrix) -> Matrix:
    """Returns the relative error for `basis` and the best u = 0, 1, … T unique elements."""
    weighted = layer.factor @ basis  # normal equations are fastest; spectra need many ranks
    inverse = np.linalg.inv(np.linalg.cholesky(weighted.T @ weighted))
    fitted = inverse @ (weighted.T @ layer.weighted_kernel)
    squares = np.maximum(np.linalg.eigvalsh(  # in increasing order
        layer.weighted_kernel.T @ layer.weighted_kernel - fitted.T @ fitted), 0)
    return np.append(np.cumsum(squares)[::-1], 0.0) / (layer.energy or 1.0)


def factorise(layer: Layer, basis: Matrix, unique_rank: int) -> Factorised:
    """Returns the best `unique_rank` unique elements in addition to `basis` `[D, s]`, and all coefficients."""
    rest = residual(layer, basis)
    left = np.linalg.svd(rest, full_matrices=unique_rank > min(rest.shape))[0][:, :unique_rank]
    directions = np.concatenate([basis, np.linalg.solve(layer.factor, left)], axis=1)
    unique = np.linalg.qr(directions)[0][:, basis.shape[1]:]  # has full rank even if the residual is 0
    elements = np.concatenate([unique, basis], axis=1)
    return Factorised(unique, fit(layer, elements))


def fit(layer: Layer, elements: Matrix) -> Matrix:
    """Returns the least-squares coefficients `[R, T]` of `elements` `[D, R]`."""
    return np.linalg.lstsq(layer.factor @ elements, layer.weighted_kernel, rcond=None)[0]


def relative_error(kernel: Matrix, approximation: Matrix, factor: Matrix | None = None) -> float:
    """Returns ‖M (W − Ŵ)‖ / ‖M W‖ for W `kernel` and Ŵ `approximation`, both `[D, T]`; `factor` None means M = I."""
    difference = kernel - approximation
    if factor is not None:
        difference, kernel = factor @ difference, factor @ kernel
    return float(np.linalg.norm(difference) / (np.linalg.norm(kernel) or 1.0))


@dataclasses.dataclass(frozen=True)
class Group:
    """The layers of a residual group, factorised together."""

    layers: Mapping[Any, Layer]
    """The layers, by any key."""
    uses: Mapping[Any, str]
    """The name of the shared basis of each layer; layers without one are absent."""

    @functools.cached_property
    def _directions(self) -> dict[str, Matrix]:
        return {name: shared_directions([self.layers[layer] for layer, used in self.uses.items() if used == name])
                for name in sorted(set(self.uses.values()))}

    def bases(self, rank: int) -> dict[str, Matrix]:
        """Returns the shared bases `[D, rank]` by name, each orthonormal, and jointly if dimensions allow."""
        if not self._directions:
            return {}
        parts = orthonormal_together([directions[:, :rank] for directions in self._directions.values()])
        return dict(zip(self._directions, parts, strict=True))

    def basis_of(self, layer: Any, bases: Mapping[str, Matrix]) -> Matrix:
        """Returns the shared elements that `layer` uses; `[D, 0]` if there are none."""
        return bases[self.uses[layer]] if layer in self.uses else np.zeros((len(self.layers[layer].kernel), 0))

    def remaining(self, rank: int) -> Matrix:
        """Returns the mean of `remaining_energy` over the layers, for shared bases of `rank`."""
        bases = self.bases(rank)
        parts = [remaining_energy(layer, self.basis_of(name, bases)) for name, layer in self.layers.items()]
        longest = max(map(len, parts))  # with as many elements as filters, the error is 0
        return np.mean([np.pad(part, (0, longest - len(part))) for part in parts], 0)
