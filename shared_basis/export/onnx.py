"""Writes a graph as an ONNX model from images uint8 [N, H, W, C] to logits float32 [N, classes], NCHW internally."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared_basis.errors import UserError
from shared_basis.export.graph import Node, kernel_roles, ordered

OPSET = 17
"""The opset, from 2022, which runtimes support widely; newer operators are not needed."""
IR_VERSION = 8
"""The IR version that corresponds to the opset."""

_TO_CHANNELS_FIRST = {4: (3, 2, 0, 1)}
"""Kernel axes by rank: [k, k, C / groups, T] becomes [T, C / groups, k, k]."""


def require_packages() -> None:
    """Raises `UserError` unless ONNX files can be written."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UserError("--format=onnx needs the package onnx, which is not installed: "
                        "pip install 'shared-basis[export]'.") from error


def serialise(output: Node, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the serialised model with suffix '' as key; `metadata` is stored as JSON in its metadata_props."""
    import onnx
    from onnx import TensorProto, helper

    writer = _Writer()
    for node in ordered(output):
        writer.write(node)
    shape = ordered(output)[0].shape
    graph = helper.make_graph(
        writer.nodes, "network", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", *output.shape])], writer.initializers)
    graph.node.append(helper.make_node("Identity", [writer.names[output]], ["logits"], "logits"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
                              producer_name="shared-basis")
    helper.set_model_props(model, {key: value if isinstance(value, str) else json.dumps(value)
                                   for key, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return {"": model.SerializeToString()}


def run(model: bytes, images: np.ndarray) -> tuple[np.ndarray, str] | None:
    """Returns the logits of uint8 `images` and the runtime's name; None if onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0], f"onnxruntime {onnxruntime.__version__}"


class _Writer:
    """Collects ONNX nodes and initialisers."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.names: dict[Node, str] = {}
        """The name of each node's result."""
        self._stored: dict[Any, str] = {}
        """The initialiser's name for each array, keyed by identity and layout."""
        self._used: set[str] = set()

    def write(self, node: Node) -> None:
        """Adds the ONNX operations of `node`."""
        scope, given = node.scope or "preprocessing", node.attributes
        inputs = [self.names[source] for source in node.inputs]
        spatial = (-1, 1, 1) if len(node.shape) == 3 else (-1,)
        match node.op:
            case "input":
                transposed = self._add("Transpose", ["images"], scope, perm=(0, 3, 1, 2))
                name = self._add("Cast", [transposed], scope, to=1)
            case "affine":
                name, = inputs
                for operator, role in (("Mul", "scale"), ("Add", "offset")):
                    if role in node.arrays:
                        constant = self._constant(node.arrays[role], f"{scope}/{role}", shape=spatial)
                        name = self._add(operator, [name, constant], scope)
            case "conv":
                names = [self._add("Conv", [*inputs, *self._weights(node, role)], scope, strides=given["strides"],
                                   pads=_pads(given["padding"]), group=given["groups"]) for role in kernel_roles(node)]
                # A kernel in two arrays becomes two convolutions, since tools expect kernels among the initialisers.
                name = names[0] if len(names) == 1 else self._add("Concat", names, scope, axis=1)
            case "linear":
                name = self._add("Gemm", [*inputs, *self._weights(node, "kernel")], scope)
            case "add" | "multiply" | "sigmoid":
                name = self._add({"add": "Add", "multiply": "Mul", "sigmoid": "Sigmoid"}[node.op], inputs, scope)
            case "clip" if (given["low"], given["high"]) == (0, math.inf):
                name = self._add("Relu", inputs, scope)
            case "clip":
                bounds = [np.array(given[key], np.float32) for key in ("low", "high")]
                name = self._add("Clip", [*inputs, *(self._constant(bound, f"{bound:g}") for bound in bounds)], scope)
            case "concat":
                name = self._add("Concat", inputs, scope, axis=1)
            case "reshape":  # 0 keeps N
                name = self._add("Reshape", [*inputs, self._integers((0, *_channels_first(node.shape)))], scope)
            case "transpose":
                axes = _channels_first(tuple(range(len(given["order"]))))
                order = [1 + axes.index(axis) for axis in _channels_first(given["order"])]
                name = self._add("Transpose", inputs, scope, perm=(0, *order))
            case "slice":
                starts, limits, strides = (self._integers(_channels_first(given[key]))
                                           for key in ("starts", "limits", "strides"))
                all_axes = self._integers(range(1, 1 + len(node.shape)))
                name = self._add("Slice", [*inputs, starts, limits, all_axes, strides], scope)
            case "pad":
                before, after = ((0, *_channels_first(sides)) for sides in zip(*given["padding"], strict=True))
                name = self._add("Pad", [*inputs, self._integers((*before, *after))], scope)
            case "max_pool":
                name = self._add("MaxPool", inputs, scope, **_window(given))
            case "average_pool":
                name = self._add("AveragePool", inputs, scope, **_window(given), count_include_pad=1)
            case "mean":
                name = self._add("Flatten", [self._add("GlobalAveragePool", inputs, scope)], scope)
            case _:
                raise ValueError(f"no operation {node.op!r}")
        self.names[node] = name

    def _add(self, operator: str, inputs: Sequence[str], scope: str, **attributes: Any) -> str:
        """Adds a node and returns the name of its result."""
        from onnx import helper

        name = self._unique(f"{scope}/{operator}")
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def _weights(self, node: Node, role: str) -> list[str]:
        """Returns the names of the kernel `role` and of the bias, if there is one."""
        return [self._constant(node.arrays[each], f"{node.scope}/{each}") for each in (role, "bias")
                if each in node.arrays]

    def _integers(self, values: Sequence[int]) -> str:
        return self._constant(np.asarray(values, np.int64), ",".join(map(str, values)))

    def _constant(self, array: np.ndarray, name: str, shape: tuple[int, ...] | None = None) -> str:
        """Returns the name of the initialiser for `array`, which is stored only once."""
        from onnx import numpy_helper

        by_value = (array.dtype, array.shape, array.tobytes())
        key = (id(array), shape) if array.ndim and array.dtype == np.float32 else by_value
        if key not in self._stored:
            self._stored[key] = self._unique(name)
            laid_out = array.transpose(_TO_CHANNELS_FIRST[array.ndim]) if array.ndim in _TO_CHANNELS_FIRST else array
            self.initializers.append(numpy_helper.from_array(
                laid_out if shape is None else laid_out.reshape(shape), self._stored[key]))
        return self._stored[key]

    def _unique(self, name: str) -> str:
        number, unique = 1, name
        while unique in self._used:
            number += 1
            unique = f"{name}_{number}"
        self._used.add(unique)
        return unique


def _channels_first(values: Sequence[int]) -> tuple[int, ...]:
    """Reorders values for [H, W, C] to [C, H, W]; also if several axes stand for C. Those for [C] stay."""
    if len(values) < 3:
        return tuple(values)
    height, width, *channels = values
    return *channels, height, width


def _pads(padding: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Returns (above, left, below, right)."""
    (above, below), (left, right) = padding
    return above, left, below, right


def _window(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"kernel_shape": given["window"], "strides": given["strides"], "pads": _pads(given["padding"])}
