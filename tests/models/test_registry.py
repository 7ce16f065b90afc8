"""Every network of the registry: shapes, published counts, gradients, and who owns and uses what is shared."""

import collections
import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from shared_basis import create_model
from shared_basis.config import PARAMETER_LABELS, is_for_small_images
from shared_basis.errors import UserError
from shared_basis.models import Network, registry
from shared_basis.models.base import global_average, linear_head
from shared_basis.models.parameters import abstract_variables, count_macs, count_parameters
from shared_basis.models.registry import BASIS, FAMILIES, Family
from shared_basis.models.stages import StagedNetwork
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.ops import quick_compiler_options
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.labels import label_parameters

# Measured on the official implementation: name, stem, classes, image size, parameters, multiply-accumulates.
COUNTS = """
resnet18 cifar 100 32 11220132 555468800
resnet34 cifar 100 32 21328292 1159448576
resnet34-s8u1 cifar 100 32 5865428 395036672
resnet34-s16u1 cifar 100 32 6485844 520865792
resnet34-s32u1 cifar 100 32 7726676 772524032
resnet34-s32u0 cifar 100 32 7442340 756795392
resnet34-s0u32 cifar 100 32 14059428 756795392
densenet121 cifar 100 32 7048548 888442880
densenet121-s64u4 cifar 100 32 5606708 1368920064
resnext50_32x4d cifar 100 32 23177124 1344151552
resnext50_32x4d-s64u4 cifar 100 32 19333380 1179000832
resnext50_32x4d-s16u4 cifar 100 32 16601220 1028005888
resnext50_32x4d-s32u4 cifar 100 32 17511940 1078337536
mobilenetv2 cifar 100 32 2428004 67356736
mobilenetv2-shared cifar 100 32 2163812 67356736
mobilenetv2-shared++ cifar 100 32 1899620 67356736
resnet18 imagenet 1000 224 11689512 1814073344
resnet34 imagenet 1000 224 21797672 3663761408
resnet50 imagenet 1000 224 25557032 4089184256
resnet101 imagenet 1000 224 44549160 7801405440
resnet34-s32u1 imagenet 1000 224 8196056 2478804992
resnet34-s48u1 imagenet 1000 224 9436888 3249508352
resnet34-s32u1-double imagenet 1000 224 9762776 2478804992
resnet34-s48u1-double imagenet 1000 224 11786968 3249508352
resnet50-shared++ imagenet 1000 224 18262056 4089184256
resnet50-shared imagenet 1000 224 20506664 4089184256
resnet101-shared++ imagenet 1000 224 22770728 7801405440
resnet101-shared imagenet 1000 224 29471784 7801405440
mobilenetv2 imagenet 1000 224 3507272 313619328
mobilenetv2-shared imagenet 1000 224 3243080 313619328
mobilenetv2-shared++ imagenet 1000 224 2978888 313619328
"""

EXAMPLES = {"s<S>u<U>": "s16u4", "s<S>u<U>-double": "s16u4-double", "shared": "shared", "shared++": "shared++",
            "tied": "tied", "template<k>": "template3"}
SMALL = {"blocks": (2, 3), "widths": (8, 16)}
SMALLER = {"resnet20": SMALL, "resnet34": SMALL, "resnet50": SMALL,
           "densenet121": {"blocks": (2, 2, 2, 3), "growth": 8},
           "resnext50_32x4d": {"blocks": (2, 3), "widths": (32, 64)}, "mobilenetv2": {}}
"""Of each architecture a shallow and narrow network, with two blocks or more that share in some group."""
NAMES = [(name, stem) for base in SMALLER
         for stem in FAMILIES[base].stems[:2 if base == "mobilenetv2" else 1]
         for name in (base, *(f"{base}-{EXAMPLES[form]}" for form in FAMILIES[base].forms))]
"""One network of each architecture in each form of sharing: depth and width are numbers, which the counts hold."""


BY_DEFAULT = ("resnet34-s32u1 cifar", "resnet34-s32u1-double", "densenet121-s64u4", "resnext50_32x4d-s64u4",
              "mobilenetv2-shared++ cifar", "resnet50-shared++", "resnet34 imagenet", "mobilenetv2 imagenet")
"""How the rows begin that are counted by default; the others are slow."""


@pytest.mark.parametrize("row", [pytest.param(row, marks=[] if row.startswith(BY_DEFAULT) else pytest.mark.slow)
                                 for row in COUNTS.split("\n")[1:-1]])
