"""Folding: merges batch normalisation into adjacent linear layers, and optionally a basis layer into one convolution.

At inference, batch normalisation is x · scale + offset. It is folded into the next or previous convolution, with
kernel K and bias b:

    (x · scale + offset) ∗ K         =  x ∗ (scale · K)  +  Σ offset · K     without padding or without offset
    (x ∗ K + b) · scale + offset     =  x ∗ (K · scale)  +  b · scale + offset

so that a basis layer becomes its basis convolution and one 1×1 convolution with a bias. Composing the two,

    (x ∗ B) @ A  =  x ∗ (B @ A)      for a basis B [k, k, C, R] and coefficients A [R, T]

gives one convolution with k²CT multiply-accumulates per pixel instead of k²CR + RT, which is fewer for R ≳ T.
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
"""The values of --fold and their meanings."""


@dataclasses.dataclass
class Outcome:
    """The result of folding."""

    layers: dict[str, int] = dataclasses.field(default_factory=lambda: {"basis": 0, "composed": 0})
    """Numbers of basis layers by form: basis and 1×1, or one convolution; a ReLU in between prevents the latter."""
    norms_left: int = 0
    """Number of batch normalisations left as scale and offset, since no unshared linear layer is adjacent."""


def fold(output: Node, choice: str) -> tuple[Node, Outcome]:
    """Returns the folded graph, for one of `CHOICES`, with float32 constants, and the outcome."""
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
    """Reshapes `constant [C]` to broadcast against the kernel's axes `[C / groups, T]`."""
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
    """Merges a basis layer into one convolution, if possible and either requested or cheaper."""
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
    """Merges two convolutions whose results are concatenated; keeps two kernel arrays, as one may be shared."""
    parts = node.inputs
    if node.op != "concat" or len(parts) != 2 or not all(
            part.op == "conv" and alone(part) and part.arrays.keys() == {"kernel"} and part.inputs == parts[0].inputs
            and part.attributes == parts[0].attributes and part.attributes["groups"] == 1 for part in parts):
        return node
    kernels = {role: part.arrays["kernel"] for role, part in zip(("kernel", "kernel_more"), parts, strict=True)}
    return dataclasses.replace(parts[0], shape=node.shape, arrays=kernels)


def _basis(node: Node) -> tuple[Node, ...]:
    """Returns the basis convolutions whose results `node` combines with coefficients; empty if there are none.

    They must belong to the same module: two consecutive layers are not merged.
    """
    if node.op != "conv" or node.arrays["kernel"].shape[:2] != (1, 1):
        return ()
    source = node.inputs[0]
    while source.op in ("affine", "clip"):
        source = source.inputs[0]
    parts = source.inputs if source.op == "concat" else (source,)
    return parts if all(part.op == "conv" and part.scope == node.scope for part in parts) else ()


def _composed(node: Node, parts: Sequence[Node]) -> Node | None:
    """Returns one convolution that replaces `node` and its basis; None if other operations or groups are in between."""
    first = parts[0]
    plain = all(part.attributes == first.attributes and part.attributes["groups"] == 1 and "bias" not in part.arrays
                for part in parts)
    if not plain or node.inputs[0].op not in ("conv", "concat"):
        return None
    basis = np.concatenate([part.arrays["kernel"] for part in parts], axis=-1, dtype=np.float64)
    return dataclasses.replace(node, inputs=first.inputs, attributes=first.attributes, arrays={
        **node.arrays, "kernel": basis @ node.arrays["kernel"][0, 0]})


def _rounded(output: Node) -> Node:
    """Returns the graph with float32 constants, without factors of 1 and offsets of 0."""
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
