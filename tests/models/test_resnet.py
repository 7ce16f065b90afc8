"""The networks: their names, who owns what, what they compute, and that everything learns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shared_basis.errors import UserError
from shared_basis.models import GRAMMAR, create_model, plain_counterpart
from shared_basis.models.parameters import abstract_variables
from shared_basis.models.resnet import BasicBlock, shortcut
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.ops import quick_compiler_options
from shared_basis.optim.basis_group import BasisGroup


def random_variables(model, image_shape=(8, 8, 3), seed=0):
    """Returns variables of `model` drawn by NumPy: kernels to scale, scales and variances near 1, others near 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        offset = 1.0 if name in ("scale", "var") else 0.0
        spread = 0.1 if leaf.ndim == 1 else np.prod(leaf.shape[:-1])**-0.5
        return (offset + spread * rng.uniform(-1.7, 1.7, leaf.shape)).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, dict(abstract_variables(model, image_shape)))


def random_images(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Names

@pytest.mark.parametrize(("name", "blocks", "shared", "unique", "double"), [
    *[(f"resnet{6 * n + 2}", n, 0, 0, False) for n in (2, 3, 5, 7, 9, 18)],
    ("resnet32-s16u1", 5, 16, 1, False),
    ("resnet56-s8u1-double", 9, 8, 1, True),
    ("resnet20-s0u16", 3, 0, 16, False),
    ("resnet20-s16u0-double", 3, 16, 0, True),
])
def test_a_name_says_depth_ranks_and_sharing(name, blocks, shared, unique, double):
    model = create_model(name, num_classes=7)
    assert (model.blocks, model.widths, model.num_classes) == ((blocks,) * 3, (16, 32, 64), 7)
    assert (model.sharing.shared_rank, model.sharing.unique_rank) == (shared, unique)
    basis = {"first": "first", "second": "second"} if double else {"first": "shared", "second": "shared"}
    assert dict(model.sharing.layers) == (basis if shared else {})


def test_the_examples_of_the_grammar_are_names():
    examples = GRAMMAR.split("e.g. ")[1].split(", ")
    assert [create_model(name).sharing.unique_rank for name in examples] == [0, 1, 1, 0, 0]


def test_a_width_in_the_name_is_that_of_the_first_group():
    narrow = create_model("resnet32w12-s8u1-double")
    assert (narrow.blocks, narrow.widths) == ((5, 5, 5), (12, 24, 48))
    assert plain_counterpart("resnet32w12-s8u1-double") == "resnet32w12"
    # The kernels and norms of ResNet-32 at widths 12, 24, 48, by hand: a block's first layer widens.
    convolutions = 9 * (3 * 12 + 10 * 12**2 + 12 * 24 + 9 * 24**2 + 24 * 48 + 9 * 48**2)
    norms = 2 * (11 * 12 + 10 * 24 + 10 * 48)
    params = abstract_variables(create_model("resnet32w12"), (32, 32, 3))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == convolutions + norms + 48 * 10 + 10


@pytest.mark.parametrize(("name", "words"), [
    ("resnet21", "unknown network 'resnet21'. The nearest: resnet20, resnet18"),  # then by depth
    ("resnet57", "unknown network 'resnet57'. The nearest: resnet56"),
    ("Resnet20", "unknown network 'Resnet20'. The nearest: resnet20"),
    ("resnet20-s8", "network 'resnet20-s8': no sharing 's8'; resnet20 supports s<S>u<U>, s<S>u<U>-double, tied,"),
    ("resnet20-s8u1-single", "no sharing 's8u1-single'"),
    ("resnet20-double", "no sharing 'double'"),
    ("resnet20-s8u1-double-double", "no sharing 's8u1-double-double'"),
    ("resnet20-s8u-1", "no sharing 's8u-1'"),
    ("resnet57-s8u1", "Names: <network>[-<sharing>], e.g. resnet56"),
    ("resnet32w16", "unknown network 'resnet32w16'. The nearest: resnet32"),  # the usual width has no second name
    ("resnet32w0", "unknown network 'resnet32w0'"),
    ("resnet34w12", "unknown network 'resnet34w12'. The nearest: resnet34"),
    ("resnet20 ", "unknown network 'resnet20 '"),
    ("resnet20\n", "unknown network 'resnet20\\n'"),
    ("", "unknown network ''. Networks:"),
    ("vgg", "unknown network 'vgg'. Networks: resnet14, resnet20, resnet32, resnet44, resnet56, resnet110, resnet18,"),
    ("resnet20-s0u4-double", "-double shares two bases per group, but s0 shares none; omit -double"),
    ("resnet20-s140u5", "group 1: a basis of 145 elements does not fit the 144-dimensional space of its 3×3×16 filters;"
                        " choose shared + unique rank at most 144."),
    ("resnet20-s999999u0", "group 1: a basis of 999999 elements does not fit"),
])
def test_a_wrong_name_is_refused_with_what_is_right(name, words):
    with pytest.raises(UserError) as caught:
        create_model(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"num_classes": 1}, "num_classes=1: a classifier needs at least 2 classes"),
    ({"stem": "imagenet"}, "has no stem 'imagenet'; it has 'cifar'"),
])
def test_a_wrong_argument_is_refused_with_what_is_right(arguments, words):
    with pytest.raises(UserError) as caught:
        create_model("resnet20", **arguments)
    assert words in str(caught.value)


