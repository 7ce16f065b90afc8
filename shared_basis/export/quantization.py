"""Quantisation of ONNX models to 8 or 16 bits, verified against float32 on all test images.

Inputs and outputs are unchanged. int8 (static quantisation, Jacob et al. 2018) quantises activations, with ranges
measured on training images, and kernels per output channel; runtimes that support it use integer arithmetic. float16
only stores kernels in 16 bits; runtimes convert them to float32 when loading the file.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared_basis import data
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.runs.trained import Trained
from shared_basis.runtime.reporter import Reporter, size_text

CHOICES = ("none", "int8", "float16")
"""The values of --quantize."""

TOLERANCE = 1.0
"""Default for the percentage points of accuracy that quantisation may lose."""
CALIBRATION_IMAGES = 512
"""Maximum number of training images for measuring the ranges of activations."""
ROUNDS = 21
"""Number of timed calls of each model, alternating; the median is reported."""

Batches = Iterable[tuple[np.ndarray, np.ndarray]]
"""Batches of images uint8 `[N, H, W, C]` and their classes `[N]`."""


def check(kind: str, choice: str, tolerance: float) -> None:
    """Raises `UserError` unless files of format `kind` can be quantised this way in this installation."""
    if choice not in CHOICES:
        raise UserError(f"--quantize={choice}: must be one of {', '.join(CHOICES)}.")
    if not 0 <= tolerance <= 100:  # also true for NaN
        raise UserError(f"--tolerance={tolerance:g}: must be 0 to 100, the points of accuracy that --quantize may "
                        "lose.")
    if choice == "none":
        if tolerance != TOLERANCE:
            raise UserError("--tolerance requires --quantize=int8 or float16; add it, or omit --tolerance.")
        return
    if kind != "onnx":
        raise UserError(f"--quantize={choice} requires --format=onnx; omit it for --format={kind}.")
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError("--quantize needs the package onnxruntime, which is not installed: "
                        "pip install 'shared-basis[export]'.") from error


def quantize(content: bytes, choice: str, tolerance: float, trained: Trained,
             reporter: Reporter) -> tuple[bytes, dict[str, Any]]:
    """Quantises the ONNX model `content` of `trained` as `choice`, and compares the result with the original.

    Returns:
      The model, and a dict with `choice`; `calibration`, the number of training images used; `test_examples`; for
      'float32' and `choice`, `test_accuracy`, `bytes` and `latency`, in seconds per image; `same_class`, the fraction
      of test images, in [0, 1], for which both predict the same class; and `by`, the runtime.

    Raises:
      UserError: the model loses more than `tolerance` percentage points, or the run's images cannot be opened.
    """
    import onnxruntime

    calibration, batches = _load(trained, CALIBRATION_IMAGES if choice == "int8" else 0, reporter)
    if choice == "int8":
        reporter.info(f"calibrating on {calibration:,} training images")
        small = _to_int8(content, batches("train"))
    else:
        small = _to_float16(content)
    contents = {"float32": content, choice: small}
    sessions = {name: onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
                for name, model in contents.items()}
    reporter.info("scoring both files on the test images")
    correct, same, examples = _score(sessions, batches("test"))
    if not examples:
        raise UserError("none of the test images can be decoded.")
    accuracy = {name: number / examples for name, number in correct.items()}
    lost = 100 * (correct["float32"] - correct[choice]) / examples  # not of fractions, which are rounded
    if lost > tolerance:
        other = "or --quantize=float16" if choice == "int8" else "or leave --quantize out"
        raise UserError(
            f"no file was written: on {examples:,} test images, {choice} classifies {100 * accuracy[choice]:.2f} % "
            f"correctly and float32 {100 * accuracy['float32']:.2f} %, a loss of {lost:.2f} points "
            f"({correct['float32'] - correct[choice]:,} images), but only --tolerance={tolerance:g} is allowed; give "
            f"--tolerance={np.ceil(lost):g}, {other}.")
    return small, {"choice": choice, "calibration": calibration, "test_examples": examples, "test_accuracy": accuracy,
                   "same_class": same / examples,
                   "bytes": {name: len(model) for name, model in contents.items()},
                   "latency": _latency(sessions, np.zeros((1, *trained.spec.image_shape), np.uint8)),
                   "by": f"onnxruntime {onnxruntime.__version__}"}


def _load(trained: Trained, wanted: int, reporter: Reporter) -> tuple[int, Callable[[str], Batches]]:
    """Opens the test images, and up to `wanted` training images.

    Returns:
      The number of training images, and a function that returns the batches of a split, given its name.
    """
    splits, calibration = {"test": trained.open_source(reporter).splits["test"]}, 0
    if wanted:
        train = data.open_source(trained.config.data, ("train",), trained.spec, reporter).splits["train"]
        calibration = min(wanted, len(train))
        order = np.random.default_rng(0).permutation(len(train))
        splits["train"] = train.take(np.sort(order[:calibration]))
    images = feeds.load(data.Source(trained.spec, splits), trained.images, trained.mesh, reporter)

    def batches(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in images.batches(name, trained.config.train.eval_batch_size, trained.mesh)():
            pixels, labels = map(np.asarray, batch)
            if (known := labels >= 0).any():  # broken images and padding have no label
                yield pixels[known], labels[known]
    return calibration, batches


def _to_int8(content: bytes, batches: Batches) -> bytes:
    """Returns the model with QDQ quantisation of kernels, per channel, and of activations around every operation.

    Per-channel scales and offsets, of batch normalisation and pixels, remain float32, since ranges are per tensor.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # Any if onnxruntime is not installed
        """Yields the calibration batches one by one."""

        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            """Returns the next input, or None at the end."""
            return next(({"images": pixels} for pixels, _ in self.batches), None)

    model = onnx.load_model_from_string(content)
    constants = {tensor.name for tensor in model.graph.initializer}
    by_channel = [node.name for node in model.graph.node
                  if node.op_type in ("Add", "Mul") and constants.intersection(node.input)]
    with tempfile.TemporaryDirectory() as directory, _without_advice():
        file = Path(directory) / "model.onnx"
        # On x86, onnxruntime has few integer kernels for signed activations, and 8-bit sums saturate on older CPUs.
        # Logits are not quantised: with 256 values, two classes would often be equal.
        quantize_static(model, file, Reader(), per_channel=True, nodes_to_exclude=by_channel,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
                        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]})
        return _labelled(onnx.load(file), "int8")


