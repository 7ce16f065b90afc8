"""Networks by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from shared_basis.errors import UserError
from shared_basis.models.base import Network, Sharing
from shared_basis.models.densenet import DenseNet
from shared_basis.models.efficientnet import EfficientNet
from shared_basis.models.mobilenetv1 import STEM as MOBILENET_WIDTH
from shared_basis.models.mobilenetv1 import MobileNetV1
from shared_basis.models.mobilenetv2 import MobileNetV2
from shared_basis.models.resnet import ResNet
from shared_basis.models.resnext import ResNeXt
from shared_basis.models.shufflenetv1 import WIDTHS, ShuffleNetV1
from shared_basis.models.shufflenetv2 import ShuffleNetV2
from shared_basis.nn.types import Dtype

GRAMMAR = "<network>[-<sharing>], e.g. resnet56, resnet56-s16u1-double, resnet34-s32u1, resnet50-shared++, resnet32w12"
"""The naming scheme; the sharing is one of `SHARING_FORMS`. Some networks also accept a width, w<channels>."""

SHARING_FORMS = {
    "s<S>u<U>": "S shared and U unique basis elements in the first group, doubling with each further one",
    "s<S>u<U>-double": "the same with one basis for the first layers of the blocks and another for the second ones",
    "shared": "one whole layer of the blocks is shared",
    "shared++": "two whole layers are",
    "tied": "baseline: the blocks share the whole filters of these layers, without penalty (naive recursion)",
    "template<k>": "baseline: the kernel of each of these layers is its own combination of k shared templates",
}
"""The forms of sharing and their meanings."""

STEMS = ("cifar", "imagenet")
"""The stems: for small and for large images."""

BASIS, DOUBLE = "s<S>u<U>", "s<S>u<U>-double"
_BASIS = (BASIS, DOUBLE)
_WHOLE = ("shared", "shared++")
_BASELINES = ("tied", "template<k>")


@dataclasses.dataclass(frozen=True)
class Family:
    """A network without its sharing: its constructor and the options that it supports."""

    build: Callable[..., Network]
    """Its class, or a function that takes the fields of `Network`, Flax's `parent`, and `arguments`."""
    stems: tuple[str, ...]
    """The supported ones of 'cifar' and 'imagenet', starting with the default."""
    forms: tuple[str, ...]
    """The supported `SHARING_FORMS`."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    width: int = 0
    """Channels of the first layer or group, to which others are proportional; a name may change them by w<channels>."""
    at_width: Callable[[int], dict[str, Any]] | None = None
    """Returns the `arguments` that depend on the width; None if the width is fixed."""


CIFAR_DEPTHS = (14, 20, 32, 44, 56, 110)
CIFAR_WIDTH = 16
"""Channels of the first group of these ResNets; e.g. `resnet32w12` has 12, 24 and 48."""


def _doubling(width: int) -> dict[str, Any]:
    return {"widths": (width, 2 * width, 4 * width)}


def _families() -> dict[str, Family]:
    small = {f"resnet{depth}": Family(ResNet, ("cifar",), _BASIS + _BASELINES, {
        "blocks": ((depth - 2) // 6,) * 3, **_doubling(CIFAR_WIDTH), "project": False}, CIFAR_WIDTH, _doubling)
        for depth in CIFAR_DEPTHS}
    wide = {"widths": (64, 128, 256, 512)}
    basic = {f"resnet{depth}": Family(ResNet, STEMS, _BASIS + _BASELINES, {"blocks": blocks, **wide})
             for depth, blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)))}
    bottleneck = {f"resnet{depth}": Family(ResNet, ("imagenet", "cifar"), _WHOLE, {
        "blocks": blocks, "bottleneck": True, **wide}) for depth, blocks in ((50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)))}
    return {
        **small, **basic, **bottleneck,
        "densenet121": Family(DenseNet, ("cifar",), _BASIS[:1]),
        "resnext50_32x4d": Family(ResNeXt, ("cifar",), _BASIS[:1], {
            "blocks": (3, 4, 6, 3), "widths": (128, 256, 512, 1024)}),
        "mobilenetv2": Family(MobileNetV2, STEMS, (*_WHOLE, BASIS, *_BASELINES)), **_compact_families(),
    }


def _compact_families() -> dict[str, Family]:
    """Returns compact networks that the paper mentions or that are widely deployed, but that it does not evaluate."""
    one = Family(MobileNetV1, STEMS, ("shared", BASIS, *_BASELINES), width=MOBILENET_WIDTH,
                 at_width=lambda width: {"width": width})
    first = {f"shufflenetv1_g{groups}": Family(ShuffleNetV1, STEMS, _WHOLE, {"groups": groups}) for groups in WIDTHS}
    second = {f"shufflenetv2_{name}": Family(ShuffleNetV2, STEMS, (*_WHOLE, *_BASIS, *_BASELINES), {
        **_doubling(width), "neck": neck}, width, _doubling) for name, width, neck in (
            ("x0_5", 48, 1024), ("x1_0", 116, 1024), ("x1_5", 176, 1024), ("x2_0", 244, 2048))}
    return {"mobilenetv1": one, **first, **second,
            "efficientnet_b0": Family(EfficientNet, STEMS, (*_WHOLE, BASIS, *_BASELINES))}


FAMILIES = _families()
"""Networks by the first part of their name. ResNet-14 is the smallest with sharing; it is not in the paper."""


def register_network(name: str, build: Callable[..., Network], forms: Sequence[str] = (BASIS,),
                     stems: Sequence[str] = STEMS[:1]) -> None:
    """Registers a user-defined network as `name`, for `create_model`, configurations and the command line.

    A recipe may call this when it is loaded: `python main.py --config=FILE.py:<name>-s16u1`. Registering it again, e.g.
    by re-running a notebook cell, replaces the old definition.

    Args:
      name: letters, digits and underscores; the part of the network's name before the dash.
      build: a subclass of `Network`, or a function that takes its fields and Flax's `parent` by name and returns one.
      forms: the supported `SHARING_FORMS`, which the network's `shared_shapes` must implement by `self.sharing`.
      stems: the supported ones of 'cifar', for small images, and 'imagenet', starting with the default; a network that
        supports both takes a field `stem`.

    Raises:
      ValueError: `name` is taken or invalid, a form or stem is unknown, or a basis is supported but the network's
        `basis_layers` is empty.
      TypeError: `build` does not return a `Network`.
    """
    if unknown := sorted(set(forms) - set(SHARING_FORMS)):
        raise ValueError(f"forms={list(forms)!r}: {unknown[0]!r} must be one of {', '.join(SHARING_FORMS)}")
    if not stems or set(stems) - set(STEMS):
        raise ValueError(f"stems={list(stems)!r}: must be some of {', '.join(map(repr, STEMS))}")
    plain = build(num_classes=2, parent=None)
    if not isinstance(plain, Network):
        raise TypeError(f"build={build!r}: returns a {type(plain).__name__}, but must return a shared_basis.Network")
    for kind, layers in (("basis", plain.basis_layers()), ("whole", plain.whole_layers())):
        needing = [form for form in forms if (form in _WHOLE) == (kind == "whole")]
        if needing and not layers:
            raise ValueError(f"forms={list(forms)!r}: {needing[0]} needs layers, and {type(plain).__name__}."
                             f"{kind}_layers() returns none")
    if name in FAMILIES and _origin(FAMILIES[name].build) == _origin(build):
        del FAMILIES[name]
    register(name, Family(build, tuple(stems), tuple(forms)))


def _origin(build: Callable[..., Network]) -> tuple[str, str]:
    """Returns where a class or function is defined, which does not change when its definition is re-run."""
    return getattr(build, "__module__", ""), getattr(build, "__qualname__", repr(build))


def register(name: str, family: Family) -> None:
    """Registers a network family as `name`; `register_network` is simpler and validates more.

    Raises:
      ValueError: `name` is taken or invalid; it may contain letters, digits and underscores.
    """
    if name in FAMILIES or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"name={name!r}: must be letters, digits and underscores, and none of {', '.join(FAMILIES)}")
    FAMILIES[name] = family


def family_of(name: str) -> Family:
    """Returns the family of the network `name`, which may include a width.

    Raises:
      UserError: there is no such network (the message suggests similar names).
    """
    base, dash, form = name.partition("-")
    family = FAMILIES.get(base)
    if family is None and (match := re.fullmatch(r"(\w+)w([1-9][0-9]{0,3})", base)):
        known, width = FAMILIES.get(match[1]), int(match[2])
        if known and known.at_width and width != known.width:  # the default width has only one name
            family = dataclasses.replace(known, arguments={**known.arguments, **known.at_width(width)})
    if family is None or (dash and not form):
        near = _similar(base)
        hint = f" The nearest: {', '.join(near)}." if near else ""
        raise UserError(f"unknown network {name!r}.{hint} Networks: {', '.join(FAMILIES)}. Names: {GRAMMAR}. "
                        "A user-defined network must be registered by register_network in the recipe given with "
                        "--config=FILE.py, also for a trained run.")
    return family


def _similar(name: str) -> list[str]:
    """Returns up to three names of families that are similar to `name`; with as similar letters, of a similar depth."""
    def distance(other: str) -> tuple[float, int]:
        depths = [int("".join(re.findall(r"\d", text)) or 0) for text in (name, other)]
        return -difflib.SequenceMatcher(None, name, other).ratio(), abs(depths[0] - depths[1])
    return sorted(difflib.get_close_matches(name, FAMILIES, n=len(FAMILIES), cutoff=0.5), key=distance)[:3]


def create_model(name: str, *, num_classes: int = 10, stem: str | None = None, dtype: Dtype = jnp.float32,
                 scan_blocks: bool | None = None) -> Network:
    """Returns the network `name` as a Flax module: `model.apply(variables, images [N, H, W, C], train=False)`.

    Args:
      name: `<network>[-<sharing>]`, a key of `FAMILIES` and one of the `SHARING_FORMS` that it supports.
      num_classes: number of logits.
      stem: 'cifar' for small images or 'imagenet' for large ones; None is the network's usual one.
      dtype: compute dtype; parameters and batch statistics are always float32.
      scan_blocks: whether identical blocks are computed in a loop; None chooses by backend.

    Raises:
      UserError: the name is unknown (the message suggests similar ones), the network does not support the sharing or
        stem, or a rank exceeds the dimension of the filter space.
    """
    family = family_of(name)
    if num_classes < 2:
        raise UserError(f"num_classes={num_classes}: a classifier needs at least 2 classes.")
    stem = stem or family.stems[0]
    if stem not in family.stems:
        raise UserError(f"network {name!r} has no stem {stem!r}; it has {' and '.join(map(repr, family.stems))}.")
    arguments = dict(family.arguments)
    if len(family.stems) > 1:
        arguments["stem"] = stem
    plain = family.build(num_classes=num_classes, parent=None, **arguments)
    sharing = _parse_sharing(name, family.forms, plain)
    return family.build(num_classes=num_classes, sharing=sharing, dtype=dtype, scan_blocks=scan_blocks, **arguments)


def plain_counterpart(name: str) -> str:
    """Returns the name of the network without sharing, to compare with `name`."""
    return name.partition("-")[0]


def _parse_sharing(name: str, forms: tuple[str, ...], plain: Network) -> Sharing:
    """Parses the sharing in the network's `name`, one of `forms`, in terms of the layers of the `plain` network."""
    form = name.partition("-")[2]
    if not form:
        return Sharing()
    basis = re.fullmatch(r"s(0|[1-9]\d{0,5})u(0|[1-9]\d{0,5})(-double)?", form)
    template = re.fullmatch(r"template([1-9]\d{0,3})", form)
    kind = (DOUBLE if basis[3] else BASIS) if basis else "template<k>" if template else form
    if kind not in forms:
        raise UserError(f"network {name!r}: no sharing {form!r}; {plain_counterpart(name)} supports "
                        f"{', '.join(forms)}.")
    one = plain.one_basis()
    if template:
        return Sharing(tuple((layer, "templates" if one else layer) for layer in plain.basis_layers()),
                       templates=int(template[1]), orthonormal=False)
    if kind == "tied":
        return Sharing(tuple((layer, layer) for layer in plain.basis_layers()), orthonormal=False)
    if kind in _WHOLE:
        layers = plain.whole_layers()[:1] if kind == "shared" else plain.whole_layers()
        return Sharing(tuple((layer, layer) for layer in layers), separate_means=kind == "shared++")
    assert basis is not None
    shared, unique, double = int(basis[1]), int(basis[2]), bool(basis[3])
    if double and not shared:
        raise UserError(f"network {name!r}: -double shares two bases per group, but s0 shares none; omit -double.")
    if not shared:
        return Sharing(unique_rank=unique)
    return Sharing(tuple((layer, "shared" if one and not double else layer) for layer in plain.basis_layers()), shared,
                   unique, separate_means=not one)
