"""Numbers of bases, against known cases and NumPy, and which arrays of a network they are taken from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sample_networks import NETWORKS, random_variables

from shared_basis.analysis import bases
from shared_basis.analysis.bases import basis_sets, describe_basis, describe_set
from shared_basis.optim.penalty import orthogonality_diagnostics

# Known cases

def test_an_orthonormal_basis_has_full_rank_and_no_coherence() -> None:
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(27, 8)))[0].T
    found = describe_basis(rows[:6], rows[6:])
    np.testing.assert_allclose(rows @ rows.T, np.eye(8), atol=1e-12)
    for name, value in {"effective_rank": 8, "stable_rank": 8, "condition": 1, "norm_min": 1, "norm_mean": 1,
                        "norm_max": 1, "coherence_shared": 0, "coherence_between": 0, "coherence_unique": 0,
                        "cosine": 0}.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    assert (found["shared"], found["unique"], len(found["singular_values"])) == (6, 2, 8)


def test_elements_twice_count_once() -> None:
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(27, 4)))[0].T
    found = describe_basis(np.concatenate([rows, rows]), None)
    assert found["effective_rank"] == pytest.approx(4)
    assert found["stable_rank"] == pytest.approx(4)
    assert found["condition"] is None
    assert found["coherence_shared"] == pytest.approx(1)
    assert found["cosine"] == pytest.approx(1)
    assert (found["coherence_between"], found["coherence_unique"]) == (None, None)


def test_effective_rank_is_exp_of_the_entropy_of_singular_values() -> None:
    values = np.array([4.0, 2.0, 1.0, 1.0, 0.0])  # p = 1/2, 1/4, 1/8, 1/8: 1.75 bits
    assert bases.effective_rank(values) == pytest.approx(2**1.75)
    assert bases.stable_rank(values) == pytest.approx(22 / 16)
    assert bases.condition_number(np.array([6.0, 3.0])) == 2


def test_coherence_is_the_largest_product_of_different_elements_and_not_normalised() -> None:
    shared, unique = np.array([[3.0, 0, 0], [0, 2, 0]]), np.array([[1.0, -2, 2]])
    found = describe_basis(shared, unique)
    assert (found["coherence_shared"], found["coherence_between"], found["coherence_unique"]) == (0, 4, None)
    assert found["cosine"] == pytest.approx(2 / 3)
    assert (found["norm_min"], found["norm_max"]) == (2, 3)


def test_a_group_agrees_with_the_diagnostics_of_training() -> None:
    network = NETWORKS["double"]
    variables = random_variables(network)
    groups = network.basis_groups("shared+unique")
    sets = basis_sets(network, variables)
    assert [found.all_rows()[0].shape for found in sets] == [(2 + 2 + 4, 36), (4 + 4 + 4, 72)]
    for found, group in zip(sets, groups, strict=True):
        expected = orthogonality_diagnostics(variables["params"], [group])
        described = describe_set(found)
        joint = next(basis for basis in described if basis["basis"] == "all shared")
        layers = [basis for basis in described if basis["unique"]]
        every = found.all_rows()[0]
        assert max(joint["norm_max"], *(layer["norm_max"] for layer in layers)) == pytest.approx(
            float(expected["norm_max"]), rel=1e-5)
        between = np.abs(found.shared_rows() @ every.T) * (1 - np.eye(*(len(found.shared_rows()), len(every))))
        assert max(between.max(), *(layer["coherence_unique"] or 0 for layer in layers)) == pytest.approx(
            float(expected["coherence"]), rel=1e-5)


# Coefficients

def test_effective_coefficients_are_what_the_layer_multiplies_by() -> None:
    network = NETWORKS["single"]
    variables = random_variables(network)
    found, = basis_sets(network, variables)
    tree, stats = (variables[kind]["group1"]["block2"]["second"] for kind in ("params", "batch_stats"))
    responses = np.random.default_rng(1).normal(size=(7, 4))
    normalised = (responses - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5) * tree["norm"]["scale"]
    by_layer = normalised @ tree["coefficients"]
    mine = responses @ found.coefficients["group1/block2/second"]
    np.testing.assert_allclose(by_layer - by_layer[:1], mine - mine[:1], rtol=1e-4, atol=1e-5)
    layers = bases.layers_of(found, "shared")
    assert list(layers) == [f"group1/block{block}/{layer}" for block in (2, 3) for layer in ("first", "second")]
    np.testing.assert_array_equal(layers["group1/block2/second"], found.coefficients["group1/block2/second"][1:])


def test_coefficients_after_another_norm_are_those_of_the_layer() -> None:
    coefficients = np.random.default_rng(0).normal(size=(3, 4))
    group_norm = {"coefficients": coefficients, "norm": {"scale": np.full(3, 2.0), "bias": np.ones(3)}}
    np.testing.assert_array_equal(bases.effective_coefficients(group_norm, {}), coefficients)
    without_scale = {"coefficients": coefficients}, {"norm": {"mean": np.ones(3), "var": np.full(3, 4 - 1e-5)}}
    np.testing.assert_allclose(bases.effective_coefficients(*without_scale), coefficients / 2)


def test_cosine_sees_output_channels_and_alignment_does_not() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(6, 12))
    turned = one @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    cosine, alignment = bases.cosines([one, turned, -one]), bases.uncentered_linear_cka([one, turned, -one])
    assert abs(cosine[0, 1]) < 0.5
    assert cosine[0, 2] == pytest.approx(-1)
    np.testing.assert_allclose(alignment, np.ones((3, 3)))
    gram, other = one @ one.T, (two := rng.normal(size=(6, 12))) @ two.T
    assert bases.uncentered_linear_cka([one, two])[0, 1] == pytest.approx(
        (gram * other).sum() / np.sqrt((gram**2).sum() * (other**2).sum()))
    assert bases.mean_off_diagonal(np.array([[1, 0.5], [0.3, 1]])) == pytest.approx(0.4)
    assert bases.mean_off_diagonal(np.ones((1, 1))) is None


def test_the_alignment_by_chance_is_that_of_random_matrices() -> None:
    rng = np.random.default_rng(0)
    for shape, tolerance in (((8, 16), 0.03), ((32, 64), 0.003)):
        matrices = [rng.normal(size=shape) for _ in range(60)]
        mean = bases.mean_off_diagonal(bases.uncentered_linear_cka(matrices))
        assert mean == pytest.approx(bases.chance_alignment(matrices[0]), abs=tolerance)


def test_channels_are_chosen_by_their_norm() -> None:
    array = np.zeros((3, 3, 5, 2))
    for channel, size in enumerate((1, 5, 0, 7, 2)):
        array[..., channel, :] = size
    assert bases.strongest_channels(array, 3).tolist() == [1, 3, 4]
    assert bases.strongest_channels(array, 9).tolist() == [0, 1, 2, 3, 4]


# Networks

SETS = {"plain": 0, "double": 2, "single": 1, "shared only": 1, "unique only": 1, "tied": 1, "templates": 1,
        "bottleneck": 4, "densenet": 2, "resnext": 2, "plain resnext": 0, "mobilenet": 4,
        "mobilenet, large images": 8, "mobilenetv1": 1, "shufflenetv1": 2, "shufflenetv2": 1, "efficientnet": 2,
        "efficientnet, unique only": 2}
"""Sets of bases of each: one a group, two where elements of a group differ in shape."""


@pytest.mark.parametrize("name", SETS)
def test_every_kind_of_network_is_taken_apart_by_its_paths(name: str) -> None:
    network = NETWORKS[name]
    variables = random_variables(network)
    sets = basis_sets(network, variables)
    assert len(sets) == SETS[name]
    stored = {(group, array) for group, named in variables["params"].get("bases", {}).items() for array in named}
    assert {(each.name.partition("/")[0], array) for each in sets for array in each.shared} == stored
    flat = {"/".join(path) for path in _paths(variables["params"])}
    for what in ("unique", "coefficients"):
        owned = {f"{layer}/{what}" for each in sets for layer in getattr(each, what)}
        assert owned == {path for path in flat if path.endswith(f"/{what}")}
    for each in sets:
        assert all(array in each.shared or (array == "" and not each.shared) for array in each.uses.values())
        for layer, matrix in each.coefficients.items():
            shared = each.shared[each.uses[layer]].shape[-1] if each.shared else 0
            unique = each.unique[layer].shape[-1] if layer in each.unique else 0
            assert len(matrix) == shared + unique
    assert all(each.comparable for each in sets) == (name != "resnext")


def _paths(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))
        else:
            yield (*prefix, key)
