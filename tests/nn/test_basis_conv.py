"""The basis convolution against values derived by hand and a NumPy reference, and how bases are initialised."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_basis.errors import UserError
from shared_basis.models.base import check_rank
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.convolution import Window, convolve
from shared_basis.nn.initializers import he_normal_fan_out, init_shared_bases

MODES = {"plain": (0, 0), "unique only": (0, 3), "shared only": (4, 0), "hybrid": (4, 3)}
"""Shared and unique rank (s, u) of each."""


def conv_reference(x, kernel, strides):
    """Convolution in float64 by explicit loops over positions: `[N, H, W, C]` with `[k, k, C, T]`, padded by k // 2."""
    x, kernel = np.float64(x), np.float64(kernel)
    k = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    rows, columns = range(0, x.shape[1], strides), range(0, x.shape[2], strides)
    y = np.empty((len(x), len(rows), len(columns), kernel.shape[3]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            y[:, i, j] = np.tensordot(padded[:, row:row + k, column:column + k], kernel, 3)
    return y


def layer_reference(x, params, shared, strides):
    """The layer at training, in float64: basis (unique elements first), batch normalisation, coefficients."""
    if "kernel" in params:
        return conv_reference(x, params["kernel"], strides)
    elements = [array for array in (params.get("unique"), shared) if array is not None]
    y = np.concatenate([conv_reference(x, array, strides) for array in elements], -1)
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    return y @ np.float64(params["coefficients"])


def make_layer(mode, *, k=3, channels=2, features=5, strides=1, dtype=jnp.float32, seed=0):
    """Returns the layer of `mode` with random parameters and batch statistics, and its shared basis."""
    s, u = MODES[mode]
    layer = BasisConv(features, k, strides, u, dtype)
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(k, k, channels, s)).astype(np.float32) if s else None
    x = jax.ShapeDtypeStruct((1, k, k, channels), jnp.float32)
    shapes = jax.eval_shape(lambda key, x: layer.init(key, x, shared, train=False), jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), shapes)
    return layer, variables, shared


def random_images(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_plain_ones_kernel_counts_the_neighbours_and_channels():
    y = BasisConv(1).apply({"params": {"kernel": jnp.ones((3, 3, 2, 1))}}, jnp.ones((1, 3, 4, 2)), train=True)
    np.testing.assert_array_equal(y[0, :, :, 0], [[8, 12, 12, 8], [12, 18, 18, 12], [8, 12, 12, 8]])


def test_stride_keeps_every_other_position_from_the_first():
    variables = {"params": {"kernel": jnp.ones((3, 3, 1, 1))}}
    y = BasisConv(1, strides=2).apply(variables, jnp.ones((1, 4, 3, 1)), train=True)
    np.testing.assert_array_equal(y[0, :, :, 0], [[4, 4], [6, 6]])


def test_unique_channels_come_before_shared_ones():
    # 1×1 elements: unique doubles the input, shared triples it; running statistics 0 and 1 make the norm ÷ √(1 + ε),
    # then × (10, 100); the coefficients add the channels with weights 1 and 1000.
    variables = {
        "params": {"unique": jnp.full((1, 1, 1, 1), 2.0), "coefficients": jnp.array([[1.0], [1000.0]]),
                   "norm": {"scale": jnp.array([10.0, 100.0]), "bias": jnp.array([0.5, 0.0])}},
        "batch_stats": {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
    y = BasisConv(1, kernel_size=1, unique_rank=1).apply(
        variables, jnp.ones((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), 3.0), train=False)
    np.testing.assert_allclose(y.item(), (20 + 1000 * 300) / np.sqrt(1 + 1e-5) + 0.5, rtol=1e-6)


def test_no_relu_follows_the_norm():
    _, variables, shared = make_layer("shared only")
    variables["params"]["norm"]["bias"] -= 100  # all channels below zero
    y = BasisConv(5).apply(variables, np.zeros((1, 4, 4, 2), np.float32), shared, train=False)
    assert np.all(y < 0)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_training_agrees_with_numpy(mode, strides):
    layer, variables, shared = make_layer(mode, strides=strides)
    x = random_images(3, 6, 5, 2)
    y, updated = layer.apply(variables, x, shared, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, layer_reference(x, variables["params"], shared, strides), rtol=1e-4, atol=1e-4)
    if mode == "plain":
        assert not updated
        return
    elements = [array for array in (variables["params"].get("unique"), shared) if array is not None]
    basis = np.concatenate([conv_reference(x, array, strides) for array in elements], -1)
    old, new = variables["batch_stats"]["norm"], updated["batch_stats"]["norm"]
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * basis.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * basis.var((0, 1, 2)), rtol=1e-4)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 3), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(1, 2), st.integers(3, 7),
       st.integers(3, 7))
