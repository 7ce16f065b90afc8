"""The mode `export`: writes a trained network's inference function as a file for runtimes without this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.augment import normalize
from shared_basis.data.in_memory import kept_part
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluator import require_finite
from shared_basis.export import onnx, quantization, stablehlo
from shared_basis.export.folding import CHOICES, fold
from shared_basis.export.graph import Node
from shared_basis.export.graph import count_macs as graph_macs
from shared_basis.export.graph import count_numbers as graph_numbers
from shared_basis.export.jaxpr import trace
from shared_basis.models.parameters import count_macs as network_macs
from shared_basis.models.parameters import count_parameters as network_parameters
from shared_basis.runs.trained import Trained
from shared_basis.runs.workdir import versions
from shared_basis.runtime.files import Place, as_path, open_files
from shared_basis.runtime.reporter import Reporter, count, size_text

FORMATS = {"onnx": onnx, "stablehlo": stablehlo}
"""The modules that write each format."""

STAGES = 4
"""Number of progress steps of an export: restored, folded, serialised, verified."""
CHECKED = 8
"""Number of images of random pixels on which the file is compared with the network."""
TOLERANCE = 1e-3
"""Tolerance of logits relative to the largest, or to 1: well above rounding errors, well below any real fault."""

Run = Callable[[bytes, np.ndarray], tuple[np.ndarray, str] | None]
"""Computes logits of uint8 images `[N, H, W, C]` from a file and names the runtime; None if it is not installed."""


def export(workdir: Place, kind: str, choice: str = "auto", which: str = "latest",
           overrides: Mapping[str, Any] | None = None, output: str = "", quantize: str = "none",
           tolerance: float = quantization.TOLERANCE, reporter: Reporter | None = None) -> dict[str, Any]:
    """Writes a checkpoint of `workdir` as a function from images uint8 `[N, H, W, C]` to logits float32 `[N, classes]`.

    The function includes normalisation, accepts any N, and computes in float32 regardless of the run's dtype.

    Args:
      kind: one of `FORMATS`.
      choice: one of `folding.CHOICES`.
      which, overrides: see `Trained.open`.
      output: the file; by default WORKDIR/export/model.onnx (quantised: model-int8.onnx) or model.stablehlo.
      quantize: one of `quantization.CHOICES`; values other than 'none' require ONNX.
      tolerance: percentage points of test accuracy that quantisation may lose.
      reporter: shows progress; None shows nothing.

    Returns:
      `workdir`, `step`, `model`, `classes`, `image_shape`, `format`, `file`, its `bytes`, `fold`; `layers`: the numbers
      of basis layers that stay `basis` or are `composed`; `norms_left`: the number of batch normalisations that remain
      as scale and offset; `macs` per image and `parameters`, of the `network` and as `exported`; and `verified`: `by`
      which runtime, the number of `images`, the largest `difference` of logits and the `largest` logit; None without
      onnxruntime. `quantized` is None, or the comparison from `quantization.quantize`; all other entries except `bytes`
      describe the file before quantisation.

    Raises:
      UserError: see `Trained.open`, `Trained.on_cpu`; or a package is missing, the file cannot be written, its
        logits differ from the network's, or quantisation loses more than `tolerance`.
    """
    if kind not in FORMATS or choice not in CHOICES:
        raise UserError(f"format={kind!r}, fold={choice!r}: format must be one of {', '.join(FORMATS)}, fold one of "
                        f"{', '.join(CHOICES)}.")
    writer = FORMATS[kind]
    writer.require_packages()
    quantization.check(kind, quantize, tolerance)
    reporter = reporter or Reporter(verbosity="quiet")
    progress = reporter.progress("exporting: stage")
    trained = Trained.open(workdir, which, overrides).on_cpu()
    data, shape = trained.config.data, trained.spec.image_shape
    progress(1, STAGES)
    graph, outcome = fold(trace(trained.model, trained.variables, shape, lambda images: normalize(images, data)),
                          choice)
    progress(2, STAGES)
    counts = _count(trained, graph)
    about = {"model": trained.config.model.name, "step": trained.step, "classes": list(trained.spec.classes),
             "image_shape": list(shape)}
    files = writer.serialise(graph, {
        **about, "input": "images: uint8 [N, H, W, C], normalised inside: (images / 255 - mean) / std",
        "resize": resizing(data, shape),
        "output": "logits: float32 [N, classes]", "mean": list(data.mean), "std": list(data.std), "fold": choice,
        **counts, "versions": versions()})
    progress(3, STAGES)
    verified = _verify(writer.run, files[""], trained)
    progress(STAGES, STAGES)
    quantized, suffix = None, ""
    if quantize != "none":
        files[""], quantized = quantization.quantize(files[""], quantize, tolerance, trained, reporter)
        suffix = f"-{quantize}"
    path = write_files(output, trained.run.path / "export" / f"model{suffix}.{kind}", files)
    return {"workdir": str(trained.run.path), **about, "format": kind, "file": str(path), "bytes": len(files[""]),
            "fold": choice, "layers": outcome.layers, "norms_left": outcome.norms_left, **counts, "verified": verified,
            "quantized": quantized}


def _count(trained: Trained, graph: Node) -> dict[str, dict[str, int]]:
    """Returns `macs` per image and `parameters`, of the `network` and as `exported`."""
    macs = network_macs(trained.model, trained.variables, trained.spec.image_shape)
    parameters = network_parameters(trained.variables["params"])
    return {"macs": {"network": sum(macs.values()), "exported": graph_macs(graph)},
            "parameters": {"network": sum(parameters.values()), "exported": graph_numbers(graph)}}


def resizing(config: DataConfig, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns how to resize images to the network's input, as plain data; docs/export.md has it as code.

    Describes the preprocessing of `shared_basis.evaluation.predict.predict`: the largest central box with the input's
    aspect ratio, scaled by `part`, is resized to `height` and `width` with `filter`, before normalisation.
    """
    part = kept_part(config)
    return {"height": shape[0], "width": shape[1], "color": "RGB" if shape[2] == 3 else "L", "crop": "center",
            "part": part, "filter": "bilinear, antialiased", "shorter_side": round(min(shape[:2]) / part)}