def test_parameters_and_macs_are_the_published_ones(row):
    name, stem, classes, size, parameters, macs = row.split()
    image_shape = (int(size), int(size), 3)
    model = create_model(name, num_classes=int(classes), stem=stem)
    variables = abstract_variables(model, image_shape)
    assert sum(count_parameters(variables["params"]).values()) == int(parameters)
    assert sum(count_macs(model, variables, image_shape).values()) == int(macs)


@pytest.mark.parametrize(("name", "stem"), NAMES)
def test_a_network_of_each_kind_maps_images_to_logits_and_owns_each_basis_once(name, stem):
    model = create_model(name, num_classes=7, stem=stem).clone(**SMALLER[name.partition("-")[0]])
    size = 64 if stem == "imagenet" else 32
    variables = abstract_variables(model, (size, size, 3))
    logits, _ = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}),
        variables, jnp.zeros((2, size, size, 3)))
    assert logits.shape == (2, 7)
    assert logits.dtype == jnp.float32
    shared = {group: named for group, named in model.shared_shapes().items() if named}
    assert jax.tree.map(lambda leaf: leaf.shape, variables["params"].get("bases", {})) == shared
    assert bool(shared) == ("-" in name and "-s0" not in name)
    assert set(jax.tree.leaves(label_parameters(variables["params"]))) <= set(PARAMETER_LABELS)


def test_counts_of_the_tied_baseline_by_hand():
    # In each group of ResNet-32 the 4 blocks after the first share 2 layers of 9·C² where plain ones have 8.
    saved = sum(9 * width**2 * (8 - 2) for width in (16, 32, 64))
    assert _parameters("resnet32-tied") == 464_154 - saved


def test_counts_of_the_template_baseline_by_hand():
    # 3 templates of 9·C² a group in place of 8 kernels, and 3 coefficients for each of the 8 layers.
    saved = sum(9 * width**2 * (8 - 3) - 8 * 3 for width in (16, 32, 64))
    assert _parameters("resnet32-template3") == 464_154 - saved


def _parameters(name):
    return sum(count_parameters(abstract_variables(create_model(name), (32, 32, 3))["params"]).values())


jit_quickly = functools.partial(jax.jit, compiler_options=quick_compiler_options())
"""For programs that run once, as compiling takes the time here."""

STRUCTURES = [("resnet20-s4u1", "cifar", SMALL), ("resnet20-s4u1-double", "cifar", SMALL),
              ("resnet20-tied", "cifar", SMALL), ("resnet20-template3", "cifar", SMALL),
              ("resnet34-s4u1", "imagenet", SMALL), ("resnet50-shared++", "imagenet", SMALL),
              ("densenet121-s16u4", "cifar", {"blocks": (2, 2, 2, 3), "growth": 4}),
              ("resnext50_32x4d-s16u4", "cifar", {"blocks": (2, 3), "widths": (32, 64)}),
              ("mobilenetv2-shared", "cifar", {}), ("mobilenetv2-s4u1", "cifar", {}),
              ("mobilenetv1-s4u1", "cifar", {"width": 4, "stages": ((1, 2, 1), (4, 2, 2))}),
              ("shufflenetv1_g2-shared++", "cifar", {"widths": (32,), "units": (4,)}),
              ("shufflenetv2_x1_0-s3u1", "cifar", {"widths": (16,), "units": (4,), "neck": 16}),
              ("efficientnet_b0-s4u1", "cifar", {"stages": ((1, 8, 1, 3, 1), (4, 8, 2, 5, 3))})]
MOBILENET_WITH_BOTH_SHARED = ("mobilenetv2-shared++", "imagenet", {})


def slow_but(names, rows):
    """Returns the parameters `rows`, of which those that do not begin with one of `names` are slow tests."""
    return [pytest.param(*row, marks=[] if row[0] in names else pytest.mark.slow) for row in rows]


@pytest.mark.parametrize(("name", "stem", "smaller"), slow_but(
    ("resnet20-s4u1",), [*STRUCTURES, MOBILENET_WITH_BOTH_SHARED]))
