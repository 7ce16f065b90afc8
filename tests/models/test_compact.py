"""The compact networks beside the paper's: counts by their published tables, what is shared, gradients, exactness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sample_networks import random_variables

from shared_basis import create_model
from shared_basis.errors import UserError
from shared_basis.models.base import Network
from shared_basis.models.check import check_network
from shared_basis.models.parameters import abstract_variables, count_macs, tree_size
from shared_basis.models.registry import FAMILIES
from shared_basis.models.shufflenetv1 import channel_shuffle
from shared_basis.nn.ops import quick_compiler_options
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.orthonormal import keep_orthonormal
from shared_basis.optim.penalty import orthogonality_diagnostics, orthogonality_penalty

# Counts, by the architectures' published tables


class Table:
    """Adds up the layers of a table: parameters, and multiply-accumulates of one image."""

    def __init__(self, side: int) -> None:
        """Takes the height and width of the images."""
        self.side, self.parameters, self.macs = side, 0, 0

    def pool(self) -> None:
        self.side = (self.side + 1) // 2

    def conv(self, inputs: int, outputs: int, size: int = 1, strides: int = 1, groups: int = 1,
             own: bool = True) -> None:
        """Adds a convolution without bias, and its batch normalisation; unless `own`, its weights are another's."""
        self.side = (self.side + strides - 1) // strides
        weights = size**2 * (inputs // groups) * outputs
        self.parameters += weights * own + 2 * outputs
        self.macs += weights * self.side**2

    def linear(self, inputs: int, outputs: int) -> None:
        self.parameters += (inputs + 1) * outputs
        self.macs += inputs * outputs


def large(side: int) -> bool:
    """Returns whether images are such that the first layer has stride 2."""
    return side > 32


def mobilenet(side: int, classes: int, shared: int, _: Any = None) -> Table:
    """Howard et al. 2017, table 1; five blocks of 512 channels are equal."""
    table = Table(side)
    table.conv(3, 32, 3, 2 if large(side) else 1)
    inputs, seen = 32, 0
    for outputs, strides in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2),
                             (1024, 1)):
        table.conv(inputs, inputs, 3, strides, groups=inputs)
        equal = inputs == outputs == 512
        seen += equal
        table.conv(inputs, outputs, own=not (equal and shared and seen > 1))
        inputs = outputs
    table.linear(1024, classes)
    return table


