"""The closed forms against NumPy written out, bounds that are known, and other choices of the same rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_basis.compression.factorize import (
    Group,
    Layer,
    factor_of,
    factorise,
    fit,
    orthonormal_together,
    relative_error,
    remaining_energy,
    shared_directions,
)

SIZE, OUTPUTS = 9, 4


def random_metric(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Returns the second moment of patches whose entries differ in scale, as those of images do."""
    patches = rng.normal(size=(40, size)) @ np.diag(2.0 ** -np.arange(size)) @ rng.normal(size=(size, size))
    return patches.T @ patches / len(patches)


def random_layers(seed: int, count: int, metric: str) -> list[Layer]:
    """Returns layers whose metric is the identity ('filters'), one of all ('common') or one of each ('own')."""
    rng = np.random.default_rng(seed)
    common = random_metric(rng)
    factor = np.eye(SIZE) if metric == "filters" else factor_of(common)
    return [Layer(rng.normal(size=(SIZE, OUTPUTS)),
                  factor_of(common + 0.3 * random_metric(rng)) if metric == "own" else factor) for _ in range(count)]


def orthonormal(rng: np.random.Generator, rank: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(SIZE, rank)))[0]


def error(layer: Layer, elements: np.ndarray, coefficients: np.ndarray) -> float:
    """Returns trace((W − E A)ᵀ Σ (W − E A)) over trace(Wᵀ Σ W)."""
    metric, rest = layer.factor.T @ layer.factor, layer.kernel - elements @ coefficients
    return float(np.trace(rest.T @ metric @ rest) / np.trace(layer.kernel.T @ metric @ layer.kernel))


def by_basis(layers: list[Layer], basis: np.ndarray) -> float:
    """Returns the summed relative errors of `layers` by a basis and its least squares."""
    return sum(error(layer, basis, fit(layer, basis)) for layer in layers)


def test_a_metric_that_rounding_made_indefinite_has_a_factor() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    values = np.array([-0.01, *np.linspace(0, 1, SIZE - 1)])  # the ridge is 5e-5
    factor = factor_of(axes @ np.diag(values) @ axes.T)
    found = np.linalg.eigvalsh(factor.T @ factor)
    np.testing.assert_allclose(found, values + 0.02, atol=1e-3)
    assert found[0] > 0.009


@pytest.mark.parametrize("metric", ["filters", "common"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_shared_basis_reaches_the_bound_of_eckart_and_young(metric: str, rank: int) -> None:
    layers = random_layers(0, 3, metric)
    stacked = np.concatenate([layer.factor @ layer.kernel / np.linalg.norm(layer.factor @ layer.kernel)
                              for layer in layers], axis=1)
    bound = np.sum(np.linalg.svd(stacked, compute_uv=False)[rank:] ** 2)
    assert by_basis(layers, shared_directions(layers)[:, :rank]) == pytest.approx(bound, rel=1e-9)
    rng = np.random.default_rng(1)
    assert all(by_basis(layers, orthonormal(rng, rank)) > bound for _ in range(20))


@pytest.mark.parametrize("rank", [2, 4])
def test_layers_of_differing_metrics_share_better_by_their_mean_than_by_filters_or_chance(rank: int) -> None:
    rng = np.random.default_rng(2)
    better = 0
    for seed in range(20):
        layers = random_layers(seed, 3, "own")
        found = by_basis(layers, shared_directions(layers)[:, :rank])
        plain = [Layer(layer.kernel, np.eye(SIZE)) for layer in layers]
        better += found < by_basis(layers, shared_directions(plain)[:, :rank])
        assert found < min(by_basis(layers, orthonormal(rng, rank)) for _ in range(5))
    assert better >= 18  # there is no closed form of the best


def test_the_bases_of_all_ranks_are_nested_and_orthonormal() -> None:
    directions = shared_directions(random_layers(3, 2, "own"))
    np.testing.assert_allclose(directions.T @ directions, np.eye(SIZE), atol=1e-12)


def test_layers_count_alike_however_large_their_filters_are() -> None:
    layers = random_layers(4, 2, "filters")
    large = [layers[0], Layer(1000 * layers[1].kernel, layers[1].factor)]
    np.testing.assert_allclose(abs(shared_directions(layers)[:, 0] @ shared_directions(large)[:, 0]), 1)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), metric=st.sampled_from(["filters", "common", "own"]), data=st.data())
