"""Official state dicts of every family are mapped whole: each tensor to its place, and none lost, added or misshapen.

The modules of the official implementation, and torchvision's, are written down here by themselves, in PyTorch's layout;
nothing is taken from the package's own table of names. (`test_pytorch.py` does this for CIFAR-10's ResNets.)
"""

import functools
import math
import zlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shared_basis import create_model
from shared_basis.errors import UserError
from shared_basis.interop.pytorch import convert_official, to_published
from shared_basis.models.parameters import abstract_variables, count_parameters

# The modules of the networks: each generator yields the name and shape of every tensor, or an alias and what it equals.


def conv(name, outputs, inputs, size=1, bias=False):
    yield f"{name}.weight", (outputs, inputs, size, size)
    if bias:
        yield f"{name}.bias", (outputs,)


def norm(name, channels):
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{leaf}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def linear(name, outputs, inputs):
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def alias(name, owner):
    yield f"{name}.weight", f"{owner}.weight"


def projection(block, outputs, inputs, names=("shortcut.0", "shortcut.1")):
    yield from conv(f"{block}.{names[0]}", outputs, inputs)
    yield from norm(f"{block}.{names[1]}", outputs)


DOWNSAMPLE = ("downsample.0", "downsample.1")
"""torchvision's names of a projection."""
SHORTCUT = ("shortcut.0", "shortcut.1")


def basic_resnet(blocks, classes, stem, s=0, u=0, double=False, project=SHORTCUT):
    """ResNet-18 and ResNet-34, with s shared and u unique elements in the first group."""
    yield from conv("conv1", 64, 3, stem)
    yield from norm("bn1", 64)
    inputs = 64
    for g, count in enumerate(blocks):
        width = 64 << g
        bases = ("_1", "_2") if double else ("",)
        for basis in bases if s else ():
            yield from conv(f"shared_basis_{g + 1}{basis}", s << g, width, 3)
        for b in range(count):
            block = f"layer{g + 1}.{b}"
            for i in (1, 2):
                if b and (s or u):
                    rank = (s + u) << g
                    if u:
                        yield from conv(f"{block}.basis_conv{i}", u << g, width, 3)
                    yield from norm(f"{block}.basis_bn{i}", rank)
                    yield from conv(f"{block}.coeff_conv{i}", width, rank)
                else:
                    yield from conv(f"{block}.conv{i}", width, inputs if i == 1 else width, 3)
                yield from norm(f"{block}.bn{i}", width)
            if b and s:
                for basis in bases:
                    yield from alias(f"{block}.shared_basis{basis}", f"shared_basis_{g + 1}{basis}")
            if inputs != width:
                yield from projection(block, width, inputs, project)
            inputs = width
    yield from linear("fc", classes, 512)


def bottleneck_resnet(blocks, classes, stem, shared=0, project=SHORTCUT):
    """ResNet-50 and ResNet-101 with `shared` whole layers: none, the 3×3, or the last 1×1 too."""
    yield from conv("conv1", 64, 3, stem)
    yield from norm("bn1", 64)
    inputs = 64
    for g, count in enumerate(blocks):
        width, outputs = 64 << g, 256 << g
        if shared == 1:
            yield from conv(f"shared_basis_{g + 1}", width, width, 3)
        if shared == 2:
            yield from conv(f"shared_basis_{g + 1}_1", width, width, 3)
            yield from conv(f"shared_basis_{g + 1}_2", outputs, width)
        for b in range(count):
            block = f"layer{g + 1}.{b}"
            yield from conv(f"{block}.conv1", width, inputs)
            if not (b and shared):
                yield from conv(f"{block}.conv2", width, width, 3)
            if not (b and shared == 2):
                yield from conv(f"{block}.conv3", outputs, width)
            for i, channels in ((1, width), (2, width), (3, outputs)):
                yield from norm(f"{block}.bn{i}", channels)
            if b and shared:
                for basis in ("_1", "_2") if shared == 2 else ("",):
                    yield from alias(f"{block}.shared_basis{basis}", f"shared_basis_{g + 1}{basis}")
            if not b:
                yield from projection(block, outputs, inputs, project)
            inputs = outputs
    yield from linear("fc", classes, 2048)


