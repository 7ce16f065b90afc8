"""A ResNet with shared bases as a PyTorch module that loads what --mode=export --format=pytorch writes.

    python examples/pytorch_resnet.py RUN/export/model.safetensors photo.jpg

It needs only torch, safetensors, pillow and numpy, so copy it into your own project. It covers ResNets of basic blocks
(resnet18, resnet20, resnet34, resnet56, ...), plain or with s<S>u<U> or s<S>u<U>-double, except the plain resnet18 and
resnet34, which are written in torchvision's layout. Modules are named as in the official implementation, and the shapes
of the state dict determine the network. `torch.nn` trains it like any other module: a shared basis is one parameter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional


def convolution(tensors: Mapping[str, Tensor], name: str, stride: int = 1) -> nn.Conv2d:
    """Returns a convolution of the shape of `name` in the state dict."""
    outputs, inputs, size, _ = tensors[f"{name}.weight"].shape
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def normalization(tensors: Mapping[str, Tensor], name: str) -> nn.BatchNorm2d:
    """Returns a batch normalisation of the size of `name` in the state dict."""
    return nn.BatchNorm2d(len(tensors[f"{name}.weight"]))


class Block(nn.Module):
    """Two 3×3 layers, each with a kernel of its own or through a basis, and a shortcut."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, stride: int, bases: Mapping[str, nn.Conv2d]) -> None:
        """`bases` are the shared bases of the group, by suffix: '' of both layers, or '_1' and '_2' of one each."""
        super().__init__()
        self.stride = stride
        self.through_basis = f"{prefix}.coeff_conv1.weight" in tensors
        for suffix, basis in bases.items():
            if self.through_basis:
                setattr(self, f"shared_basis{suffix}", basis)
        for layer, step in (("1", stride), ("2", 1)):
            if self.through_basis:
                if f"{prefix}.basis_conv{layer}.weight" in tensors:  # unique elements
                    setattr(self, f"basis_conv{layer}", convolution(tensors, f"{prefix}.basis_conv{layer}"))
                setattr(self, f"basis_bn{layer}", normalization(tensors, f"{prefix}.basis_bn{layer}"))
                setattr(self, f"coeff_conv{layer}", convolution(tensors, f"{prefix}.coeff_conv{layer}"))
            else:
                setattr(self, f"conv{layer}", convolution(tensors, f"{prefix}.conv{layer}", step))
            setattr(self, f"bn{layer}", normalization(tensors, f"{prefix}.bn{layer}"))
        self.shortcut = nn.Sequential()
        if f"{prefix}.shortcut.0.weight" in tensors:
            self.shortcut = nn.Sequential(convolution(tensors, f"{prefix}.shortcut.0", stride),
                                          normalization(tensors, f"{prefix}.shortcut.1"))

    def layer(self, x: Tensor, layer: str) -> Tensor:
        """Applies layer '1' or '2' and the batch normalisation that follows."""
        modules: dict[str, Any] = dict(self.named_children())
        if self.through_basis:
            names = f"basis_conv{layer}", "shared_basis", f"shared_basis_{layer}"  # unique elements come first
            x = torch.cat([modules[name](x) for name in names if name in modules], 1)
            x = modules[f"coeff_conv{layer}"](modules[f"basis_bn{layer}"](x))
        else:
            x = modules[f"conv{layer}"](x)
        y: Tensor = modules[f"bn{layer}"](x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C, H, W]` to `[N, T, H / stride, W / stride]`."""
        y = self.layer(functional.relu(self.layer(x, "1")), "2")
        x = self.shortcut(x)
        if x.shape != y.shape:  # no parameters: every second pixel, and zeros for the channels that are missing
            x = x[:, :, ::self.stride, ::self.stride]
            missing = y.shape[1] - x.shape[1]
            x = functional.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """A ResNet of the depth, width and sharing that `tensors`, a state dict, has."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises KeyError for the state dict of another architecture."""
        super().__init__()
        size = tensors["conv1.weight"].shape[-1]
        self.conv1, self.bn1 = convolution(tensors, "conv1", 2 if size == 7 else 1), normalization(tensors, "bn1")
        self.pool = nn.MaxPool2d(3, 2, 1) if size == 7 else nn.Identity()  # the stem for images of 224×224
        self.groups = 0
        while f"layer{self.groups + 1}.0.bn1.weight" in tensors:
            self.groups += 1
            group = f"layer{self.groups}"
            bases = {suffix: convolution(tensors, f"shared_basis_{self.groups}{suffix}") for suffix in ("", "_1", "_2")
                     if f"shared_basis_{self.groups}{suffix}.weight" in tensors}
            for suffix, basis in bases.items():
                setattr(self, f"shared_basis_{self.groups}{suffix}", basis)
            blocks: list[Block] = []
            while f"{group}.{len(blocks)}.bn1.weight" in tensors:
                stride = 2 if self.groups > 1 and not blocks else 1
                blocks.append(Block(tensors, f"{group}.{len(blocks)}", stride, bases))
            setattr(self, group, nn.Sequential(*blocks))
        classes, features = tensors["fc.weight"].shape
        self.fc = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images `[N, 3, H, W]` to logits `[N, classes]`."""
        x = self.pool(functional.relu(self.bn1(self.conv1(images))))
        for group in range(1, self.groups + 1):
            x = self.get_submodule(f"layer{group}")(x)
        return self.fc(x.mean((2, 3)))


def load(path: str) -> tuple[ResNet, dict[str, Any]]:
    """Returns the network in the file `path`, in evaluation mode, and the file's metadata."""
    tensors = load_file(path)
    network = ResNet(tensors)
    network.load_state_dict(tensors, strict=True)
    with safe_open(path, "pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
    return network.eval(), about


def read(path: str, about: Mapping[str, Any]) -> Tensor:
    """Returns the image file `path` as the network's input `[1, C, H, W]`: cropped, resized and normalised."""
    to = about["resize"]
    image: Image.Image = Image.open(path)
    sideways = image.getexif().get(0x0112, 1) >= 5  # turned by its EXIF orientation
    width, height = image.size[::-1] if sideways else image.size
    rows = min(height, width * to["height"] / to["width"]) * to["part"]  # of the central box
    columns = min(rows * to["width"] / to["height"], width)
    enough = min(rows / to["height"], columns / to["width"]) / 2  # large JPEG files are decoded at 1/2, 1/4 or 1/8
    by = next((n for n in (8, 4, 2) if n <= enough), 1) if image.format in ("JPEG", "MPO") else 1
    if by > 1:
        image.draft(image.mode, (image.width // by, image.height // by))
    image = ImageOps.exif_transpose(image).convert(to["color"])
    box = ((width - columns) / 2, (height - rows) / 2, (width + columns) / 2, (height + rows) / 2)
    left, top, right, bottom = (side / by for side in box)
    image = image.resize((to["width"], to["height"]), Image.Resampling.BILINEAR,
                         box=(left, top, min(right, image.width), min(bottom, image.height)))
    pixels = np.asarray(image, np.float32).reshape(to["height"], to["width"], -1) / 255
    return torch.from_numpy(((pixels - np.float32(about["mean"])) / np.float32(about["std"])).transpose(2, 0, 1)[None])


def main() -> None:
    """Prints the most probable class of each image."""
    network, about = load(sys.argv[1])
    for path in sys.argv[2:]:
        with torch.inference_mode():
            probabilities = network(read(path, about)).softmax(-1)[0]
        best = int(probabilities.argmax())
        print(f"{path}  {about['classes'][best]} {100 * float(probabilities[best]):.1f} %")


if __name__ == "__main__":
    main()
