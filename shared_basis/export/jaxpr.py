"""Converts a Flax network to a graph by reading its traced program (jaxpr), so that networks are defined only once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shared_basis.errors import UserError
from shared_basis.export.graph import Node
from shared_basis.nn import ops

Value = Node | np.ndarray
"""A value in the program: a node that depends on the images, or a known constant."""

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""The parameters of equations that call another program."""
_IDENTITIES = ("convert_element_type", "copy", "name", "reduce_precision", "stop_gradient")
"""Primitives that return a float32 array unchanged."""


def trace(model: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, int, int],
          preprocess: Callable[[jax.Array], jax.Array]) -> Node:
    """Returns the graph of `model.apply(variables, preprocess(images), train=False)` for images uint8 `[N, H, W, C]`.

    Values that do not depend on the images are computed: composed kernels, factors of batch normalisation.

    Args:
      model: a network that computes in float32, without loops over blocks.
      variables: `params` and `batch_stats`, as NumPy arrays. Kernels used unchanged remain the same objects.

    Raises:
      UserError: the network contains an operation that a graph cannot represent.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    with ops.portable():
        program = jax.make_jaxpr(lambda variables, images: model.apply(variables, preprocess(images), train=False))(
            variables, images)
    # Constants are computed on CPU in full float32; accelerators may use fewer bits for matrix products.
    with jax.default_device(jax.devices("cpu")[0]):
        inputs: list[Value] = [*jax.tree.leaves(variables), Node("input", image_shape)]
        output, = _Reader(type(model).__name__).read(program.jaxpr, list(map(np.asarray, program.consts)), inputs, "")
    if not isinstance(output, Node):
        raise UserError(f"network {type(model).__name__} does not depend on its images and cannot be exported.")
    return output


class _Reader:
    """Converts equations one after another."""

    def __init__(self, network: str) -> None:
        """Sets the name of the network's class, with which scopes begin."""
        self._network = network

    def read(self, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value], scope: str) -> list[Value]:
        """Returns the outputs of the program `jaxpr` for `inputs`."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        for eqn in jaxpr.eqns:
            arguments = [np.asarray(var.val) if hasattr(var, "val") else values[var] for var in eqn.invars]
            results = self._equation(eqn, arguments, f"{scope}/{eqn.source_info.name_stack}")
            values |= dict(zip(eqn.outvars, results, strict=True))
        return [values[var] for var in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: Sequence[Value], scope: str) -> list[Value]:
        name, called = eqn.primitive.name, [eqn.params[key] for key in _CALLS if key in eqn.params]
        if called and name not in ("scan", "while", "cond"):
            inner = getattr(called[0], "jaxpr", called[0])  # closed or open
            return self.read(inner, getattr(called[0], "consts", []), inputs, scope)
        if not any(isinstance(value, Node) for value in inputs):
            results = eqn.primitive.bind(*inputs, **eqn.params)
            return [np.asarray(result) for result in (results if eqn.primitive.multiple_results else [results])]
        if name in _IDENTITIES and eqn.outvars[0].aval.dtype == jnp.float32:
            return [inputs[0]]
        try:
            _require(name in _READ)
            return [_READ[name](eqn, inputs, tuple(eqn.outvars[0].aval.shape[1:]), self._module(scope))]
        except _Unreadable as error:
            shapes = ", ".join(str(var.aval) for var in eqn.invars)
            raise UserError(f"the operation {name} of {shapes}, in {scope.strip('/') or 'the preprocessing'}, cannot "
                            "be exported.") from error

    def _module(self, scope: str) -> str:
        """Returns the module's path for a scope like Network/group1/first/first._convolve: methods follow a dot."""
        parts = [part for part in scope.split("/") if part and "." not in part]
        return "/".join(parts[1:] if parts[:1] == [self._network] else parts)


class _Unreadable(Exception):
    """An operation has parameters that a graph cannot represent."""


def _require(condition: bool) -> None:
    if not condition:
        raise _Unreadable


def _node(value: Value) -> Node:
    if not isinstance(value, Node):
        raise _Unreadable
    return value