def densenet(classes, s=0, u=0):
    """DenseNet-121; the fourth block's layers use the third basis, and the fourth basis is unused."""
    yield from conv("conv1", 64, 3, 3)
    channels = 64
    for g, layers in enumerate((6, 12, 24, 16)):
        if s:
            yield from conv(f"shared_basis_{g + 1}", s, 128, 3)
        name = "features.dense_block3" if g == 3 and not s else f"features.dense_block_layer_{g}"
        for j in range(layers):
            layer = f"{name}.bottle_neck_layer_{j}"
            if s:
                yield from norm(f"{layer}.bn0", channels)
                yield from conv(f"{layer}.conv1", 128, channels)
                yield from norm(f"{layer}.bn1", 128)
                yield from conv(f"{layer}.basis_conv2", u, 128, 3)
                yield from norm(f"{layer}.basis_bn2", s + u)
                yield from conv(f"{layer}.coeff_conv2", 32, s + u)
                yield from alias(f"{layer}.shared_basis", f"shared_basis_{min(g + 1, 3)}")
            else:
                layer += ".residual_function"
                yield from norm(f"{layer}.0", channels)
                yield from conv(f"{layer}.2", 128, channels)
                yield from norm(f"{layer}.3", 128)
                yield from conv(f"{layer}.5", 32, 128, 3)
            channels += 32
        if g < 3:
            yield from norm(f"features.transition_layer_{g}.down_sample.0", channels)
            yield from conv(f"features.transition_layer_{g}.down_sample.1", channels // 2, channels)
            channels //= 2
    yield from norm("features.bn", channels)
    yield from linear("linear", classes, 1024)


def resnext(classes, s=0, u=0):
    """ResNeXt-50 32×4d."""
    yield from conv("conv1", 64, 3, 3)
    yield from norm("bn1", 64)
    inputs = 64
    for g, count in enumerate((3, 4, 6, 3)):
        width, outputs = 128 << g, 256 << g
        if s:
            yield from conv(f"shared_basis_{g + 1}", s << g, width // (s // 4), 3)
        for b in range(count):
            block = f"layer{g + 1}.{b}"
            if b and s:
                unique, rank = u << g, (s + u) << g
                yield from conv(f"{block}.conv1", width, inputs)
                yield from norm(f"{block}.bn1", width)
                yield from conv(f"{block}.basis_conv2", unique, width // (unique // 4), 3)
                yield from norm(f"{block}.bn2", rank)
                yield from conv(f"{block}.conv3", outputs, rank)
                yield from norm(f"{block}.bn3", outputs)
                yield from alias(f"{block}.shared_basis", f"shared_basis_{g + 1}")
            else:
                for index, (channels, fan, size) in ((0, (width, inputs, 1)), (3, (width, width // 32, 3)),
                                                     (6, (outputs, width, 1))):
                    yield from conv(f"{block}.residual_function.{index}", channels, fan, size)
                    yield from norm(f"{block}.residual_function.{index + 1}", channels)
            if not b:
                yield from projection(block, outputs, inputs)
            inputs = outputs
    yield from linear("linear", classes, 2048)


MOBILE_STAGES = ((1, 16, 1), (2, 24, 6), (3, 32, 6), (4, 64, 6), (3, 96, 6), (3, 160, 6), (1, 320, 6))
"""Blocks, output channels and expansion."""


def mobilenet(classes, cifar=True, shared=0):
    """MobileNetV2 with `shared` of its 1×1 layers: none, the expansion, or the projection too."""
    yield from conv("pre.0", 32, 3, 1 if cifar else 3, bias=True)
    yield from norm("pre.1", 32)
    inputs = 32
    for stage, (count, outputs, expansion) in enumerate(MOBILE_STAGES, 1):
        shares = shared if stage in (3, 4, 5, 6) else 0
        bases = {0: {}, 1: {"": "1"}, 2: {"_1": "1", "_2": "2"}}[shares]
        for basis, number in bases.items():
            pair = (6 * outputs, outputs) if number == "1" else (outputs, 6 * outputs)
            yield from conv(f"shared_basis_{stage - 2}{basis}", *pair)
        for b in range(count):
            block, inner = f"stage{stage}" if count == 1 else f"stage{stage}.{b}", expansion * inputs
            if not (b and shares):
                yield from conv(f"{block}.conv1", inner, inputs)
            yield from conv(f"{block}.conv2", inner, 1, 3)
            if not (b and shares == 2):
                yield from conv(f"{block}.conv3", outputs, inner)
            for i, channels in ((1, inner), (2, inner), (3, outputs)):
                yield from norm(f"{block}.bn{i}", channels)
            for basis, number in bases.items() if b else ():
                yield from alias(f"{block}.shared_basis{number}", f"shared_basis_{stage - 2}{basis}")
            if cifar and not b and stage in (1, 5, 6, 7):
                yield from projection(block, outputs, inputs)
            inputs = outputs
    yield from conv("conv1.0", 1280, 320, bias=True)
    yield from norm("conv1.1", 1280)
    yield from (conv("conv2", classes, 1280, bias=True) if cifar else linear("classifier.1", classes, 1280))


def torchvision_mobilenet(classes):
    yield from conv("features.0.0", 32, 3, 3)
    yield from norm("features.0.1", 32)
    inputs, index = 32, 1
    for count, outputs, expansion in MOBILE_STAGES:
        for _ in range(count):
            block, inner = f"features.{index}.conv", expansion * inputs
            names = ("1.0", "1.1", "2", "3") if expansion > 1 else ("0.0", "0.1", "1", "2")
            if expansion > 1:
                yield from conv(f"{block}.0.0", inner, inputs)
                yield from norm(f"{block}.0.1", inner)
            yield from conv(f"{block}.{names[0]}", inner, 1, 3)
            yield from norm(f"{block}.{names[1]}", inner)
            yield from conv(f"{block}.{names[2]}", outputs, inner)
            yield from norm(f"{block}.{names[3]}", outputs)
            inputs, index = outputs, index + 1
    yield from conv("features.18.0", 1280, 320)
    yield from norm("features.18.1", 1280)
    yield from linear("classifier.1", classes, 1280)


def timm_mobilenet(classes):
    """mobilenetv2_100 of timm."""
    yield from conv("conv_stem", 32, 3, 3)
    yield from norm("bn1", 32)
    inputs = 32
    for stage, (count, outputs, expansion) in enumerate(MOBILE_STAGES):
        for b in range(count):
            block, inner = f"blocks.{stage}.{b}", expansion * inputs
            layers = (("conv_pw", inner, inputs, 1), ("conv_dw", inner, 1, 3), ("conv_pwl", outputs, inner, 1))
            if expansion == 1:
                layers = (("conv_dw", inner, 1, 3), ("conv_pw", outputs, inner, 1))
            for i, (name, channels, fan, size) in enumerate(layers, 1):
                yield from conv(f"{block}.{name}", channels, fan, size)
                yield from norm(f"{block}.bn{i}", channels)
            inputs = outputs
    yield from conv("conv_head", 1280, 320)
    yield from norm("bn2", 1280)
    yield from linear("classifier", classes, 1280)


# The networks, and where tensors of each kind go


def oihw(tensor):
    return np.moveaxis(tensor, (0, 1), (3, 2))


def matrix(tensor):
    return tensor.reshape(tensor.shape[:2]).T


def same(tensor):
    return tensor


class Case(NamedTuple):
    """A published network: its name and stem here, its tensors there."""

    name: str
    stem: str
    modules: functools.partial
    parameters: int
    """Its published number of parameters, as the official implementation and torchvision count them."""
    places: dict
    """By tensor, the path of its variable and its layout."""
    added: int = 0
    """Parameters that the network has here and not there."""


ADDED = 32 * 32 + 2 * 32 + 32 + 1280
"""Parameters that torchvision's and timm's MobileNetV2 have not: the first 1×1 layer with its norm, and two biases."""

D18, D34, D50, D101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3), (3, 4, 23, 3)
"""Blocks by depth."""

STEM = {"conv1.weight": ("params/stem/kernel", oihw), "bn1.running_var": ("batch_stats/stem_norm/var", same),
        "bn1.bias": ("params/stem_norm/bias", same)}
FC = {"fc.weight": ("params/head/kernel", matrix), "fc.bias": ("params/head/bias", same)}
LINEAR = {"linear.weight": ("params/head/kernel", matrix), "linear.bias": ("params/head/bias", same)}
PROJECTION = {"layer3.0.shortcut.0.weight": ("params/group3/block1/shortcut/kernel", oihw),
              "layer3.0.shortcut.1.weight": ("params/group3/block1/shortcut_norm/scale", same)}
TORCHVISION_PROJECTION = {
    "layer3.0.downsample.0.weight": ("params/group3/block1/shortcut/kernel", oihw),
    "layer2.0.downsample.1.running_mean": ("batch_stats/group2/block1/shortcut_norm/mean", same)}
BASIC = {**STEM, **FC, "layer4.0.conv1.weight": ("params/group4/block1/first/kernel", oihw),
         "layer1.0.conv2.weight": ("params/group1/block1/second/kernel", oihw),
         "layer2.0.bn2.running_mean": ("batch_stats/group2/block1/second_norm/mean", same)}
COEFFICIENTS = {"layer2.1.coeff_conv2.weight": ("params/group2/block2/second/coefficients", matrix),
                "layer3.5.coeff_conv1.weight": ("params/group3/block6/first/coefficients", matrix),
                "layer4.2.basis_bn1.weight": ("params/group4/block3/first/norm/scale", same),
                "layer4.2.bn1.weight": ("params/group4/block3/first_norm/scale", same)}
UNIQUE = {"layer2.3.basis_conv2.weight": ("params/group2/block4/second/unique", oihw),
          "layer2.3.basis_conv1.weight": ("params/group2/block4/first/unique", oihw)}
BOTTLENECK = {**STEM, **FC, "layer2.0.conv2.weight": ("params/group2/block1/second/kernel", oihw),
              "layer4.2.conv1.weight": ("params/group4/block3/first/kernel", oihw),
              "layer4.0.conv3.weight": ("params/group4/block1/third/kernel", oihw),
              "layer3.4.bn3.weight": ("params/group3/block5/third_norm/scale", same),
              "layer3.4.bn2.running_var": ("batch_stats/group3/block5/second_norm/var", same)}
DENSE_PLAIN = ((0, "input_norm/scale", same), (2, "first/kernel", oihw), (3, "first_norm/scale", same),
               (5, "second/kernel", oihw))
DENSE_SHARED = (("bn0", "input_norm/scale", same), ("conv1", "first/kernel", oihw), ("bn1", "first_norm/scale", same),
                ("basis_conv2", "second/unique", oihw), ("basis_bn2", "second/norm/scale", same),
                ("coeff_conv2", "second/coefficients", matrix))
DENSE = {**LINEAR, "conv1.weight": STEM["conv1.weight"],
         "features.transition_layer_0.down_sample.0.bias": ("params/transition1_norm/bias", same),
         "features.transition_layer_2.down_sample.1.weight": ("params/transition3/kernel", oihw),
         "features.bn.running_mean": ("batch_stats/final_norm/mean", same)}
RESNEXT = {**STEM, **LINEAR, **PROJECTION, **{
    f"layer2.0.residual_function.{index}.weight": (f"params/group2/block1/{layer}", layout)
    for index, layer, layout in ((0, "first/kernel", oihw), (1, "first_norm/scale", same), (3, "second/kernel", oihw),
                                 (4, "second_norm/scale", same), (6, "third/kernel", oihw),
                                 (7, "third_norm/scale", same))}}
RESNEXT_SHARED = {**RESNEXT, "shared_basis_4.weight": ("params/bases/group4/shared", oihw), **{
    f"layer3.5.{name}.weight": (f"params/group3/block6/{layer}", layout)
    for name, layer, layout in (("conv1", "first/kernel", oihw), ("bn1", "first_norm/scale", same),
                                ("basis_conv2", "second/unique", oihw), ("bn2", "second/norm/scale", same),
                                ("conv3", "second/coefficients", matrix), ("bn3", "third_norm/scale", same))}}
MOBILE = {"pre.0.weight": ("params/stem/kernel", oihw), "pre.0.bias": ("params/stem/bias", same),
          "pre.1.bias": ("params/stem_norm/bias", same), "conv1.0.weight": ("params/neck/kernel", oihw),
          "conv1.0.bias": ("params/neck/bias", same), "conv1.1.running_var": ("batch_stats/neck_norm/var", same),
          "stage1.conv1.weight": ("params/stage1/block1/first/kernel", oihw),
          "stage7.conv3.weight": ("params/stage7/block1/third/kernel", oihw),
          "stage4.3.conv2.weight": ("params/stage4/block4/second/kernel", oihw),
          "stage6.2.bn3.weight": ("params/stage6/block3/third_norm/scale", same),
          "stage2.1.conv1.weight": ("params/stage2/block2/first/kernel", oihw)}
MOBILE_CIFAR = {**MOBILE, "conv2.weight": ("params/head/kernel", matrix), "conv2.bias": ("params/head/bias", same),
                "stage1.shortcut.0.weight": ("params/stage1/block1/shortcut/kernel", oihw),
                "stage6.0.shortcut.1.weight": ("params/stage6/block1/shortcut_norm/scale", same)}
MOBILE_IMAGENET = {**MOBILE, "classifier.1.weight": ("params/head/kernel", matrix),
                   "classifier.1.bias": ("params/head/bias", same)}
MOBILE_SHARED = {"shared_basis_1.weight": ("params/bases/stage3/first", oihw),
                 "shared_basis_4.weight": ("params/bases/stage6/first", oihw),
                 "stage5.1.conv3.weight": ("params/stage5/block2/third/kernel", oihw)}
MOBILE_SHARED_TWICE = {"shared_basis_2_1.weight": ("params/bases/stage4/first", oihw),
                       "shared_basis_3_2.weight": ("params/bases/stage5/third", oihw)}

CASES = {
    "resnet18": Case(
        "resnet18", "cifar", functools.partial(basic_resnet, D18, 100, 3), 11_220_132, {**BASIC, **PROJECTION}),
    "resnet34": Case(
        "resnet34", "imagenet", functools.partial(basic_resnet, D34, 1000, 7), 21_797_672, {**BASIC, **PROJECTION}),
    "resnet34-single": Case(
        "resnet34-s32u1", "cifar", functools.partial(basic_resnet, D34, 100, 3, s=32, u=1), 7_726_676,
        {**BASIC, **PROJECTION, **COEFFICIENTS, **UNIQUE,
         "shared_basis_3.weight": ("params/bases/group3/shared", oihw)}),
    "resnet34-shared-only": Case(
        "resnet34-s32u0", "cifar", functools.partial(basic_resnet, D34, 100, 3, s=32), 7_442_340,
        {**BASIC, **COEFFICIENTS, "shared_basis_4.weight": ("params/bases/group4/shared", oihw)}),
    "resnet34-non-shared": Case(
        "resnet34-s0u32", "cifar", functools.partial(basic_resnet, D34, 100, 3, u=32), 14_059_428,
        {**BASIC, **COEFFICIENTS, **UNIQUE}),
    "resnet34-double": Case(
        "resnet34-s32u1-double", "imagenet", functools.partial(basic_resnet, D34, 1000, 7, s=32, u=1, double=True),
        9_762_776, {**BASIC, **COEFFICIENTS, **UNIQUE, "shared_basis_3_1.weight": ("params/bases/group3/first", oihw),
                    "shared_basis_3_2.weight": ("params/bases/group3/second", oihw)}),
    "resnet50": Case(
        "resnet50", "imagenet", functools.partial(bottleneck_resnet, D50, 1000, 7), 25_557_032,
        {**BOTTLENECK, **PROJECTION, "layer2.3.conv2.weight": ("params/group2/block4/second/kernel", oihw),
         "layer2.3.conv3.weight": ("params/group2/block4/third/kernel", oihw)}),
    "resnet50-shared": Case(
        "resnet50-shared", "imagenet", functools.partial(bottleneck_resnet, D50, 1000, 7, shared=1), 20_506_664,
        {**BOTTLENECK, "shared_basis_2.weight": ("params/bases/group2/second", oihw),
         "layer2.3.conv3.weight": ("params/group2/block4/third/kernel", oihw)}),
    "resnet50-shared++": Case(
        "resnet50-shared++", "imagenet", functools.partial(bottleneck_resnet, D50, 1000, 7, shared=2), 18_262_056,
        {**BOTTLENECK, "shared_basis_2_1.weight": ("params/bases/group2/second", oihw),
         "shared_basis_2_2.weight": ("params/bases/group2/third", oihw)}),
    "resnet101-shared++": Case(
        "resnet101-shared++", "imagenet", functools.partial(bottleneck_resnet, D101, 1000, 7, shared=2), 22_770_728,
        {**BOTTLENECK, "layer3.22.conv1.weight": ("params/group3/block23/first/kernel", oihw)}),
    "densenet121": Case(
        "densenet121", "cifar", functools.partial(densenet, 100), 7_048_548, {**DENSE, **{
            f"features.{block}.bottle_neck_layer_7.residual_function.{index}.weight": (f"params/{ours}/{layer}", layout)
            for block, ours in (("dense_block_layer_2", "group3/block8"), ("dense_block3", "group4/block8"))
            for index, layer, layout in DENSE_PLAIN}}),
    "densenet121-shared": Case(
        "densenet121-s64u4", "cifar", functools.partial(densenet, 100, s=64, u=4), 5_606_708, {
            **DENSE, "shared_basis_3.weight": ("params/bases/group3/shared", oihw),
            "shared_basis_1.weight": ("params/bases/group1/shared", oihw), **{
                f"features.dense_block_layer_{g}.bottle_neck_layer_0.{name}.weight":
                (f"params/group{g + 1}/block1/{layer}", layout)
                for g in (0, 3) for name, layer, layout in DENSE_SHARED}}),
    "resnext50": Case(
        "resnext50_32x4d", "cifar", functools.partial(resnext, 100), 23_177_124,
        {**RESNEXT, "layer3.5.residual_function.3.weight": ("params/group3/block6/second/kernel", oihw)}),
    "resnext50-s64u4": Case(
        "resnext50_32x4d-s64u4", "cifar", functools.partial(resnext, 100, s=64, u=4), 19_333_380, RESNEXT_SHARED),
    "resnext50-s16u4": Case(
        "resnext50_32x4d-s16u4", "cifar", functools.partial(resnext, 100, s=16, u=4), 16_601_220, RESNEXT_SHARED),
    "mobilenetv2": Case(
        "mobilenetv2", "cifar", functools.partial(mobilenet, 100), 2_428_004, MOBILE_CIFAR),
    "mobilenetv2-shared": Case(
        "mobilenetv2-shared", "cifar", functools.partial(mobilenet, 100, shared=1), 2_163_812,
        {**MOBILE_CIFAR, **MOBILE_SHARED}),
    "mobilenetv2-shared++": Case(
        "mobilenetv2-shared++", "cifar", functools.partial(mobilenet, 100, shared=2), 1_899_620,
        {**MOBILE_CIFAR, **MOBILE_SHARED_TWICE}),
    "mobilenetv2-imagenet": Case(
        "mobilenetv2", "imagenet", functools.partial(mobilenet, 1000, cifar=False), 3_507_272, MOBILE_IMAGENET),
    "mobilenetv2-shared++-imagenet": Case(
        "mobilenetv2-shared++", "imagenet", functools.partial(mobilenet, 1000, cifar=False, shared=2), 2_978_888,
        {**MOBILE_IMAGENET, **MOBILE_SHARED_TWICE}),
    "torchvision-resnet18": Case(
        "resnet18", "imagenet", functools.partial(basic_resnet, D18, 1000, 7, project=DOWNSAMPLE), 11_689_512,
        {**BASIC, **TORCHVISION_PROJECTION}),
    "torchvision-resnet34": Case(
        "resnet34", "imagenet", functools.partial(basic_resnet, D34, 1000, 7, project=DOWNSAMPLE), 21_797_672,
        {**BASIC, **TORCHVISION_PROJECTION}),
    "torchvision-resnet50": Case(
        "resnet50", "imagenet", functools.partial(bottleneck_resnet, D50, 1000, 7, project=DOWNSAMPLE), 25_557_032,
        {**BOTTLENECK, **TORCHVISION_PROJECTION}),
    "torchvision-resnet101": Case(
        "resnet101", "imagenet", functools.partial(bottleneck_resnet, D101, 1000, 7, project=DOWNSAMPLE), 44_549_160,
        {**BOTTLENECK, **TORCHVISION_PROJECTION}),
    "torchvision-mobilenetv2": Case(
        "mobilenetv2", "imagenet", functools.partial(torchvision_mobilenet, 1000), 3_504_872, {
            "features.0.0.weight": ("params/stem/kernel", oihw),
            "features.0.1.running_var": ("batch_stats/stem_norm/var", same),
            "features.1.conv.0.0.weight": ("params/stage1/block1/second/kernel", oihw),
            "features.1.conv.0.1.bias": ("params/stage1/block1/second_norm/bias", same),
            "features.1.conv.1.weight": ("params/stage1/block1/third/kernel", oihw),
            "features.1.conv.2.running_mean": ("batch_stats/stage1/block1/third_norm/mean", same),
            "features.2.conv.0.0.weight": ("params/stage2/block1/first/kernel", oihw),
            "features.4.conv.0.1.weight": ("params/stage3/block1/first_norm/scale", same),
            "features.9.conv.1.0.weight": ("params/stage4/block3/second/kernel", oihw),
            "features.13.conv.1.1.weight": ("params/stage5/block3/second_norm/scale", same),
            "features.14.conv.2.weight": ("params/stage6/block1/third/kernel", oihw),
            "features.17.conv.3.weight": ("params/stage7/block1/third_norm/scale", same),
            "features.18.0.weight": ("params/neck/kernel", oihw),
            "features.18.1.running_mean": ("batch_stats/neck_norm/mean", same),
            "classifier.1.weight": ("params/head/kernel", matrix), "classifier.1.bias": ("params/head/bias", same),
        }, added=ADDED),
    "timm-mobilenetv2": Case(
        "mobilenetv2", "imagenet", functools.partial(timm_mobilenet, 1000), 3_504_872, {
            "conv_stem.weight": ("params/stem/kernel", oihw), "bn1.running_var": ("batch_stats/stem_norm/var", same),
            "blocks.0.0.conv_dw.weight": ("params/stage1/block1/second/kernel", oihw),
            "blocks.0.0.bn1.bias": ("params/stage1/block1/second_norm/bias", same),
            "blocks.0.0.conv_pw.weight": ("params/stage1/block1/third/kernel", oihw),
            "blocks.0.0.bn2.running_mean": ("batch_stats/stage1/block1/third_norm/mean", same),
            "blocks.1.0.conv_pw.weight": ("params/stage2/block1/first/kernel", oihw),
            "blocks.3.2.conv_dw.weight": ("params/stage4/block3/second/kernel", oihw),
            "blocks.4.2.bn2.weight": ("params/stage5/block3/second_norm/scale", same),
            "blocks.5.0.conv_pwl.weight": ("params/stage6/block1/third/kernel", oihw),
            "blocks.6.0.bn3.weight": ("params/stage7/block1/third_norm/scale", same),
            "conv_head.weight": ("params/neck/kernel", oihw), "bn2.running_mean": (
                "batch_stats/neck_norm/mean", same),
            "classifier.weight": ("params/head/kernel", matrix), "classifier.bias": ("params/head/bias", same),
        }, added=ADDED),
}


class Published:
    """A state dict with random values, and the network that it holds."""

    def __init__(self, case):
        self.case = case
        self.aliases, self.tensors = {}, {}
        rng = np.random.default_rng(0)
        for name, shape in case.modules():
            assert name not in self.tensors
            if isinstance(shape, str):
                self.aliases[name] = shape
                self.tensors[name] = self.tensors[shape]  # the same array, as in PyTorch
            elif name.endswith("num_batches_tracked"):
                self.tensors[name] = np.array(1000)
            else:
                self.tensors[name] = rng.random(shape, np.float32)
        classes = 1000 if case.stem == "imagenet" else 100
        self.model = create_model(case.name, num_classes=classes, stem=case.stem)

    def convert(self, **changes):
        return convert(self.tensors | changes, self.model)

    def sample(self, salt, count):
        """Returns names of a few tensors, always the same ones."""
        names = [name for name in self.tensors if not name.endswith("num_batches_tracked") and not self.unused(name)]
        rng = np.random.default_rng(zlib.crc32(f"{salt} {self.case.name} {self.case.stem} {len(names)}".encode()))
        return [names[index] for index in rng.choice(len(names), count, replace=False)]

    def names(self, message, name):
        """Tells whether the message names the tensor."""
        return name in message

    def unused(self, name):
        """Tells whether the official network has the tensor and uses another one: DenseNet's fourth basis."""
        return self.case.modules.func is densenet and name == "shared_basis_4.weight"


traced = functools.cache(lambda model: abstract_variables(model, (32, 32, 3)))


def convert(tensors, model):
    """Converts; the network is traced once only, which takes longer than all the rest."""
    return convert_official({name: tensor for name, tensor in tensors.items() if tensor is not None}, model,
                            traced(model))


def refusal(tensors, model):
    with pytest.raises(UserError) as caught:
        convert(tensors, model)
    return str(caught.value)


ONE_OF_EACH_LAYOUT = (
    "resnet34-single", "resnet34-double", "resnet50-shared++", "densenet121", "densenet121-shared", "resnext50",
    "resnext50-s16u4", "mobilenetv2-shared", "mobilenetv2-shared++-imagenet", "torchvision-resnet18",
    "torchvision-mobilenetv2", "timm-mobilenetv2")
"""The others differ from one of them in depth, classes or stem."""


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=[] if name in ONE_OF_EACH_LAYOUT else pytest.mark.slow) for name in CASES])
def published(request):
    return Published(CASES[request.param])


@functools.cache
def densenet_file():
    return Published(CASES["densenet121-shared"])


def at(variables, path):
    return functools.reduce(lambda tree, key: tree[key], path.split("/"), variables)


def fingerprint(array):
    return array.size, float(array.min()), float(array.max())


# Every tensor has its place


def test_every_tensor_goes_to_its_place_and_every_variable_is_filled(published):
    case, tensors = published.case, published.tensors
    variables = published.convert()
    for name, (path, layout) in case.places.items():
        np.testing.assert_array_equal(at(variables, path), layout(tensors[name]), err_msg=name)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}

    # No two tensors have the same values, so that these sets match only if the mapping is one to one.
    owned = {name: tensor for name, tensor in tensors.items()
             if name not in published.aliases and not name.endswith("num_batches_tracked")}
    found = [fingerprint(leaf) for leaf in jax.tree.leaves(variables)]
    expected = {fingerprint(tensor) for name, tensor in owned.items() if not published.unused(name)}
    assert len(expected) == len(owned) - any(map(published.unused, owned))
    assert expected <= set(found)
    assert len(found) == len(owned) + (7 if case.added else 0)  # an identity, its norm's 4, two biases

    counted = sum(tensor.size for name, tensor in owned.items() if "running" not in name)
    assert counted == case.parameters
    assert sum(count_parameters(variables["params"]).values()) == case.parameters + case.added


