"""A network at inference as a graph of plain operations, which is folded and then written as ONNX or StableHLO.

Shapes are those of one image, `[H, W, C]` and finally `[C]`: no operation mixes images. Operations:

    input    images, uint8, as float32
    affine   x · scale + offset, each [C] and each optional
    conv     with kernel [k, k, C / groups, T] and an optional bias [T]; strides, padding, groups. The kernel may be
             split into two arrays, kernel and kernel_more, concatenated along the last axis
    linear   x [C] times kernel [C, T], with an optional bias [T]
    add      of two inputs
    multiply of two inputs; the second may be [1, 1, C], one factor per channel
    clip     to [low, high]; ReLU is low 0, high ∞
    sigmoid
    concat   of channels
    slice    with starts, limits and strides for [H, W, C]
    pad      with zeros, (before, after) of [H, W, C]
    max_pool, average_pool    window, strides, padding; averages include padding zeros
    mean     over height and width
    reshape  of the axes after height and width, [H, W, C] to [H, W, a, b] or back; or of [C] to [1, 1, C]
    transpose    of the axes after height and width; order lists all axes

Strides and windows are (height, width), padding is ((above, below), (left, right)).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """An operation and its result; a graph is represented by its output node."""

    op: str
    shape: tuple[int, ...]
    inputs: tuple[Node, ...] = ()
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Constants by role. An array used by several operations is one object and is stored once."""
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scope: str = ""
    """Path of the module that the operation belongs to, e.g. group1/block2/first."""


def ordered(output: Node) -> list[Node]:
    """Returns all nodes that `output` depends on, in topological order."""
    done: dict[Node, None] = {}
    waiting = [output]
    while waiting:
        node = waiting[-1]
        missing = [source for source in node.inputs if source not in done]
        if not missing:
            done[node] = None
            waiting.pop()
        waiting += reversed(missing)
    return list(done)


Rule = Callable[[Node, Callable[[Node], bool]], Node]
"""Maps a node to its replacement; the second argument tests whether an input has no other consumer."""


def rewrite(output: Node, rule: Rule) -> Node:
    """Returns the graph with `rule` applied to each node, starting from the input."""
    users = Counter(source for node in ordered(output) for source in node.inputs)
    new: dict[Node, Node] = {}
    uses: dict[Node, int] = {}
    for node in ordered(output):
        inputs = tuple(new[source] for source in node.inputs)
        new[node] = rule(dataclasses.replace(node, inputs=inputs), lambda source: uses[source] == 1)
        uses[new[node]] = users[node]
    return new[output]


def macs(node: Node) -> int:
    """Returns the multiply-accumulates of one node for one image."""
    if node.op not in ("conv", "linear"):
        return 0
    kernel = node.arrays["kernel"]
    return math.prod(node.shape) * (kernel.size // kernel.shape[-1])


def kernel_roles(node: Node) -> list[str]:
    """Returns the roles of the arrays that make up the kernel of `node`."""
    return [role for role in ("kernel", "kernel_more") if role in node.arrays]


def count_macs(output: Node) -> int:
    """Returns the multiply-accumulates of all convolutions and matrix products for one image."""
    return sum(map(macs, ordered(output)))


def arrays(output: Node) -> dict[int, np.ndarray]:
    """Returns the distinct constants, keyed by identity."""
    return {id(array): array for node in ordered(output) for array in node.arrays.values()}


def count_numbers(output: Node) -> int:
    """Returns the number of elements in all constants, counting shared arrays once."""
    return sum(array.size for array in arrays(output).values())


def compute(output: Node, images: jax.Array) -> jax.Array:
    """Evaluates the graph in JAX on `images` uint8 `[N, H, W, C]`; returns the output, `[N, …]`."""
    constants = {key: jnp.asarray(array, jnp.float32) for key, array in arrays(output).items()}
    values: dict[Node, jax.Array] = {}
    for node in ordered(output):
        values[node] = _apply(node, [values[source] for source in node.inputs] or [images],
                              {role: constants[id(array)] for role, array in node.arrays.items()})
    return values[output]


def _apply(node: Node, inputs: list[jax.Array], constant: Mapping[str, jax.Array]) -> jax.Array:
    x, given = inputs[0], node.attributes
    match node.op:
        case "input":
            return x.astype(jnp.float32)
        case "affine":
            return x * constant.get("scale", 1.0) + constant.get("offset", 0.0)
        case "conv":
            kernel = jnp.concatenate([constant[role] for role in kernel_roles(node)], axis=-1)
            y = jax.lax.conv_general_dilated(
                x, kernel, given["strides"], given["padding"], feature_group_count=given["groups"],
                dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST)
            return y + constant["bias"] if "bias" in constant else y
        case "linear":
            y = jnp.matmul(x, constant["kernel"], precision=jax.lax.Precision.HIGHEST)
            return y + constant["bias"] if "bias" in constant else y
        case "add":
            return x + inputs[1]
        case "clip":
            return jnp.clip(x, given["low"], None if math.isinf(given["high"]) else given["high"])
        case "multiply":
            return x * inputs[1]
        case "sigmoid":
            return jax.nn.sigmoid(x)
        case "concat":
            return jnp.concatenate(inputs, axis=-1)
        case "reshape":
            return x.reshape(x.shape[0], *node.shape)
        case "transpose":
            return x.transpose(0, *(axis + 1 for axis in given["order"]))
        case "slice":
            for axis, bounds in enumerate(zip(given["starts"], given["limits"], given["strides"], strict=True), 1):
                x = jax.lax.slice_in_dim(x, *bounds, axis=axis)
            return x
        case "pad":
            return jnp.pad(x, ((0, 0), *given["padding"]))
        case "max_pool" | "average_pool":
            maximum = node.op == "max_pool"
            y = jax.lax.reduce_window(
                x, -jnp.inf if maximum else 0.0, jax.lax.max if maximum else jax.lax.add, (1, *given["window"], 1),
                (1, *given["strides"], 1), ((0, 0), *given["padding"], (0, 0)))
            return y if maximum else y / math.prod(given["window"])
        case "mean":
            return jnp.mean(x, axis=(1, 2))
    raise ValueError(f"no operation {node.op!r}")
