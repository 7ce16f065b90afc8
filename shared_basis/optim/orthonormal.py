"""Exact orthogonality: filter bases that are orthonormal after every step, with any optimizer.

While the penalty (`shared_basis.optim.penalty`) pulls bases towards orthonormality, this keeps them there: norms are 1
and coherence is 0 at every step, without a weight λ. Each update is projected to the tangent space of the orthonormal
bases, so that neither momentum nor weight decay pulls away from them, and the remaining deviation is removed by the
polar factor, the nearest orthonormal basis (Absil, Mahony & Sepulchre 2008, section 4.1).

The pairs made orthogonal are those that the penalty counts: all shared elements of a group with each other, and the
unique elements of a layer with each other and with the shared ones. If there are more shared elements than dimensions,
R > k²C, their rows cannot be orthonormal; the columns are made orthonormal instead, which is a tight frame.
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
"""Coefficients of Newton–Schulz iterations X ← (a + b X Xᵀ + c (X Xᵀ)²) X.

The first maps singular values to between 0.68 and 1.21, multiplying small ones by 3.4 per iteration (Jordan et al.
2024, "Muon"); the second takes them from there to 1, with cubic convergence.
"""

ITERATIONS = (*(LIFTING,) * 5, *(CONVERGING,) * 2)
"""Together with a third, final iteration, enough for singular values within a factor of 100; updates stay closer."""


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _transposed(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)


def polar_factor(matrix: Array) -> Array:
    """Returns the nearest matrix with orthonormal rows, or columns if there are more rows than columns.

    Args:
      matrix: `[…, R, D]` of full rank, float32 or float64; leading axes are batch axes.

    Returns:
      U Vᵀ of the singular value decomposition U S Vᵀ, by Newton–Schulz iteration: only matrix products, in its type.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return _transposed(polar_factor(_transposed(matrix)))
    # The largest row sum bounds the largest eigenvalue: singular values come to (0, 1], where the iteration converges.
    gram = _product(matrix, _transposed(matrix))
    square = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)[..., None, None]
    x = _product(_factor(gram / square, ITERATIONS), matrix / jnp.sqrt(square))
    # A Gram matrix is inaccurate for small singular values, so the last iteration starts from the actual result.
    return _product(_factor(_product(x, _transposed(x)), [CONVERGING]), x)


def _factor(gram: Array, iterations: Sequence[tuple[float, float, float]]) -> Array:
    """Returns the factor `[…, R, R]` by which `iterations` multiply a matrix with Gram matrix `gram`.

    As a basis is much wider than high, products of Gram matrices are much cheaper than products with the basis.
    """
    total = eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    for index, (a, b, c) in enumerate(iterations):
        factor = a * eye + b * gram + c * _product(gram, gram)
        total = _product(factor, total) if index else factor
        gram = _product(_product(factor, gram), factor)  # the last one is unused and eliminated by XLA
    return total


def tangent(matrix: Array, direction: Array) -> Array:
    """Returns the part of `direction` along which `matrix`, both `[…, R, D]`, remains orthonormal to first order.

    This is the orthogonal projection to {Z: X Zᵀ + Z Xᵀ = 0} or, if columns are orthonormal, {Z: Xᵀ Z + Zᵀ X = 0}.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return _transposed(tangent(_transposed(matrix), _transposed(direction)))
    products = _product(direction, _transposed(matrix))
    return direction - _product((products + _transposed(products)) / 2, matrix)


def keep_orthonormal(basis_groups: Iterable[BasisGroup],
                     optimizer: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
    """Wraps `optimizer` so that the selected bases are orthonormal after each update.

        keep_orthonormal(basis_groups, optax.sgd(0.1, momentum=0.9))

    Works with any optimizer and any pytree: nested dicts, `FrozenDict`, `nnx.State`, dataclasses. Bases that are not
    yet orthonormal become so in the first update or, if norms are far from 1, the first updates. Exclude the same paths
    from weight decay: the projection removes its effect, but not from momentum.

    No later transformation may modify the returned updates, e.g. by scaling or clipping; include those in `optimizer`.
    `optax.MultiSteps`, `apply_if_finite`, `masked` and `partition` may wrap the result, as they pass updates on
    unchanged or not at all. `orthogonality_diagnostics` after an update can verify the bases.

    Args:
      basis_groups: select the bases in the parameter tree, as for `add_orthogonality_penalty`.
      optimizer: the complete optimizer, including the learning rate. The deprecated form without it, a link that had to
        be the last one of a chain, will be removed in the next version.

    Raises:
      UserError: (on initialisation) shared and unique elements of a layer are more than the dimensions of their space.
      KeyError: (on initialisation) a path does not exist, or a glob or predicate matches nothing.
      ValueError: a selected leaf cannot be a basis, is selected twice, or is a stack without `stack_axis`;
        `basis_groups` is empty; or (on update) `params` was not passed.
      TypeError: `basis_groups` is not a list of `BasisGroup`.
    """
    if optimizer is None:
        note_renamed("keep_orthonormal(basis_groups), a link that had to be the last one of a chain,",
                     "keep_orthonormal(basis_groups, optimizer)")
        return retraction(basis_groups)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: must be an optax transformation, as in "
                        "keep_orthonormal(basis_groups, optax.sgd(0.1))")
    return optax.chain(optimizer, retraction(basis_groups))


def retraction(basis_groups: Iterable[BasisGroup]) -> optax.GradientTransformation:
    """Returns the last link of a chain, which makes bases orthonormal after each update; see `keep_orthonormal`.

    Its state is empty and at the end of the chain, as in checkpoints of earlier versions.
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
                                    "omit unique elements from the BasisGroup.")
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
      shared: the current elements, `[s, D]` for each shared array.
      unique: the current elements, `[u, D]` for each layer.
      shared_moves: the proposed updates of `shared`.
      unique_moves: the proposed updates of `unique`.
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