WRITTEN_AS = {"resnet34": "torchvision-resnet34", "resnet50": "torchvision-resnet50",
              "timm-mobilenetv2": "torchvision-mobilenetv2"}
"""Files of networks that torchvision has too: they are written in its layout."""


def test_what_is_written_is_the_file_again(published):
    case = next(name for name, case in CASES.items() if case is published.case)
    written = to_published(published.convert(), published.model, 1000)
    expected = dict(published.tensors)
    if case in WRITTEN_AS:
        theirs = [name for name, _ in CASES[WRITTEN_AS[case]].modules()]
        assert sorted(written) == sorted(theirs)
        jax.tree.map(np.testing.assert_array_equal, convert(written, published.model), published.convert())
        return
    for name in filter(published.unused, expected):
        expected[name] = expected["shared_basis_3.weight"]
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].shape == tensor.shape, name
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_a_trained_mobilenetv2_is_written_in_the_official_layout():
    file = Published(CASES["torchvision-mobilenetv2"])
    variables = file.convert()
    variables["params"]["stage1"]["block1"]["first"]["kernel"] *= 1.5  # which torchvision has no place for
    written = to_published(variables, file.model)
    assert sorted(written) == sorted(name for name, _ in CASES["mobilenetv2-imagenet"].modules())
    jax.tree.map(np.testing.assert_array_equal, convert(written, file.model), variables)