def shufflenetv1(side: int, classes: int, shared: int, groups: int) -> Table:
    """Zhang et al. 2018, table 1: bottlenecks of a quarter, and no groups in the very first 1×1 layer."""
    table = Table(side)
    table.conv(3, 24, 3, 2 if large(side) else 1)
    if large(side):
        table.pool()
    inputs = 24
    for stage, units in enumerate((4, 8, 4)):
        outputs = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}[groups] * 2**stage
        for unit in range(units):
            table.conv(inputs, outputs // 4, groups=1 if inputs == 24 else groups, own=not (shared and unit > 1))
            table.conv(outputs // 4, outputs // 4, 3, 1 if unit else 2, groups=outputs // 4)
            table.conv(outputs // 4, outputs if unit else outputs - inputs, groups=groups,
                       own=not (shared > 1 and unit > 1))
            inputs = outputs
    table.linear(inputs, classes)
    return table


def shufflenetv2(side: int, classes: int, shared: int, widths: tuple[int, int]) -> Table:
    """Ma et al. 2018, table 5: the width of the first stage, which doubles, and that of the last 1×1 layer."""
    table = Table(side)
    table.conv(3, 24, 3, 2 if large(side) else 1)
    if large(side):
        table.pool()
    inputs = 24
    for stage, units in enumerate((4, 8, 4)):
        half = widths[0] * 2**stage // 2
        for unit in range(units):
            before = table.side
            table.conv(half if unit else inputs, half, own=not (shared and unit > 1))
            table.conv(half, half, 3, 1 if unit else 2, groups=half)
            table.conv(half, half, own=not (shared > 1 and unit > 1))
            if not unit:
                table.side = before
                table.conv(inputs, inputs, 3, 2, groups=inputs)
                table.conv(inputs, half)
            inputs = 2 * half
    table.conv(inputs, widths[1])
    table.linear(widths[1], classes)
    return table


def efficientnet(side: int, classes: int, shared: int, _: Any = None) -> Table:
    """Tan & Le 2019, table 1; squeeze and excitation by a quarter of a block's input channels, with biases."""
    table = Table(side)
    table.conv(3, 32, 3, 2 if large(side) else 1)
    inputs = 32
    for expansion, size, strides, outputs, blocks in (
            (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)):
        for block in range(blocks):
            inner = expansion * inputs
            if expansion > 1:
                table.conv(inputs, inner, own=not (shared and block > 1))
            table.conv(inner, inner, size, 1 if block else strides, groups=inner)
            table.linear(inner, inputs // 4)
            table.linear(inputs // 4, inner)
            table.conv(inner, outputs, own=not (shared > 1 and block > 1))
            inputs = outputs
    table.conv(inputs, 1280)
    table.linear(1280, classes)
    return table


TABLES: dict[str, tuple[Callable[..., Table], Any, int, float]] = {
    "mobilenetv1": (mobilenet, None, 4_231_976, 568.7),
    "shufflenetv1_g1": (shufflenetv1, 1, 0, 143), "shufflenetv1_g2": (shufflenetv1, 2, 0, 140),
    "shufflenetv1_g3": (shufflenetv1, 3, 0, 137), "shufflenetv1_g4": (shufflenetv1, 4, 0, 133),
    "shufflenetv1_g8": (shufflenetv1, 8, 0, 137),
    "shufflenetv2_x0_5": (shufflenetv2, (48, 1024), 1_366_792, 41),
    "shufflenetv2_x1_0": (shufflenetv2, (116, 1024), 2_278_604, 146),
    "shufflenetv2_x1_5": (shufflenetv2, (176, 1024), 3_503_624, 299),
    "shufflenetv2_x2_0": (shufflenetv2, (244, 2048), 7_393_996, 591),
    "efficientnet_b0": (efficientnet, None, 5_288_548, 390)}
"""By name its table; published parameters (of Keras, and of torchvision; 0 where none are), and millions of MACs."""


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_read_as_they_are_meant(name: str) -> None:
    """Published multiply-accumulates are rounded, and leave out one or another small layer."""
    table, argument, parameters, macs = TABLES[name]
    found = table(224, 1000, 0, argument)
    assert found.parameters == (parameters or found.parameters)
    assert found.macs == pytest.approx(macs * 1e6, rel=0.025)


FORMS = ("", "-shared", "-shared++")
BY_DEFAULT = {("mobilenetv1-shared", 224), ("shufflenetv1_g3-shared++", 32), ("shufflenetv2_x1_0-shared++", 224),
              ("efficientnet_b0-shared++", 32)}


@pytest.mark.parametrize(("name", "side"), [
    pytest.param(base + form, side, marks=[] if (base + form, side) in BY_DEFAULT else pytest.mark.slow)
    for base in TABLES for shared, form in enumerate(FORMS) for side in (224, 32)
    if shared < 2 or base != "mobilenetv1"])
def test_parameters_and_macs_are_those_of_the_published_tables(name: str, side: int) -> None:
    base, _, form = name.partition("-")
    classes = 1000 if side == 224 else 100
    table, argument, *_ = TABLES[base]
    expected = table(side, classes, len(form.removeprefix("shared")) // 2 + bool(form), argument)
    model = create_model(name, num_classes=classes, stem="imagenet" if side == 224 else "cifar")
    variables = abstract_variables(model, (side, side, 3))
    assert tree_size(variables["params"]) == expected.parameters
    assert sum(count_macs(model, variables, (side, side, 3)).values()) == expected.macs


def test_a_basis_of_the_five_equal_layers_of_mobilenet_is_counted_by_hand() -> None:
    def parameters(name: str) -> int:
        return tree_size(abstract_variables(create_model(name), (32, 32, 3))["params"])
    rank = 64 + 4  # each layer has 4 unique elements, a normalisation of the basis and coefficients
    assert parameters("mobilenetv1-s64u4") == parameters("mobilenetv1") - 5 * 512**2 + 512 * 64 + 5 * (
        512 * 4 + 2 * rank + rank * 512)


# Small networks of each architecture

SMALL: dict[str, dict[str, Any]] = {
    "mobilenetv1": {"width": 4, "stages": ((1, 2, 1), (4, 2, 2))},
    "shufflenetv1_g2": {"widths": (32, 64), "units": (3, 1)},
    "shufflenetv2_x1_0": {"widths": (16, 32), "units": (4, 3), "neck": 32},
    "mobilenetv2": {},
    "efficientnet_b0": {"stages": ((1, 8, 1, 3, 1), (3, 8, 2, 5, 3))}}
RANKS = {"s<S>u<U>": "s4u1", "s<S>u<U>-double": "s3u1-double", "template<k>": "template2"}
NAMES = [name for base in SMALL for name in (
    base, *(f"{base}-{RANKS.get(form, form)}" for form in FAMILIES[base].forms))]
SIZE = 16


def small(name: str) -> Network:
    return create_model(name, num_classes=5, scan_blocks=False).clone(**SMALL[name.partition("-")[0]])


@pytest.mark.parametrize(("name", "most"), [("mobilenetv2", 20), ("mobilenetv1", 512)])
def test_the_bound_in_the_message_is_the_largest_rank_that_is_accepted(name: str, most: int) -> None:
    for rank in (most + 1, 8 * most):
        with pytest.raises(UserError, match=f"choose shared . unique rank at most {most}[.,]"):
            create_model(f"{name}-s{rank - 1}u1")
    create_model(f"{name}-s{most - 1}u1")


def test_ranks_double_with_each_stage() -> None:
    params = abstract_variables(small("shufflenetv2_x1_0-s3u1-double"), (SIZE, SIZE, 3))["params"]
    for stage, width, times in (("stage2", 8, 1), ("stage3", 16, 2)):
        assert {name: array.shape for name, array in params["bases"][stage].items()} == dict.fromkeys(
            ("first", "third"), (1, 1, width, 3 * times))
        assert params[stage]["block3"]["third"]["unique"].shape == (1, 1, width, times)
        assert params[stage]["block2"]["first"]["coefficients"].shape == (4 * times, width)


@pytest.mark.slow
def test_all_elements_start_with_norm_1() -> None:
    model = small("efficientnet_b0-s4u1")
    params = jax.jit(lambda key: model.init(key, jnp.zeros((1, SIZE, SIZE, 3)), train=False)["params"],
                     compiler_options=quick_compiler_options())(jax.random.key(0))
    found = orthogonality_diagnostics(params, model.basis_groups("shared+unique"))
    assert float(found["norm_min"]) == pytest.approx(1, abs=1e-5)
    assert float(found["norm_max"]) == pytest.approx(1, abs=1e-5)


def test_layers_with_filters_of_other_sizes_are_penalised_apart_with_their_own_unique_elements() -> None:
    groups = small("efficientnet_b0-s4u1").basis_groups("shared+unique")
    assert groups == tuple(BasisGroup(
        [f"bases/stage2/{layer}"], [f"stage2/{block}/{layer}/unique" for block in ("block2", "block3")],
        reduction_group=layer) for layer in ("first", "third"))
    assert [len(group.unique) for group in small("efficientnet_b0-s4u1").basis_groups("shared")] == [0, 0]
    group, = small("shufflenetv2_x1_0-s3u1").clone(units=(3, 1)).basis_groups("shared+unique")  # of one size, together
    assert (len(group.shared), len(group.unique)) == (1, 4)


CHECKED = {"mobilenetv1-s4u1 cifar", "shufflenetv1_g2-shared imagenet", "shufflenetv2_x1_0-s3u1-double cifar",
           "efficientnet_b0-template2 imagenet"}


@pytest.mark.parametrize(("name", "stem"), [
    pytest.param(name, stem, marks=[] if f"{name} {stem}" in CHECKED else pytest.mark.slow)
    for name in NAMES for stem in ("cifar", "imagenet")])
def test_every_form_computes_what_it_declares(name: str, stem: str) -> None:
    check_network(small(name).clone(stem=stem), (SIZE, SIZE, 3))


WITH_GRADIENTS = {"shufflenetv2_x0_5-shared"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in WITH_GRADIENTS else pytest.mark.slow) for name in NAMES if "-" in name])
def test_every_parameter_has_a_gradient_and_bases_can_be_penalised_and_kept_orthonormal(name: str) -> None:
    model = small(name)
    variables = random_variables(model, (SIZE, SIZE, 3))
    images = jax.random.normal(jax.random.key(1), (4, SIZE, SIZE, 3))
    groups = model.basis_groups("shared+unique")
    optimizer = keep_orthonormal(groups, optax.sgd(0.1, momentum=0.9)) if groups else optax.sgd(0.1)

    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits * jnp.sin(jnp.arange(logits.size)).reshape(logits.shape))
        gradient = jax.grad(loss)(params)
        if not groups:
            return gradient, None, None
        penalty = jax.grad(lambda params: orthogonality_penalty(params, groups))(params)
        state, moved = optimizer.init(params), params
        for _ in range(2):
            updates, state = optimizer.update(gradient, state, moved)
            moved = optax.apply_updates(moved, updates)
        return gradient, penalty, orthogonality_diagnostics(moved, groups)

    gradient, penalty, found = jax.jit(run, compiler_options=quick_compiler_options())(variables["params"])
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        names = [key.key for key in path]
        # Within a normalised layer a bias has no effect where only linear maps follow.
        if names[-1] != "bias" or names[0] == "head":
            assert float(jnp.linalg.norm(leaf)) > 1e-6 * largest, "/".join(names)
    if not groups:
        assert name.endswith(("-tied", "-template2"))
        return
    named = {path for group in groups for path in (*group.shared, *group.unique)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(penalty):
        assert bool(jnp.any(leaf)) == (tuple(key.key for key in path) in named)
    frame = any(elements > space for _, kernels in model.shareable().values() for layer, kernel in kernels.items()
                for space, elements in [(kernel[2], model.sharing.shape(kernel)[-1])]
                if layer in dict(model.sharing.layers))
    if not frame:
        assert float(found["coherence"]) < 1e-4
        assert float(abs(found["norm_mean"] - 1)) < 1e-4


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "shufflenetv1_g2-shared++" else pytest.mark.slow)
    for name in NAMES if name.endswith(("-shared", "-shared++"))])
