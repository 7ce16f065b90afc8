"""The networks by name."""

from __future__ import annotations

import difflib
import re

import flax.linen as nn
import jax.numpy as jnp

from shared_basis.basis import Dtype
from shared_basis.errors import UserError
from shared_basis.models.resnet import ResNet

CIFAR_DEPTHS = (14, 20, 32, 44, 56, 110)
"""Depths 6n + 2 of the ResNets for 32×32 images; 14 is the least in which a group has layers that share."""

GRAMMAR = "<network>[-s<S>u<U>[-double]], e.g. resnet56, resnet56-s16u1, resnet56-s16u1-double, resnet56-s0u16"
"""How a network is named: S shared and U unique elements in the first group (doubling with each further group), one
shared basis a group or, with -double, one for the first layers and one for the second ones."""

_NAME = re.compile(r"(?P<network>[a-z0-9]+)(?:-s(?P<s>\d{1,6})u(?P<u>\d{1,6})(?P<double>-double)?)?")


def create_model(name: str, *, num_classes: int = 10, stem: str = "cifar", dtype: Dtype = jnp.float32) -> nn.Module:
    """Returns the network `name` as a Flax module: `model.apply(variables, images [N, H, W, C], train=False)`.

    Args:
      name: a name of the grammar `<network>[-s<S>u<U>[-double]]`; `<network>` is resnet14, 20, 32, 44, 56 or 110.
      num_classes: number of logits.
      stem: 'cifar', the 3×3 stem for small images.
      dtype: compute type; parameters and batch statistics are float32 always.

    Raises:
      UserError: the name is unknown (with the nearest known one), a rank exceeds the space of the filters, or the
        network has no such stem.
    """
    match = _NAME.fullmatch(name)
    networks = [f"resnet{depth}" for depth in CIFAR_DEPTHS]
    if match is None or match["network"] not in networks:
        near = difflib.get_close_matches(name.split("-")[0], networks, n=3, cutoff=0.5)
        hint = f" The nearest: {', '.join(near)}." if near else ""
        raise UserError(f"unknown network {name!r}.{hint} Networks: {', '.join(networks)}. Names: {GRAMMAR}.")
    shared, unique, double = int(match["s"] or 0), int(match["u"] or 0), match["double"] is not None
    if double and not shared:
        raise UserError(f"network {name!r}: -double shares two bases a group, and s0 shares none; drop -double.")
    if num_classes < 2:
        raise UserError(f"num_classes={num_classes}: a classifier needs at least 2 classes.")
    if stem != "cifar":
        raise UserError(f"network {name!r} has no stem {stem!r}; it is a network for small images: stem='cifar'.")
    depth = int(match["network"].removeprefix("resnet"))
    return ResNet(blocks=((depth - 2) // 6,) * 3, widths=(16, 32, 64), num_classes=num_classes, shared_rank=shared,
                  unique_rank=unique, double=double, dtype=dtype)


def plain_counterpart(name: str) -> str:
    """Returns the name of the network without shared or unique elements that `name` is compared with."""
    return name.split("-")[0]