# A tensor too few, too many, or of another shape


def test_a_missing_tensor_is_named(published):
    names = [*published.sample("missing", 6), *list(published.aliases)[::7][:4]]
    for name in names:
        assert published.names(refusal(published.tensors | {name: None}, published.model), f"{name!r}")


def test_counts_of_batches_are_optional(published):
    counts = {name: None for name in published.tensors if name.endswith("num_batches_tracked")}
    some = dict.fromkeys(list(counts)[::2])
    complete = published.convert()
    for without in (some, counts):
        jax.tree.map(np.testing.assert_array_equal, published.convert(**without), complete)


def test_an_additional_tensor_is_named(published):
    tensors = published.tensors
    kernel = next(name for name in reversed(tensors) if tensors[name].ndim == 4)
    layer = kernel.removesuffix(".weight")
    head = "linear" if "fc.weight" in tensors else "fc"
    for name in (f"{layer}.bias2", f"{layer}.num_batches_tracked", f"{head}.weight", "shared_basis_5.weight",
                 "layer1.0.shared_basis.weight", "stage3.0.shared_basis1.weight"):
        assert name not in tensors
        assert published.names(refusal(tensors | {name: tensors[kernel]}, published.model), name)


def test_a_misshapen_tensor_is_named(published):
    for name in published.sample("misshapen", 5):
        tensor = published.tensors[name]
        wrong = [tensor[1:], np.concatenate([tensor, tensor[:1]])]
        if tensor.ndim == 1:
            wrong.append(tensor[:, None])
        else:
            wrong += [tensor[:, 1:], tensor[..., None]]
            wrong += [tensor.swapaxes(0, 1)] if tensor.shape[0] != tensor.shape[1] else []
        wrong += [tensor[:, :, :1, :1] if tensor.shape[-1] > 1 else np.tile(tensor, (3, 3))] if tensor.ndim == 4 else []
        for array in wrong:
            changes = {other: array for other, value in published.tensors.items() if value is tensor}  # aliases too
            message = refusal(published.tensors | changes, published.model)
            assert published.names(message, f"{published.aliases.get(name, name)!r}")


