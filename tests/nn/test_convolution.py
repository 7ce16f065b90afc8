"""Convolutions in every form that they are computed in, against NumPy and Flax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_basis.nn.basis_conv import basis_conv
from shared_basis.nn.batch_norm import Norm
from shared_basis.nn.convolution import Window, convolve
from shared_basis.nn.ops import forms_for, portable

PLATFORMS = ("cpu", "tpu")


def convolve_in_numpy(x, kernel, strides, padding):
    """Adds up, for each tap, the product of the shifted input with that tap's matrix, in float64."""
    size, _, _, filters = kernel.shape
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((length - size) // strides + 1 for length in padded.shape[1:3])
    y = np.zeros((len(x), height, width, filters))
    for i in range(size):
        for j in range(size):
            part = padded[:, i:i + (height - 1) * strides + 1:strides, j:j + (width - 1) * strides + 1:strides]
            y += part @ np.asarray(kernel[i, j], np.float64)
    return y


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def square(strides, padding):
    return Window((strides, strides), ((padding, padding),) * 2, (1, 1))


def with_gradients(platform, window, x, kernel):
    """Returns the convolution y in the form of `platform`, and its two gradients where y has the gradient cos(y)."""
    def results(x, kernel):
        y, pull = jax.vjp(lambda x, k: convolve(x, k, window, jnp.float32), x, kernel)
        return y, *pull(jnp.cos(y))
    with forms_for(platform):
        return jax.jit(results)(x, kernel)


@settings(deadline=None, max_examples=7, derandomize=True)
@given(size=st.sampled_from((1, 2, 3, 7)), strides=st.integers(1, 3), padding=st.integers(0, 3),
       height=st.integers(7, 9), width=st.integers(7, 9), channels=st.integers(1, 9),
       filters=st.sampled_from((1, 2, 8, 9, 16)), seed=st.integers(0, 99))
def test_convolution_and_gradients_are_numpy_s(size, strides, padding, height, width, channels, filters, seed):
    x, kernel = draw(seed, (2, height, width, channels), (size, size, channels, filters))
    y, dx, dk = with_gradients("cpu", square(strides, padding), x, kernel)
    np.testing.assert_allclose(y, convolve_in_numpy(x, kernel, strides, padding), rtol=1e-4, atol=1e-4)
    dy = np.cos(y)
    assert (dx.shape, dk.shape) == (x.shape, kernel.shape)
    # It is linear in either: ⟨dy, conv(x', k)⟩ = ⟨dx, x'⟩ for every x', and likewise for kernels.
    other_x, other_kernel = draw(seed + 2, x.shape, kernel.shape)
    for gradient, other, result in ((dx, other_x, convolve_in_numpy(other_x, kernel, strides, padding)),
                                    (dk, other_kernel, convolve_in_numpy(x, other_kernel, strides, padding))):
        scale = np.linalg.norm(gradient) * np.linalg.norm(other)
        np.testing.assert_allclose(np.vdot(gradient, other) / scale, np.vdot(dy, result) / scale, atol=1e-5)


@pytest.mark.parametrize("filters", [2, 16])
@pytest.mark.parametrize(("groups", "padding"), [
    (1, ((1, 1), (1, 1))), (1, ((0, 2), (2, 1))), (4, ((1, 1), (1, 1))), (8, ((0, 2), (2, 1)))])
def test_every_platform_s_form_computes_the_same(filters, groups, padding):
    filters *= groups
    x, kernel = draw(0, (3, 8, 8, 8), (3, 3, 8 // groups, filters))
    forms = (with_gradients(platform, Window((1, 1), padding, (1, 1)), x, kernel) for platform in PLATFORMS)
    for one, other in zip(*forms, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=7, derandomize=True)
@given(size=st.sampled_from((1, 2, 3, 5)), strides=st.integers(1, 3), padding=st.integers(0, 3),
       dilation=st.integers(1, 2), height=st.integers(9, 11), width=st.integers(9, 11), channels=st.integers(1, 9),
       seed=st.integers(0, 99))
def test_depthwise_convolution_and_gradients_are_xla_s(size, strides, padding, dilation, height, width, channels, seed):
    window = Window((strides, strides), ((padding, 1), (padding, padding)), (dilation, 1))
    x, kernel = draw(seed, (2, height, width, channels), (size, size, 1, channels))
    forms = (with_gradients(platform, window, x, kernel) for platform in PLATFORMS)
    for one, other in zip(*forms, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [4, 8])
def test_the_forms_of_groups_can_be_transformed(groups):
    """Like those of one group, which test_transformations.py has."""
    x, kernel = draw(0, (4, 6, 6, 8), (3, 3, 8 // groups, 8))

    def loss(kernel, x):
        return jnp.mean(jnp.tanh(convolve(x, kernel, square(1, 1), jnp.float32)))

    def sharded(kernel, x):
        return jax.grad(lambda kernel: jax.lax.pmean(loss(kernel, x), "d"))(kernel)
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    expected = jax.jit(jax.grad(loss))(kernel, x)
    with forms_for("cpu"):
        for found in (jax.jit(jax.grad(jax.checkpoint(loss)))(kernel, x),
                      jnp.mean(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(kernel, x[:, None]), 0),
                      jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec()))(
                          kernel, x)):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 6, 6, 8), jnp.float32)
        exported = jax.export.export(jax.jit(functools.partial(loss, kernel)))(shape)
    np.testing.assert_allclose(exported.call(x), loss(kernel, x), rtol=1e-4)


def test_the_form_follows_the_platform_the_filters_and_the_groups():
    """Forms compute the same, so that a wrong choice would show in nothing but time."""
    def primitives(filters, groups=1):
        x, kernel = jnp.zeros((2, 8, 8, 16)), jnp.zeros((3, 3, 16 // groups, filters))
        return str(jax.make_jaxpr(lambda: convolve(x, kernel, square(1, 1), jnp.float32))())
    with forms_for("cpu"):
        assert "conv_general_dilated" not in primitives(8)
        assert "custom_vjp" in primitives(9)
        assert "conv_general_dilated" not in primitives(16, 16)  # depthwise
        assert "length=4" in primitives(36, 4)  # a loop over the groups
    for program in (primitives(8), primitives(9), primitives(16, 16), primitives(36, 4)):
        # As they are written, they can be transformed in every way.
        assert "conv_general_dilated" in program
        assert "scan" not in program
        assert "custom_vjp" not in program


@pytest.mark.parametrize(("filters", "groups"), [(1, 1), (16, 1), (32, 32)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_is_accumulated_in_float32(filters, groups, platform):
    x, kernel = draw(0, (2, 8, 8, 32), (3, 3, 32 // groups, filters))
    x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    with forms_for(platform):
        y = convolve(x, kernel, square(1, 1), jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    dense = np.asarray(kernel, np.float32)
    dense = dense * np.eye(32)[:, :filters] if groups > 1 else dense  # zero from each channel to all others
    exact = convolve_in_numpy(np.asarray(x, np.float32), dense, 1, 1)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-3)  # one rounding, at the end


@pytest.mark.parametrize("rank", [0, 1, 7, 17])
def test_on_accelerators_a_channel_of_ones_stands_after_the_elements(rank):
    x, kernel = draw(0, (2, 5, 4, 3), (3, 3, 3, rank))
    y = convolve(x, kernel, square(1, 1), jnp.float32, one=True)
    assert y.shape == (2, 5, 4, rank + 1)
    np.testing.assert_allclose(y[..., :rank], convolve_in_numpy(x, kernel, 1, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[..., rank], 1)
    norm, then = (Norm(*(jnp.ones(count) for _ in range(4))) for count in (rank, 6))

    def layer(platform):
        with portable() if platform == "portable" else forms_for(platform):
            return basis_conv(x, [kernel[..., :1], kernel[..., 1:]], norm, jnp.ones((rank, 6)), window=square(1, 1),
                              train=True, then=then)
    assert f"f32[2,5,4,{rank + 1}] = conv_general_dilated" in str(jax.make_jaxpr(lambda: layer("gpu"))())
    results = (jax.jit(layer, static_argnums=0)(platform) for platform in ("gpu", "portable"))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=pytest.mark.slow), "tpu"])
@pytest.mark.parametrize(("size", "options"), [
    ((3,), {"strides": 2, "padding": "SAME"}), ((5, 2), {"padding": "VALID", "strides": (2, 1)}),
    ((3, 3), {"padding": "same", "strides": 3}), ((3, 3), {"padding": ((2, 0), (1, 3))}),
    ((3, 3), {"padding": 2, "kernel_dilation": 2}), ((2, 3), {"padding": (1, 2), "kernel_dilation": (1, 3)}),
    ((3, 1, 2), {"padding": "SAME", "kernel_dilation": (2, 1, 1)}), ((3, 3), {"feature_group_count": 2}),
    ((3,), {"strides": 2, "padding": "SAME", "feature_group_count": 4}),
    ((3, 2, 1), {"padding": 1, "strides": (1, 2, 3), "feature_group_count": 4}),
], ids=str)
def test_windows_are_flax_s(size, options, platform):
    x, = draw(1, (*(2, 9, 8, 7, 6)[:len(size) + 1], 4))
    conv = nn.Conv(4 if options.get("feature_group_count") == 4 else 6, size, use_bias=False, **options)
    variables = conv.init(jax.random.key(0), x)
    options = {"padding": "SAME", **options}
    window = Window.of(size, x.shape[1:-1], options.get("strides", 1), options["padding"],
                       options.get("kernel_dilation", 1))
    with forms_for(platform):
        y = convolve(x, variables["params"]["kernel"], window, jnp.float32)
    np.testing.assert_allclose(y, conv.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "said"), [
    ({"strides": (1, 2, 1)}, "strides"), ({"dilation": (1,)}, "kernel_dilation"), ({"padding": (1, 1, 1)}, "padding"),
    ({"padding": "CAUSAL"}, "'SAME', 'VALID'")])
def test_a_wrong_window_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        Window.of((3, 3), (8, 8), **options)
