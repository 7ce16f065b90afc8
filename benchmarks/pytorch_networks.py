"""The networks in PyTorch, as its users would write them, for comparison in `benchmarks.speed`.

Ordinary modules in NCHW; a shared basis is an `nn.Conv2d` that all blocks of a group except the first receive. Module
names correspond to this package's parameter names (`group1.1.first.unique.weight` is `group1/block2/first/unique`), so
that tests can compare the two.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pytorch_blocks import BasicBlock, BasisConv2d, Bottleneck, InvertedResidual, conv
from shared_basis.errors import UserError

SMALL = {f"resnet{depth}": ((depth - 2) // 6,) * 3 for depth in (14, 20, 32, 44, 56, 110)}
BASIC = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
BOTTLENECK = {"resnet50": (3, 4, 6, 3)}
STAGES = ((1, 16, 1, 1), (2, 24, 2, 6), (3, 32, 2, 6), (4, 64, 2, 6), (3, 96, 1, 6), (3, 160, 2, 6), (1, 320, 1, 6))
"""MobileNetV2, by stage: blocks, output channels, stride of the first block, and expansion."""
SHARING_STAGES = (3, 4, 5, 6)


@dataclasses.dataclass
class Elements:
    """Basis elements of one group that should be jointly orthonormal."""

    shared: list[nn.Conv2d]
    unique: list[nn.Conv2d] = dataclasses.field(default_factory=list)


class Network(nn.Module):
    """The base of the networks: owns the shared filters and defines which elements are penalised."""

    def __init__(self) -> None:
        super().__init__()
        self.bases = nn.ModuleDict()
        self.penalised: list[list[Elements]] = []
        """Families of groups; the penalty is averaged over the pairs of each family."""

    def share(self, group: str, filters: dict[str, nn.Conv2d]) -> None:
        """Registers `filters` as the shared ones of `group`."""
        self.bases[group] = nn.ModuleDict(filters)

    def initialise(self) -> None:
        """He initialisation of convolutions; orthonormal bases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        for module in self.bases.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)

    def penalise_each(self) -> None:
        """Makes each kind of shared filters a family, as published for shared whole layers."""
        kinds: dict[str, list[Elements]] = {}
        for named in self.bases.values():
            for kind, filters in named.items():  # type: ignore[operator]
                kinds.setdefault(kind, []).append(Elements([filters]))
        self.penalised = list(kinds.values())


class ResNet(Network):
    """ResNets: basic blocks, whose 3×3 layers may have filter bases, or bottlenecks, which may share layers."""

    def __init__(self, name: str, classes: int, stem: str, elements: str) -> None:
        super().__init__()
        base, sharing = parse(name)
        blocks = {**SMALL, **BASIC, **BOTTLENECK}[base]
        widths = (16, 32, 64) if base in SMALL else (64, 128, 256, 512)
        self.stem = conv(3, widths[0]) if stem == "cifar" else conv(3, widths[0], 7, 2)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        self.pool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        make = self._bottleneck_group if base in BOTTLENECK else functools.partial(
            self._basic_group, project=base not in SMALL, elements=elements)
        channels = widths[0]
        for g, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            made = make(g, count, channels, width, sharing)
            channels = width * (4 if base in BOTTLENECK else 1)
            self.add_module(f"group{g + 1}", nn.Sequential(*made))
        self.groups = len(blocks)
        self.head = nn.Linear(channels, classes)
        if sharing.whole:
            self.penalise_each()
        self.initialise()

    def _basic_group(self, g: int, count: int, inputs: int, width: int, sharing: Sharing, *, project: bool,
                     elements: str) -> Iterator[nn.Module]:
        stride = 2 if g else 1
        yield BasicBlock(inputs, width, stride, (conv(inputs, width, 3, stride), conv(width, width)), project)
        shared = {name: conv(width, sharing.shared << g) for name in sharing.bases}
        if shared:
            self.share(f"group{g + 1}", shared)

        def layer(name: str) -> nn.Module:
            if not sharing.factorised:
                return conv(width, width)
            return BasisConv2d(shared.get(name, shared.get("shared")), width, sharing.unique << g)
        blocks = [BasicBlock(width, width, 1, (layer("first"), layer("second")), project) for _ in range(count - 1)]
        yield from blocks
        unique = [part.unique for block in blocks for part in (block.first, block.second)
                  if isinstance(part, BasisConv2d) and part.unique is not None and elements == "shared+unique"]
        if shared or unique:
            self.penalised = self.penalised or [[]]
            self.penalised[0].append(Elements(list(shared.values()), unique))

    def _bottleneck_group(self, g: int, count: int, inputs: int, width: int, sharing: Sharing) -> Iterator[nn.Module]:
        yield Bottleneck(inputs, width, 2 if g else 1, {})
        shared = {"second": conv(width, width), "third": conv(width, 4 * width, 1)}
        shared = {layer: filters for layer, filters in shared.items() if layer in sharing.whole}
        if shared:
            self.share(f"group{g + 1}", shared)
        for _ in range(count - 1):
            yield Bottleneck(4 * width, width, 1, shared)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[N, 3, H, W]` to logits `[N, classes]`."""
        x = self.pool(F.relu(self.stem_norm(self.stem(x)), inplace=True))
        for g in range(self.groups):
            x = self.get_submodule(f"group{g + 1}")(x)
        return self.head(x.mean((2, 3)))


class MobileNetV2(Network):
    """MobileNetV2 for large images; expansions and projections may be shared within stages 3 to 6."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        _, sharing = parse(name)
        self.stem, self.stem_norm = conv(3, 32, 3, 2, bias=True), nn.BatchNorm2d(32)
        channels = 32
        for s, (count, width, stride, expansion) in enumerate(STAGES, 1):
            shared = {"first": conv(width, expansion * width, 1), "third": conv(expansion * width, width, 1)}
            shared = {layer: filters for layer, filters in shared.items() if layer in sharing.whole}
            if s not in SHARING_STAGES:
                shared = {}
            if shared:
                self.share(f"stage{s}", shared)
            blocks = [InvertedResidual(channels, width, stride, expansion, {})]
            blocks += [InvertedResidual(width, width, 1, expansion, shared) for _ in range(count - 1)]
            self.add_module(f"stage{s}", nn.Sequential(*blocks))
            channels = width
        self.neck, self.neck_norm = conv(channels, 1280, 1, bias=True), nn.BatchNorm2d(1280)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(1280, classes)
        self.penalise_each()
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[N, 3, H, W]` to logits `[N, classes]`."""
        x = F.relu6(self.stem_norm(self.stem(x)), inplace=True)
        for s in range(1, len(STAGES) + 1):
            x = self.get_submodule(f"stage{s}")(x)
        x = F.relu6(self.neck_norm(self.neck(x)), inplace=True)
        return self.head(self.dropout(x.mean((2, 3))))


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The sharing in the second part of a network's name."""

    shared: int = 0
    unique: int = 0
    bases: tuple[str, ...] = ()
    """The names of a group's bases."""
    whole: tuple[str, ...] = ()
    """The layers that are shared as a whole."""

    @property
    def factorised(self) -> bool:
        """Whether layers have a basis."""
        return bool(self.shared or self.unique)


