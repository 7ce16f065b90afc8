"""The orthogonality penalty on filter bases, as a link of an optax chain, and diagnostics of the bases.

With the basis elements of a group as the rows of B, and M a 0/1 mask over pairs of rows (section 3.2):

    penalty = Σ_groups Σ_ij M_ij (B Bᵀ − I)²_ij / Σ_groups Σ_ij M_ij

(if bases belong to several reduction groups, the sum of such a mean for each of them).

Pairs of a shared element with any element of the group count, as do pairs of unique elements of the same layer.
Independent of networks: bases are selected by path (`BasisGroup`), in any pytree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from shared_basis.nn.types import Array, Path, Tree
from shared_basis.optim.basis_group import BasisGroup, checked_groups
from shared_basis.optim.find import FoundGroup, alike, find_groups, paths_of
from shared_basis.optim.paths import arrays_at, replace_arrays


def _product(a: Array, b: Array) -> Array:
    """Returns `a bᵀ` in full precision, regardless of the device's default precision."""
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=jax.lax.Precision.HIGHEST)


def _gram_blocks(shared: Sequence[Array], unique: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Returns the counted pairs of one group as blocks of B Bᵀ, each with the corresponding block of I.

    The blocks are `[s, rows]` (shared × all rows) and, for the layers of each unique rank, `[layers, u, u]` (unique ×
    unique within each layer), so that no masked-out product is computed.

    Args:
      shared: `[s, D]` for each shared array.
      unique: `[u, D]` for each layer.
    """
    blocks = []
    if shared:
        rows = jnp.concatenate(shared)
        products = _product(rows, jnp.concatenate([rows, *unique]))
        blocks.append((products, jnp.eye(products.shape[0], products.shape[1], dtype=products.dtype)))
    for same in alike(unique):
        layers = jnp.stack([unique[index] for index in same])
        products = _product(layers, layers)
        blocks.append((products, jnp.broadcast_to(jnp.eye(layers.shape[1], dtype=products.dtype), products.shape)))
    return blocks


def _blocks(arrays: Mapping[Path, Array], group: FoundGroup) -> list[tuple[Array, Array]]:
    return group.over_members(_gram_blocks)(*group.rows(arrays))


def _penalty(arrays: Mapping[Path, Array], groups: Sequence[FoundGroup], reduction: str) -> Array:
    totals: dict[str, Array] = {}
    counts: dict[str, int] = {}
    for group in groups:
        name = group.reduction_group
        for products, identity in _blocks(arrays, group):
            totals[name] = totals.get(name, 0.0) + jnp.sum((products - identity) ** 2)
            counts[name] = counts.get(name, 0) + products.size
    return functools.reduce(jnp.add, [total / (counts[name] if reduction == "mean" else 1)
                                      for name, total in totals.items()])


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")


def orthogonality_penalty(params: Tree, basis_groups: Iterable[BasisGroup], reduction: str = "mean") -> Array:
    """Returns the penalty of the bases that `basis_groups` select in `params`, a scalar (section 3.2).

    It is float32, or float64 for float64 parameters.

    Args:
      params: any pytree of arrays, such as nested dicts or an `nnx.State`.
      basis_groups: one for each group whose elements should be jointly orthonormal.
      reduction: 'mean' over the counted pairs of a reduction group (published), or their 'sum'.

    Raises:
      KeyError: a path does not exist, or a glob or predicate matches nothing.
      ValueError: a selected leaf cannot be a basis, is selected twice in a reduction group, or is a stack without
        `stack_axis`; `basis_groups` is empty; or `reduction` is unknown.
      TypeError: `basis_groups` is not a list of `BasisGroup`.
    """
    _check_reduction(reduction)
    groups = find_groups(params, basis_groups)
    return _penalty(arrays_at(params, paths_of(groups)), groups, reduction)


def orthogonality_diagnostics(params: Tree, basis_groups: Iterable[BasisGroup]) -> dict[str, Array]:
    """Measures how far the selected bases are from orthonormal; returns scalars of the penalty's type.

    `penalty` is the mean penalty; `norm_min`, `norm_mean` and `norm_max` are the norms of all elements; `coherence` is
    the largest |product| of two different elements among the counted pairs. Orthonormal bases have penalty 0, norms 1
    and coherence 0.

    Raises:
      KeyError, ValueError, TypeError: see `orthogonality_penalty`.
    """
    groups = find_groups(params, basis_groups)
    arrays = arrays_at(params, paths_of(groups))
    blocks = [block for group in groups for block in _blocks(arrays, group)]
    norms = jnp.sqrt(jnp.concatenate([jnp.sum(products * identity, -1).ravel() for products, identity in blocks]))
    return {
        "penalty": _penalty(arrays, groups, "mean"),
        "norm_min": norms.min(), "norm_mean": norms.mean(), "norm_max": norms.max(),
        "coherence": jnp.stack([jnp.max(jnp.abs(p) * (1 - identity)) for p, identity in blocks]).max(),
    }


class PenaltyState(NamedTuple):
    """The state of `add_orthogonality_penalty`."""

    count: Array  # type: ignore[assignment]  # shadows a tuple method; optax uses this name
    """Number of updates so far, int32."""


def add_orthogonality_penalty(
    weight: float | Array | optax.Schedule, basis_groups: Iterable[BasisGroup], reduction: str = "mean",
) -> optax.GradientTransformation:
    """Returns the optax transformation that adds the gradient of `weight · penalty` to the updates of selected bases.

    Placed before momentum in the chain, this equals training on the loss plus `weight · penalty`:

        optax.chain(add_orthogonality_penalty(10.0, basis_groups), optax.sgd(0.1, momentum=0.9))

    Args:
      weight: λ, or a schedule that maps the number of updates so far to λ; can be a hyperparameter of
        `optax.inject_hyperparams(add_orthogonality_penalty)`.
      basis_groups: select the bases in the parameter tree, as in `orthogonality_penalty`.
      reduction: see `orthogonality_penalty`.

    Raises:
      KeyError, ValueError, TypeError: (immediately, or on initialisation) see `orthogonality_penalty`; (on update)
        `params` was not passed.
    """
    _check_reduction(reduction)
    basis_groups = checked_groups(basis_groups)

    def init(params: Tree) -> PenaltyState:
        find_groups(params, basis_groups)  # invalid groups fail here with a message
        return PenaltyState(jnp.zeros((), jnp.int32))

    def update(updates: Tree, state: PenaltyState, params: Tree = None) -> tuple[Tree, PenaltyState]:
        if params is None:
            raise ValueError("add_orthogonality_penalty needs the parameters: call update(updates, state, params)")
        scale = weight(state.count) if callable(weight) else weight
        groups = find_groups(params, basis_groups)
        paths = paths_of(groups)
        # Only of the selected arrays: other leaves may be integers, or too large for a gradient of zeros.
        gradient = jax.grad(_penalty)(arrays_at(params, paths), groups, reduction)
        sums = jax.tree.map(lambda g, p: g + (scale * p).astype(g.dtype), arrays_at(updates, paths), gradient)
        return replace_arrays(updates, sums), PenaltyState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
