"""Numerical descriptions of filter bases: inner products, norms, singular values, effective rank, coefficients.

The rows of a matrix are flattened basis elements. Everything is computed in NumPy, float64, from the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shared_basis.models import Network
from shared_basis.nn.batch_norm import EPSILON
from shared_basis.nn.types import Tree

Matrix = np.ndarray


class BasisSet(NamedTuple):
    """The bases of a group with elements of one shape, and the layers that use them."""

    name: str
    """The group's name, or '<group>/<array>' (or layer) if its elements have different shapes."""
    shared: dict[str, np.ndarray]
    """The shared arrays `[k, k, C, s]` by name (templates: `[k, k, C, T, s]`)."""
    uses: dict[str, str]
    """The name of each layer's shared array, or '', by path such as 'group1/block2/first', ordered by depth."""
    unique: dict[str, np.ndarray]
    """The unique elements `[k, k, C, u]` of each layer that has some."""
    coefficients: dict[str, Matrix]
    """The `effective_coefficients [R, T]` of each layer that has some, unique elements first."""

    @property
    def comparable(self) -> bool:
        """Whether unique elements see the same channels as shared ones, so that their inner products are defined."""
        arrays = (*self.shared.values(), *self.unique.values())
        return len({array.shape[:-1] for array in arrays}) == 1

    def shared_rows(self) -> Matrix:
        """Returns the elements of all shared arrays, as rows."""
        return np.concatenate([rows(array) for array in self.shared.values()])

    def all_rows(self) -> tuple[Matrix, list[str]]:
        """Returns all elements as rows, with a name for each: the shared ones and, if comparable, the unique ones."""
        arrays = {**self.shared, **(self.unique if self.comparable or not self.shared else {})}
        names = [f"{name}:{index}" for name, array in arrays.items() for index in range(array.shape[-1])]
        return np.concatenate([rows(array) for array in arrays.values()]), names


def rows(array: np.ndarray) -> Matrix:
    """Returns the elements of `[..., elements]` as rows, float64 `[elements, size]`."""
    return np.asarray(array, np.float64).reshape(-1, array.shape[-1]).T


def basis_sets(network: Network, variables: Mapping[str, Tree]) -> list[BasisSet]:
    """Finds the bases of `network` in `variables` (`params`, `batch_stats`); empty for a plain network."""
    params, stats = variables["params"], variables["batch_stats"]
    sharing = network.sharing
    array_of = dict(sharing.layers) or {layer: "" for layer in network.basis_layers() if sharing.factorised}
    sets = []
    for group, blocks in network.sharing_blocks().items():
        shared = {name: np.asarray(array) for name, array in sorted(params.get("bases", {}).get(group, {}).items())}
        for name, arrays, layers in _parts(network, group, shared, array_of):
            uses = {"/".join(network.layer_path(group, block, layer)): array_of[layer] for block in blocks
                    for layer in layers}
            if not uses:
                continue
            own = {layer: (_at(params, layer), _at(stats, layer)) for layer in uses}
            sets.append(BasisSet(
                name, arrays, uses,
                {layer: np.asarray(tree["unique"]) for layer, (tree, _) in own.items() if "unique" in tree},
                {layer: effective_coefficients(*trees) for layer, trees in own.items() if "coefficients" in trees[0]}))
    return sets


def _parts(network: Network, group: str, shared: dict[str, np.ndarray],
           array_of: Mapping[str, str]) -> list[tuple[str, dict[str, np.ndarray], list[str]]]:
    """Returns, for each element shape in `group`, a name, the shared arrays, and the layers that use this shape."""
    if not shared and not network.one_basis():
        return [(f"{group}/{layer}", {}, [layer]) for layer in array_of]
    if len({array.shape[:-1] for array in shared.values()}) <= 1:
        return [(group, shared, list(array_of))]
    return [(f"{group}/{name}", {name: array}, [layer for layer, used in array_of.items() if used == name])
            for name, array in shared.items()]


def _at(tree: Tree, path: str) -> Tree:
    """Returns the subtree at `path`, or an empty dict: layers that share whole filters have no parameters."""
    for key in path.split("/"):
        tree = tree.get(key, {})
    return tree


def effective_coefficients(params: Tree, stats: Tree) -> Matrix:
    """Returns the factors by which a layer multiplies the responses to its R elements, at evaluation, float64 `[R, T]`.

    These are its coefficients times scale / √(running variance + ε) of the preceding batch normalisation, without which
    coefficients of different layers would differ in scale. Coefficients after another normalisation or none, and those
    of templates, `[templates, 1]`, are unchanged.
    """
    coefficients = np.asarray(params["coefficients"], np.float64)
    if "norm" not in stats:
        return coefficients.reshape(len(coefficients), -1)
    scale = np.asarray(params.get("norm", {}).get("scale", 1.0), np.float64)  # a user's norm may lack it
    factor = scale / np.sqrt(np.asarray(stats["norm"]["var"], np.float64) + EPSILON)
    return factor[:, None] * coefficients


def coherence(products: Matrix, *, same: bool) -> float | None:
    """Returns the largest |product| of two different elements; None if there are fewer than two.

    Args:
      products: `[a, b]`, of a elements with b others or, with `same`, of the elements of one set with each other.
    """
    sizes = np.abs(products) * (1 - np.eye(*products.shape)) if same else np.abs(products)
    return float(sizes.max()) if products.size > same else None


def singular_values(matrix: Matrix) -> np.ndarray:
    """Returns the singular values of a matrix, in descending order."""
    return np.linalg.svd(matrix, compute_uv=False)