def test_gradient_of_what_is_shared_is_the_sum_over_the_layers_that_use_it(name, stem, smaller):
    model = create_model(name, num_classes=5, stem=stem, scan_blocks=False).clone(**smaller)
    size = 64 if stem == "imagenet" else 16
    images = jax.random.normal(jax.random.key(1), (4, size, size, 3))
    variables = jit_quickly(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    users = _users(model, variables, images)
    copies = {path: jnp.zeros(shape) for path, shape in users.items()}

    def loss(params, copies):
        """The loss of a network in which every layer has a copy of its own: the shared array plus zeros."""
        def separate(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name == "__call__" and path in copies:
                args = (args[0], args[1] + copies[path], *args[2:])
            return call(*args, **kwargs)
        with nn.intercept_methods(separate):
            logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"],
                                    rngs={"dropout": jax.random.key(2)})
        return jnp.sum(logits * jnp.sin(jnp.arange(logits.size)).reshape(logits.shape))

    gradient, of_copies = jit_quickly(jax.grad(loss, (0, 1)))(variables["params"], copies)
    sums = collections.defaultdict(float)
    for path, value in of_copies.items():
        group, block, layer = path.split("/")
        assert block in model.sharing_blocks()[group]
        assert float(jnp.linalg.norm(value)) > 0
        sums[group, dict(model.sharing.layers)[layer]] += value
    assert len(users) == sum(len(blocks) for blocks in model.sharing_blocks().values()) * len(model.sharing.layers)
    assert set(sums) == {(group, basis) for group, named in gradient["bases"].items() for basis in named}
    for (group, basis), value in sums.items():
        assert jnp.allclose(gradient["bases"][group][basis], value, rtol=1e-3, atol=1e-4 * float(jnp.abs(value).max()))
    _assert_every_parameter_has_a_gradient(gradient)


@pytest.mark.parametrize(("name", "stem", "smaller"), slow_but(
    (), [row for row in STRUCTURES if not row[0].startswith("dense")]))
def test_a_loop_computes_what_blocks_do_one_after_another(name, stem, smaller):
    one, other = (create_model(name, num_classes=5, stem=stem, scan_blocks=scan_blocks).clone(**smaller)
                  for scan_blocks in (True, False))
    size = 64 if stem == "imagenet" else 16
    images = jax.random.normal(jax.random.key(1), (4, size, size, 3))
    variables = jit_quickly(lambda key: other.init(key, images, train=False))(jax.random.key(0))
    assert jax.tree.structure(variables) == jax.tree.structure(abstract_variables(one, images.shape[1:]))

    def run(model):
        def loss(params):
            logits, updated = model.apply({**variables, "params": params}, images, train=True,
                                          mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})
            return jnp.sum(logits * jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)), (logits, updated)
        gradient, (logits, updated) = jax.grad(loss, has_aux=True)(variables["params"])
        return gradient, logits, updated, model.apply({**variables, **updated}, images, train=False)

    assert str(jax.make_jaxpr(lambda: run(one))()).count(" scan[") > 0
    assert str(jax.make_jaxpr(lambda: run(other))()).count(" scan[") == 0
    results = [jit_quickly(run, static_argnums=0)(model) for model in (one, other)]
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    # By norm: depth and the statistics of few pixels amplify rounding (in MobileNet's 52 layers to some 1e-3).
    largest = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(results[1][0]))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(results[0]), jax.tree.leaves(results[1]), strict=True):
        scale = float(jnp.linalg.norm(b)) + (1e-3 * largest if path[0].idx == 0 else 1e-3)
        assert float(jnp.linalg.norm(a - b)) < 1e-2 * scale, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_loop_keeps_less_for_the_gradient():
    def memory(scan_blocks):
        model = create_model("resnet44-s16u1-double", scan_blocks=scan_blocks).clone(blocks=(8,), widths=(16,))
        images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)

        def loss(params, batch_stats, images):
            return jnp.sum(model.apply({"params": params, "batch_stats": batch_stats}, images, train=True,
                                       mutable=["batch_stats"])[0])
        gradient = jit_quickly(jax.grad(loss))
        variables = abstract_variables(model, (32, 32, 3))
        return gradient.lower(variables["params"], variables["batch_stats"], images).compile().memory_analysis()
    assert memory(True).temp_size_in_bytes < 0.6 * memory(False).temp_size_in_bytes


def _users(model, variables, images):
    """Returns by path the shape of the shared array that each layer is handed."""
    users = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, BasisConv) and context.method_name == "__call__" and args[1:] and (
                args[1] is not None):
            users["/".join(context.module.path)] = args[1].shape
        return call(*args, **kwargs)

    def run(v, x):
        with nn.intercept_methods(note):
            return model.apply(v, x, train=False)
    jax.eval_shape(run, variables, images)
    return users