def test_an_alias_that_differs_is_named(published):
    for name in list(published.aliases)[::3]:
        changed = published.tensors[name].copy()
        changed.flat[-1] += 1
        message = refusal(published.tensors | {name: changed}, published.model)
        assert message.startswith(f"tensor {name!r} differs from ")
    for owner in list(dict.fromkeys(published.aliases.values()))[::2]:
        assert f"{owner!r}" in refusal(published.tensors | {owner: published.tensors[owner] + 1}, published.model)


@pytest.mark.parametrize(("file", "name", "stem", "named"), [
    ("resnet18", "resnet34", "cifar", "'layer1.2.bn1.running_mean'"),
    ("resnet34-single", "resnet34-s32u1-double", "cifar", "'shared_basis_1_1.weight'"),
    ("resnet50-shared", "resnet50-shared++", "imagenet", "'shared_basis_1_1.weight'"),
    ("resnext50-s16u4", "resnext50_32x4d-s32u4", "cifar", "'layer1.1.bn2.running_mean'"),
    ("mobilenetv2", "mobilenetv2-shared", "cifar", "'shared_basis_1.weight'"),
    ("mobilenetv2-shared", "mobilenetv2-shared++", "cifar", "'shared_basis_1_1.weight'"),
    ("mobilenetv2", "mobilenetv2", "imagenet", "'pre.0.weight'"),
    ("torchvision-mobilenetv2", "mobilenetv2-shared", "imagenet", "'shared_basis_1.weight'"),
])
def test_the_file_of_another_network_is_refused(file, name, stem, named):
    tensors = Published(CASES[file]).tensors
    classes = 1000 if CASES[file].stem == "imagenet" else 100
    assert named in refusal(tensors, create_model(name, num_classes=classes, stem=stem))


