"""The orthogonality penalty on filter bases, as a link of an optax chain, and diagnostics of the bases.

With the basis elements of a group as the rows of B, and M a 0/1 mask over pairs of rows (section 3.2):

    penalty = Σ_groups Σ_ij M_ij (B Bᵀ − I)²_ij / Σ_groups Σ_ij M_ij

(where bases belong to several reduction groups, such a mean for each of them, added).

Shared elements count with every row of the group; unique elements count with the unique elements of their own layer.
Nothing here knows a network: bases are named by path (`ElementSet`), in any tree of nested dicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import optax

from shared_basis.nn.basis_conv import BasisGroup
from shared_basis.nn.types import Array, Path, Tree


def rows_at(params: Tree, path: Path) -> Array:
    """Returns the elements of the array at `path` as float32 rows `[elements, size]`; raises `KeyError` without one."""
    leaf = params
    for i, key in enumerate(path):
        if not hasattr(leaf, "keys") or key not in leaf:
            raise KeyError(f"no basis at {'/'.join(path)}: the parameter tree has no {'/'.join(path[: i + 1])}")
        leaf = leaf[key]
    return jnp.reshape(leaf, (-1, leaf.shape[-1])).T.astype(jnp.float32)


def _product(a: Array, b: Array) -> Array:
    """Returns `a bᵀ` in full float32, whatever the device's default precision of products."""
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=jax.lax.Precision.HIGHEST)


def _gram_blocks(params: Tree, elements: BasisGroup) -> Iterator[tuple[Array, Array]]:
    """Yields the counted pairs of one group as blocks of B Bᵀ, each with the block of I that it is compared with.

    The blocks are `[s, rows]` (shared × all rows) and `[layers, u, u]` (unique × unique within each layer), so that
    no masked-out product is computed.
    """
    unique = [rows_at(params, path) for path in elements.unique]
    if elements.shared:
        shared = jnp.concatenate([rows_at(params, path) for path in elements.shared])
        products = _product(shared, jnp.concatenate([shared, *unique]))
        yield products, jnp.eye(products.shape[0], products.shape[1])
    if unique:
        layers = jnp.stack(unique)
        products = _product(layers, layers)
        yield products, jnp.broadcast_to(jnp.eye(layers.shape[1]), products.shape)


def orthogonality_penalty(params: Tree, basis_groups: Sequence[BasisGroup], reduction: str = "mean") -> Array:
    """Returns the penalty of the bases named by `basis_groups` in `params`, a float32 scalar (section 3.2).

    Args:
      params: nested dicts of arrays.
      basis_groups: one for each group whose elements are to be orthonormal together.
      reduction: 'mean' over the pairs that count, of a reduction group together (published), or their 'sum'.

    Raises:
      KeyError: a path is not in `params`.
      ValueError: there is no element set, or `reduction` is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
    if not basis_groups:
        raise ValueError("basis_groups is empty: name at least one basis")
    totals: dict[str, Array] = {}
    counts: dict[str, int] = {}
    for elements in basis_groups:
        for products, identity in _gram_blocks(params, elements):
            totals[elements.reduction_group] = totals.get(elements.reduction_group, 0.0) + jnp.sum((products - identity) ** 2)
            counts[elements.reduction_group] = counts.get(elements.reduction_group, 0) + products.size
    return sum((total / (counts[name] if reduction == "mean" else 1) for name, total in totals.items()),
               jnp.zeros(()))


def orthogonality_diagnostics(params: Tree, basis_groups: Sequence[BasisGroup]) -> dict[str, Array]:
    """Returns how far the named bases are from orthonormal, as float32 scalars.

    `penalty` is the mean penalty, `norm_min`, `norm_mean`, `norm_max` are of the norms of all elements, and
    `coherence` is the largest |product| of two different elements among the pairs that count. Orthonormal bases have
    penalty 0, norms 1 and coherence 0.
    """
    blocks = [block for elements in basis_groups for block in _gram_blocks(params, elements)]
    norms = jnp.concatenate([jnp.linalg.norm(rows_at(params, path), axis=1)
                             for elements in basis_groups for path in (*elements.shared, *elements.unique)])
    return {
        "penalty": orthogonality_penalty(params, basis_groups),
        "norm_min": norms.min(), "norm_mean": norms.mean(), "norm_max": norms.max(),
        "coherence": jnp.stack([jnp.max(jnp.abs(p) * (1 - identity)) for p, identity in blocks]).max(),
    }


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
      ValueError: (when updating) `params` was not passed to `update`.
    """
    def init(params: Tree) -> optax.ScaleByScheduleState:
        orthogonality_penalty(params, basis_groups, reduction)  # a wrong path or reduction fails here, by name
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))  # counts updates, for a scheduled weight

    def update(updates: Tree, state: optax.ScaleByScheduleState,
               params: Tree = None) -> tuple[Tree, optax.ScaleByScheduleState]:
        if params is None:
            raise ValueError("add_orthogonality_penalty needs the parameters: call update(updates, state, params)")
        scale = weight(state.count) if callable(weight) else weight
        gradient = jax.grad(orthogonality_penalty)(params, basis_groups, reduction)
        updates = jax.tree.map(lambda g, p: g + (scale * p).astype(g.dtype), updates, gradient)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
