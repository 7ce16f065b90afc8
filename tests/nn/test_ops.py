"""Convolutions and batch normalisation in every form that they are computed in."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from shared_basis.nn import batch_norm, ops
from shared_basis.nn.basis_conv import BasisConv


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


@settings(deadline=None, max_examples=12, derandomize=True)
@given(size=st.sampled_from((1, 2, 3, 7)), strides=st.integers(1, 3), padding=st.integers(0, 3),
       height=st.integers(7, 9), width=st.integers(7, 9), channels=st.integers(1, 9),
       filters=st.sampled_from((1, 2, 8, 9, 16)), seed=st.integers(0, 99))
def test_convolution_and_gradients_are_numpy_s(size, strides, padding, height, width, channels, filters, seed):
    x, kernel = draw(seed, (2, height, width, channels), (size, size, channels, filters))
    y, pull = jax.vjp(lambda x, k: ops.convolve(x, k, strides, padding, jnp.float32), x, kernel)
    np.testing.assert_allclose(y, convolve_in_numpy(x, kernel, strides, padding), rtol=1e-4, atol=1e-4)
    (dy,) = draw(seed + 1, y.shape)
    dx, dk = pull(dy)
    assert (dx.shape, dk.shape) == (x.shape, kernel.shape)
    # It is linear in either: ⟨dy, conv(x', k)⟩ = ⟨dx, x'⟩ for every x', and likewise for kernels.
    other_x, other_kernel = draw(seed + 2, x.shape, kernel.shape)
    for gradient, other, result in ((dx, other_x, convolve_in_numpy(other_x, kernel, strides, padding)),
                                    (dk, other_kernel, convolve_in_numpy(x, other_kernel, strides, padding))):
        scale = np.linalg.norm(gradient) * np.linalg.norm(other)
        np.testing.assert_allclose(np.vdot(gradient, other) / scale, np.vdot(dy, result) / scale, atol=1e-5)


@pytest.mark.parametrize("filters", [2, 16])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_backend_computes_the_same(filters, groups, monkeypatch):
    filters *= groups
    x, kernel, dy = draw(0, (3, 8, 8, 8), (3, 3, 8 // groups, filters), (3, 8, 8, filters))

    def results():
        y, pull = jax.vjp(lambda x, k: ops.convolve(x, k, 1, 1, jnp.float32), x, kernel)
        return y, *pull(dy)
    on_cpu = results()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for one, other in zip(on_cpu, results(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_chooses_the_form_by_backend_and_filters(monkeypatch):
    """Forms compute the same, so that a wrong choice would show in nothing but time."""
    def primitives(filters):
        x, kernel = jnp.zeros((2, 8, 8, 16)), jnp.zeros((3, 3, 16, filters))
        return str(jax.make_jaxpr(lambda: ops.convolve(x, kernel, 1, 1, jnp.float32))())
    assert "conv_general_dilated" not in primitives(8)
    assert "custom_vjp" in primitives(9)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for filters in (8, 9):
        assert "conv_general_dilated" in primitives(filters)
        assert "custom_vjp" not in primitives(filters)


@pytest.mark.parametrize("filters", [1, 16])
def test_bfloat16_is_accumulated_in_float32(filters):
    x, kernel = draw(0, (2, 8, 8, 32), (3, 3, 32, filters))
    x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    y = ops.convolve(x, kernel, 1, 1, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    exact = convolve_in_numpy(np.asarray(x, np.float32), np.asarray(kernel, np.float32), 1, 1)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-3)  # one rounding, at the end


def norms(train, dtype=jnp.float32):
    """Returns ours and Flax's."""
    return (batch_norm.BatchNorm(train, dtype),
            nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype))


def variables_of(channels):
    rng = np.random.default_rng(1)
    return {"params": {"scale": rng.uniform(0.5, 2, channels).astype(np.float32),
                       "bias": rng.standard_normal(channels).astype(np.float32)},
            "batch_stats": {"mean": rng.standard_normal(channels).astype(np.float32),
                            "var": rng.uniform(0.5, 2, channels).astype(np.float32)}}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (8, 7)])
