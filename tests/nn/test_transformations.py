"""Every transformation of JAX, on the layer in Linen and in NNX, in the forms of each platform."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import shared_basis.nnx
from shared_basis import BasisConv
from shared_basis.nn.batch_norm import BatchNorm
from shared_basis.nn.ops import forms_for

IMAGES = jax.random.normal(jax.random.key(0), (4, 6, 6, 4))
BASIS = shared_basis.nnx.shared_basis(jax.random.key(1), (3, 3, 4, 5))[...]
PLATFORMS = ("cpu", "gpu")


def linen(dtype=jnp.float32):
    """Returns the parameters of the layer, and `(params, images, train, axis_name) -> output, statistics`."""
    make = functools.partial(BasisConv, 3, unique_rank=2, dtype=dtype)
    variables = make().init(jax.random.key(2), IMAGES, BASIS, False)

    def apply(params, images, train=True, axis_name=None):
        layer = make(axis_name=axis_name)
        y, updated = layer.apply({**variables, "params": params["layer"]}, images, params["basis"], train,
                                 mutable=["batch_stats"])
        return y, updated["batch_stats"]["norm"]
    return {"layer": variables["params"], "basis": BASIS}, apply


def in_nnx(dtype=jnp.float32):
    """Likewise, with the same parameters."""
    variables = linen()[0]

    def make(axis_name=None):
        return shared_basis.nnx.BasisConv(4, 3, nnx.Param(BASIS), unique_rank=2, dtype=dtype, axis_name=axis_name,
                                          rngs=nnx.Rngs(0))

    def apply(params, images, train=True, axis_name=None):
        layer = make(axis_name)
        for name, value in (("unique", params["layer"]["unique"]), ("coefficients", params["layer"]["coefficients"]),
                            ("shared", params["basis"])):
            setattr(layer, name, nnx.Param(value))
        layer.norm.scale, layer.norm.bias = (nnx.Param(params["layer"]["norm"][name]) for name in ("scale", "bias"))
        y = layer(images, train)
        return y, {"mean": layer.norm.mean[...], "var": layer.norm.var[...]}
    return variables, apply


def loss(apply, params, images, train=True, **options):
    """A scalar to which the result and the statistics both contribute."""
    y, statistics = apply(params, images, train, **options)
    return jnp.mean(jnp.tanh(y)) + sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(statistics))


def tangent(params):
    return jax.tree.map(lambda leaf: jnp.cos(leaf * 3), params)


def difference(function, params, direction, step=1e-2):
    """Returns the derivative along `direction`, by differences."""
    moved = [function(jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction)) for sign in (1, -1)]
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), *moved)


def assert_close(one, other, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1e-2, np.abs(b).max()))


def jit(apply, params):
    assert_close(jax.jit(apply)(params, IMAGES), apply(params, IMAGES))


def gradient(apply, params):
    function = functools.partial(loss, apply, images=IMAGES)
    along = jax.tree.map(lambda g, d: jnp.vdot(g, d), jax.grad(function)(params), tangent(params))
    assert_close(sum(jax.tree.leaves(along)), difference(function, params, tangent(params)), 1e-2)


def jvp(apply, params):
    function = functools.partial(loss, apply, images=IMAGES)
    _, along = jax.jvp(function, (params,), (tangent(params),))
    assert_close(along, difference(function, params, tangent(params)), 1e-2)


def jacfwd(apply, params):
    function = functools.partial(loss, apply, params)
    assert_close(jax.jacfwd(function)(IMAGES[:1]), jax.jacrev(function)(IMAGES[:1]))


def hessian_vector_product(apply, params):
    slope = jax.grad(functools.partial(loss, apply, images=IMAGES, train=True))
    forward = jax.jvp(slope, (params,), (tangent(params),))[1]
    reverse = jax.grad(lambda p: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope(p), tangent(params)))))(params)
    assert_close(forward, reverse, 1e-3)


def vmap(apply, params):
    stacks = jnp.stack([IMAGES, 2 * IMAGES])
    assert_close(jax.vmap(functools.partial(apply, params))(stacks),
          jax.tree.map(lambda *leaves: jnp.stack(leaves), *(apply(params, images) for images in stacks)))


def vmap_with_one_batch(apply, params):
    halves = IMAGES.reshape(2, 2, *IMAGES.shape[1:])
    y, statistics = jax.vmap(functools.partial(apply, params, axis_name="half"), axis_name="half")(halves)
    assert_close((y.reshape(4, *y.shape[2:]), jax.tree.map(lambda leaf: leaf[0], statistics)), apply(params, IMAGES))


def checkpoint(apply, params):
    assert_close(jax.grad(jax.checkpoint(functools.partial(loss, apply)))(params, IMAGES),
          jax.grad(functools.partial(loss, apply))(params, IMAGES))


def mesh():
    return jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


def shard_map(apply, params):
    """With its default check, the gradient and the statistics of the whole batch."""
    def step(params, images):
        def mean(params):
            return jax.lax.pmean(jnp.mean(jnp.tanh(apply(params, images, True, "d")[0])), "d")
        return jax.grad(mean)(params), apply(params, images, True, "d")[1]
    sharded = jax.shard_map(step, mesh=mesh(), in_specs=(PartitionSpec(), PartitionSpec("d")),
                            out_specs=PartitionSpec())
    expected = jax.grad(lambda p: jnp.mean(jnp.tanh(apply(p, IMAGES)[0])))(params), apply(params, IMAGES)[1]
    assert_close(jax.jit(sharded)(params, IMAGES), expected, 1e-3)


def shard_map_refuses_local_statistics(apply, params):
    """Statistics of a part alone differ among the devices: JAX refuses to take them for one."""
    sharded = jax.shard_map(lambda p, x: apply(p, x)[1], mesh=mesh(), in_specs=(PartitionSpec(), PartitionSpec("d")),
                            out_specs=PartitionSpec())
    with pytest.raises(ValueError, match=r"out_specs|replicat|varying"):
        jax.jit(sharded)(params, IMAGES)


def pmap(apply, params):
    halves = IMAGES.reshape(2, 2, *IMAGES.shape[1:])
    assert_close(jax.pmap(lambda x: apply(params, x)[0])(halves),
          jnp.stack([apply(params, half)[0] for half in halves]))


def donated(apply, params):
    copy = jax.tree.map(jnp.copy, params)
    update = jax.jit(lambda p, x: jax.tree.map(jnp.subtract, p, jax.grad(functools.partial(loss, apply))(p, x)),
                     donate_argnums=0)
    assert_close(update(copy, IMAGES), jax.tree.map(
        jnp.subtract, params, jax.grad(functools.partial(loss, apply))(params, IMAGES)))


def export(apply, params):
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 6, 6, 4), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: apply(params, x, False)[0]))(shape)
    assert_close(exported.call(IMAGES), apply(params, IMAGES, False)[0])


def statistics_have_gradients(apply, params):
    """DeepInversion and its like descend on them."""
    slope = jax.grad(lambda x: jnp.sum(apply(params, x)[1]["var"]))(IMAGES)
    assert float(jnp.abs(slope).max()) > 1e-4


TRANSFORMATIONS = (jit, gradient, jvp, jacfwd, hessian_vector_product, vmap, vmap_with_one_batch, checkpoint, shard_map,
                   shard_map_refuses_local_statistics, pmap, donated, export, statistics_have_gradients)
FORWARD = (jvp, jacfwd)
"""What needs forward mode, which the forms for CPU alone refuse."""


BY_DEFAULT = {(linen, "gpu"): set(TRANSFORMATIONS) - {jacfwd, hessian_vector_product, donated, checkpoint},
              (in_nnx, "gpu"): {gradient, jvp, vmap_with_one_batch, shard_map},
              (linen, "cpu"): {jvp}, (in_nnx, "cpu"): set()}
"""The other cases are slow."""
CASES = [pytest.param(transformation, face, platform, id=f"{transformation.__name__}-{face.__name__}-{platform}",
                      marks=() if transformation in BY_DEFAULT[face, platform] else pytest.mark.slow)
         for transformation in TRANSFORMATIONS for face in (linen, in_nnx) for platform in PLATFORMS]


@pytest.mark.parametrize(("transformation", "face", "platform"), CASES)
def test_transformation(transformation, face, platform):
    params, apply = face()
    with forms_for(platform):
        if platform == "cpu" and transformation in FORWARD:
            with pytest.raises(TypeError, match="forward-mode"):
                transformation(apply, params)
        else:
            transformation(apply, params)


def test_the_faces_compute_the_same():
    """Results, statistics and gradients; `assert_close` asserts it."""
    (params, one), (_, other) = linen(), in_nnx()
    for train in (True, False):
        assert_close(one(params, IMAGES, train), other(params, IMAGES, train), 1e-6)
    assert_close(*(jax.grad(functools.partial(loss, apply))(params, IMAGES) for apply in (one, other)), 1e-5)


def test_layers_with_a_mapped_axis_initialise_without_it_as_flax_s_do():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = BasisConv(3, unique_rank=2, axis_name="half", name="conv")(x, train=train)
            return BatchNorm(train, axis_name="half", name="norm")(x)
    variables, others = (Block().init(jax.random.key(0), IMAGES, train) for train in (True, False))
    assert_close(variables, others)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_float64_and_float16(platform):
    with jax.enable_x64(True), forms_for(platform):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (linen()[0], IMAGES))
        exact, statistics = linen(jnp.float64)[1](*wide)
        assert exact.dtype == jnp.float64
        assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}  # as they were
    with forms_for(platform):
        half, statistics = linen(jnp.float16)[1](linen()[0], IMAGES)
    assert half.dtype == jnp.float16
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}
    assert_close(half, exact, 1e-2)


class Stack(nn.Module):
    """Three layers that share a basis, by `nn.scan`."""

    @nn.compact
    def __call__(self, x, basis, train):
        layers = nn.scan(Step, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3,
                         in_axes=(nn.broadcast, nn.broadcast))
        return layers(name="layers")(x, basis, train)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, basis, train):
        return BasisConv(4, unique_rank=1, name="conv")(x, basis, train), None


@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=pytest.mark.slow), "gpu"])
def test_linen_s_scan_is_its_layers_one_after_another(platform):
    with forms_for(platform):
        variables = Stack().init(jax.random.key(0), IMAGES, BASIS, False)
        y, updated = Stack().apply(variables, IMAGES, BASIS, True, mutable=["batch_stats"])
        x = IMAGES
        for index in range(3):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], variables)
            x, moved = BasisConv(4, unique_rank=1).apply(
                {kind: tree["layers"]["conv"] for kind, tree in one.items()}, x, BASIS, True, mutable=["batch_stats"])
    assert_close(y, x)
    assert_close(jax.tree.map(lambda leaf: leaf[2], updated["batch_stats"]["layers"]["conv"]), moved["batch_stats"])


@pytest.mark.slow
def test_linen_s_vmap_makes_an_ensemble_around_one_basis():
    ensemble = nn.vmap(BasisConv, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True},
                       in_axes=(0, None, None))(3, unique_rank=1)
    stacks = jnp.stack([IMAGES, IMAGES])
    variables = ensemble.init(jax.random.key(0), stacks, BASIS, True)
    y, _ = ensemble.apply(variables, stacks, BASIS, True, mutable=["batch_stats"])
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], variables)
        assert_close(y[index], BasisConv(3, unique_rank=1).apply(one, IMAGES, BASIS, True, mutable=["batch_stats"])[0])


@pytest.mark.parametrize(("options", "arguments"), [
    ({"static_argnums": (3,)}, (BASIS, True)), ({}, (BASIS,))], ids=["argument", "field"])
def test_linen_s_remat_takes_the_layer_as_it_is(options, arguments):
    fields = {} if len(arguments) > 1 else {"use_running_average": False}
    plain, remat = (make(3, unique_rank=1, **fields) for make in (BasisConv, nn.remat(BasisConv, **options)))
    variables = plain.init(jax.random.key(0), IMAGES, *arguments)
    y, updated = remat.apply(variables, IMAGES, *arguments, mutable=["batch_stats"])
    assert_close((y, updated), plain.apply(variables, IMAGES, *arguments, mutable=["batch_stats"]))
