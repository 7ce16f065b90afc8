"""Factorising plain arrays: bounds that are known, the layers that come out, and what is refused."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shared_basis import BasisConv, BasisGroup, factorize_kernels, orthogonality_diagnostics, patch_moments
from shared_basis.compression.kernels import LayerFactors, SharedFactors
from shared_basis.compression.patches import Moments

CHANNELS, SIZE = 3, 27


@pytest.fixture(scope="module")
def kernels() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(3, 3, CHANNELS, outputs)).astype(np.float32) for outputs in (4, 6, 5)]


@pytest.fixture(scope="module")
def inputs() -> list[np.ndarray]:
    """Returns smooth images, as those of networks are, with a mean: patches fill few directions."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0.5, 1, size=(3, 6, 9, 9, CHANNELS))
    smooth = (noise[:, :, :-1, :-1] + noise[:, :, 1:, :-1] + noise[:, :, :-1, 1:] + noise[:, :, 1:, 1:]) / 4
    return list(smooth @ rng.normal(size=(CHANNELS, CHANNELS)))


def flat(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64).reshape(-1, array.shape[-1])


def stand_in(found: SharedFactors, layer: LayerFactors) -> np.ndarray:
    """Returns the kernel, `[D, T]`, that `layer` has in place of its own."""
    return flat(np.concatenate([layer.unique, found.basis], axis=-1)) @ layer.coefficients.astype(np.float64)


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_without_unique_elements_the_basis_is_the_truncated_svd(kernels: list[np.ndarray], rank: int) -> None:
    found = factorize_kernels(kernels, rank)
    stacked = np.concatenate([flat(kernel) / np.linalg.norm(kernel) for kernel in kernels], axis=1)
    bound = np.sum(np.linalg.svd(stacked, compute_uv=False)[rank:]**2)
    errors = [np.linalg.norm(flat(kernel) - stand_in(found, layer)) / np.linalg.norm(kernel)
              for kernel, layer in zip(kernels, found.layers, strict=True)]
    assert np.sum(np.square(errors)) == pytest.approx(bound, rel=1e-5)
    np.testing.assert_allclose([layer.filter_error for layer in found.layers], errors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([layer.captured for layer in found.layers], 1 - np.square(errors), rtol=1e-5)
    assert all(layer.activation_error is None and not layer.unique.size for layer in found.layers)


@pytest.mark.parametrize(("shared", "unique"), [(SIZE, 0), (0, 6), (15, 0), (9, 6)])
def test_at_full_rank_the_kernels_come_back(kernels: list[np.ndarray], inputs: list[np.ndarray], shared: int,
                                            unique: int) -> None:
    """Full are as many elements as a filter has numbers, or as the layers, or as each of them, have filters."""
    for options in ({}, {"activations": inputs}):
        found = factorize_kernels(kernels, shared, unique, **options)
        for kernel, layer in zip(kernels, found.layers, strict=True):
            np.testing.assert_allclose(stand_in(found, layer), flat(kernel), atol=1e-4)
            assert layer.captured == pytest.approx(1, abs=1e-9)
            np.testing.assert_allclose(layer.mean_shift, 0, atol=1e-4)
            np.testing.assert_allclose(layer.var_ratio, 1, atol=1e-4)


@pytest.mark.parametrize("centered", [False, True])
def test_with_activations_the_results_of_layers_err_less(kernels: list[np.ndarray], inputs: list[np.ndarray],
                                                         centered: bool) -> None:
    by_filters = factorize_kernels(kernels, 4, 1)
    found = factorize_kernels(kernels, 4, 1, activations=inputs, centered=centered)
    total, total_by_filters = 0.0, 0.0
    for kernel, x, layer, other in zip(kernels, inputs, found.layers, by_filters.layers, strict=True):
        moments = patch_moments(x)
        metric = moments.covariance if centered else moments.second
        metric = metric + 1e-4 * np.trace(metric) / SIZE * np.eye(SIZE)

        def energy(filters: np.ndarray, metric: np.ndarray = metric) -> float:
            return float(np.trace(filters.T @ metric @ filters))
        error = energy(flat(kernel) - stand_in(found, layer)) / energy(flat(kernel))
        assert layer.activation_error == pytest.approx(np.sqrt(error), rel=1e-3)
        assert layer.captured == pytest.approx(1 - error, rel=1e-3)
        total += error
        total_by_filters += energy(flat(kernel) - stand_in(by_filters, other)) / energy(flat(kernel))
    assert total < 0.7 * total_by_filters


def test_the_layers_are_those_of_basis_conv_and_of_the_normalisation_after_it(
        kernels: list[np.ndarray], inputs: list[np.ndarray]) -> None:
    found = factorize_kernels(kernels, 5, 2, activations=inputs, centered=True)
    params = {"bases": {"body": found.basis}, **{
        str(index): layer.variables()["params"] for index, layer in enumerate(found.layers)}}
    for index, (kernel, x, layer) in enumerate(zip(kernels, inputs, found.layers, strict=True)):
        plain = nn.Conv(kernel.shape[-1], (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x)
        module = BasisConv(kernel.shape[-1], unique_rank=2)
        y = module.apply(layer.variables(), x, found.basis, train=False)
        np.testing.assert_allclose(flat(y), flat(_convolved(x, stand_in(found, layer))), atol=1e-4)
        rows, before = flat(y), flat(plain)
        np.testing.assert_allclose(layer.mean_shift, rows.mean(0) - before.mean(0), atol=1e-4)
        np.testing.assert_allclose(layer.var_ratio, rows.var(0) / before.var(0), rtol=1e-3)
        # Batch statistics of the inputs that were measured are the running ones: training begins where it ended.
        trained, _ = module.apply(layer.variables(), x, found.basis, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(trained, y, atol=1e-3)
        one = orthogonality_diagnostics(params, [BasisGroup(["bases/body"], [f"{index}/unique"])])
        assert float(one["penalty"]) < 1e-10


def test_a_bias_comes_along_and_takes_the_shift_of_the_means(kernels: list[np.ndarray],
                                                              inputs: list[np.ndarray]) -> None:
    biases = [np.arange(kernel.shape[-1], dtype=np.float32) for kernel in kernels]
    for activations in (None, inputs):
        found = factorize_kernels(kernels, 5, 2, activations=activations, centered=activations is not None,
                                  biases=[None, *biases[1:]])
        assert "bias" not in found.layers[0].variables()["params"]
        for kernel, x, layer, bias in list(zip(kernels, inputs, found.layers, biases, strict=True))[1:]:
            y = BasisConv(kernel.shape[-1], unique_rank=2, use_bias=True).apply(
                layer.variables(), x, found.basis, train=False)
            by_hand = flat(_convolved(x, stand_in(found, layer))) + bias
            if activations is None:
                np.testing.assert_allclose(flat(y), by_hand, atol=1e-4)
            else:
                before = flat(_convolved(x, kernel)) + bias
                np.testing.assert_allclose(flat(y).mean(0), before.mean(0), atol=1e-4)
                assert abs(by_hand.mean(0) - before.mean(0)).max() > 1e-3
            np.testing.assert_array_equal(layer.mean_shift, 0)


def test_the_layer_may_have_no_normalisation_but_no_other(kernels: list[np.ndarray], inputs: list[np.ndarray]) -> None:
    found = factorize_kernels(kernels, 5, 2, activations=inputs)
    layer, features = found.layers[0], kernels[0].shape[-1]
    expected = BasisConv(features, unique_rank=2).apply(layer.variables(), inputs[0], found.basis, train=False)
    without = BasisConv(features, unique_rank=2, norm=None)
    np.testing.assert_allclose(without.apply(layer.variables(norm=None), inputs[0], found.basis), expected, atol=1e-4)
    assert jax.tree.map(np.shape, layer.variables(norm=None)) == jax.tree.map(
        np.shape, without.init(jax.random.key(0), inputs[0], found.basis))
    with pytest.raises(ValueError, match="norm='group': must be 'batch' or None"):
        layer.variables(norm="group")


def test_what_is_found_is_shown_by_its_shapes(kernels: list[np.ndarray]) -> None:
    shown = repr(factorize_kernels(kernels, 5, 1))
    assert shown.startswith(f"SharedFactors(basis=[3, 3, {CHANNELS}, 5], layers=[LayerFactors("
                            f"unique=[3, 3, {CHANNELS}, 1], coefficients=[6, {kernels[0].shape[-1]}], captured=0.")


def test_one_array_is_no_list_of_kernels(kernels: list[np.ndarray]) -> None:
    with pytest.raises(TypeError, match=r"kernels is one array of shape \[3, 3, .*list\(kernels\) if its first axis"):
        factorize_kernels(kernels[0], 2)


def test_what_is_not_measured_is_left_at_zero_mean_and_unit_variance(kernels: list[np.ndarray]) -> None:
    found = factorize_kernels(kernels, 5)
    for layer in found.layers:
        variables = layer.variables()
        assert set(variables["params"]) == {"coefficients", "norm"}
        stats, norm = variables["batch_stats"]["norm"], variables["params"]["norm"]
        np.testing.assert_array_equal([stats["mean"], norm["bias"], stats["var"] - 1], 0)
        np.testing.assert_allclose(norm["scale"].astype(np.float64)**2, 1 + 1e-5, rtol=1e-6)
        np.testing.assert_array_equal([layer.mean_shift, layer.var_ratio - 1], 0)


def _convolved(x: np.ndarray, filters: np.ndarray) -> Any:
    kernel = jnp.asarray(filters.reshape(3, 3, CHANNELS, -1), jnp.float32)
    return nn.Conv(kernel.shape[-1], (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x)


def test_moments_stand_for_inputs_and_other_axes_and_types_are_taken(kernels: list[np.ndarray],
                                                                     inputs: list[np.ndarray]) -> None:
    found = factorize_kernels(kernels, 4, 1, activations=inputs)
    again = factorize_kernels(kernels, 4, 1, activations=[patch_moments(x) for x in inputs])
    np.testing.assert_array_equal(found.basis, again.basis)
    moved = factorize_kernels(kernels, 4, 1, activations=[patch_moments(x, padding="VALID") for x in inputs])
    assert np.abs(found.basis - moved.basis).max() > 1e-3
    line = factorize_kernels([jnp.ones((5, 2, 3), jnp.bfloat16)], 1, activations=[np.ones((2, 7, 2))])
    assert (line.basis.shape, line.basis.dtype, line.layers[0].coefficients.shape) == ((5, 2, 1), np.float32, (1, 3))
    assert line.layers[0].filter_error < 1e-6


NAN = np.full((3, 3, CHANNELS, 2), np.nan)
GOOD = np.ones((3, 3, CHANNELS, 2))


@pytest.mark.parametrize(("kernels", "ranks", "options", "message"), [
    ([], (1, 0), {}, "kernels is empty"),
    ([GOOD, np.ones((3, 3, 4, 2))], (1, 0), {}, r"kernels\[1\] of shape \[3, 3, 4, 2\] and kernels\[0\] .*must agree"),
    ([np.ones((3, 2))], (1, 0), {}, r"kernels\[0\] of shape \[3, 2\] and type float64: must be floats \[\*k, C, T\]"),
    ([np.ones((3, 3, 2), int)], (1, 0), {}, r"kernels\[0\] of shape \[3, 3, 2\] and type int64: must be floats"),
    ([GOOD, NAN], (1, 0), {}, r"kernels\[1\] holds NaN"),
    ([GOOD], (26, 2), {}, "shared_rank=26 and unique_rank=2: must be .* together from 1 to 27"),
    ([GOOD], (0, 0), {}, "shared_rank=0 and unique_rank=0"),
    ([GOOD], (2, -1), {}, "unique_rank=-1"),
    ([GOOD], (1, 0), {"centered": True}, "centered=True"),
    ([GOOD, GOOD], (1, 0), {"activations": [np.ones((1, 4, 4, 3))]}, "1 activations for 2 kernels"),
    ([GOOD, GOOD], (1, 0), {"biases": [None]}, "1 biases for 2 kernels"),
    ([GOOD], (1, 0), {"biases": [np.ones(3)]}, r"biases\[0\] of shape \[3\]: must be \[2\]"),
    ([GOOD], (1, 0), {"activations": [np.ones((1, 4, 4, 2))]}, r"activations\[0\] of shape \[1, 4, 4, 2\]: must be"),
    ([GOOD], (1, 0), {"activations": [np.full((1, 4, 4, 3), np.inf)]}, r"activations\[0\]: inputs hold NaN"),
    ([GOOD], (1, 0), {"activations": [np.ones((4, 4, 3))]}, r"activations\[0\]: inputs of shape \[4, 4, 3\]"),
    ([GOOD], (1, 0), {"activations": [Moments(1, np.ones(18), np.eye(18))]}, r"activations\[0\] .* 18 .*must be of 27"),
])
def test_what_is_invalid_is_refused_by_name(kernels: Any, ranks: tuple[int, int], options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize_kernels(kernels, *ranks, **options)
