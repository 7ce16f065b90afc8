"""Folding: batch normalisation goes into neighbouring linear maps, and a basis layer may become one convolution.

At inference batch normalisation is x · scale + offset. Folded into the convolution behind or before it, with a kernel
K and a bias b,

    (x · scale + offset) ∗ K         =  x ∗ (scale · K)  +  Σ offset · K     where there is no padding, or no offset
    (x ∗ K + b) · scale + offset     =  x ∗ (K · scale)  +  b · scale + offset

so that a basis layer is its basis convolution and one 1×1 convolution with a bias. The two composed,

    (x ∗ B) @ A  =  x ∗ (B @ A)      for a basis B [k, k, C, R] and coefficients A [R, T]

are one convolution of k²CT multiply-accumulates a pixel in place of k²CR + RT, fewer from about R = T on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from shared_basis.export.graph import Node, macs, ordered, rewrite

CHOICES = {
    "auto": "each basis layer as basis or composed, by multiply-accumulates; filters that layers share stay shared",
    "basis": "basis layers stay basis convolution and 1×1; what layers share is stored once",
    "composed": "every layer is one convolution with a kernel of its own",
    "none": "nothing is folded",
}
"""What can be asked for, and what it means."""


@dataclasses.dataclass
class Outcome:
    """What folding has done."""

    layers: dict[str, int] = dataclasses.field(default_factory=lambda: {"basis": 0, "composed": 0})
    """How many basis layers are now basis and 1×1, and how many one convolution; ReLU inside forbids the latter."""
    norms_left: int = 0
    """Batch normalisations that remain as scale and offset: no linear map of one layer's own is next to them."""


def fold(output: Node, choice: str) -> tuple[Node, Outcome]:
    """Returns the graph folded as one of `CHOICES`, with float32 constants, and what was done."""
    outcome = Outcome()
    if choice != "none":
        uses = Counter(id(node.arrays["kernel"]) for node in ordered(output) if node.op == "conv")
        shared = set() if choice == "composed" else {key for key, count in uses.items() if count > 1}
        for rule in (_into_next, _into_previous):
            output = rewrite(output, functools.partial(rule, shared=shared))
    output = rewrite(output, lambda node, alone: _compose(node, alone, choice, outcome))
    output = _rounded(output if choice == "none" else rewrite(output, _join))
    outcome.norms_left = sum("scale" in node.arrays and bool(node.scope) for node in ordered(output))
    return output, outcome


def _is_linear(node: Node) -> bool:
    return node.op in ("conv", "linear")


def _into_next(node: Node, alone: Callable[[Node], bool], shared: Collection[int]) -> Node:
    """Folds the affine map before a convolution or matrix product into it."""
    if not _is_linear(node) or node.inputs[0].op != "affine" or not alone(node.inputs[0]):
        return node
    before, kernel = node.inputs[0], node.arrays["kernel"]
    scale, offset = before.arrays["scale"], before.arrays["offset"]
    if id(kernel) in shared or (np.any(offset) and np.any(node.attributes.get("padding", 0))):
        return node
    groups = node.attributes.get("groups", 1)
    scale, offset = (_by_group(constant, groups, kernel.shape[-1]) for constant in (scale, offset))
    taps = tuple(range(kernel.ndim - 1))
    bias = node.arrays.get("bias", 0.0) + (kernel * offset).sum(axis=taps)
    return dataclasses.replace(node, inputs=before.inputs, arrays={"kernel": kernel * scale, "bias": bias})


def _by_group(constant: np.ndarray, groups: int, features: int) -> np.ndarray:
    """Returns what `constant [C]` is to the kernel's axes `[C / groups, T]`."""
    return constant.reshape(groups, -1).repeat(features // groups, axis=0).T


def _into_previous(node: Node, alone: Callable[[Node], bool], shared: Collection[int]) -> Node:
    """Folds an affine map into the convolution or matrix product before it."""
    if node.op != "affine" or not _is_linear(node.inputs[0]) or not alone(node.inputs[0]):
        return node
    before, scale = node.inputs[0], node.arrays["scale"]
    kernel = before.arrays["kernel"]
    if id(kernel) in shared:
        return node
    bias = before.arrays.get("bias", 0.0) * scale + node.arrays["offset"]
    return dataclasses.replace(before, arrays={"kernel": kernel * scale, "bias": bias})


def _compose(node: Node, alone: Callable[[Node], bool], choice: str, outcome: Outcome) -> Node:
    """Makes one convolution of a basis layer, where that can be done and is asked for or cheaper."""
    parts = _basis(node)
    if not parts:
        return node
    whole = _composed(node, parts) if all(map(alone, (node.inputs[0], *parts))) else None
    if whole is not None and choice != "composed" and (
            choice != "auto" or macs(whole) >= macs(node) + sum(map(macs, parts))):
        whole = None
    outcome.layers["basis" if whole is None else "composed"] += 1
    return whole or node


def _join(node: Node, alone: Callable[[Node], bool]) -> Node:
    """Makes one convolution of two whose results are concatenated; their kernels stay two, as one may be shared."""
    parts = node.inputs
    if node.op != "concat" or len(parts) != 2 or not all(
            part.op == "conv" and alone(part) and part.arrays.keys() == {"kernel"} and part.inputs == parts[0].inputs
            and part.attributes == parts[0].attributes and part.attributes["groups"] == 1 for part in parts):
        return node
    kernels = {role: part.arrays["kernel"] for role, part in zip(("kernel", "kernel_more"), parts, strict=True)}
    return dataclasses.replace(parts[0], shape=node.shape, arrays=kernels)


def _basis(node: Node) -> tuple[Node, ...]:
    """Returns the convolutions by basis elements whose results `node` combines by coefficients; none if it does not.

    They belong to one module: two layers that only follow each other stay two.
    """
    if node.op != "conv" or node.arrays["kernel"].shape[:2] != (1, 1):
        return ()
    source = node.inputs[0]
    while source.op in ("affine", "clip"):
        source = source.inputs[0]
    parts = source.inputs if source.op == "concat" else (source,)
    return parts if all(part.op == "conv" and part.scope == node.scope for part in parts) else ()


def _composed(node: Node, parts: Sequence[Node]) -> Node | None:
    """Returns one convolution in place of `node` and its basis; None where something else stands between, or groups."""
    first = parts[0]
    plain = all(part.attributes == first.attributes and part.attributes["groups"] == 1 and "bias" not in part.arrays
                for part in parts)
    if not plain or node.inputs[0].op not in ("conv", "concat"):
        return None
    basis = np.concatenate([part.arrays["kernel"] for part in parts], axis=-1, dtype=np.float64)
    return dataclasses.replace(node, inputs=first.inputs, attributes=first.attributes, arrays={
        **node.arrays, "kernel": basis @ node.arrays["kernel"][0, 0]})


def _rounded(output: Node) -> Node:
    """Returns the graph with float32 constants, without factors that are 1 and offsets that are 0."""
    rounded: dict[int, np.ndarray] = {}

    def rule(node: Node, alone: Callable[[Node], bool]) -> Node:
        constants = {role: rounded.setdefault(id(array), np.asarray(array, np.float32))
                     for role, array in node.arrays.items()}
        if node.op == "affine":
            constants = {role: array for role, array in constants.items() if np.any(array != (role == "scale"))}
            if not constants:
                return node.inputs[0]
        return dataclasses.replace(node, arrays=constants)
    return rewrite(output, rule)
