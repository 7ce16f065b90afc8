"""The compact networks beside PyTorch: imports of torchvision's and timm's layouts, and logits.

By default the networks of PyTorch are written here, in those layouts. By hand, with the real ones:

    SHARED_BASIS_TORCHVISION=PYTHON python -m pytest -m slow -s tests/models/test_compact_pytorch.py

where PYTHON is a Python that has torch, torchvision and timm. On 2026-11-26, with torch 2.14.1, torchvision 0.29.1 and
timm 1.0.31, on networks with random weights (activations stay below 6, at which timm's MobileNetV1 clips), it printed:

    torchvision shufflenet_v2_x0_5: 1,366,792 parameters, logits differ by 4.5e-08, the largest is 0.11
    torchvision shufflenet_v2_x1_0: 2,278,604 parameters, logits differ by 4.5e-08, the largest is 0.123
    torchvision shufflenet_v2_x1_5: 3,503,624 parameters, logits differ by 6.0e-08, the largest is 0.119
    torchvision shufflenet_v2_x2_0: 7,393,996 parameters, logits differ by 4.8e-08, the largest is 0.0831
    torchvision efficientnet_b0: 5,288,548 parameters, logits differ by 2.8e-08, the largest is 0.055
    timm efficientnet_b0: 5,288,548 parameters, logits differ by 4.7e-08, the largest is 0.0821
    timm mobilenetv1_100: 4,231,976 parameters, logits differ by 1.1e-07, the largest is 0.167
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sample_networks import random_variables

from shared_basis import create_model
from shared_basis.errors import UserError
from shared_basis.interop.pytorch import convert_official, load_network, load_pytorch_weights, to_published
from shared_basis.models.base import Network, Sharing
from shared_basis.models.parameters import tree_size
from shared_basis.models.shufflenetv1 import ShuffleNetV1
from shared_basis.nn.ops import quick_compiler_options

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


def logits_of(model: Network, variables: Any, images: np.ndarray) -> np.ndarray:
    run = jax.jit(lambda v, x: model.apply(v, x, train=False), compiler_options=quick_compiler_options())
    return np.asarray(run(variables, jnp.asarray(images)))


def assert_close(actual: np.ndarray, desired: np.ndarray) -> None:
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-4 * max(1, float(np.abs(desired).max())))


def layers(inputs: int, outputs: int, size: int = 1, strides: int = 1, groups: int = 1, act: Any = None) -> list[Any]:
    conv = nn.Conv2d(inputs, outputs, size, strides, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([act()] if act else [])]


class Separable(nn.Module):
    """timm's block of MobileNet, by its names."""

    def __init__(self, inputs: int, outputs: int, strides: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = layers(inputs, inputs, 3, strides, inputs)
        self.conv_pw, self.bn2 = layers(inputs, outputs)

    def forward(self, x: Any) -> Any:
        return F.relu(self.bn2(self.conv_pw(F.relu(self.bn1(self.conv_dw(x))))))


class MobileNet(nn.Module):
    """MobileNet for large images, by timm's names."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = layers(3, width, 3, 2)
        inputs, stages = width, []
        for blocks, factor, strides in ((1, 2, 1), (2, 4, 2), (2, 8, 2), (6, 16, 2), (2, 32, 2)):
            stage = []
            for block in range(blocks):
                stage.append(Separable(inputs, factor * width, 1 if block else strides))
                inputs = factor * width
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Any) -> Any:
        return self.classifier(self.blocks(F.relu(self.bn1(self.conv_stem(x)))).mean((2, 3)))


class Unit(nn.Module):
    """torchvision's unit of ShuffleNet V2, by its names."""

    def __init__(self, inputs: int, outputs: int, strides: int) -> None:
        super().__init__()
        half = outputs // 2
        if strides > 1:
            self.branch1 = nn.Sequential(*layers(inputs, inputs, 3, 2, inputs), *layers(inputs, half, act=nn.ReLU))
        self.branch2 = nn.Sequential(
            *layers(inputs if strides > 1 else half, half, act=nn.ReLU), *layers(half, half, 3, strides, half),
            *layers(half, half, act=nn.ReLU))

    def forward(self, x: Any) -> Any:
        parts = (self.branch1(x), x) if hasattr(self, "branch1") else x.chunk(2, 1)
        return shuffle(torch.cat((parts[0], self.branch2(parts[1])), 1), 2)


def shuffle(x: Any, groups: int) -> Any:
    images, channels, height, width = x.shape
    return x.view(images, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class ShuffleNet(nn.Module):
    """ShuffleNet V2 for large images, by torchvision's names; it has fewer units."""

    def __init__(self, classes: int, width: int, neck: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*layers(3, 24, 3, 2, act=nn.ReLU))
        inputs = 24
        for stage, units in ((2, 3), (3, 2), (4, 1)):
            outputs = width << stage - 2
            setattr(self, f"stage{stage}", nn.Sequential(*(
                Unit(outputs if unit else inputs, outputs, 1 if unit else 2) for unit in range(units))))
            inputs = outputs
        self.conv5 = nn.Sequential(*layers(inputs, neck, act=nn.ReLU))
        self.fc = nn.Linear(neck, classes)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        return self.fc(self.conv5(self.stage4(self.stage3(self.stage2(x)))).mean((2, 3)))


class Excitation(nn.Module):
    """torchvision's squeeze and excitation, by its names."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Any) -> Any:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """torchvision's block of EfficientNet, by its names."""

    def __init__(self, inputs: int, outputs: int, strides: int, size: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.adds = strides == 1 and inputs == outputs
        self.block = nn.Sequential(
            *([nn.Sequential(*layers(inputs, inner, act=nn.SiLU))] if expansion > 1 else []),
            nn.Sequential(*layers(inner, inner, size, strides, inner, act=nn.SiLU)), Excitation(inner, inputs // 4),
            nn.Sequential(*layers(inner, outputs)))

    def forward(self, x: Any) -> Any:
        return x + self.block(x) if self.adds else self.block(x)


STAGES = ((1, 16, 1, 3, 1), (2, 24, 2, 3, 6), (3, 40, 2, 5, 6))
"""The first three stages of EfficientNet, the last with a block more, then the last convolution at `features.8`."""


class EfficientNet(nn.Module):
    """EfficientNet for large images, by torchvision's names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        features, inputs = {"0": nn.Sequential(*layers(3, 32, 3, 2, act=nn.SiLU))}, 32
        for s, (blocks, outputs, strides, size, expansion) in enumerate(STAGES, 1):
            features[str(s)] = nn.Sequential(*(
                MBConv(outputs if b else inputs, outputs, 1 if b else strides, size, expansion) for b in range(blocks)))
            inputs = outputs
        features["8"] = nn.Sequential(*layers(inputs, 1280, act=nn.SiLU))
        self.features = nn.ModuleDict(features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Any) -> Any:
        for part in self.features.values():
            x = part(x)
        return self.classifier(x.mean((2, 3)))


def model_of(name: str, **changes: Any) -> Network:
    return create_model(name, num_classes=10, stem="imagenet").clone(**changes)


PAIRS = {
    "mobilenetv1": (lambda: MobileNet(10, 8), lambda: model_of("mobilenetv1w8")),
    "shufflenetv2": (lambda: ShuffleNet(10, 16, 32),
                     lambda: model_of("shufflenetv2_x1_0w16", neck=32, units=(3, 2, 1))),
    "efficientnet": (lambda: EfficientNet(10), lambda: model_of("efficientnet_b0", stages=STAGES))}


def after_training(network: Any) -> Any:
    """Returns a network of PyTorch at evaluation, with values as after training."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0, (tensor.numel() / len(tensor)) ** -0.5, generator=generator)
        elif name.endswith(("running_var", "weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.3, generator=generator)
    return network.eval()


@pytest.mark.parametrize("name", PAIRS)
def test_a_state_dict_is_imported_and_gives_the_same_logits(name: str) -> None:
    make, ours = PAIRS[name]
    network, model = after_training(make()), ours()
    variables = convert_official({key: tensor.numpy() for key, tensor in network.state_dict().items()}, model)
    assert tree_size(variables["params"]) == sum(each.numel() for each in network.parameters())
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert_close(logits_of(model, variables, images), expected)


@pytest.mark.parametrize("form", ["", "-shared"])
@pytest.mark.parametrize(("name", "base"), [
    ("mobilenetv1", "mobilenetv1"), ("shufflenetv2", "shufflenetv2_x1_0"), ("efficientnet", "efficientnet_b0")])
def test_what_is_written_is_the_layout_that_is_read(name: str, base: str, form: str) -> None:
    make, ours = PAIRS[name]
    model = ours().clone(sharing=create_model(base + form).sharing)
    variables = random_variables(model, (64, 64, 3))
    written = to_published(variables, model)
    if not form:
        assert set(written) == set(make().state_dict())
    read = convert_official(written, model)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read, variables))


def test_a_plain_file_is_read_for_a_network_with_bases_that_has_no_layout(tmp_path: Path) -> None:
    """As before a compression, or with --init."""
    network, plain = after_training(MobileNet(10, 8)), PAIRS["mobilenetv1"][1]()
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    factorised = plain.clone(sharing=Sharing((("second", "second"),), 2, 1))
    found, variables = load_network(tmp_path / "plain.pth", factorised, plain)
    assert found == plain
    expected = load_pytorch_weights(tmp_path / "plain.pth", plain)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, expected))
    with pytest.raises(UserError, match="no layout with bases has been published"):
        to_published(random_variables(factorised, (64, 64, 3)), factorised)


def test_timm_s_names_of_efficientnet_are_the_same_network() -> None:
    network, model = after_training(EfficientNet(10)), PAIRS["efficientnet"][1]()
    theirs = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    renamed = {timm_name(key): tensor for key, tensor in theirs.items()}
    assert len(renamed) == len(theirs)
    expected, found = convert_official(theirs, model), convert_official(renamed, model)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, found))
    missing = "blocks.0.0.conv_pw.weight"
    with pytest.raises(UserError, match=missing.replace(".", r"\.")):
        convert_official({key: tensor for key, tensor in renamed.items() if key != missing}, model)


