"""`BasisConv` with the arguments of Flax's convolutions, in Linen and in NNX, and what both refuse."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import shared_basis.nnx
from shared_basis import BasisConv, BasisGroup, add_orthogonality_penalty, create_model, keep_orthonormal
from shared_basis.nn.batch_norm import BatchNorm
from shared_basis.nn.ops import forms_for, portable


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("size", "options"), [
    ((3, 3), {"strides": 2, "padding": "SAME", "use_bias": True}), ((5,), {"padding": "VALID", "kernel_dilation": 2}),
    ((3, 2), {"feature_group_count": 2, "padding": 1}), ((2, 3, 3), {"strides": (1, 2, 1), "padding": "SAME"}),
], ids=str)
def test_with_a_kernel_of_its_own_it_is_flax_s_convolution(size, options):
    x, = draw(1, (3, 7, 8, 6, 5)[:len(size) + 1] + (4,))  # noqa: RUF005
    theirs = nn.Conv(6, size, **{"use_bias": False, **options})
    ours = BasisConv(6, size, **options)
    variables = ours.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, theirs.init(jax.random.key(0), x))
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), atol=1e-5)
    twice = jnp.stack([x, 2 * x])  # further axes before the images
    np.testing.assert_allclose(ours.apply(variables, twice), theirs.apply(variables, twice), atol=1e-5)
    np.testing.assert_allclose(ours.apply(variables, x[0]), theirs.apply(variables, x[0]), atol=1e-5)


@settings(deadline=None, max_examples=3, derandomize=True)
@given(shared=st.integers(1, 6), unique=st.integers(0, 3), groups=st.sampled_from([1, 2]),
       shared_groups=st.sampled_from([1, 2]), platform=st.sampled_from(["cpu", "gpu"]), bias=st.booleans(),
       size=st.sampled_from([(3, 3), (1, 2), (3,)]))
def test_the_norm_that_follows_changes_nothing_but_the_passes(shared, unique, groups, shared_groups, platform, bias,
                                                              size):
    shared, unique = 2 * shared, 2 * unique  # so that groups divide them
    x, basis = draw(3, (5, 6, 7)[:len(size) + 1] + (4,), (*size, 4 // shared_groups, shared))  # noqa: RUF005

    class Block(nn.Module):
        joint: bool

        @nn.compact
        def __call__(self, x):
            conv = BasisConv(5, size, unique_rank=unique, feature_group_count=groups, use_bias=bias,
                             bias_init=nn.initializers.normal(), shared_feature_group_count=shared_groups, name="conv")
            norm = BatchNorm(True, name="norm")
            return conv(x, basis, True, then=norm) if self.joint else norm(conv(x, basis, True))
    variables = jax.jit(Block(False).init)(jax.random.key(0, impl="rbg"), x)
    with forms_for(platform):
        results = [jax.jit(functools.partial(Block(joint).apply, mutable=["batch_stats"]))(variables, x)
                   for joint in (True, False)]
    with portable():
        results.append(jax.jit(functools.partial(Block(True).apply, mutable=["batch_stats"]))(variables, x))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for other in results[1:]:
        for one, two in zip(*map(jax.tree.leaves, (results[0], other)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_any_layer_may_follow():
    x, basis = draw(2, (2, 5, 5, 4), (3, 3, 4, 4))
    variables = BasisConv(5).init(jax.random.key(0), x, basis, True)
    y = BasisConv(5).apply(variables, x, basis, False)
    np.testing.assert_array_equal(BasisConv(5).apply(variables, x, basis, False, then=jnp.tanh), jnp.tanh(y))
    layer = shared_basis.nnx.BasisConv(4, 5, nnx.Param(basis), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, False, then=jnp.tanh), jnp.tanh(layer(x, False)))


@pytest.mark.parametrize("norm", [None, functools.partial(nn.GroupNorm, num_groups=3)], ids=["none", "group"])
def test_another_norm_or_none_between_basis_and_coefficients(norm):
    x, basis = draw(2, (2, 5, 5, 4), (3, 3, 4, 4))
    layer = BasisConv(5, unique_rank=2, norm=norm)
    variables = layer.init(jax.random.key(0), x, basis)  # without batch statistics, training is no different
    params = variables["params"]
    assert "batch_stats" not in variables
    joined = jnp.concatenate([params["unique"], basis], -1)
    expected = jax.lax.conv_general_dilated(x, joined, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if norm is not None:
        expected = norm().apply({"params": params["norm"]}, expected)
    for arguments in ((), (True,), (False,)):
        np.testing.assert_allclose(layer.apply(variables, x, basis, *arguments), expected @ params["coefficients"],
                                   atol=1e-5)


def test_unique_elements_may_start_at_norm_1():
    x, basis = draw(2, (2, 5, 5, 16), (3, 3, 16, 4))
    orthogonal = {"unique_init": nn.initializers.orthogonal()}
    for options, norm, error in (({}, np.sqrt(2 * 16 / 4), 0.25), (orthogonal, 1, 1e-5)):
        unique = BasisConv(5, unique_rank=4, **options).init(jax.random.key(0), x, basis, True)["params"]["unique"]
        np.testing.assert_allclose(jnp.linalg.norm(unique.reshape(-1, 4), axis=0), norm, rtol=error)


def test_a_norm_of_another_type_is_computed_by_itself():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BasisConv(5, name="conv")(x, BASIS, False, then=BatchNorm(False, jnp.bfloat16, name="norm"))
    assert Block().init_with_output(jax.random.key(0), X)[0].dtype == jnp.bfloat16
    layer = shared_basis.nnx.BasisConv(4, 5, nnx.Param(BASIS), rngs=nnx.Rngs(0))
    norm = nnx.BatchNorm(5, momentum=0.9, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(X, False, then=norm).dtype == jnp.bfloat16


@pytest.mark.slow
def test_parameters_may_be_of_another_type():
    x, basis = draw(2, (2, 5, 5, 4), (3, 3, 4, 4))
    variables = BasisConv(5, unique_rank=1, param_dtype=jnp.bfloat16, use_bias=True).init(
        jax.random.key(0), x, basis, True)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["batch_stats"])} == {jnp.dtype("float32")}


def test_earlier_names_go_on_with_a_note():
    x, = draw(1, (1, 4, 4, 4))
    with pytest.warns(match=r"groups.*feature_group_count"):
        earlier = BasisConv(6, groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert earlier.clone() == BasisConv(6, feature_group_count=2)
        assert earlier.init(jax.random.key(0), x)["params"]["kernel"].shape == (3, 3, 2, 6)
    with pytest.warns(match="shared_feature_group_count"):
        assert BasisConv(6, shared_groups=2).shared_feature_group_count == 2


X, BASIS = draw(0, (2, 5, 5, 4), (3, 3, 4, 4))


@pytest.mark.parametrize(("options", "shared", "arguments", "said"), [
    ({}, BASIS, {"train": True, "use_running_average": True}, "contradictory"),
    ({}, BASIS[:1], {"train": True}, r"shape \(1, 3, 4, 4\)"),
    ({}, BASIS.astype(jnp.int32), {"train": True}, "int32"),
    ({}, jnp.stack([BASIS, BASIS]), {"train": True}, r"shape \(2, 3, 3, 4, 4\)"),
    ({"whole_filters": True}, BASIS, {}, r"needs floats of shape \(3, 3, 4, 5\)"),
    ({"shared_feature_group_count": 3}, BASIS, {"train": True}, "shared_feature_group_count=3"),
    ({"feature_group_count": 3}, None, {}, "feature_group_count=3"),
    ({"strides": (1, 1, 2)}, None, {}, "strides"),
    ({"norm": "bacth"}, BASIS, {"train": True}, "norm='bacth': must be 'batch', None, or a callable that returns"),
])
@pytest.mark.parametrize("face", ["linen", "nnx"])
def test_what_does_not_fit_is_refused_by_name(face, options, shared, arguments, said):
    def in_linen():
        BasisConv(5, **options).init(jax.random.key(0), X, shared, **arguments)

    def in_nnx():
        held = None if shared is None else nnx.Param(shared)
        shared_basis.nnx.BasisConv(4, 5, held, rngs=nnx.Rngs(0), **options)(X, **arguments)
    with pytest.raises(ValueError, match=said):
        {"linen": in_linen, "nnx": in_nnx}[face]()


def test_what_is_no_array_is_refused_by_name():
    for shared, said in (({"body": BASIS}, r"shared is a dict: must be an array .* bases\['body'\]"),
                         (True, "shared is a bool: .* train=True")):
        with pytest.raises(TypeError, match=said):
            BasisConv(5).init(jax.random.key(0), X, shared, train=True)
    for shared in (BASIS, (3, 3), {"body": BASIS}):
        with pytest.raises(TypeError, match=r"must be an nnx\.Param.* kernel_size=\(3, 3\)"):
            shared_basis.nnx.BasisConv(4, 5, shared, rngs=nnx.Rngs(0))


def test_a_basis_in_nnx_is_drawn_from_a_key_or_a_stream():
    by_key = shared_basis.nnx.shared_basis(nnx.Rngs(0).params(), (3, 3, 4, 6))
    np.testing.assert_array_equal(by_key[...], shared_basis.nnx.shared_basis(nnx.Rngs(0), (3, 3, 4, 6))[...])


def test_whether_to_train_must_be_said():
    with pytest.raises(ValueError, match="neither train nor use_running_average"):
        BasisConv(5).init(jax.random.key(0), X, BASIS)


def test_whether_to_train_is_no_array():
    layer = BasisConv(5, unique_rank=1)
    variables = layer.init(jax.random.key(0), X, BASIS, True)
    for call in (lambda: layer.apply(variables, X, BASIS, jnp.array(False)),
                 lambda: jax.jit(layer.apply)(variables, X, BASIS, False),
                 lambda: nn.remat(BasisConv)(5, unique_rank=1).apply(variables, X, BASIS, False)):
        with pytest.raises(TypeError, match=r"Python bools, not arrays: mark them static .*static_argnums"):
            call()


def test_too_few_axes_are_refused():
    with pytest.raises(ValueError, match="2 spatial axes and channels"):
        BasisConv(5).init(jax.random.key(0), X[0, 0])


class Pair(nnx.Module):
    """Two layers that hold one basis."""

    def __init__(self, rngs):
        body = shared_basis.nnx.shared_basis(rngs.params(), (3, 3, 4, 6))
        self.first = shared_basis.nnx.BasisConv(4, 4, body, unique_rank=1, rngs=rngs)
        self.second = shared_basis.nnx.BasisConv(4, 4, body, use_bias=True, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x, then=self.norm)))


def test_layers_in_nnx_hold_one_basis_by_reference_and_train():
    model = Pair(nnx.Rngs(0))
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert [path for path in paths if path.endswith("shared")] == ["first/shared"]
    assert model.first.shared is model.second.shared
    groups = [BasisGroup(["first/shared"])]
    for chain in (optax.chain(add_orthogonality_penalty(1.0, groups), optax.sgd(0.1)),
                  keep_orthonormal(groups, optax.sgd(0.1))):
        optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
        before = jnp.array(model.second.shared[...])

        @nnx.jit
        def step(model, optimizer):
            gradient = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
            optimizer.update(model, gradient)
        step(model, optimizer)
        moved = model.second.shared[...]
        assert float(jnp.abs(moved - before).max()) > 1e-4
        assert model.first.shared is model.second.shared
    rows = moved.reshape(-1, 6).T
    np.testing.assert_allclose(rows @ rows.T, np.eye(6), atol=1e-5)


def test_the_norm_that_follows_in_nnx_moves_as_it_does_alone():
    joint, apart = Pair(nnx.Rngs(0)), Pair(nnx.Rngs(0))
    np.testing.assert_allclose(joint.first(X, True, then=joint.norm), apart.norm(apart.first(X, True)), atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(joint.norm, name)[...], getattr(apart.norm, name)[...], atol=1e-5)


def test_train_and_eval_of_nnx_reach_the_layer():
    model = Pair(nnx.Rngs(0))
    before = jnp.array(model.first.norm.mean[...])
    model.eval()
    model(X)
    np.testing.assert_array_equal(model.first.norm.mean[...], before)
    model.train()
    model(X)
    assert float(jnp.abs(model.first.norm.mean[...] - before).max()) > 1e-3


def test_a_norm_of_other_constants_is_not_taken_into_the_closed_form():
    model = Pair(nnx.Rngs(0))
    other = nnx.BatchNorm(4, momentum=0.5, epsilon=1e-2, rngs=nnx.Rngs(0))
    y = model.first(X, True, then=other)
    alone = nnx.BatchNorm(4, momentum=0.5, epsilon=1e-2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(y, alone(Pair(nnx.Rngs(0)).first(X, True)), atol=1e-5)
    np.testing.assert_allclose(other.var[...], alone.var[...], atol=1e-5)


@pytest.mark.parametrize("options", [{"epsilon": 0.5, "momentum": 0.5}, {"use_scale": False}], ids=str)
def test_a_batch_norm_of_one_s_own_in_nnx_keeps_its_options(options):
    layer = shared_basis.nnx.BasisConv(4, 5, unique_rank=2, norm=functools.partial(nnx.BatchNorm, **options),
                                       rngs=nnx.Rngs(0))
    between = jax.lax.conv_general_dilated(X, layer.unique[...], (1, 1), "SAME",
                                           dimension_numbers=("NHWC", "HWIO", "NHWC"))
    alone = nnx.BatchNorm(2, **options, rngs=nnx.Rngs(0))
    for train in (True, False):  # the statistics move in the first one
        expected = alone(between, use_running_average=not train) @ layer.coefficients[...]
        np.testing.assert_allclose(layer(X, train), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.norm.var[...], alone.var[...], rtol=1e-5)


def test_a_filter_of_nnx_freezes_each_batch_norm_alone():
    def moves(model, train=None):
        before = [jnp.array(norm.var[...]) for norm in (model.first.norm, model.norm)]
        model.first(X, train, then=model.norm)
        return [bool((norm.var[...] != old).any()) for norm, old in
                zip((model.first.norm, model.norm), before, strict=True)]
    model = Pair(nnx.Rngs(0))
    assert moves(model) == [True, True]
    model.first.set_attributes(nnx.BatchNorm, use_running_average=True)
    assert moves(model) == [False, True]
    model.set_attributes(nnx.BatchNorm, use_running_average=True)
    assert moves(model) == [False, False]
    model.train()
    model.norm.use_running_average = True
    assert moves(model) == [True, False]
    assert moves(model, True) == [True, True]  # the call has the last word
    model.train()
    assert moves(model, False) == [False, False]


@pytest.mark.parametrize("form", ["whole", "templates"])
def test_whole_filters_and_templates_in_nnx_are_linen_s(form):
    shared = draw(5, (3, 3, 4, 5) if form == "whole" else (3, 3, 4, 5, 2))[0]
    layer = shared_basis.nnx.BasisConv(4, 5, nnx.Param(shared), whole_filters=form == "whole", rngs=nnx.Rngs(0))
    variables = {"params": {} if form == "whole" else {"coefficients": layer.coefficients[...]}}
    expected = BasisConv(5, whole_filters=form == "whole").apply(variables, X, shared)
    np.testing.assert_allclose(layer(X), expected, atol=1e-6)


@pytest.mark.slow
def test_networks_work_through_the_bridge():
    network = create_model("resnet14w4-s2u1", num_classes=3)
    images = jnp.ones((2, 8, 8, 3))
    model = nnx.bridge.ToNNX(network, rngs=nnx.Rngs(0)).lazy_init(images, train=False)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    groups = network.basis_groups()
    link = add_orthogonality_penalty(1.0, groups)
    state = nnx.state(model, nnx.Param)
    updates, _ = link.update(jax.tree.map(jnp.zeros_like, state), link.init(state), state)
    assert float(optax.tree.norm(updates)) < 1e-4  # it starts orthonormal
    assert params["bases"]["group1"]["shared"].shape == (3, 3, 4, 2)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    logits = model(images, train=False)
    np.testing.assert_allclose(logits, network.apply({"params": params, "batch_stats": stats}, images, train=False),
                               atol=1e-5)
