"""Exact orthogonality: filter bases that are orthonormal after every step, whatever the optimizer is.

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
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax

from shared_basis.errors import UserError, note_renamed
from shared_basis.nn.types import Array, Path, Tree
from shared_basis.optim.basis_group import BasisGroup, checked_groups
from shared_basis.optim.find import FoundGroup, alike, check_named_once, find_groups, paths_of
from shared_basis.optim.paths import arrays_at, replace_arrays

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


def keep_orthonormal(basis_groups: Iterable[BasisGroup],
                     optimizer: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
    """Returns `optimizer` with the named bases orthonormal after each of its updates.

        keep_orthonormal(basis_groups, optax.sgd(0.1, momentum=0.9))

    It works for any optimizer, and any pytree: nested dicts, `FrozenDict`, `nnx.State`, dataclasses. Bases that are
    not orthonormal yet become so by the first update, or, with norms far from 1, by the first updates. Leave the same
    paths out of weight decay: the projection removes its effect, but not from momentum.

    What comes out are the updates to add: no further link may change them, as a scale or clipping would. Such belong
    into `optimizer`; `optax.MultiSteps`, `apply_if_finite`, `masked` and `partition` may stand around it, for they
    pass updates on whole or not at all. `orthogonality_diagnostics` after an update shows whether all is well.

    Args:
      basis_groups: name the bases in the parameter tree, as for `add_orthogonality_penalty`.
      optimizer: the whole optimizer, learning rate included. The earlier form without it, a link that had to be the
        last one of a chain, goes with the next version.

    Raises:
      UserError: (when initialised) shared and unique elements of a layer are more than their space has dimensions.
      KeyError: (when initialised) there is nothing at a path, or a glob or predicate matches nothing.
      ValueError: what is named cannot be a basis, or is named twice, or is a stack without a `stack_axis`; there is no
        basis group; or (when updating) `params` was not passed.
      TypeError: `basis_groups` is no list of `BasisGroup`.
    """
    if optimizer is None:
        note_renamed("keep_orthonormal(basis_groups), a link that had to be the last one of a chain,",
                     "keep_orthonormal(basis_groups, optimizer)")
        return retraction(basis_groups)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: must be one of optax, as "
                        "keep_orthonormal(basis_groups, optax.sgd(0.1))")
    return optax.chain(optimizer, retraction(basis_groups))


def retraction(basis_groups: Iterable[BasisGroup]) -> optax.GradientTransformation:
    """Returns the link that must end a chain so that bases are orthonormal after each update; see `keep_orthonormal`.

    Its state is empty, and its place that of the last link, as in the checkpoints of earlier versions.
    """
    basis_groups = checked_groups(basis_groups)

    def find(params: Tree) -> list[FoundGroup]:
        groups = find_groups(params, basis_groups)
        check_named_once((("", path) for group in groups for path in group.paths),
                         "elements are made orthonormal with those of one group, so name it in one")
        return groups

    def init(params: Tree) -> optax.EmptyState:
        for group in (groups := find(params)):
            sizes = group.sizes(arrays_at(params, paths_of(groups)))
            shared = sum(sizes[path][0] for path in group.shared)
            for path in group.unique:
                unique, size = sizes[path]
                if shared + unique > size:
                    raise UserError(f"{shared} shared elements and the {unique} of {'/'.join(path)} cannot all be "
                                    f"orthogonal in {size} dimensions; set --config.orthogonality.elements=shared, or "
                                    "leave unique elements out of the BasisGroup.")
        return optax.EmptyState()

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None) -> tuple[Tree, optax.EmptyState]:
        if params is None:
            raise ValueError("keep_orthonormal needs the parameters: call update(updates, state, params)")
        groups = find(params)
        paths = paths_of(groups)
        arrays, moves = arrays_at(params, paths), arrays_at(updates, paths)
        found: dict[Path, Array] = {}
        for group in groups:
            kept = group.over_members(_retract)(*group.rows(arrays), *group.rows(moves))
            found |= group.arrays(kept, moves)
        return replace_arrays(updates, found), state

    return optax.GradientTransformation(init, update)


def _retract(shared: list[Array], unique: list[Array], shared_moves: list[Array],
             unique_moves: list[Array]) -> tuple[list[Array], list[Array]]:
    """Returns the updates that lead from orthonormal elements to orthonormal ones.

    Args:
      shared: the elements as they are, `[s, D]` for each shared array.
      unique: the same, `[u, D]` for each layer.
      shared_moves: the updates that were to be.
      unique_moves: the same.
    """
    space = None
    if shared:
        now = jnp.concatenate(shared)
        space = polar_factor(now + tangent(now, jnp.concatenate(shared_moves)))
        *ends, _ = itertools.accumulate(part.shape[0] for part in shared)
        shared = jnp.split(space - now, ends)
    kept = list(unique)
    for same in alike(unique):
        now = jnp.stack([unique[index] for index in same])  # [layers, u, D]
        moved = now + tangent(now, jnp.stack([unique_moves[index] for index in same]))
        if space is not None:
            moved = moved - _product(_product(moved, space.T), space)
        for index, update in zip(same, polar_factor(moved) - now, strict=True):
            kept[index] = update
    return shared, kept
