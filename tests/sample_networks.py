"""A small network of every kind of layer, block and sharing, with variables as after training."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from helpers import tiny_network

from shared_basis.models.base import Network, Sharing
from shared_basis.models.densenet import DenseNet
from shared_basis.models.efficientnet import EfficientNet
from shared_basis.models.mobilenetv1 import MobileNetV1
from shared_basis.models.mobilenetv2 import MobileNetV2
from shared_basis.models.parameters import abstract_variables
from shared_basis.models.resnet import ResNet
from shared_basis.models.resnext import ResNeXt
from shared_basis.models.shufflenetv1 import ShuffleNetV1
from shared_basis.models.shufflenetv2 import ShuffleNetV2


def whole(*layers: str, templates: int = 0) -> Sharing:
    """Returns the sharing of whole filters by `layers` of all blocks of a group."""
    return Sharing(tuple((layer, layer) for layer in layers), orthonormal=False, templates=templates)


SECOND = (("second", "second"),)
ONE_ARRAY = (("first", "shared"), ("second", "shared"))
NETWORKS: dict[str, Network] = {
    "plain": tiny_network(blocks=(2, 2), widths=(4, 8), sharing=Sharing()),
    "double": tiny_network(blocks=(3, 2), widths=(4, 8)),
    "single": tiny_network(blocks=(3,), sharing=Sharing(ONE_ARRAY, 3, 1)),
    "shared only": tiny_network(blocks=(3,), sharing=Sharing(ONE_ARRAY, 3)),
    "unique only": tiny_network(blocks=(3,), sharing=Sharing(unique_rank=3)),
    "tied": tiny_network(blocks=(3,), sharing=whole("first", "second")),
    "templates": tiny_network(blocks=(3,), sharing=whole("first", "second", templates=2)),
    "bottleneck": ResNet(10, whole("second", "third"), blocks=(3, 3), widths=(4, 8), bottleneck=True, stem="imagenet"),
    "densenet": DenseNet(10, Sharing(SECOND, 4, 1), blocks=(2, 3), growth=4),
    "resnext": ResNeXt(10, Sharing(SECOND, 8, 4), blocks=(3, 2), widths=(32, 64)),
    "plain resnext": ResNeXt(10, blocks=(2,), widths=(32,)),
    "mobilenet": MobileNetV2(10, whole("first")),
    "mobilenet, large images": MobileNetV2(10, whole("first", "third"), stem="imagenet"),
    "mobilenetv1": MobileNetV1(10, Sharing((("second", "shared"),), 3, 1), width=4, stages=((1, 2, 1), (3, 2, 2))),
    "shufflenetv1": ShuffleNetV1(10, whole("first", "third"), groups=2, widths=(32,), units=(3,)),
    "shufflenetv2": ShuffleNetV2(10, Sharing((("first", "shared"), ("third", "shared")), 3, 1), widths=(16,),
                                 units=(3,), neck=16),
    "efficientnet": EfficientNet(10, Sharing((("first", "first"), ("third", "third")), 3, 1, separate_means=True),
                                 stages=((1, 8, 1, 3, 1), (3, 8, 2, 5, 3))),
    "efficientnet, unique only": EfficientNet(10, Sharing(unique_rank=3), stages=((3, 8, 2, 5, 3),)),
}
SHAPE = (8, 8, 3)
"""Of their images."""


def random_variables(model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Any:
    """Returns variables as after training: each normalisation has its own mean, variance, scale and offset."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = 0.3 if path[-1].key in ("bias", "mean") else (1 / math.prod(leaf.shape[:-1])) ** 0.5
        return rng.normal(0, spread, leaf.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, dict(abstract_variables(model, shape)))