def parse(name: str) -> tuple[str, Sharing]:
    """Parses `name`, one of this package's names, into the network and its sharing.

    Raises:
      UserError: the network is not implemented in PyTorch here.
    """
    base, _, form = name.partition("-")
    basis = re.fullmatch(r"s(\d+)u(\d+)(-double)?", form)
    if base in {**SMALL, **BASIC} and (basis or not form):
        if not basis:
            return base, Sharing()
        shared, unique = int(basis[1]), int(basis[2])
        bases = () if not shared else ("first", "second") if basis[3] else ("shared",)
        return base, Sharing(shared, unique, bases)
    if base in {*BOTTLENECK, "mobilenetv2"} and form in ("", "shared", "shared++"):
        layers = ("second", "third") if base in BOTTLENECK else ("first", "third")
        return base, Sharing(whole={"": (), "shared": layers[:1], "shared++": layers}[form])
    raise UserError(f"{name} is not implemented in PyTorch here")


def create(name: str, classes: int, stem: str, elements: str) -> Network:
    """Returns the network `name`, using this package's naming.

    Args:
      stem: 'cifar' or 'imagenet'.
      elements: 'shared' or 'shared+unique', the basis elements to penalise.

    Raises:
      UserError: the network is not implemented in PyTorch here.
    """
    base, _ = parse(name)
    if base != "mobilenetv2":
        return ResNet(name, classes, stem, elements)
    if stem != "imagenet":
        raise UserError(f"{name} for small images is not implemented in PyTorch here")
    return MobileNetV2(name, classes)


def orthogonality_penalty(network: Network) -> Tensor:
    """Returns the penalty: the sum over families of the mean of (B Bᵀ − I)² over the counted pairs."""
    means = []
    for family in network.penalised:
        errors = [error.flatten() for elements in family for error in _errors(elements)]
        means.append(torch.cat(errors).square().mean())
    return torch.stack(means).sum() if means else torch.zeros((), device=network.get_parameter("head.weight").device)


def _errors(elements: Elements) -> Iterator[Tensor]:
    """Yields B Bᵀ − I of shared × all rows, and of unique × unique rows within each layer."""
    unique = [filters.weight.flatten(1) for filters in elements.unique]
    if elements.shared:
        shared = torch.cat([filters.weight.flatten(1) for filters in elements.shared])
        rows = torch.cat([shared, *unique])
        yield shared @ rows.T - torch.eye(len(shared), len(rows), device=rows.device)
    if unique:
        layers = torch.stack(unique)
        yield layers @ layers.mT - torch.eye(layers.shape[1], device=layers.device)