def timm_name(name: str) -> str:
    """Returns timm's name of a tensor of `EfficientNet`."""
    top = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.8.0": "conv_head", "features.8.1": "bn2",
           "classifier.1": "classifier"}
    module, _, leaf = name.rpartition(".")
    if module in top:
        return f"{top[module]}.{leaf}"
    _, stage, block, _, *rest = module.split(".")
    inner = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2.fc1": "se.conv_reduce",
             "2.fc2": "se.conv_expand", "3.0": "conv_pwl", "3.1": "bn3"}
    if stage == "1":  # has no expansion
        inner = {"0.0": "conv_dw", "0.1": "bn1", "1.fc1": "se.conv_reduce", "1.fc2": "se.conv_expand",
                 "2.0": "conv_pw", "2.1": "bn2"}
    return f"blocks.{int(stage) - 1}.{block}.{inner['.'.join(rest)]}.{leaf}"


def test_what_a_file_lacks_is_named_as_in_the_file() -> None:
    network, model = after_training(EfficientNet(10)), PAIRS["efficientnet"][1]()
    tensors = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    first = "features.1.0.block.2.0.weight"
    with pytest.raises(UserError, match=first.replace(".", r"\.")):
        convert_official({key: tensor for key, tensor in tensors.items() if key != first}, model)
    for extra in ("features.1.0.block.9.weight", "features.1.0.block.3.0.weight"):
        with pytest.raises(UserError, match=f"unexpected tensors: {extra}"):
            convert_official({**tensors, extra: np.zeros(3)}, model)
    with pytest.raises(UserError, match="no layout with bases has been published"):
        convert_official(tensors, model.clone(sharing=Sharing((("first", "first"), ("third", "third")), 4, 1)))