def test_batch_norm_is_flax_s(shape, dtype):
    x, dy = draw(2, shape, shape)
    x = jnp.asarray(3 * x + 1, dtype)
    variables = variables_of(shape[-1])
    ours, theirs = norms(train=False, dtype=dtype)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5 if dtype == jnp.float32 else 2**-6,
                              atol=2e-5 if dtype == jnp.float32 else 2**-6)
    close(*(np.asarray(norm.apply(variables, x), np.float32) for norm in (ours, theirs)))

    def run(norm):
        def apply(params, x):
            y, updated = norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return y, updated["batch_stats"]
        y, pull, stats = jax.vjp(apply, variables["params"], x, has_aux=True)
        assert y.dtype == dtype
        gradients, dx = pull(jnp.asarray(dy, dtype))
        assert dx.dtype == dtype
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (y, stats, gradients, dx))
    for one, other in zip(*(jax.tree.leaves(run(norm)) for norm in norms(train=True, dtype=dtype)), strict=True):
        close(one, other)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("ends", [(), (1,)])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_normalize_and_multiply_is_the_product_of_what_is_normalised(train, dtype, ends, backend, monkeypatch):
    x, dy, matrix = draw(2, (6, 5, 4, 3), (6, 5, 4, 9), (3, 9))
    x, variables = jnp.asarray(3 * x + 1, dtype), variables_of(3)
    norm = batch_norm.BatchNorm(train, dtype)

    def run(compute):
        def apply(params, x, matrix):
            y, updated = nn.apply(compute, norm, mutable=["batch_stats"])({**variables, "params": params}, x, matrix)
            return y, updated["batch_stats"]
        y, pull, stats = jax.vjp(apply, variables["params"], x, matrix, has_aux=True)
        assert y.dtype == dtype
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (y, stats, pull(jnp.asarray(dy, dtype))))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    folded = run(lambda norm, x, matrix: norm.normalize_and_multiply(jnp.split(x, ends, axis=-1), matrix))
    plain = run(lambda norm, x, matrix: norm(x) @ matrix.astype(dtype))
    assert jax.tree.structure(folded) == jax.tree.structure(plain)
    for one, other in zip(jax.tree.leaves(folded), jax.tree.leaves(plain), strict=True):
        atol = (1e-5 if dtype == jnp.float32 else 2**-6) * np.abs(other).max()  # the plain one rounds more often
        np.testing.assert_allclose(one, other, rtol=1e-4 if dtype == jnp.float32 else 2**-5, atol=atol)


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_products_turn_no_array_of_several_axes(activation):
    """XLA would do that in one fusion with what has computed the array, in an order that misses the cache."""
    x, shared = draw(6, (6, 5, 4, 3), (3, 3, 3, 9))
    layer = BasisConv(7, unique_rank=2, activation=activation)
    variables = layer.init(jax.random.key(0), x, shared, train=True)

    def loss(params, x, shared):
        y, _ = layer.apply({**variables, "params": params}, x, shared, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.square(y))
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(variables["params"], x, shared)
    products = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert len(products) >= 6  # of the coefficients and of the unique elements: forward, and both gradients
    assert all(operand.aval.ndim == 2 for eqn in products for operand in eqn.invars)