def test_the_largest_rank_that_fits_is_accepted():
    assert create_model("resnet14-s140u4").sharing.shared_rank == 140


def test_without_any_element_the_network_is_the_plain_one():
    assert create_model("resnet20-s0u0") == create_model("resnet20")


@pytest.mark.parametrize("name", ["resnet20", "resnet20-s8u1", "resnet20-s8u1-double"])
def test_the_plain_counterpart_is_the_network_without_bases(name):
    assert plain_counterpart(name) == "resnet20"


# Who owns what

def shapes(tree):
    """Returns the shape of every array of `tree` by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def owned_by_bases(*names):
    """Returns the shapes of the shared bases `names` at s = 4: [3, 3, C, 4 · 2^g] in group g = 0, 1, 2."""
    return {f"bases/group{g + 1}/{name}": (3, 3, 16 << g, 4 << g) for g in range(3) for name in names}


@pytest.mark.parametrize(("name", "bases"), [
    ("resnet20", {}),
    ("resnet20-s0u2", {}),
    ("resnet20-s4u0", owned_by_bases("shared")),
    ("resnet20-s4u2", owned_by_bases("shared")),
    ("resnet20-s4u2-double", owned_by_bases("first", "second")),
])
def test_each_shared_basis_exists_exactly_once_and_belongs_to_the_network(name, bases):
    params = shapes(abstract_variables(create_model(name), (8, 8, 3))["params"])
    assert {path: shape for path, shape in params.items() if path.startswith("bases")} == bases
    leaves = {path.split("/")[-1] for path in params if not path.startswith("bases")}
    assert leaves <= {"kernel", "unique", "coefficients", "scale", "bias"}


@pytest.mark.parametrize(("s", "u"), [(4, 2), (4, 0), (0, 3)])
def test_the_first_block_of_a_group_is_plain_and_the_others_have_growing_ranks(s, u):
    params = shapes(abstract_variables(create_model(f"resnet20-s{s}u{u}"), (8, 8, 3))["params"])
    for g, width in enumerate((16, 32, 64)):
        rank, norm = (s + u) << g, {f"{layer}_norm/{leaf}": (width,) for layer in ("first", "second")
                                    for leaf in ("scale", "bias")}
        layer = {"coefficients": (rank, width), "norm/scale": (rank,), "norm/bias": (rank,)}
        if u:
            layer["unique"] = (3, 3, width, u << g)
        later = norm | {f"{name}/{leaf}": shape for name in ("first", "second") for leaf, shape in layer.items()}
        first = norm | {"first/kernel": (3, 3, width // 2 if g else 16, width), "second/kernel": (3, 3, width, width)}
        for block, expected in (("block1", first), ("block2", later), ("block3", later)):
            prefix = f"group{g + 1}/{block}/"
            assert {path.removeprefix(prefix): shape for path, shape in params.items()
                    if path.startswith(prefix)} == expected


def test_element_sets_name_the_arrays_of_each_group():
    groups = ("group1", "group2", "group3")
    single, double, unique_only = (create_model(f"resnet20-{name}") for name in ("s4u1", "s4u1-double", "s0u1"))
    unique = [tuple((group, block, layer, "unique") for block in ("block2", "block3") for layer in ("first", "second"))
              for group in groups]
    both = [(("bases", group, "first"), ("bases", group, "second")) for group in groups]
    assert single.basis_groups() == tuple(BasisGroup((("bases", group, "shared"),)) for group in groups)
    assert double.basis_groups("shared") == tuple(BasisGroup(paths) for paths in both)
    assert double.basis_groups("shared+unique") == tuple(map(BasisGroup, both, unique))
    assert unique_only.basis_groups("shared") == ()
    assert unique_only.basis_groups("shared+unique") == tuple(BasisGroup((), paths) for paths in unique)
    assert create_model("resnet20").basis_groups("shared+unique") == ()


# What they compute

def test_the_shortcut_subsamples_and_adds_zero_channels_on_both_sides():
    x = np.arange(18.0).reshape(1, 3, 3, 2)
    y = shortcut(x, 4, 2, False, jnp.float32, False)
    np.testing.assert_array_equal(y[0, :, :, 0], np.zeros((2, 2)))
    np.testing.assert_array_equal(y[0, :, :, 1], [[0, 4], [12, 16]])
    np.testing.assert_array_equal(y[0, :, :, 2], [[1, 5], [13, 17]])
    np.testing.assert_array_equal(y[0, :, :, 3], np.zeros((2, 2)))


def test_the_shortcut_between_equal_shapes_is_the_identity():
    x = random_images(2, 3, 4, 5)
    np.testing.assert_array_equal(shortcut(x, 5, 1, False, jnp.float32, False), x)


def test_a_block_whose_layers_give_zero_is_the_rectified_shortcut():
    x = random_images(2, 4, 6, 8)
    block = BasicBlock(16, 2)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(
        lambda key: block.init(key, x, {}, train=False), jax.random.key(0)))
    expected = np.zeros((2, 2, 3, 16))
    expected[..., 4:12] = np.maximum(x[:, ::2, ::2], 0)
    np.testing.assert_array_equal(block.apply(variables, x, {}, train=False), expected)


def test_a_block_is_its_layers_norms_relus_and_shortcut():
    x, shared = random_images(2, 4, 4, 6), {"first": random_images(3, 3, 6, 4, seed=2)}
    block = BasicBlock(6, unique_rank=2)
    rng = np.random.default_rng(3)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), jax.eval_shape(
        lambda key: block.init(key, x, shared, train=False), jax.random.key(0)))
    y = x
    for layer in ("first", "second"):
        part = {kind: tree[layer] for kind, tree in variables.items()}
        y = BasisConv(6, unique_rank=2).apply(part, y, shared.get(layer), train=False)
        scale, bias = (variables["params"][f"{layer}_norm"][leaf] for leaf in ("scale", "bias"))
        mean, var = (variables["batch_stats"][f"{layer}_norm"][leaf] for leaf in ("mean", "var"))
        y = (np.asarray(y) - mean) / np.sqrt(var + 1e-5) * scale + bias
        y = np.maximum(y + (x if layer == "second" else 0), 0)
    np.testing.assert_allclose(block.apply(variables, x, shared, train=False), y, rtol=1e-4, atol=1e-4)


def abstract_logits(name, *image_shape, **arguments):
    """Returns shape and dtype of the logits of two images."""
    model = create_model(name, **arguments)
    variables = abstract_variables(model, image_shape)
    return jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.zeros((2, *image_shape)))


@pytest.mark.parametrize(("ranks", "image_shape", "dtype"), [
    ("-s0u2", (8, 8, 1), jnp.float32), ("-s4u1-double", (7, 12, 3), jnp.bfloat16)])
def test_every_mode_gives_float32_logits_for_any_image(ranks, image_shape, dtype):
    logits = abstract_logits(f"resnet14{ranks}", *image_shape, num_classes=11, dtype=dtype)
    assert (logits.shape, logits.dtype) == ((2, 11), jnp.float32)


def test_initial_variables_are_those_published():
    model = create_model("resnet14-s4u1-double")
    key = jax.random.key(0, impl="rbg")  # compiles in a third of the default generator's time
    variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, 8, 8, 3)), train=False),
                        compiler_options=quick_compiler_options())(key)
    params = variables["params"]
    for bases in params["bases"].values():  # both bases of a group are orthonormal together
        b = np.concatenate([np.reshape(bases[name], (-1, bases[name].shape[-1])).T for name in ("first", "second")])
        np.testing.assert_allclose(b @ b.T, np.eye(len(b)), atol=1e-5)
    for leaf in params["head"].values():  # PyTorch's range ±1/√64, which the largest of the values comes close to
        assert 0.9 / 8 * (leaf.size > 10) < np.max(np.abs(leaf)) <= 1 / 8
        assert np.min(leaf) < 0 < np.max(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        names = [key.key for key in path]
        if names[-2].endswith("norm"):
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, names[-1] in ("scale", "var")), str(names))
    kernel = params["group3"]["block1"]["first"]["kernel"]
    assert abs(np.std(kernel) / np.sqrt(2 / (9 * 64)) - 1) < 5 / np.sqrt(2 * kernel.size)


def test_blocks_begin_apart_and_their_number_does_not_lengthen_the_program():
    def initialise(depth):
        model = create_model(f"resnet{depth}-s2u1-double")
        return jax.jit(lambda key: model.init(key, jnp.zeros((1, 8, 8, 3)), train=False)).trace(jax.random.key(0))

    shallow, deep = initialise(20), initialise(32)  # 3 and 5 blocks in a group
    draws = [str(traced.jaxpr).count("erf_inv") for traced in (shallow, deep)]
    assert draws[0] == draws[1] > 0
    group = deep.lower().compile(quick_compiler_options())(jax.random.key(0))["params"]["group1"]
    coefficients = [group[f"block{index}"]["first"]["coefficients"] for index in range(2, 6)]
    for one, other in itertools.combinations(coefficients, 2):
        assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 0.6
    assert np.std(coefficients) == pytest.approx(np.sqrt(2 / 16), rel=0.25)  # He's, by the 16 filters


# Learning: one small network of each mode, one compiled program for each

class Trained:
    """A network with random variables, and logits, gradients and new statistics of one training pass."""

    def __init__(self, name, image_shape):
        self.model = create_model(name)
        self.variables = random_variables(self.model, image_shape)
        self.images = random_images(6, *image_shape)

        def run(params, batch_stats, images, labels):
            def loss(params):
                logits, updated = self.model.apply({"params": params, "batch_stats": batch_stats}, images, train=True,
                                                   mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, updated)
            return jax.grad(loss, has_aux=True)(params)

        # Compiles in half the time without optimization.
        run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        self.gradient, (self.logits, updated) = run(self.variables["params"], self.variables["batch_stats"],
                                                    self.images, np.arange(6))
        self.batch_stats = updated["batch_stats"]


@pytest.fixture(scope="module", params=[("resnet14-s4u1-double", (8, 6, 3))], ids=lambda param: param[0])
def trained(request):
    return Trained(*request.param)


def test_training_gives_finite_logits_and_moves_every_statistic(trained):
    assert np.all(np.isfinite(trained.logits))
    moved = jax.tree.map(lambda old, new: np.all(old != new), trained.variables["batch_stats"], trained.batch_stats)
    assert jax.tree.all(moved)


def test_every_parameter_gets_a_gradient_but_biases_that_a_later_norm_cancels(trained):
    """A bias of a basis norm passes through linear coefficients into a norm, which subtracts the mean: exactly 0."""
    norms = {path: float(np.linalg.norm(leaf)) for path, leaf in
             ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
              for path, leaf in jax.tree_util.tree_flatten_with_path(trained.gradient)[0])}
    cancelled = {path for path in norms if path.endswith(("first/norm/bias", "second/norm/bias"))}
    assert len(cancelled) == 6  # two layers of one block in each of three groups
    assert max(norms[path] for path in cancelled) < 1e-5
    weakest = min(set(norms) - cancelled, key=norms.get)
    assert norms[weakest] > 1e-3, weakest


@jax.jit
def _evaluate(variables, images):
    return create_model("resnet14-s4u1-double").apply(variables, images, train=False, mutable=["batch_stats"])


def test_evaluation_changes_no_statistic_and_scores_each_image_by_itself():
    model = create_model("resnet14-s4u1-double")
    variables, images = random_variables(model), random_images(6, 8, 8, 3)
    logits, updated = _evaluate(variables, images)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
    mixed, _ = _evaluate(variables, np.concatenate([images[:1], random_images(5, 8, 8, 3, seed=2)]))
    np.testing.assert_allclose(mixed[0], logits[0], rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(mixed[1] - logits[1])) > 0.01


def test_in_double_sharing_each_layer_uses_the_basis_of_its_name():
    variables, images = random_variables(create_model("resnet14-s4u1-double")), random_images(6, 8, 8, 3)
    for group in ("group1", "group2", "group3"):  # what the first layers' bases find no longer counts
        variables["params"][group]["block2"]["first"]["coefficients"] *= 0
    logits, _ = _evaluate(variables, images)
    for layer, counts in (("first", False), ("second", True)):
        for bases in variables["params"]["bases"].values():
            bases[layer] *= -1
        assert np.any(_evaluate(variables, images)[0] != logits) == counts
