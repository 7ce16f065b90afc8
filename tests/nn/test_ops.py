"""How operations are traced and compiled for a platform, loops, and products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shared_basis.nn import ops
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.convolution import Window, convolve

WINDOW = Window((1, 1), ((1, 1), (1, 1)), (1, 1))


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_products_turn_no_array_of_several_axes(activation):
    """XLA would do that in one fusion with what has computed the array, in an order that misses the cache."""
    x, shared = draw(6, (6, 5, 4, 3), (3, 3, 3, 9))
    layer = BasisConv(7, unique_rank=2, activation=activation)
    variables = layer.init(jax.random.key(0), x, shared, train=True)

    def loss(params, x, shared):
        y, _ = layer.apply({**variables, "params": params}, x, shared, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.square(y))
    with ops.forms_for("cpu"):
        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(variables["params"], x, shared)
    products = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert len(products) >= 6  # of the coefficients and of the unique elements: forward, and both gradients
    assert all(operand.aval.ndim == 2 for eqn in products for operand in eqn.invars)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_loop_is_its_body_again_and_again(platform):
    def body(carry, part):
        return convolve(carry, part["kernel"], WINDOW, jnp.float32) + part["bias"], carry.sum()

    x, *kernels = draw(5, (2, 6, 6, 9), (3, 3, 9, 9), (3, 3, 9, 9), (3, 3, 9, 9))
    parts = [{"kernel": kernel, "bias": np.float32(index)} for index, kernel in enumerate(kernels)]

    def unrolled(x, parts):
        outputs = []
        for part in parts:
            x, output = body(x, part)
            outputs.append(output)
        return x, outputs
    with ops.forms_for(platform):
        (y, outputs), pull = jax.vjp(lambda x, parts: ops.scan_with_remat(body, x, parts), x, parts)
    (other, others), other_pull = jax.vjp(unrolled, x, parts)
    for one, two in zip(jax.tree.leaves((y, outputs, pull((y, outputs)))),
                        jax.tree.leaves((other, others, other_pull((other, others)))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5 * np.abs(two).max())


def test_where_loops_are_preferred():
    assert not ops.prefers_loops()
    with ops.forms_for("cpu"):
        assert ops.prefers_loops()
        with jax.debug_nans(True):
            assert not ops.prefers_loops()
    with ops.forms_for("gpu"):
        assert not ops.prefers_loops()


def test_options_are_those_of_the_platform(monkeypatch):
    options = {**ops.compiler_options(), **ops.quick_compiler_options()}
    assert options == {**ops.compiler_options("cpu"), **ops.quick_compiler_options("cpu")}  # the default backend
    assert float(jax.jit(lambda x: x + 1, compiler_options=options)(1.0)) == 2
    for name in options:
        monkeypatch.setenv("XLA_FLAGS", f"--{name}=1")
        assert name not in ops.compiler_options() | ops.quick_compiler_options()
    monkeypatch.delenv("XLA_FLAGS")
    assert ops.compiler_options("gpu") == ops.quick_compiler_options("tpu") == {}


def layer_and_arguments():
    x, kernel = draw(0, (2, 6, 6, 4), (3, 3, 4, 2))
    layer = BasisConv(3)
    variables = layer.init(jax.random.key(0), x, kernel, train=False)
    return lambda x: layer.apply(variables, x, kernel, train=False), x


def primitives(function, x):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(lambda x: function(x))(x).eqns]


def test_jit_for_traces_in_the_forms_of_the_platform_and_nothing_else_does():
    function, x = layer_and_arguments()
    usual = primitives(function, x)
    on_cpu, elsewhere = (str(ops.jit_for(platform)(function).trace(x).jaxpr) for platform in ("cpu", "gpu"))
    assert "conv_general_dilated" not in on_cpu  # two filters are one matrix product there
    assert "conv_general_dilated" in elsewhere
    assert "custom_vjp_call" not in usual
    assert primitives(function, x) == usual
    results = [ops.jit_for("cpu", quick=quick)(function)(x) for quick in (False, True)]
    for result in results:
        np.testing.assert_allclose(result, function(x), atol=1e-5)


def test_what_is_compiled_in_one_form_is_not_taken_for_another():
    function, x = layer_and_arguments()
    compiled = jax.jit(function)

    def traced():
        return "conv_general_dilated" in str(compiled.trace(x).jaxpr)
    assert traced()
    with ops.forms_for("cpu"):
        assert not traced()
    assert traced()


def test_portable_programs_have_each_operation_as_it_is_written_down():
    function, x = layer_and_arguments()
    usual = primitives(function, x)
    with ops.portable():
        assert not ops.prefers_loops()
        portable, result = primitives(function, x), function(x)
    assert [name for name in portable if name in ("conv_general_dilated", "sub", "dot_general")] == [
        "conv_general_dilated", "sub", "dot_general"]  # the mean is taken off before the product, not after it
    assert "custom_jvp_call" in usual  # all in one step
    assert primitives(function, x) == usual
    np.testing.assert_allclose(result, function(x), atol=1e-5)


@pytest.mark.parametrize("forms", [ops.forms_for("cpu"), ops.forms_for("gpu"), ops.portable()],
                         ids=["cpu", "gpu", "portable"])
def test_relu_of_product_is_relu(forms):
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    with forms:
        y, pull = jax.vjp(ops.relu_of_product, x)
        np.testing.assert_array_equal(pull(jnp.ones(4))[0], [0, 0, 0, 1])
        np.testing.assert_array_equal(jax.jvp(ops.relu_of_product, (x,), (jnp.ones(4),))[1], [0, 0, 0, 1])
    np.testing.assert_array_equal(y, [0, 0, 0, 3])