# DenseNet's fourth basis

FOURTH = "features.dense_block_layer_3.bottle_neck_layer_{}.shared_basis.weight"


def fourth_uses(tensor, layers=range(16)):
    return {FOURTH.format(j): tensor for j in layers}


def test_the_fourth_block_of_densenet_owns_a_copy_of_the_third_basis():
    file = densenet_file()
    bases = file.convert()["params"]["bases"]
    np.testing.assert_array_equal(bases["group4"]["shared"], oihw(file.tensors["shared_basis_3.weight"]))
    assert not np.array_equal(bases["group4"]["shared"], oihw(file.tensors["shared_basis_4.weight"]))


def test_a_densenet_whose_fourth_block_uses_the_fourth_basis_loads_as_it_is():
    file = densenet_file()
    bases = file.convert(**fourth_uses(file.tensors["shared_basis_4.weight"]))["params"]["bases"]
    for number in (1, 2, 3, 4):
        expected = oihw(file.tensors[f"shared_basis_{number}.weight"])
        np.testing.assert_array_equal(bases[f"group{number}"]["shared"], expected)


@pytest.mark.parametrize("layers", [[0], [15], range(1, 16)])
@pytest.mark.parametrize("usual", ["shared_basis_3.weight", "shared_basis_4.weight"])
def test_a_densenet_whose_fourth_block_uses_two_bases_is_refused(usual, layers):
    file = densenet_file()
    other = {"shared_basis_3.weight": "shared_basis_4.weight", "shared_basis_4.weight": "shared_basis_3.weight"}[usual]
    changes = fourth_uses(file.tensors[usual]) | fourth_uses(file.tensors[other], layers)
    message = refusal(file.tensors | changes, file.model)
    assert "features.dense_block_layer_3.bottle_neck_layer_" in message
    assert "differs" in message