def effective_rank(values: np.ndarray) -> float:
    """Returns the effective rank for singular `values`: exp of the entropy of p = values / sum(values).

    It equals the number of rows if they are orthonormal, and decreases the more the values differ (Roy & Vetterli, "The
    effective rank: a measure of effective dimensionality", EUSIPCO 2007).
    """
    p = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def stable_rank(values: np.ndarray) -> float:
    """Returns the stable rank: the squared Frobenius norm over the squared largest singular value."""
    return float(np.sum(values**2) / values[0] ** 2)


def condition_number(values: np.ndarray) -> float | None:
    """Returns the ratio of the largest to the smallest singular value; None if the latter is zero within rounding."""
    smallest = values[-1]
    return None if smallest <= values[0] * np.finfo(np.float32).eps else float(values[0] / smallest)


def describe_basis(shared: Matrix | None, unique: Matrix | None) -> dict[str, Any]:
    """Describes the basis `[shared; unique]`, either of which may be None: see `describe_set`."""
    parts = [part for part in (shared, unique) if part is not None]
    matrix = np.concatenate(parts)
    norms, values = np.linalg.norm(matrix, axis=1), singular_values(matrix)
    return {
        "shared": 0 if shared is None else len(shared), "unique": 0 if unique is None else len(unique),
        "norm_min": float(norms.min()), "norm_mean": float(norms.mean()), "norm_max": float(norms.max()),
        "coherence_shared": None if shared is None else coherence(shared @ shared.T, same=True),
        "coherence_between": coherence(shared @ unique.T, same=False) if shared is not None and unique is not None
        else None,
        "coherence_unique": None if unique is None else coherence(unique @ unique.T, same=True),
        "cosine": coherence(cosines(list(matrix)), same=True),
        "effective_rank": effective_rank(values), "stable_rank": stable_rank(values),
        "condition": condition_number(values), "singular_values": values.tolist()}


def describe_set(found: BasisSet) -> list[dict[str, Any]]:
    """Describes each basis of a set: every shared array, all of them together, and each layer's basis.

    Returns:
      For each basis its name `basis`; the numbers of `shared` and `unique` elements; `norm_min`, `norm_mean` and
      `norm_max`; the largest |product| of two different elements (`coherence_shared`, `coherence_unique` and, between
      shared and unique ones, `coherence_between`); and for the matrix with the elements as rows, `effective_rank`,
      `stable_rank`, `condition` number and `singular_values`. Values that do not apply are None.
    """
    described = {f"{name} (shared)": describe_basis(rows(array), None) for name, array in found.shared.items()}
    if len(found.shared) > 1:
        described["all shared"] = describe_basis(found.shared_rows(), None)
    for layer, array in found.unique.items():
        shared = found.shared.get(found.uses[layer])
        described[layer] = describe_basis(None if shared is None or not found.comparable else rows(shared),
                                          rows(array))
    return [{"basis": name, **numbers} for name, numbers in described.items()]


def layers_of(found: BasisSet, array: str) -> dict[str, Matrix]:
    """Returns the effective coefficients `[s, T]` for the elements of a shared array, by layer that uses it."""
    count = found.shared[array].shape[-1]
    return {layer: coefficients[-count:] for layer, coefficients in found.coefficients.items()
            if found.uses[layer] == array}


def compared(sets: Sequence[BasisSet]) -> Iterator[tuple[str, list[str], list[Matrix]]]:
    """Yields the name, the layers and their coefficients for each shared array with at least two layers."""
    for found in sets:
        for array in found.shared:
            layers = layers_of(found, array)
            if len(layers) > 1:
                name = found.name if len(found.shared) == 1 else f"{found.name}/{array}"
                yield name, list(layers), list(layers.values())


def cosines(matrices: list[Matrix]) -> Matrix:
    """Returns the pairwise cosines of n matrices of one shape, as vectors, `[n, n]`.

    A cosine of 1 is the same combination of elements for every output channel; independent ones are near 0 (± 1/√size).
    """
    vectors = np.stack([matrix.ravel() for matrix in matrices])
    norms = np.linalg.norm(vectors, axis=1)
    return vectors @ vectors.T / np.maximum(np.outer(norms, norms), np.finfo(np.float64).tiny)


def uncentered_linear_cka(matrices: list[Matrix]) -> Matrix:
    """Returns the pairwise cosines between A Aᵀ of n coefficient matrices A `[s, T]`, `[n, n]`.

    It compares which elements are combined with each other, and is invariant to permutations (and rotations) of the
    output channels, whose order has no meaning within blocks. This is linear CKA (Kornblith et al. 2019) without
    centring, in [0, 1]; independent Gaussian matrices give about T / (T + s + 1), `chance_alignment`, rather than 0.
    """
    return cosines([matrix @ matrix.T for matrix in matrices])


def chance_alignment(matrix: Matrix) -> float:
    """Returns the approximate `uncentered_linear_cka` of independent Gaussian matrices `[s, T]`: T / (T + s + 1).

    This is the ratio of the expected product to the expected square; for small matrices the mean is slightly larger.
    """
    elements, outputs = matrix.shape
    return outputs / (outputs + elements + 1)


def mean_off_diagonal(matrix: Matrix) -> float | None:
    """Returns the mean over pairs of different matrices; None if there is only one."""
    count = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1))) if count > 1 else None


def strongest_channels(array: np.ndarray, limit: int) -> np.ndarray:
    """Returns the at most `limit` channels of `[k, k, C, elements]` with the largest norms, in increasing order.

    For templates `[k, k, C, T, elements]` a channel is a pair of an input and an output channel, C · T in total.
    """
    flat = np.asarray(array, np.float64).reshape(*array.shape[:2], math.prod(array.shape[2:-1]), array.shape[-1])
    norms = np.sqrt((flat**2).sum((0, 1, 3)))
    return np.sort(np.argsort(-norms, kind="stable")[:limit])