def test_convolution_agrees_with_numpy_on_any_shape(count, k, channels, strides, height, width):
    x, kernel = random_images(count, height, width, channels), random_images(k, k, channels, 2, seed=2)
    y = convolve(x, kernel, Window.of((k, k), x.shape[1:3], strides), jnp.float32)
    assert y.shape == (count, -(-height // strides), -(-width // strides), 2)
    np.testing.assert_allclose(y, conv_reference(x, kernel, strides), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_has_parameters_for_what_its_mode_needs_and_no_more(mode):
    _, variables, _ = make_layer(mode, channels=2, features=5)
    s, u = MODES[mode]
    norm = {"scale": (s + u,), "bias": (s + u,)}
    expected = {"kernel": (3, 3, 2, 5)} if not s + u else {"norm": norm, "coefficients": (s + u, 5)}
    if u:
        expected["unique"] = (3, 3, 2, u)
    assert jax.tree.map(jnp.shape, dict(variables["params"])) == expected
    assert set(variables) == ({"params", "batch_stats"} if s + u else {"params"})


@pytest.mark.parametrize("mode", ["unique only", "shared only", "hybrid"])
def test_without_normalisation_the_layer_is_a_convolution_with_the_composed_kernel(mode):
    layer, variables, shared = make_layer(mode, strides=2)
    rank = sum(MODES[mode])
    variables["params"]["norm"] = {"scale": np.full(rank, np.sqrt(1 + 1e-5), np.float32), "bias": np.zeros(rank)}
    variables["batch_stats"]["norm"] = {"mean": np.zeros(rank), "var": np.ones(rank)}
    elements = [array for array in (variables["params"].get("unique"), shared) if array is not None]
    kernel = np.concatenate(elements, -1) @ variables["params"]["coefficients"]
    x = random_images(2, 6, 6, 2)
    y = layer.apply(variables, x, shared, train=False)
    np.testing.assert_allclose(y, conv_reference(x, kernel, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 3, 3, 4), (5, 5, 2, 4)])
def test_a_shared_basis_of_other_filters_is_refused(shape):
    layer, variables, _ = make_layer("shared only")
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}") + ".*" + re.escape("(3, 3, 2, elements)")):
        layer.apply(variables, random_images(1, 4, 4, 2), np.ones(shape, np.float32), train=False)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_statistics():
    layer, variables, shared = make_layer("hybrid", dtype=jnp.bfloat16)
    x = random_images(3, 6, 5, 2)
    y, updated = layer.apply(variables, x, shared, train=True, mutable=["batch_stats"])
    initial = jax.eval_shape(lambda key: layer.init(key, x, shared, train=True), jax.random.key(0))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((initial, updated))} == {jnp.dtype("float32")}
    reference = layer_reference(x, variables["params"], shared, 1)
    assert np.max(np.abs(np.float64(y) - reference)) < 0.03 * np.max(np.abs(reference))


def rows(*arrays):
    """Returns the elements of all arrays as rows, in float64."""
    return np.concatenate([np.float64(array).reshape(-1, array.shape[-1]).T for array in arrays])


@settings(deadline=None, max_examples=5, derandomize=True)
@given(st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 40), st.sampled_from([("shared",), ("a", "b")]))
def test_initial_bases_are_orthonormal_together_as_far_as_the_space_reaches(k, channels, rank, names):
    space = k * k * channels
    rank = min(rank, space)
    bases = init_shared_bases(jax.random.key(rank), dict.fromkeys(names, (k, k, channels, rank)))
    assert {name: array.shape for name, array in bases.items()} == dict.fromkeys(names, (k, k, channels, rank))
    assert {array.dtype for array in bases.values()} == {jnp.dtype("float32")}
    sets = [rows(*bases.values())] if len(names) * rank <= space else [rows(array) for array in bases.values()]
    for b in sets:
        np.testing.assert_allclose(b @ b.T, np.eye(len(b)), atol=1e-5)


def test_two_bases_that_do_not_fit_together_differ():
    bases = init_shared_bases(jax.random.key(0), dict.fromkeys(("first", "second"), (3, 3, 1, 5)))
    assert np.max(np.abs(rows(bases["first"]) - rows(bases["second"]))) > 0.1


def test_two_bases_that_just_fit_together_span_the_space():
    bases = init_shared_bases(jax.random.key(0), dict.fromkeys(("first", "second"), (3, 3, 2, 9)))
    b = rows(*bases.values())
    np.testing.assert_allclose(b @ b.T, np.eye(18), atol=1e-5)


def test_more_elements_than_the_space_has_dimensions_are_a_tight_frame():
    b = rows(init_shared_bases(jax.random.key(0), {"shared": (1, 1, 4, 10)})["shared"])
    np.testing.assert_allclose(b.T @ b, np.eye(4), atol=1e-5)


@pytest.fixture(scope="module")
def initial():
    """Initial parameters of a wide layer: 100 channels, 8 unique elements, 40 features."""
    return jax.jit(lambda key: BasisConv(40, unique_rank=8).init(key, jnp.zeros((1, 1, 1, 100)), train=False))(
        jax.random.key(0))["params"]


def test_convolutions_are_drawn_by_he_with_fan_out(initial):
    kernel = he_normal_fan_out(jax.random.key(1), (3, 3, 100, 40))
    for array, fan_out in ((initial["unique"], 9 * 8), (initial["coefficients"], 40), (kernel, 9 * 40)):
        values = np.ravel(array) / np.sqrt(2 / fan_out)
        # Five standard errors of the standard deviation and of the mean of n normal values.
        assert abs(np.std(values) - 1) < 5 / np.sqrt(2 * values.size)
        assert abs(np.mean(values)) < 5 / np.sqrt(values.size)


def test_the_norm_starts_as_the_identity(initial):
    np.testing.assert_array_equal(initial["norm"]["scale"], np.ones(8))
    np.testing.assert_array_equal(initial["norm"]["bias"], np.zeros(8))


def test_a_rank_up_to_the_dimension_of_the_filters_is_accepted():
    check_rank("group 1", 18, 3, 2)
    with pytest.raises(UserError) as caught:
        check_rank("group 1", 19, 3, 2)
    assert str(caught.value) == ("group 1: a basis of 19 elements does not fit the 18-dimensional space of its "
                                 "3×3×2 filters; choose shared + unique rank at most 18.")