def test_a_densenet_whose_fourth_block_uses_neither_basis_is_refused():
    file = densenet_file()
    for strange in (file.tensors["shared_basis_1.weight"], file.tensors["shared_basis_3.weight"] + 1):
        message = refusal(file.tensors | fourth_uses(strange), file.model)
        assert message.startswith(f"tensor {FOURTH.format(0)!r} differs from ")


# torchvision's MobileNetV2


def test_torchvision_s_first_stage_has_an_identity_and_biases_of_zero():
    variables = Published(CASES["torchvision-mobilenetv2"]).convert()
    params, stats = variables["params"], variables["batch_stats"]
    block, statistics = params["stage1"]["block1"], stats["stage1"]["block1"]["first_norm"]
    np.testing.assert_array_equal(block["first"]["kernel"], np.eye(32)[None, None])
    assert not params["stem"]["bias"].any()
    assert not params["neck"]["bias"].any()
    x = np.linspace(0, 6, 32)
    normalised = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    np.testing.assert_allclose(normalised * block["first_norm"]["scale"] + block["first_norm"]["bias"], x, rtol=1e-6)


@pytest.mark.parametrize(("name", "value"), [
    ("features.6.conv.3.bias", None), ("features.6.conv.3.bias", np.zeros(3)), ("features.18.0.bias2", np.zeros(3)),
    ("pre.0.weight", np.zeros(3)), ("pre.0.bias", np.zeros(3)), ("stage1.conv1.weight", np.zeros(3)),
])
def test_what_is_wrong_with_torchvision_s_tensors_is_said_by_their_own_names(name, value):
    file = Published(CASES["torchvision-mobilenetv2"])
    others = {other: tensor for other, tensor in file.tensors.items() if other != name}
    assert name in refusal({name: value} | others, file.model)