def shufflenetv1(x: Any, params: Any, stats: Any, model: ShuffleNetV1) -> Any:
    """ShuffleNet V1 for large images, by functions of PyTorch on our arrays; figures 2(b) and (c) of the paper."""
    def conv(x: Any, path: list[str], strides: int = 1, groups: int = 1, padding: int = 0) -> Any:
        *parents, name = path
        inside, around = params, stats
        for key in parents:
            inside, around = inside[key], around[key]
        kernel = inside[name]["kernel"] if name in inside else params["bases"][parents[0]][name]
        weight = torch.from_numpy(np.ascontiguousarray(np.asarray(kernel).transpose(3, 2, 0, 1)))
        norm, moments = inside[f"{name}_norm"], around[f"{name}_norm"]
        arrays = [torch.from_numpy(np.asarray(each)) for each in (
            moments["mean"], moments["var"], norm["scale"], norm["bias"])]
        return F.batch_norm(F.conv2d(x, weight, None, strides, padding, groups=groups), *arrays)

    x = F.max_pool2d(F.relu(conv(x, ["stem"], 2, padding=1)), 3, 2, 1)
    for stage, (units, width) in model.stages().items():
        for unit in range(1, units + 1):
            block, strides = [stage, f"block{unit}"], 2 if unit == 1 else 1
            y = F.relu(conv(x, [*block, "first"], groups=1 if (stage, unit) == ("stage2", 1) else model.groups))
            y = conv(shuffle(y, model.groups), [*block, "second"], strides, width // 4, 1)
            y = conv(y, [*block, "third"], groups=model.groups)
            x = F.relu(torch.cat((F.avg_pool2d(x, 3, 2, 1), y), 1) if unit == 1 else x + y)
    head = [torch.from_numpy(np.asarray(params["head"][name])) for name in ("kernel", "bias")]
    return x.mean((2, 3)) @ head[0] + head[1]


@pytest.mark.parametrize("form", ["", "-shared++"])
def test_shufflenet_v1_gives_the_logits_of_its_blocks_in_pytorch(form: str) -> None:
    model = create_model(f"shufflenetv1_g3{form}", num_classes=10, stem="imagenet").clone(
        widths=(48, 96), units=(3, 2))
    variables = random_variables(model, (64, 64, 3))
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    expected = shufflenetv1(torch.from_numpy(images.transpose(0, 3, 1, 2)), variables["params"],
                            variables["batch_stats"], model).numpy()
    assert_close(logits_of(model, variables, images), expected)


# The real networks

_REAL = """
import sys
import numpy, torch
from safetensors.torch import save_file
library, name, path = sys.argv[1:]
torch.manual_seed(0)
if library == "timm":
    import timm
    network = timm.create_model(name, pretrained=False)
else:
    import torchvision
    network = torchvision.models.get_model(name, weights=None)
images = torch.randn(2, 3, 224, 224)
network.train()
with torch.no_grad():
    for _ in range(3):
        network(torch.randn(8, 3, 96, 96))
network.eval()
with torch.no_grad():
    logits = network(images)
save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path + ".safetensors")
numpy.savez(path + ".npz", images=images.numpy().transpose(0, 2, 3, 1), logits=logits.numpy())
"""
"""A network of a library after three passes that move its statistics, as a file, and its logits."""


SIZES = ("x0_5", "x1_0", "x1_5", "x2_0")
REAL = (*(("torchvision", f"shufflenet_v2_{size}", f"shufflenetv2_{size}") for size in SIZES),
        ("torchvision", "efficientnet_b0", "efficientnet_b0"), ("timm", "efficientnet_b0", "efficientnet_b0"),
        ("timm", "mobilenetv1_100", "mobilenetv1"))
"""Library, name there, name here."""


@pytest.mark.slow
@pytest.mark.parametrize(("library", "theirs", "ours"), REAL)
def test_the_real_networks_are_imported_and_give_their_logits(library: str, theirs: str, ours: str,
                                                              tmp_path: Path) -> None:
    python = os.environ.get("SHARED_BASIS_TORCHVISION")
    if not python:
        pytest.skip("name a Python with torch, torchvision, timm and safetensors in SHARED_BASIS_TORCHVISION")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", _REAL, library, theirs, str(tmp_path / "file")], check=False, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    model = create_model(ours, num_classes=1000, stem="imagenet")
    variables = load_pytorch_weights(tmp_path / "file.safetensors", model)
    with np.load(tmp_path / "file.npz") as arrays:
        images, expected = arrays["images"], arrays["logits"]
    difference, largest = np.abs(logits_of(model, variables, images) - expected).max(), np.abs(expected).max()
    print(f"{library} {theirs}: {tree_size(variables['params']):,} parameters, logits differ by {difference:.1e}, the "
          f"largest is {largest:.3g}", file=sys.__stdout__)
    assert difference < 1e-4 * largest