def test_a_factorised_layer_is_the_best_of_its_ranks(seed: int, metric: str, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, SIZE), "shared")
    unique = data.draw(st.integers(0, SIZE - shared), "unique")
    layer, other = random_layers(seed, 2, metric)
    basis = shared_directions([layer, other])[:, :shared]
    found = factorise(layer, basis, unique)
    elements = np.concatenate([found.unique, basis], axis=1)
    np.testing.assert_allclose(elements.T @ elements, np.eye(shared + unique), atol=1e-9)
    rest = layer.kernel - elements @ found.coefficients
    scale = np.linalg.norm(layer.factor) ** 2 * np.linalg.norm(layer.kernel)
    normal_equations = elements.T @ layer.factor.T @ layer.factor @ rest
    np.testing.assert_allclose(normal_equations / scale, 0, atol=1e-9)
    reached = error(layer, elements, found.coefficients)
    assert reached == pytest.approx(remaining_energy(layer, basis)[min(unique, OUTPUTS)], abs=1e-8)
    assert reached == pytest.approx(
        relative_error(layer.kernel, elements @ found.coefficients, layer.factor) ** 2, abs=1e-12)
    rng = np.random.default_rng(seed)
    for _ in range(3 if elements.size else 0):
        chosen = np.concatenate([rng.normal(size=(SIZE, unique)), basis], axis=1)
        assert reached <= error(layer, chosen, fit(layer, chosen)) + 1e-9
    if shared + unique == SIZE or unique >= OUTPUTS:
        np.testing.assert_allclose(elements @ found.coefficients, layer.kernel, atol=1e-6)


def test_given_the_shared_elements_the_unique_ones_are_the_svd_of_what_is_left() -> None:
    layer = random_layers(5, 1, "common")[0]
    basis = orthonormal(np.random.default_rng(6), 3)
    seen = layer.factor @ layer.kernel
    shared = layer.factor @ basis
    left = seen - shared @ np.linalg.solve(shared.T @ shared, shared.T @ seen)
    tails = [np.sum(np.linalg.svd(left, compute_uv=False)[u:] ** 2) / np.sum(seen**2) for u in range(OUTPUTS + 1)]
    np.testing.assert_allclose(remaining_energy(layer, basis), tails, atol=1e-12)


def test_a_kernel_of_zeros_and_patches_of_zeros_are_no_trouble() -> None:
    nothing = Layer(np.zeros((SIZE, OUTPUTS)), factor_of(np.zeros((SIZE, SIZE))))
    some = Layer(np.random.default_rng(0).normal(size=(SIZE, OUTPUTS)), np.eye(SIZE))
    basis = shared_directions([nothing, some])[:, :2]
    found = factorise(nothing, basis, 3)
    elements = np.concatenate([found.unique, basis], axis=1)
    np.testing.assert_allclose(elements.T @ elements, np.eye(5), atol=1e-12)
    np.testing.assert_array_equal(found.coefficients, 0)
    assert remaining_energy(nothing, basis).max() == 0
    assert relative_error(nothing.kernel, nothing.kernel) == 0


def test_the_factor_of_a_metric() -> None:
    rng = np.random.default_rng(7)
    metric = random_metric(rng)
    factor = factor_of(metric)
    np.testing.assert_allclose(factor.T @ factor, metric, atol=1e-3 * np.trace(metric) / SIZE)
    patches = rng.normal(size=(3, SIZE))  # fill three dimensions of nine
    assert np.linalg.cond(factor_of(patches.T @ patches)) < 1e4


def test_bases_become_orthonormal_together_by_the_least_move() -> None:
    rng = np.random.default_rng(8)
    one, other = orthonormal(rng, 3), orthonormal(rng, 3)
    found = np.concatenate(orthonormal_together([one, other]), axis=1)
    stacked = np.concatenate([one, other], axis=1)
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-12)
    for _ in range(20):
        rotated = np.linalg.qr(found + 0.1 * rng.normal(size=found.shape))[0]
        rotated *= np.sign(np.sum(rotated * found, axis=0))
        assert np.linalg.norm(found - stacked) < np.linalg.norm(rotated - stacked)
    again = orthonormal_together(np.split(found, 2, axis=1))
    np.testing.assert_allclose(np.concatenate(again, axis=1), found, atol=1e-12)


def test_bases_stay_where_the_space_cannot_hold_them_together() -> None:
    rng = np.random.default_rng(9)
    bases = [orthonormal(rng, 5), orthonormal(rng, 5)]
    for found, basis in zip(orthonormal_together(bases), bases, strict=True):
        np.testing.assert_array_equal(found, basis)


def test_a_group_shares_by_name_and_tells_what_remains() -> None:
    layers = dict(zip("abcd", random_layers(10, 4, "own"), strict=True))
    single = Group(layers, dict.fromkeys("abcd", "shared"))
    double = Group(layers, {"a": "first", "b": "second", "c": "first", "d": "second"})
    alone = Group(layers, {})
    assert [set(group.bases(2)) for group in (single, double, alone)] == [{"shared"}, {"first", "second"}, set()]
    assert alone.basis_of("a", {}).shape == (SIZE, 0)
    both = np.concatenate(list(double.bases(2).values()), axis=1)
    np.testing.assert_allclose(both.T @ both, np.eye(4), atol=1e-12)
    for group, rank in ((single, 3), (double, 2), (alone, 0)):
        bases = group.bases(rank)
        expected = []
        for name, layer in layers.items():
            basis = group.basis_of(name, bases)
            own = factorise(layer, basis, 1)
            expected.append(error(layer, np.concatenate([own.unique, basis], axis=1), own.coefficients))
        assert group.remaining(rank)[1] == pytest.approx(np.mean(expected), abs=1e-9)