class StageIsReachedError(Exception):
    """Ends a pass early; its argument is the output of the first stage."""


def test_stem_and_first_stage_compute_what_torchvision_s_do():
    file = Published(CASES["torchvision-mobilenetv2"])
    rng = np.random.default_rng(1)
    for name, tensor in file.tensors.items():
        if name.startswith(("features.0.", "features.1.")) and tensor.ndim:
            scale = math.prod(tensor.shape[1:]) ** -0.5 if tensor.ndim > 1 else 0.2
            positive = tensor.ndim == 1 and name.endswith(("weight", "running_var"))
            file.tensors[name] = rng.normal(0, scale, tensor.shape)
            if positive:
                file.tensors[name] = np.abs(1 + file.tensors[name])
    images = rng.normal(size=(2, 12, 12, 3)).astype(np.float32)

    def stop(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.module.path == ("stage1",) and context.method_name == "__call__":
            raise StageIsReachedError(result)
        return result
    variables = file.convert()  # which traces the network itself
    with nn.intercept_methods(stop), pytest.raises(StageIsReachedError) as caught:
        file.model.apply(variables, jnp.asarray(images), train=False)
    found = caught.value.args[0]

    def convolve(x, name, strides=1):
        """Convolves `x [N, H, W, C]` with padding; a weight of one input channel is depthwise."""
        weight = file.tensors[f"{name}.weight"]
        size = weight.shape[-1]
        x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::strides, ::strides]
        if weight.shape[1] == 1:
            return np.einsum("nhwcij,cij->nhwc", windows, weight[:, 0])
        return np.einsum("nhwcij,ocij->nhwo", windows, weight)

    def normalise(x, name):
        weight, bias, mean, var = (file.tensors[f"{name}.{leaf}"] for leaf in (
            "weight", "bias", "running_mean", "running_var"))
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    x = np.clip(normalise(convolve(images, "features.0.0", 2), "features.0.1"), 0, 6)
    x = np.maximum(normalise(convolve(x, "features.1.conv.0.0"), "features.1.conv.0.1"), 0)
    assert 1 < x.max() < 6  # where ReLU is ReLU6
    x = normalise(convolve(x, "features.1.conv.1"), "features.1.conv.2")
    assert found.shape == x.shape == (2, 6, 6, 16)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)
