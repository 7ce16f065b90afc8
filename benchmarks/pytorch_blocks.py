"""The networks' blocks in PyTorch: ordinary modules in NCHW, which may receive the filters of other blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Returns a convolution that preserves height and width, except for the stride."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


class BasisConv2d(nn.Module):
    """A 3×3 layer with coefficients for its unique and the group's shared elements, and batch normalisation."""

    def __init__(self, shared: nn.Conv2d | None, width: int, unique_rank: int) -> None:
        super().__init__()
        self.shared = shared
        self.unique = conv(width, unique_rank) if unique_rank else None
        rank = unique_rank + (shared.out_channels if shared is not None else 0)
        self.norm = nn.BatchNorm2d(rank)
        self.coefficients = nn.Conv2d(rank, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, width, H, W]` to the same shape."""
        parts = [part(x) for part in (self.unique, self.shared) if part is not None]
        return self.coefficients(self.norm(torch.cat(parts, dim=1)))


class OptionA(nn.Module):
    """The parameter-free shortcut: subsampling, with zero channels on both sides."""

    def __init__(self, missing: int, stride: int) -> None:
        super().__init__()
        self.pad, self.stride = (0, 0, 0, 0, missing // 2, missing - missing // 2), stride

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C, H, W]` to `[N, C + missing, H / stride, W / stride]`."""
        return F.pad(x[:, :, ::self.stride, ::self.stride], self.pad)


def shortcut(inputs: int, outputs: int, stride: int, project: bool) -> nn.Module:
    """Returns the shortcut of a residual block."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if project:
        return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    return OptionA(outputs - inputs, stride)


class BasicBlock(nn.Module):
    """Two 3×3 layers."""

    def __init__(self, inputs: int, width: int, stride: int, layers: tuple[nn.Module, nn.Module],
                 project: bool) -> None:
        super().__init__()
        self.first, self.second = layers
        self.first_norm, self.second_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, width, H / stride, W / stride]`."""
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        y = self.second_norm(self.second(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a 1×1 layer; the last two may be shared with other blocks."""

    def __init__(self, inputs: int, width: int, stride: int, shared: dict[str, nn.Conv2d]) -> None:
        super().__init__()
        outputs = 4 * width
        self.first, self.first_norm = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.second, self.second_norm = shared.get("second", conv(width, width, 3, stride)), nn.BatchNorm2d(width)
        self.third, self.third_norm = shared.get("third", conv(width, outputs, 1)), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride, True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, 4 · width, H / stride, W / stride]`."""
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        y = F.relu(self.second_norm(self.second(y)), inplace=True)
        y = self.third_norm(self.third(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, 1×1 projection; the 1×1 layers may be shared with other blocks."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, shared: dict[str, nn.Conv2d]) -> None:
        super().__init__()
        inner = expansion * inputs
        self.first, self.first_norm = shared.get("first", conv(inputs, inner, 1)), nn.BatchNorm2d(inner)
        self.second, self.second_norm = conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner)
        self.third, self.third_norm = shared.get("third", conv(inner, outputs, 1)), nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        y = F.relu(self.first_norm(self.first(x)), inplace=True)
        y = F.relu(self.second_norm(self.second(y)), inplace=True)
        y = self.third_norm(self.third(y))
        return x + y if self.residual else y
