"""Kinds of parameters, and the counts of parameters and multiply-accumulates."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shared_basis import BasisConv, Network
from shared_basis.config import PARAMETER_LABELS, ModelConfig
from shared_basis.models import create_model, registry
from shared_basis.models.parameters import abstract_variables, count_by_kind, count_macs, count_parameters
from shared_basis.models.summary import compare_with_plain, count_network, render, render_saving
from shared_basis.nn.ops import portable
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.labels import label_parameters

CIFAR10_COUNTS = {
    "resnet20": (269722, 40551040),
    "resnet32": (464154, 68862592),
    "resnet44": (658586, 97174144),
    "resnet56": (853018, 125485696),
    "resnet110": (1727962, 252887680),
    "resnet32-s8u1-double": (174858, 47628928),
    "resnet32-s16u1-double": (245642, 79086208),
    "resnet32-s8u1": (150666, 47628928),
    "resnet32-s16u1": (197258, 79086208),
    "resnet32-s16u0-double": (218650, 75154048),
    "resnet32-s0u16": (508954, 75154048),
    "resnet56-s8u1-double": (226042, 83018368),
    "resnet56-s16u1-double": (319226, 145932928),
    "resnet56-s8u1": (201850, 83018368),
    "resnet56-s16u1": (270842, 145932928),
    "resnet56-s16u0-double": (265242, 138068608),
    "resnet56-s0u16": (942618, 138068608),
}
"""Trainable parameters and multiply-accumulates of the official implementation at 32×32×3 and 10 classes."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if index % 8 == 0 else pytest.mark.slow)
                                  for index, name in enumerate(CIFAR10_COUNTS)])
def test_counts_are_those_of_the_official_networks(name):
    counts = count_network(ModelConfig(name=name), 10, (32, 32, 3))
    assert (counts["parameters"], counts["macs"]) == CIFAR10_COUNTS[name]


def test_labels_name_the_kind_of_every_parameter():
    params = abstract_variables(create_model("resnet14-s4u1-double"), (8, 8, 3))["params"]
    labels = label_parameters(params)
    norm = {"scale": "norm", "bias": "norm"}
    layer = {"unique": "basis", "coefficients": "coefficients", "norm": norm}
    plain = {"first": {"kernel": "kernel"}, "first_norm": norm, "second": {"kernel": "kernel"}, "second_norm": norm}
    group = {"block1": plain, "block2": {"first": layer, "first_norm": norm, "second": layer, "second_norm": norm}}
    assert labels == {
        "bases": {f"group{g}": {"first": "basis", "second": "basis"} for g in (1, 2, 3)},
        "stem": {"kernel": "kernel"}, "stem_norm": norm, "group1": group, "group2": group, "group3": group,
        "head": {"kernel": "kernel", "bias": "bias"}}
    assert set(jax.tree.leaves(labels)) == set(PARAMETER_LABELS)


def test_parameters_of_other_names_are_labelled_by_their_axes():
    vector, matrix = jnp.zeros(2), jnp.zeros((2, 2))
    assert label_parameters({"GroupNorm_0": {"scale": vector, "bias": vector}, "Embed_0": {"embedding": matrix},
                             "LayerScale_0": {"gamma": vector}, "alpha": jnp.zeros(())}) == {
        "GroupNorm_0": {"scale": "norm", "bias": "norm"}, "Embed_0": {"embedding": "kernel"},
        "LayerScale_0": {"gamma": "bias"}, "alpha": "bias"}


def test_parameters_are_counted_under_each_top_level_name():
    tree = {"a": {"x": np.zeros((2, 3)), "y": {"z": jax.ShapeDtypeStruct((4,), jnp.float32)}}, "b": np.zeros(())}
    assert count_parameters(tree) == {"a": 10, "b": 1}