def _to_float16(content: bytes) -> bytes:
    """Returns the model with float16 kernels, each cast to float32 by one operation, even if used several times."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_model_from_string(content)
    casts = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) in (2, 4):
            with np.errstate(over="ignore"):  # non-finite logits count as incorrect
                half = numpy_helper.to_array(tensor).astype(np.float16)
            name = f"{tensor.name}/float32"
            casts[tensor.name] = helper.make_node("Cast", [tensor.name], [name], name, to=TensorProto.FLOAT)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    nodes = [*casts.values(), *model.graph.node]
    for node in model.graph.node:
        node.input[:] = [casts[name].name if name in casts else name for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return _labelled(model, "float16")


def _labelled(model: Any, choice: str) -> bytes:
    """Returns the serialised model with the kind of quantisation added to its metadata."""
    model.metadata_props.add(key="quantize", value=choice)
    content: bytes = model.SerializeToString()
    return content


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silences onnxruntime's warnings to simplify the graph before quantisation, which is already done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _score(sessions: dict[str, Any], batches: Batches) -> tuple[dict[str, int], int, int]:
    """Returns how many images each model classifies correctly, how many all classify alike, and how many there are."""
    correct, same, examples = dict.fromkeys(sessions, 0), 0, 0
    for pixels, labels in batches:
        examples += len(labels)
        found = []
        for name, session in sessions.items():
            logits = session.run(None, {"images": pixels})[0]
            found.append(np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1))
            correct[name] += int(np.sum(found[-1] == labels))
        same += int(np.sum((np.ptp(found, axis=0) == 0) & (found[0] >= 0)))
    return correct, same, examples


def _latency(sessions: dict[str, Any], image: np.ndarray) -> dict[str, float]:
    """Returns the median seconds per call of each model, called alternately."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            session.run(None, {"images": image})  # untimed warm-up, since the other model used the caches
            began = time.perf_counter()
            session.run(None, {"images": image})
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def render(result: dict[str, Any]) -> str:
    """Returns the comparison from `quantize` as a human-readable line."""
    choice, milliseconds = result["choice"], {name: 1000 * value for name, value in result["latency"].items()}
    measured = f", calibrated on {result['calibration']:,} training images" if result["calibration"] else ""
    accuracy, size = result["test_accuracy"], result["bytes"]
    return (f"float32 → {choice}{measured}: accuracy {100 * accuracy['float32']:.2f} → {100 * accuracy[choice]:.2f} % "
            f"of {result['test_examples']:,} test images, and the same class for {100 * result['same_class']:.2f} % of "
            f"them; file {size_text(size['float32'])} → {size_text(size[choice])}; latency "
            f"{milliseconds['float32']:.2f} → {milliseconds[choice]:.2f} ms per image, by {result['by']}, median of "
            f"{ROUNDS} calls")