def test_a_loop_is_its_body_again_and_again():
    def body(carry, part):
        return ops.convolve(carry, part["kernel"], 1, 1, jnp.float32) + part["bias"], carry.sum()

    x, *kernels = draw(5, (2, 6, 6, 9), (3, 3, 9, 9), (3, 3, 9, 9), (3, 3, 9, 9))
    parts = [{"kernel": kernel, "bias": np.float32(index)} for index, kernel in enumerate(kernels)]

    def unrolled(x, parts):
        outputs = []
        for part in parts:
            x, output = body(x, part)
            outputs.append(output)
        return x, outputs
    (y, outputs), pull = jax.vjp(lambda x, parts: ops.scan_with_remat(body, x, parts), x, parts)
    (other, others), other_pull = jax.vjp(unrolled, x, parts)
    for one, two in zip(jax.tree.leaves((y, outputs, pull((y, outputs)))),
                        jax.tree.leaves((other, others, other_pull((other, others)))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5 * np.abs(two).max())


def test_where_loops_are_preferred(monkeypatch):
    assert ops.prefers_loops()
    with jax.debug_nans(True):
        assert not ops.prefers_loops()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not ops.prefers_loops()


def test_batch_norm_s_variables_are_flax_s():
    x = jnp.ones((2, 3, 3, 5))
    ours, theirs = (norm.init(jax.random.key(0), x) for norm in norms(train=True))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def normalized(x, scale, bias):
    """Returns `x` normalised over its batch."""
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": variables_of(x.shape[-1])["batch_stats"]}
    return batch_norm.BatchNorm(train=True).apply(variables, x, mutable=["batch_stats"])[0]


def test_batch_norm_s_gradient_is_that_of_differences():
    x, scale, bias, weights = draw(3, (4, 3, 3, 2), (2,), (2,), (4, 3, 3, 2))
    check_grads(lambda *a: jnp.sum(weights * jnp.tanh(normalized(*a))), (x, scale, bias), 1, ["rev"],
                atol=1e-2, rtol=1e-2)


def test_a_large_mean_does_not_drown_the_gradient_of_the_scale():
    x, dy = draw(4, (64, 8, 8, 2), (64, 8, 8, 2))
    _, pull = jax.vjp(normalized, x + np.float32(50), np.ones(2, np.float32), np.zeros(2, np.float32))
    _, dscale, _ = pull(jnp.asarray(dy))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / exact.std((0, 1, 2))
    np.testing.assert_allclose(dscale, (dy * exact).sum((0, 1, 2)), atol=0.1)


def test_options_are_those_of_the_backend(monkeypatch):
    options = {**ops.compiler_options(), **ops.quick_compiler_options()}
    assert float(jax.jit(lambda x: x + 1, compiler_options=options)(1.0)) == 2
    for name in options:
        monkeypatch.setenv("XLA_FLAGS", f"--{name}=1")
        assert name not in ops.compiler_options() | ops.quick_compiler_options()
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ops.compiler_options() == ops.quick_compiler_options() == {}


def test_portable_programs_have_each_operation_as_it_is_written_down():
    x, kernel, scale = draw(0, (2, 6, 6, 4), (3, 3, 4, 2), (2,))
    variables = {"params": {"scale": scale, "bias": scale + 1},
                 "batch_stats": {"mean": scale - 1, "var": np.square(scale)}}

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = ops.convolve(x, kernel, 1, 1, jnp.float32)
            norm = batch_norm.batch_norm(False, jnp.float32, "norm")
            return norm.normalize_and_multiply([y], kernel[0, 0, :2].T @ kernel[0, 0, :2])

    def program(x):
        return Layer().apply({kind: {"norm": tree} for kind, tree in variables.items()}, x)

    def primitives():
        return [eqn.primitive.name for eqn in jax.make_jaxpr(lambda x: program(x))(x).eqns]
    usual = primitives()
    with ops.portable():
        assert not ops.prefers_loops()
        portable, result = primitives(), program(x)
    assert "custom_vjp_call" in usual
    assert "conv_general_dilated" not in usual  # two filters are one matrix product on CPU
    assert [name for name in portable if name in ("conv_general_dilated", "sub", "dot_general")] == [
        "conv_general_dilated", "sub", "dot_general"]
    assert "custom_vjp_call" not in portable
    assert primitives() == usual
    np.testing.assert_allclose(result, program(x), atol=1e-5)
