"""Batch normalisation against Flax, and its closed form against what it is the closed form of."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from shared_basis.nn.batch_norm import BatchNorm, Norm, mix, normalize
from shared_basis.nn.ops import forms_for, portable


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def norms(train, dtype=jnp.float32):
    """Returns ours and Flax's."""
    return (BatchNorm(train, dtype),
            nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype))


def variables_of(channels):
    rng = np.random.default_rng(1)
    return {"params": {"scale": rng.uniform(0.5, 2, channels).astype(np.float32),
                       "bias": rng.standard_normal(channels).astype(np.float32)},
            "batch_stats": {"mean": rng.standard_normal(channels).astype(np.float32),
                            "var": rng.uniform(0.5, 2, channels).astype(np.float32)}}


def norm_of(channels, seed):
    rng = np.random.default_rng(seed)
    return Norm(*(rng.uniform(low, 2, channels) for low in (0.5, -2, -2, 0.1)))


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

        @jax.jit
        def results(params, x):
            (y, stats), pull = jax.vjp(apply, params, x)
            return y, stats, *pull((jnp.asarray(dy, dtype), jax.tree.map(jnp.sin, stats)))  # these have gradients too
        y, stats, gradients, dx = results(variables["params"], x)
        assert (y.dtype, dx.dtype) == (dtype, dtype)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (y, stats, gradients, dx))
    for one, other in zip(*(jax.tree.leaves(run(norm)) for norm in norms(train=True, dtype=dtype)), strict=True):
        close(one, other)


def test_batch_norm_s_variables_are_flax_s():
    x = jnp.ones((2, 3, 3, 5))
    ours, theirs = (norm.init(jax.random.key(0), x) for norm in norms(train=True))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def normalized(x, scale, bias):
    """Returns `x` normalised over its batch."""
    return normalize(x, Norm(scale, bias, *jnp.ones((2, x.shape[-1]))), True, jnp.float32)[0]


def test_batch_norm_s_gradient_is_that_of_differences():
    x, scale, bias, weights = draw(3, (4, 3, 3, 2), (2,), (2,), (4, 3, 3, 2))
    loss = jax.jit(lambda *a: jnp.sum(weights * jnp.tanh(normalized(*a))))
    check_grads(loss, (x, scale, bias), 1, atol=2e-2, rtol=2e-2)


def test_a_large_mean_does_not_drown_the_gradient_of_the_scale():
    x, dy = draw(4, (64, 8, 8, 2), (64, 8, 8, 2))
    _, pull = jax.vjp(normalized, x + np.float32(50), np.ones(2, np.float32), np.zeros(2, np.float32))
    _, dscale, _ = pull(jnp.asarray(dy))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / exact.std((0, 1, 2))
    np.testing.assert_allclose(dscale, (dy * exact).sum((0, 1, 2)), atol=0.1)


def one_by_one(parts, norm, matrix, then, train):
    """The norm, the product and the norm that follows, each by itself, from means and variances as defined."""
    def normalise(x, norm):
        axes = tuple(range(x.ndim - 1))
        mean, var = (x.mean(axes), x.var(axes)) if train else (norm.mean, norm.var)
        return (x - mean) / jnp.sqrt(var + 1e-5) * norm.scale + norm.bias, mean, var
    y, *moments = normalise(jnp.concatenate(parts, axis=-1), norm)
    y = y @ matrix
    if then is not None:
        y, *more = normalise(y, then)
        moments += more
    return y, moments


@settings(deadline=None, max_examples=7, derandomize=True)
@given(shape=st.sampled_from([(8, 3, 5), (1, 4, 4), (64,), (2, 1, 1)]), rank=st.integers(1, 9),
       features=st.integers(1, 9),
       cut=st.booleans(), train=st.booleans(), joint=st.booleans(), platform=st.sampled_from(["cpu", "gpu"]),
       spread=st.sampled_from([1.0, 1e-3, 1e-6]), one=st.booleans(), seed=st.integers(0, 99))