def _assert_every_parameter_has_a_gradient(gradient):
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        names = [key.key for key in path]
        # A bias before batch normalisation, with at most linear maps between, has no effect; so only the head's counts.
        if names[-1] != "bias" or names[0] == "head":
            assert float(jnp.linalg.norm(leaf)) > 1e-7 * largest, "/".join(names)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown network 'mobilnetv2-shared'\. The nearest: mobilenetv2"):
        create_model("mobilnetv2-shared")


@pytest.mark.parametrize(("name", "message"), [
    ("resnet50-s16u1", "resnet50 supports shared, shared\\+\\+"),
    ("resnet34-shared", "resnet34 supports s<S>u<U>"),
    ("densenet121-s16u1-double", "densenet121 supports s<S>u<U>"),
    ("resnet34-template0", "no sharing 'template0'"),
    ("resnext50_32x4d-s6u4", "shared rank 6"),
    ("resnext50_32x4d-s64u3", "unique rank 3"),
    ("densenet121-s1200u1", "at most 1152"),
    ("resnet34-s600u1", "group 1"),
])
def test_a_sharing_that_the_network_does_not_admit_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        create_model(name)


def test_stems():
    assert create_model("resnet50").stem == "imagenet"
    assert create_model("resnet34").stem == "cifar"
    with pytest.raises(UserError, match="has no stem 'imagenet'; it has 'cifar'"):
        create_model("resnet56", stem="imagenet")


def test_dropout_acts_in_training_alone():
    model = create_model("mobilenetv2", stem="imagenet")
    variables, images = abstract_variables(model, (32, 32, 3)), jnp.zeros((2, 32, 32, 3))

    def random_draws(model, train):
        rngs = {"dropout": jax.random.key(1)}
        program = jax.make_jaxpr(lambda v: model.apply(v, images, train=train, mutable=["batch_stats"], rngs=rngs)[0])
        return str(program(variables)).count("random_bits")
    assert model.dropout == 0.2
    assert (random_draws(model, True), random_draws(model, False)) == (1, 0)
    assert random_draws(model.clone(dropout=0.0), True) == 0


def test_penalty_takes_the_mean_over_each_kind_of_array_apart():
    kinds = {elements.reduction_group for elements in create_model("resnet50-shared++").basis_groups()}
    assert kinds == {"second", "third"}
    assert {elements.reduction_group for elements in create_model("resnet34-s8u1-double").basis_groups()} == {""}
    assert create_model("resnet34-tied").basis_groups() == ()


class Chain(Network):
    """A network of a user's own, whose factorised layer has a name of its own."""

    def shared_shapes(self):
        return {"body": {name: (3, 3, 4, self.sharing.shared_rank) for _, name in self.sharing.layers}}

    def sharing_blocks(self):
        return {"body": ("block1", "block2")}

    def basis_layers(self):
        return ("conv",)

    def layer_path(self, group, block, layer):
        return (f"{block}_{layer}",)

    @nn.compact
    def __call__(self, images, *, train):
        shared = self.shared_by_layer(self.shared_arrays(), "body")
        x = BasisConv(4, name="stem")(images, train=train)
        for block in self.sharing_blocks()["body"]:
            conv = BasisConv(4, unique_rank=self.sharing.unique_rank, name=f"{block}_conv")
            x = x + conv(x, shared.get("conv"), train=train)
        return linear_head(self.num_classes, 4)(global_average(x))


@pytest.fixture
def chain(monkeypatch):
    """Registers it for the time of a test."""
    monkeypatch.setattr(registry, "FAMILIES", dict(FAMILIES))
    registry.register_network("chain", Chain)


@pytest.mark.usefixtures("chain")
def test_a_registered_network_is_asked_for_what_is_specific_to_it():
    model = create_model("chain-s3u1")
    assert model.sharing.layers == (("conv", "shared"),)
    params = abstract_variables(model, (8, 8, 3))["params"]
    assert params["bases"]["body"]["shared"].shape == (3, 3, 4, 3)
    assert params["block2_conv"]["unique"].shape == (3, 3, 4, 1)
    group, = model.basis_groups("shared+unique")
    assert group == BasisGroup(["bases/body/shared"], ["block1_conv/unique", "block2_conv/unique"])
    with pytest.raises(UserError, match="chain supports s<S>u<U>"):
        create_model("chain-shared")
    with pytest.raises(UserError, match="Chain has no published weights"):
        model.published_names()
    with pytest.raises(ValueError, match="chain"):
        registry.register("chain", Family(Chain, ("cifar",), ()))


