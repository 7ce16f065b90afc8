"""Exact orthogonality: filter bases that are orthonormal after every step, as the last link of an optax chain.

The penalty (`shared_basis.optim.penalty`) pulls bases towards orthonormality; this keeps them there. Norms are then 1
and coherence 0 at every step, with no weight λ to choose. Each update is projected to the tangent space of the
orthonormal bases, so that neither momentum nor weight decay pulls away from them, and what is left of the deviation is
removed by the polar factor: the nearest orthonormal basis (Absil, Mahony & Sepulchre 2008, section 4.1).

The pairs that are made orthogonal are those that the penalty counts: all shared elements of a group with each other,
and the unique elements of a layer with each other and with the shared ones. Where there are more shared elements than
the space has dimensions, R > k²C, their rows cannot be orthonormal: the columns are made so instead, which is a tight
frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from shared_basis.errors import UserError
from shared_basis.nn.types import Array, Path, Tree
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.paths import arrays_at, replace_arrays
from shared_basis.optim.penalty import Rows, paths_of, rows_at

LIFTING, CONVERGING = (3.4445, -4.775, 2.0315), (1.875, -1.25, 0.375)
"""Of Newton–Schulz iterations X ← (a + b X Xᵀ + c (X Xᵀ)²) X.

The first brings singular values to between 0.68 and 1.21, small ones by 3.4 times at each (Jordan et al. 2024, "Muon");
the second takes them from there to 1, with an error that falls as its third power.
"""

ITERATIONS = (*(LIFTING,) * 5, *(CONVERGING,) * 2)
"""With a last, third converging one, enough for singular values of a factor of a hundred; updates leave them close."""


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _transposed(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)


def polar_factor(matrix: Array) -> Array:
    """Returns the nearest matrix with orthonormal rows, or columns where there are more rows than columns.

    Args:
      matrix: float32 `[…, R, D]` of full rank; a stack of matrices is treated one by one.

    Returns:
      U Vᵀ of the singular value decomposition U S Vᵀ, by Newton–Schulz iteration: products alone, in float32.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return _transposed(polar_factor(_transposed(matrix)))
    # The largest row sum bounds the largest eigenvalue: singular values come to (0, 1], where the iteration converges.
    gram = _product(matrix, _transposed(matrix))
    square = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)[..., None, None]
    x = _product(_factor(gram / square, ITERATIONS), matrix / jnp.sqrt(square))
    # A Gram matrix holds small singular values inexactly: the last iteration starts from what has really come out.
    return _product(_factor(_product(x, _transposed(x)), [CONVERGING]), x)


def _factor(gram: Array, iterations: Sequence[tuple[float, float, float]]) -> Array:
    """Returns `[…, R, R]` what `iterations` multiply a matrix by whose Gram matrix is `gram`.

    A basis is much wider than high: products of Gram matrices take a small part of the time of those with the basis.
    """
    total = eye = jnp.eye(gram.shape[-1])
    for index, (a, b, c) in enumerate(iterations):
        factor = a * eye + b * gram + c * _product(gram, gram)
        total = _product(factor, total) if index else factor
        gram = _product(_product(factor, gram), factor)  # the last one, which nothing uses, is not compiled
    return total


def tangent(matrix: Array, direction: Array) -> Array:
    """Returns the part of `direction` along which `matrix`, both `[…, R, D]`, stays orthonormal to first order.

    It is the orthogonal projection to {Z: X Zᵀ + Z Xᵀ = 0}, or, where columns are orthonormal, {Z: Xᵀ Z + Zᵀ X = 0}.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return _transposed(tangent(_transposed(matrix), _transposed(direction)))
    products = _product(direction, _transposed(matrix))
    return direction - _product((products + _transposed(products)) / 2, matrix)


def keep_orthonormal(basis_groups: Sequence[BasisGroup]) -> optax.GradientTransformation:
    """Returns the optax link that ends a chain so that the named bases are orthonormal after each update.

        optax.chain(optax.sgd(0.1, momentum=0.9), keep_orthonormal(basis_groups))

    Works for any optimizer, and any pytree: nested dicts, `FrozenDict`, `nnx.State`, dataclasses. Bases that are not
    orthonormal yet become so by the first update, or, with norms far from 1, by the first updates. Leave the same paths
    out of weight decay: the projection removes its effect, but not from momentum.

    Args:
      basis_groups: name the bases in the parameter tree, as for `add_orthogonality_penalty`.

    Raises:
      UserError: (when initialised) shared and unique elements of a layer are more than their space has dimensions.
      KeyError: (when initialised) a path is not in the parameters.
      ValueError: there is no basis group, a path names more than an array, or (when updating) `params` was not passed.
    """
    if not basis_groups:
        raise ValueError("basis_groups is empty: name at least one basis")

    def init(params: Tree) -> optax.EmptyState:
        rows = rows_at(params, paths_of(basis_groups))
        for group in basis_groups:
            shared = sum(rows[path].shape[0] for path in group.shared)
            for path in group.unique:
                unique, size = rows[path].shape
                if shared + unique > size:
                    raise UserError(f"{shared} shared elements and the {unique} of {'/'.join(path)} cannot all be "
                                    f"orthogonal in {size} dimensions; set --config.orthogonality.elements=shared.")
        return optax.EmptyState()

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None) -> tuple[Tree, optax.EmptyState]:
        if params is None:
            raise ValueError("keep_orthonormal needs the parameters: call update(updates, state, params)")
        paths = paths_of(basis_groups)
        arrays, rows, moves = arrays_at(updates, paths), rows_at(params, paths), rows_at(updates, paths)
        for group in basis_groups:
            moves |= _retract(rows, moves, group)
        return replace_arrays(updates, {path: moves[path].T.reshape(array.shape).astype(array.dtype)
                                        for path, array in arrays.items()}), state

    return optax.GradientTransformation(init, update)


def _retract(rows: Rows, moves: Rows, group: BasisGroup) -> dict[Path, Array]:
    """Returns by path the updates that lead from orthonormal elements to orthonormal ones.

    Args:
      rows: the elements as they are.
      moves: the updates that were to be.
    """
    found: dict[Path, Array] = {}
    shared = None
    if group.shared:
        parts = [rows[path] for path in group.shared]
        now = jnp.concatenate(parts)
        shared = polar_factor(now + tangent(now, jnp.concatenate([moves[path] for path in group.shared])))
        *ends, _ = itertools.accumulate(part.shape[0] for part in parts)
        found |= dict(zip(group.shared, jnp.split(shared - now, ends), strict=True))
    if group.unique:
        now = jnp.stack([rows[path] for path in group.unique])  # [layers, u, D]
        moved = now + tangent(now, jnp.stack([moves[path] for path in group.unique]))
        if shared is not None:
            moved = moved - _product(_product(moved, shared.T), shared)
        found |= dict(zip(group.unique, polar_factor(moved) - now, strict=True))
    return found