def test_the_closed_form_is_exact(shape, rank, features, cut, train, joint, platform, spread, one, seed):
    """In float64: the result, the statistics, and the gradients through all of them."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((*shape, rank)) * spread + rng.standard_normal(rank)
        parts = [x[..., :rank // 2], x[..., rank // 2:]] if cut and rank > 1 else [x]
        norm, then = norm_of(rank, seed), norm_of(features, seed + 1) if joint else None
        matrix = rng.standard_normal((rank, features))

        def closed(parts, norm, matrix, then):
            if one:
                parts = [jnp.concatenate([*parts, jnp.ones((*shape, 1))], axis=-1)]
            with forms_for(platform):
                y, moved, moved_then = mix(parts, norm, matrix, train, jnp.float64, then, one=one)
            if not train:
                assert moved is norm
                assert moved_then is then
                return y, []
            pairs = [(moved, norm)] + ([(moved_then, then)] if joint else [])
            return y, [(getattr(new, name) - 0.9 * getattr(old, name)) / 0.1
                       for new, old in pairs for name in ("mean", "var")]

        def expected(parts, norm, matrix, then):
            y, moments = one_by_one(parts, norm, matrix, then, train)
            return y, moments if train else []
        arguments = (parts, norm, matrix, then)
        results = []
        for function in (closed, expected):
            def with_gradient(*arguments, function=function):
                out, pull = jax.vjp(function, *arguments)
                return out, pull(jax.tree.map(jnp.sin, out))
            results.append(jax.jit(with_gradient)(*arguments))
        scale = 1 / min(spread, 1)  # of gradients: variances below epsilon amplify
        for one, other in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8 * scale * max(1, np.abs(other).max()))


@pytest.mark.parametrize(("train", "joint"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=pytest.mark.slow), "gpu"])
def test_the_closed_form_is_as_near_to_float64_as_one_by_one(train, joint, dtype, platform):
    x, dy, matrix = draw(2, (32, 6, 5, 9), (32, 6, 5, 7), (9, 7))
    x = jnp.asarray(3 * x + np.arange(9), dtype)
    norm, then = (jax.tree.map(jnp.float32, norm_of(n, n)) for n in (9, 7))

    @functools.partial(jax.jit, static_argnums=0)
    def run(compute, *arguments):
        y, pull = jax.vjp(compute, *arguments)
        return y, pull(jnp.asarray(dy, y.dtype))

    def closed(x, norm, matrix, then):
        one = platform != "cpu"
        parts = [jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)] if one else [x[..., :2], x[..., 2:]]
        with forms_for(platform):
            return mix(parts, norm, matrix, train, dtype, then if joint else None, one=one)[0]

    def separate(x, norm, matrix, then):
        with portable():
            return mix([x], norm, matrix, train, dtype, then if joint else None)[0]
    got, usual = run(closed, x, norm, matrix, then), run(separate, x, norm, matrix, then)
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [leaf.dtype for leaf in jax.tree.leaves(usual)]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (x, norm, matrix, then))
        exact = run(lambda x, n, m, t: one_by_one([x], n, m, t if joint else None, train)[0], *wide)
    error = functools.partial(jax.tree.map, lambda a, e: np.linalg.norm(np.float64(a) - np.asarray(e)))
    size = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(exact[1]))
    for ours, theirs, value in zip(*map(jax.tree.leaves, (error(got, exact), error(usual, exact), exact)), strict=True):
        unit = 1e-6 if dtype == jnp.float32 else 2**-8
        assert ours <= 3 * theirs + unit * (np.linalg.norm(value) + 0.02 * size)


@pytest.mark.parametrize("joint", [True, False])
def test_in_training_the_closed_form_reads_the_basis_convolution_no_more_often_than_it_must(joint):
    """A pass over it is what costs time on accelerators: its products are counted, forward and backward."""
    x, matrix = draw(2, (4, 5, 6, 3), (3, 7))
    norm, then = (jax.tree.map(jnp.float32, norm_of(n, n)) for n in (3, 7))

    def loss(x, norm, matrix, then):
        return jnp.sum(mix([x], norm, matrix, True, jnp.float32, then if joint else None)[0])

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general" and max(var.aval.size for var in eqn.invars) > 100:
                yield eqn
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    body = getattr(inner, "jaxpr", inner)
                    if hasattr(body, "eqns"):
                        yield from products(body)
    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(x, norm, matrix, then)
    # Forward: the result, and the covariance. Backward: for the matrix, for x, and for x by the covariance.
    assert len(list(products(program.jaxpr))) == (5 if joint else 3)


def test_the_gradient_of_the_mean_is_a_kernel_of_its_own_and_the_forward_pass_has_no_barrier():
    x, matrix, weights = draw(3, (6, 4, 4, 5), (5, 3), (6, 4, 4, 3))
    norm, then = (jax.tree.map(jnp.float32, norm_of(n, n)) for n in (5, 3))

    def loss(x):
        parts = [jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)]
        return jnp.sum(weights * mix(parts, norm, matrix, True, jnp.float32, then, one=True)[0])
    with forms_for("gpu"):
        assert "optimization_barrier" not in str(jax.make_jaxpr(loss)(x))
        assert "f32[5] = optimization_barrier" in str(jax.make_jaxpr(jax.grad(loss))(x))
        check_grads(jax.jit(loss), (x,), 1, ["fwd", "rev"], atol=2e-2, rtol=2e-2)


def test_statistics_with_a_channel_of_ones_are_averaged_over_an_axis():
    x, matrix = draw(4, (8, 3, 5), (5, 3))
    norm, then = (jax.tree.map(jnp.float32, norm_of(n, n)) for n in (5, 3))

    def run(x, axis_name=None):
        parts = [jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)]
        with forms_for("gpu"):
            return mix(parts, norm, matrix, True, jnp.float32, then, axis_name, one=True)
    whole = jax.jit(run)(x)
    parts = jax.jit(jax.vmap(functools.partial(run, axis_name="d"), axis_name="d"))(x.reshape(2, 4, 3, 5))
    np.testing.assert_allclose(parts[0].reshape(8, 3, 3), whole[0], rtol=1e-4, atol=1e-5)
    for several, one in zip(jax.tree.leaves(parts[1:]), jax.tree.leaves(whole[1:]), strict=True):
        np.testing.assert_allclose(several, np.stack([one, one]), rtol=1e-5, atol=1e-6)


def test_running_statistics_keep_their_type_in_a_layer_of_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(draw(2, (6, 3))[0], jnp.float64)
        variables = jax.tree.map(jnp.asarray, variables_of(3))
        y, updated = BatchNorm(True, jnp.float64).apply(variables, x, mutable=["batch_stats"])
        assert y.dtype == jnp.float64
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