class Wide(Chain):
    def basis_layers(self):
        return ()


class Short(StagedNetwork):
    """Its stages have too few blocks to share."""

    def shareable(self):
        return {}


@pytest.mark.usefixtures("chain")
def test_registering_again_replaces_the_network_and_takes_no_other_s_name():
    again = type("Chain", (Chain,), {"__module__": Chain.__module__, "__qualname__": Chain.__qualname__,
                                     "basis_layers": lambda self: ("conv", "other")})
    registry.register_network("chain", again)
    assert create_model("chain-s3u1").sharing.layers == (("conv", "shared"), ("other", "shared"))
    for name in ("chain", "resnet20"):
        with pytest.raises(ValueError, match=f"name='{name}'"):
            registry.register_network(name, Wide, forms=())


@pytest.mark.parametrize(("build", "forms", "message"), [
    (Chain, ("s16u1",), r"'s16u1' must be one of s<S>u<U>, s<S>u<U>-double, shared"),
    (Wide, (BASIS,), r"s<S>u<U> needs layers, and Wide\.basis_layers\(\) returns none"),
    (Short, (BASIS,), r"s<S>u<U> needs layers, and Short\.basis_layers\(\) returns none"),
    (Chain, (BASIS, "shared"), r"shared needs layers, and Chain\.whole_layers\(\) returns none"),
    (lambda num_classes, parent: nn.Dense(num_classes, parent=parent), (), "returns a Dense"),
])
def test_a_network_that_cannot_share_as_it_says_is_not_registered(build, forms, message):
    with pytest.raises((ValueError, TypeError), match=message):
        registry.register_network("unheard_of", build, forms=forms)
    assert "unheard_of" not in FAMILIES


def test_the_architectures_say_which_layers_are_shared_and_whether_a_basis_can_be_fitted():
    layers = {name: dict(create_model(name).sharing.layers) for name in (
        "resnet20-s4u1", "resnet20-s4u1-double", "densenet121-s4u1", "resnext50_32x4d-s4u4", "resnet50-shared",
        "resnet50-shared++", "mobilenetv2-shared", "mobilenetv2-shared++", "resnet20-tied", "resnet20-template2")}
    both = {"first": "first", "second": "second"}
    assert layers == {
        "resnet20-s4u1": {"first": "shared", "second": "shared"}, "resnet20-s4u1-double": both,
        "densenet121-s4u1": {"second": "shared"}, "resnext50_32x4d-s4u4": {"second": "shared"},
        "resnet50-shared": {"second": "second"}, "resnet50-shared++": {"second": "second", "third": "third"},
        "mobilenetv2-shared": {"first": "first"}, "mobilenetv2-shared++": {"first": "first", "third": "third"},
        "resnet20-tied": both, "resnet20-template2": {"first": "templates", "second": "templates"}}
    linear = {name for name in FAMILIES if create_model(name).basis_is_linear()}
    assert set(FAMILIES) - linear == {"resnext50_32x4d"}


def test_elements_of_other_channel_groups_cannot_be_penalised_together():
    with pytest.raises(UserError, match=r"other channel groups.*elements=shared\."):
        create_model("resnext50_32x4d-s64u4").basis_groups("shared+unique")
    assert len(create_model("resnext50_32x4d-s64u4").basis_groups("shared")) == 4
    assert len(create_model("resnext50_32x4d-s0u4").basis_groups("shared+unique")) == 4


def test_recipes_know_by_the_name_which_networks_are_for_small_images_alone():
    """They import no architecture, so that help and mistakes in flags do not wait for JAX.

    The registry is executed anew: other tests of the same process register networks of their own.
    """
    shipped = importlib.util.module_from_spec(registry.__spec__)
    registry.__spec__.loader.exec_module(shipped)
    assert len(shipped.FAMILIES) > len(SMALLER)
    for name, family in shipped.FAMILIES.items():
        for form in ("", "w24", "-s4u1"):
            assert is_for_small_images(name + form) == (family.stems == ("cifar",)), name + form
