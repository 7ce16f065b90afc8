"""The orthogonality penalty on filter bases, as a link of an optax chain, and diagnostics of the bases.

With the basis elements of a group as the rows of B, and M a 0/1 mask over pairs of rows (section 3.2):

    penalty = Σ_groups Σ_ij M_ij (B Bᵀ − I)²_ij / Σ_groups Σ_ij M_ij

(where bases belong to several reduction groups, such a mean for each of them, added).

Shared elements count with every row of the group; unique elements count with the unique elements of their own layer.
Nothing here knows a network: bases are named by path (`BasisGroup`), in any pytree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from shared_basis.nn.types import Array, Path, Tree
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.paths import arrays_at

Rows = Mapping[Path, Array]
"""Basis elements as float32 rows `[elements, size]`, by the path of their array."""


def paths_of(basis_groups: Sequence[BasisGroup]) -> list[Path]:
    """Returns the paths of all arrays that `basis_groups` name."""
    return [path for group in basis_groups for path in (*group.shared, *group.unique)]


def rows_at(params: Tree, paths: Sequence[Path]) -> dict[Path, Array]:
    """Returns the elements of the arrays at `paths` as rows.

    Raises:
      KeyError: there is nothing at a path.
      ValueError: a path names a part of the tree and not one array.
    """
    return {path: jnp.reshape(array, (-1, array.shape[-1])).T.astype(jnp.float32)
            for path, array in arrays_at(params, paths).items()}


def _product(a: Array, b: Array) -> Array:
    """Returns `a bᵀ` in full float32, whatever the device's default precision of products."""
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=jax.lax.Precision.HIGHEST)


def _gram_blocks(rows: Rows, group: BasisGroup) -> Iterator[tuple[Array, Array]]:
    """Yields the counted pairs of one group as blocks of B Bᵀ, each with the block of I that it is compared with.

    The blocks are `[s, rows]` (shared × all rows) and `[layers, u, u]` (unique × unique within each layer), so that
    no masked-out product is computed.
    """
    unique = [rows[path] for path in group.unique]
    if group.shared:
        shared = jnp.concatenate([rows[path] for path in group.shared])
        products = _product(shared, jnp.concatenate([shared, *unique]))
        yield products, jnp.eye(products.shape[0], products.shape[1])
    if unique:
        layers = jnp.stack(unique)
        products = _product(layers, layers)
        yield products, jnp.broadcast_to(jnp.eye(layers.shape[1]), products.shape)


def orthogonality_penalty(params: Tree, basis_groups: Sequence[BasisGroup], reduction: str = "mean") -> Array:
    """Returns the penalty of the bases named by `basis_groups` in `params`, a float32 scalar (section 3.2).

    Args:
      params: any pytree of arrays, such as nested dicts or an `nnx.State`.
      basis_groups: one for each group whose elements are to be orthonormal together.
      reduction: 'mean' over the pairs that count, of a reduction group together (published), or their 'sum'.

    Raises:
      KeyError: a path is not in `params`.
      ValueError: there is no basis group, a path names more than an array, or `reduction` is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
    if not basis_groups:
        raise ValueError("basis_groups is empty: name at least one basis")
    rows = rows_at(params, paths_of(basis_groups))
    totals: dict[str, Array] = {}
    counts: dict[str, int] = {}
    for group in basis_groups:
        name = group.reduction_group
        for products, identity in _gram_blocks(rows, group):
            totals[name] = totals.get(name, 0.0) + jnp.sum((products - identity) ** 2)
            counts[name] = counts.get(name, 0) + products.size
    return sum((total / (counts[name] if reduction == "mean" else 1) for name, total in totals.items()),
               jnp.zeros(()))


def orthogonality_diagnostics(params: Tree, basis_groups: Sequence[BasisGroup]) -> dict[str, Array]:
    """Returns how far the named bases are from orthonormal, as float32 scalars.

    `penalty` is the mean penalty, `norm_min`, `norm_mean`, `norm_max` are of the norms of all elements, and
    `coherence` is the largest |product| of two different elements among the pairs that count. Orthonormal bases have
    penalty 0, norms 1 and coherence 0.
    """
    rows = rows_at(params, paths_of(basis_groups))
    blocks = [block for group in basis_groups for block in _gram_blocks(rows, group)]
    norms = jnp.concatenate([jnp.linalg.norm(rows[path], axis=1) for path in paths_of(basis_groups)])
    return {
        "penalty": orthogonality_penalty(params, basis_groups),
        "norm_min": norms.min(), "norm_mean": norms.mean(), "norm_max": norms.max(),
        "coherence": jnp.stack([jnp.max(jnp.abs(p) * (1 - identity)) for p, identity in blocks]).max(),
    }


class PenaltyState(NamedTuple):
    """The state of `add_orthogonality_penalty`."""

    count: Array  # type: ignore[assignment]  # a method of tuples; optax names it so too
    """Updates made so far, int32."""


def add_orthogonality_penalty(
    weight: float | optax.Schedule, basis_groups: Sequence[BasisGroup], reduction: str = "mean",
) -> optax.GradientTransformation:
    """Returns the optax link that adds the gradient of `weight · penalty` to the updates.

    Before momentum in the chain it equals training on the loss plus `weight · penalty`:

        optax.chain(add_orthogonality_penalty(10.0, basis_groups), optax.sgd(0.1, momentum=0.9))

    Args:
      weight: λ, or a schedule that maps the number of updates made so far to λ.
      basis_groups: names the bases in the parameter tree, as in `orthogonality_penalty`.
      reduction: as in `orthogonality_penalty`.

    Raises:
      KeyError, ValueError: (when initialised) as `orthogonality_penalty`; (when updating) `params` was not passed.
    """
    def init(params: Tree) -> PenaltyState:
        orthogonality_penalty(params, basis_groups, reduction)  # a wrong path or reduction fails here, by name
        return PenaltyState(jnp.zeros((), jnp.int32))

    def update(updates: Tree, state: PenaltyState, params: Tree = None) -> tuple[Tree, PenaltyState]:
        if params is None:
            raise ValueError("add_orthogonality_penalty needs the parameters: call update(updates, state, params)")
        scale = weight(state.count) if callable(weight) else weight
        gradient = jax.grad(orthogonality_penalty)(params, basis_groups, reduction)
        updates = jax.tree.map(lambda g, p: g + (scale * p).astype(g.dtype), updates, gradient)
        return updates, PenaltyState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