def test_parameters_of_any_tree_are_counted_by_kind():
    norm = {"scale": np.zeros(5), "bias": np.zeros(5)}
    tree = {"filters": np.zeros((3, 3, 2, 4)),
            "layer": {"unique": np.zeros((3, 3, 2, 1)), "coefficients": np.zeros((5, 7)), "norm": norm},
            "dense": {"kernel": jax.ShapeDtypeStruct((7, 2), jnp.float32), "bias": np.zeros(2)}, "alpha": np.zeros(())}
    counts = {"basis": 18, "coefficients": 35, "kernel": 14, "norm": 10, "bias": 2, "other": 72 + 1}
    assert count_by_kind(tree) == counts
    assert count_by_kind(tree, [BasisGroup("filters")]) == {**counts, "basis": 90, "other": 1}
    labels = {"filters": "mine",
              "layer": {"unique": "mine", "coefficients": "mix", "norm": {"scale": "n", "bias": "n"}},
              "dense": {"kernel": "mine", "bias": "n"}, "alpha": "n"}
    assert count_by_kind(tree, labels=labels) == {"mine": 72 + 18 + 14, "mix": 35, "n": 13}
    with pytest.raises(ValueError, match="labels must be a tree like params"):
        count_by_kind(tree, labels={"filters": "mine"})


def test_counts_by_kind_of_a_network_of_ours_are_all_its_parameters():
    model = create_model("resnet20-s4u1-double")
    params = abstract_variables(model, (8, 8, 3))["params"]
    counts = count_by_kind(params, model.basis_groups("shared+unique"))
    assert counts == count_by_kind(params)
    assert sum(counts.values()) == sum(count_parameters(params).values())
    assert counts["other"] == 0


class Tiny(nn.Module):
    """A strided and a grouped convolution, a loop over one dense layer, a layer called through jit, a head."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), strides=2, padding=1, name="conv")(x)
        x = nn.Conv(6, (3, 1), padding="SAME", feature_group_count=2, name="grouped")(x)
        x = x.mean((1, 2))
        kernel = self.param("loop", nn.initializers.ones, (6, 6))
        with jax.named_scope("loop"):
            x, _ = jax.lax.scan(lambda carry, _: (carry @ kernel, None), x, length=5)
        x = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="scan")(x, None)[0]
        x = nn.jit(nn.Dense)(7, name="jitted")(x)
        return nn.Dense(2, name="head")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(6)(x), None


def test_macs_of_any_model_are_counted_by_module():
    model = Tiny()
    macs = count_macs(model, abstract_variables(model, (5, 8, 3)), (5, 8, 3))
    assert macs == {
        "conv": 3 * 4 * 4 * (3 * 3 * 3),  # positions, outputs, taps: padded positions count like any other
        "grouped": 3 * 4 * 6 * (3 * 1 * 2),  # each output sees half of the four channels
        "loop": 5 * 6 * 6,
        "scan": 3 * 6 * 6,
        "jitted": 6 * 7,
        "head": 7 * 2,
    }


class Flat(Network):
    """All layers in the network's own method: one uses a shared whole filter alone, another is a product."""

    def shared_shapes(self):
        return {"body": {name: (3, 3, 3, 3) for _, name in self.sharing.layers}}

    def sharing_blocks(self):
        return {"body": ("block1",)}

    def basis_layers(self):
        return ("conv",)

    def layer_path(self, group, block, layer):
        return (layer,)

    @nn.compact
    def __call__(self, images, *, train):
        shared = self.shared_by_layer(self.shared_arrays(), "body").get("conv")
        x = BasisConv(3, whole_filters=True, name="conv")(images, shared)
        return x.mean((1, 2)) @ self.param("classes", nn.initializers.ones, (3, self.num_classes))