def _constant(value: Value) -> np.ndarray:
    if isinstance(value, Node):
        raise _Unreadable
    return value


def _conv(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    x, kernel = inputs
    given, numbers = eqn.params, eqn.params["dimension_numbers"]
    _require(given["batch_group_count"] == 1)
    _require((numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)))
    _require({*given["lhs_dilation"], *given["rhs_dilation"]} == {1})
    return _convolution(_node(x), _constant(kernel), shape, scope, given["window_strides"], given["padding"],
                        given["feature_group_count"])


def _convolution(x: Node, kernel: np.ndarray, shape: tuple[int, ...], scope: str, strides: Sequence[int] = (1, 1),
                 padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)), groups: int = 1) -> Node:
    return Node("conv", shape, (x,), {"kernel": kernel},
                {"strides": tuple(strides), "padding": tuple(padding), "groups": groups}, scope)


def _dot(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    """Reads a product of channels and a matrix; with spatial axes it becomes a 1×1 convolution."""
    x, matrix = _node(inputs[0]), _constant(inputs[1])
    _require(matrix.ndim == 2 and len(x.shape) in (1, 3))
    _require(eqn.params["dimension_numbers"] == (((len(x.shape),), (0,)), ((), ())))
    if len(x.shape) == 3:
        return _convolution(x, matrix[None, None], shape, scope)
    return Node("linear", shape, (x,), {"kernel": matrix}, scope=scope)


def _arithmetic(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    """Reads +, −, · and /: any of them with a constant per channel, but only + and · between two nodes."""
    (x, y), name = inputs, eqn.primitive.name
    if isinstance(x, Node) and isinstance(y, Node):
        if name == "mul":
            return _product(x, y, shape, scope)
        _require(name == "add" and x.shape == y.shape)
        return Node("add", shape, (x, y), scope=scope)
    constant, behind = _by_channel(y if isinstance(x, Node) else x, shape), isinstance(x, Node)
    x = _node(x if behind else y)
    match name:
        case "add":
            return _affine(x, 1.0, constant, scope)
        case "sub":
            return _affine(x, 1.0, -constant, scope) if behind else _affine(x, -1.0, constant, scope)
        case "mul":
            return _affine(x, constant, 0.0, scope)
    _require(behind)
    return _affine(x, 1 / constant, 0.0, scope)


def _product(x: Node, y: Node, shape: tuple[int, ...], scope: str) -> Node:
    """Reads the product of two nodes, one of which may be a factor per channel."""
    if x.shape != shape:
        x, y = y, x
    _require(x.shape == shape and y.shape in (shape, (1, 1, *shape[2:])))
    return Node("multiply", shape, (x, y), scope=scope)


def _by_channel(constant: Value, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a constant `[1, 1, 1, C]`, or a scalar, as float64 `[C]`."""
    array = np.asarray(_constant(constant), np.float64)
    _require(array.size == 1 or array.size == array.shape[-1])
    return np.broadcast_to(array.reshape(-1), shape[-1:])


def _affine(x: Node, scale: np.ndarray | float, offset: np.ndarray | float, scope: str) -> Node:
    """Returns x · scale + offset, merged with `x` if that is affine; in float64, so that it is rounded only once."""
    if x.op == "affine":
        scale, offset, x = x.arrays["scale"] * scale, x.arrays["offset"] * scale + offset, x.inputs[0]
    channels = x.shape[-1:]
    constants = {"scale": np.broadcast_to(scale, channels), "offset": np.broadcast_to(offset, channels)}
    return Node("affine", x.shape, (x,), constants, scope=scope)


def _clip(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    """Reads the maximum or minimum of a node and a scalar; two of them merge into one clip."""
    first, second = sorted(inputs, key=lambda value: not isinstance(value, Node))
    x, bound, name = _node(first), _constant(second), eqn.primitive.name
    _require(bound.size == 1)
    low, high = -math.inf, math.inf
    if x.op == "clip" and name == "min":
        low, high, x = x.attributes["low"], x.attributes["high"], x.inputs[0]
    number = float(bound.reshape(()))
    limits = {"low": max(low, number), "high": high} if name == "max" else {"low": low, "high": min(high, number)}
    return Node("clip", shape, (x,), attributes=limits, scope=scope)


def _concatenate(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    _require(eqn.params["dimension"] == len(shape))
    return Node("concat", shape, tuple(map(_node, inputs)), scope=scope)


def _slice(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    rank = len(shape) + 1
    cut = {"starts": eqn.params["start_indices"], "limits": eqn.params["limit_indices"],
           "strides": eqn.params["strides"] or (1,) * rank}
    _require([bounds[0] for bounds in cut.values()] == [0, 1, 1])
    return Node("slice", shape, (_node(inputs[0]),), scope=scope,
                attributes={name: tuple(bounds[1:]) for name, bounds in cut.items()})


def _pad(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    config = eqn.params["padding_config"]
    _require(not np.any(_constant(inputs[1])) and config[0] == (0, 0, 0))
    _require(all(low >= 0 and high >= 0 and not inner for low, high, inner in config))
    return Node("pad", shape, (_node(inputs[0]),), attributes={"padding": tuple(sides[:2] for sides in config[1:])},
                scope=scope)


def _pool(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    """Reads a pooling; a sum over windows becomes an average times the window size, folded into what follows."""
    given = eqn.params
    window, strides, padding = given["window_dimensions"], given["window_strides"], given["padding"]
    _require(len(window) == 4 and {window[0], window[3], strides[0], strides[3]} == {1})
    _require({*given["base_dilation"], *given["window_dilation"]} == {1} and not np.any((padding[0], padding[3])))
    maximum = eqn.primitive.name == "reduce_window_max"
    node = Node("max_pool" if maximum else "average_pool", shape, (_node(inputs[0]),), scope=scope, attributes={
        "window": window[1:3], "strides": strides[1:3], "padding": tuple(map(tuple, padding[1:3]))})
    return node if maximum else _affine(node, float(math.prod(window)), 0.0, scope)


def _sum(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    x = _node(inputs[0])
    _require(len(x.shape) == 3 and eqn.params["axes"] == (1, 2))
    return _affine(Node("mean", shape, (x,), scope=scope), float(x.shape[0] * x.shape[1]), 0.0, scope)


def _sigmoid(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    return Node("sigmoid", shape, (_node(inputs[0]),), scope=scope)


def _reshape(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    """Reads a reshape of the axes after height and width, or of `[C]` to `[1, 1, C]`."""
    x = _node(inputs[0])
    behind = min(len(x.shape), len(shape)) >= 3 and x.shape[:2] == shape[:2]
    _require(math.prod(x.shape) == math.prod(shape) and (behind or shape == (1, 1, *x.shape)))
    if x.op == "affine" and x.shape[-1] == shape[-1]:  # channels are unchanged, so later affine maps can merge with it
        return dataclasses.replace(x, shape=shape, inputs=(Node("reshape", shape, x.inputs, scope=scope),))
    return Node("reshape", shape, (x,), scope=scope)


def _transpose(eqn: Any, inputs: Sequence[Value], shape: tuple[int, ...], scope: str) -> Node:
    order = eqn.params["permutation"]
    _require(tuple(order[:3]) == (0, 1, 2))
    return Node("transpose", shape, (_node(inputs[0]),), attributes={"order": tuple(axis - 1 for axis in order[1:])},
                scope=scope)


_READ: dict[str, Callable[[Any, Sequence[Value], tuple[int, ...], str], Node]] = {
    "conv_general_dilated": _conv, "dot_general": _dot, "add": _arithmetic, "sub": _arithmetic, "mul": _arithmetic,
    "div": _arithmetic, "max": _clip, "min": _clip, "logistic": _sigmoid, "concatenate": _concatenate, "slice": _slice,
    "pad": _pad, "reshape": _reshape, "broadcast_in_dim": _reshape, "transpose": _transpose,
    "reduce_window_max": _pool, "reduce_window_sum": _pool, "reduce_sum": _sum}