def _verify(run: Run, file: bytes, trained: Trained) -> dict[str, Any] | None:
    """Compares logits that `run` computes from `file` with the network's; returns None if `run` is not installed.

    Raises:
      UserError: the logits differ too much.
    """
    images = np.random.default_rng(0).integers(0, 256, (CHECKED, *trained.spec.image_shape), dtype=np.uint8)
    computed = run(file, images)
    if computed is None:
        return None
    (logits, by), expected = computed, np.asarray(trained.classifier()(images))
    require_finite(np.isfinite(expected).all(axis=-1), trained)
    difference, largest = float(np.abs(logits - expected).max()), float(np.abs(expected).max())
    if not difference <= TOLERANCE * max(1.0, largest):  # also true for NaN
        raise UserError(f"no file was written: the logits that {by} computes from it differ from the network's by "
                        f"{difference:.3g}, with a largest logit of {largest:.3g}. This is a bug in the export; please "
                        "report it, and try --fold=none.")
    return {"by": by, "images": CHECKED, "difference": difference, "largest": largest}


def write_files(output: str, default: PurePath, files: Mapping[str, bytes]) -> PurePath:
    """Writes the contents of `files`, keyed by suffix, next to the path that it returns, once all are complete.

    Args:
      output: the path; if empty, `default` is used and its directory created.

    Raises:
      UserError: a file cannot be written.
    """
    path = as_path(output) if output else default
    beside = open_files(path.parent)
    try:
        if not output:
            beside.make()
        beside.write({path.name + suffix: content for suffix, content in files.items()})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another with --output=FILE.") from error
    return path


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `export` as human-readable lines."""
    layers, verified = result["layers"], result["verified"]
    shape = ", ".join(map(str, result["image_shape"]))
    ways = {"kept as a basis convolution and a 1×1 convolution": layers["basis"],
            "composed into one convolution": layers["composed"]}
    by = " (fewest multiply-accumulates)" if result["fold"] == "auto" else ""
    folded = f"--fold={result['fold']}{by}: " + (", ".join(
        f"{number} basis layers {way}" for way, number in ways.items() if number) or "there are no basis layers")
    if result["fold"] == "auto" and layers["composed"]:
        folded += " (a file with --fold=basis may be smaller)"
    if result["norms_left"]:
        folded += f"; {result['norms_left']} batch normalisations are not folded"
    changes = "; ".join(
        f"{name} {count(result[key]['network'])}" + ("" if result[key]["network"] == result[key]["exported"] else
                                                     f" → {count(result[key]['exported'])}")
        for name, key in (("multiply-accumulates", "macs"), ("parameters", "parameters")))
    lines = [
        f"{result['model']} at step {result['step']:,} of {result['workdir']}: {result['file']} "
        f"({size_text(result['bytes'])}), from images uint8 [N, {shape}], normalised inside, to logits "
        f"[N, {len(result['classes'])}]", folded, changes,
        "not verified, since onnxruntime is not installed: pip install 'shared-basis[export]'" if verified is None else
        f"verified by {verified['by']} on {verified['images']} images of random pixels: logits differ by at most "
        f"{verified['difference']:.1e}, the largest is {verified['largest']:.3g}"]
    if result["quantized"]:
        lines[-1] += ", before quantisation"
        lines.append(quantization.render(result["quantized"]))
    return "\n".join(lines)