def test_a_network_that_shares_computes_what_the_plain_one_does_whose_layers_are_equal(name: str) -> None:
    model, plain = small(name), small(name.partition("-")[0])
    variables = random_variables(model, (SIZE, SIZE, 3))
    params = {group: dict(tree) for group, tree in variables["params"].items() if group != "bases"}
    for group, named in variables["params"]["bases"].items():
        for block in model.sharing_blocks()[group]:
            params[group][block] = params[group][block] | {layer: {"kernel": named[layer]} for layer in named}
    images = jax.random.normal(jax.random.key(1), (2, SIZE, SIZE, 3))
    logits = [jax.jit(lambda v, model=model: model.apply(v, images, train=False),
                      compiler_options=quick_compiler_options())(v)
              for model, v in ((model, variables), (plain, {**variables, "params": params}))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def test_a_shuffle_takes_channels_of_groups_in_turns_and_another_turns_it_back() -> None:
    x = jnp.arange(2 * 12).reshape(2, 1, 1, 12)
    shuffled = channel_shuffle(x, 3)
    assert shuffled[0, 0, 0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    np.testing.assert_array_equal(channel_shuffle(shuffled, 4), x)


def test_a_name_may_ask_for_another_width() -> None:
    assert create_model("mobilenetv1w24-shared").width == 24
    assert create_model("shufflenetv2_x1_0w64").widths == (64, 128, 256)
    for name, message in (("mobilenetv1w32", "unknown network"), ("efficientnet_b0w16", "unknown network"),
                          ("shufflenetv2_x1_0w65", "width 65: the units of ShuffleNet V2 halve it"),
                          ("mobilenetv1-s600u0", "stage4: a basis of 600 elements"),
                          ("mobilenetv2-s20u1", "stage6: a basis of 168 elements does not fit the 160-dim"),
                          ("shufflenetv1_g3-s4u1", "shufflenetv1_g3 supports shared, shared")):
        with pytest.raises(UserError, match=message):
            create_model(name)