def test_macs_of_the_network_s_own_method_are_counted(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register_network("flat", Flat, forms=("tied",))
    counts = count_network(ModelConfig("flat-tied"), 10, (4, 5, 3))
    assert counts["groups"] == {
        "conv": {"parameters": 0, "shared_parameters": 0, "macs": 20 * 81},
        "Flat": {"parameters": 0, "shared_parameters": 0, "macs": 30},
        "classes": {"parameters": 30, "shared_parameters": 0, "macs": 0},
        "bases/body": {"parameters": 81, "shared_parameters": 81, "macs": 0}}
    assert (counts["parameters"], counts["macs"]) == (111, 1650)


@pytest.mark.parametrize("name", ["resnet20", "resnet14-s4u1-double"])
def test_macs_agree_with_the_compiler(name):
    model = create_model(name)
    variables = abstract_variables(model, (64, 64, 3))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    unrolled = model.clone(scan_blocks=False)  # the compiler counts the body of a loop once
    with portable():  # elsewhere bases have an additional filter
        lowered = jax.jit(lambda v, x: unrolled.apply(v, x, train=False)).lower(variables, images)
    # The compiler leaves out taps on padding (hence large images) and counts additions and normalisations besides.
    macs = sum(count_macs(model, variables, (64, 64, 3)).values())
    assert macs == pytest.approx(lowered.cost_analysis()["flops"] / 2, rel=0.07)


@pytest.fixture(scope="module")
def comparison():
    return compare_with_plain(ModelConfig(name="resnet32-s16u1-double"), 10, (32, 32, 3))


def test_a_comparison_has_the_counts_of_the_plain_network_and_the_saving(comparison):
    (parameters, macs), (plain_parameters, plain_macs) = (
        CIFAR10_COUNTS[name] for name in ("resnet32-s16u1-double", "resnet32"))
    assert (comparison["plain"]["parameters"], comparison["plain"]["macs"]) == (plain_parameters, plain_macs)
    assert comparison["saving"] == pytest.approx(
        {"parameters": 1 - parameters / plain_parameters, "macs": 1 - macs / plain_macs})


def test_the_groups_of_a_comparison_are_counted_by_hand(comparison):
    groups = comparison["groups"]
    assert list(groups) == ["stem", "group1", "group2", "group3", "head"]
    for key in ("parameters", "macs"):
        assert sum(row[key] for row in groups.values()) == comparison[key]
    assert groups["stem"] == {"parameters": 3 * 3 * 3 * 16 + 2 * 16, "shared_parameters": 0,
                              "macs": 32 * 32 * 3 * 3 * 3 * 16}
    assert groups["head"] == {"parameters": 64 * 10 + 10, "shared_parameters": 0, "macs": 64 * 10}
    for g, width in enumerate((16, 32, 64)):
        s, u = 16 << g, 1 << g
        channels_in, positions = (16, 16, 32)[g], (32 >> g)**2
        plain_block = 9 * (channels_in + width) * width  # the block's two kernels
        layer_macs = 9 * width * (s + u) + (s + u) * width
        layer = 9 * width * u + 2 * (s + u) + (s + u) * width
        shared = 2 * 9 * width * s
        assert groups[f"group{g + 1}"] == {
            "parameters": shared + plain_block + 8 * layer + 10 * 2 * width,
            "shared_parameters": shared, "macs": positions * (plain_block + 8 * layer_macs)}


def test_the_table_shows_each_group_beside_the_plain_one(comparison):
    text = render(comparison)
    assert text.replace("\n", "").isprintable()
    title, header, *rows, saving = text.splitlines()
    assert title.startswith("resnet32-s16u1-double, images 32×32×3, 10 classes")
    assert header.split("  ")[-1].strip() == "plain MACs"
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells["total"] == ["245,642", f"{2 * 9 * (16 * 16 + 32 * 32 + 64 * 64):,}", "79,086,208", "464,154",
                              "68,862,592"]
    assert cells["group1"][3:] == [f"{10 * (9 * 16 * 16 + 2 * 16):,}", f"{10 * 9 * 16 * 16 * 32 * 32:,}"]
    assert cells["head"] == ["650", "0", "640", "650", "640"]
    assert saving == ("245,642 parameters (47.1 % fewer than the 464,154 of plain resnet32), "
                      "79,086,208 MACs (14.8 % more than 68,862,592)")


def test_the_plain_network_is_not_compared_with_itself():
    text = render_saving(compare_with_plain(ModelConfig(name="resnet20"), 10, (32, 32, 3)))
    assert text == "269,722 parameters, 40,551,040 MACs; this is the plain network"


def test_the_plain_counterpart_has_the_same_classes_and_images():
    comparison = compare_with_plain(ModelConfig(name="resnet14-s4u1"), 100, (8, 12, 1))
    assert comparison["plain"]["groups"]["head"] == {"parameters": 6500, "shared_parameters": 0, "macs": 6400}
    assert comparison["plain"]["groups"]["stem"]["macs"] == math.prod((8, 12, 9, 16))
