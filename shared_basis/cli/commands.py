"""The modes of the command line, as functions of a `Request`."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from shared_basis import data
from shared_basis.analysis import analyze, tables
from shared_basis.cli.flags import MODES_BY_FLAG
from shared_basis.compression import compress, spectra
from shared_basis.config import Config
from shared_basis.errors import UserError, note_renamed
from shared_basis.evaluation import evaluate, predict
from shared_basis.export import export, pytorch, quantization
from shared_basis.interop.weights import find_weights, only_for_files
from shared_basis.models import summary
from shared_basis.report import compare, run_report
from shared_basis.runs import inspect
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.distributed import is_main_process
from shared_basis.runtime.files import as_path, open_files
from shared_basis.runtime.reporter import Reporter
from shared_basis.training import start, train


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line requests."""

    config: Config
    """The recipe. Modes that read a trained run use that run's configuration, changed by `overrides`."""
    overrides: Mapping[str, Any]
    """The fields that the user set, by dotted path."""
    workdir: str
    workdir_given: bool
    """Whether the user gave --workdir; otherwise `workdir` is the recipe's default."""
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    checkpoint: str = "latest"
    init: str = ""
    weights: str = ""
    classes: str = ""
    against: str = ""
    images: Sequence[str] = ()
    output: str = ""
    tensorboard: bool = False
    format: str = "onnx"
    fold: str = "auto"
    quantize: str = "none"
    tolerance: float = quantization.TOLERANCE
    report: bool = True
    runs: Sequence[str] = ()
    source: str = ""
    calibration: int | None = None
    budget: float | None = None
    budget_of: str = "parameters"
    spectra: bool = False

    @functools.cached_property
    def reporter(self) -> Reporter:
        """Prints lines and progress in the main process only; to standard error if the result is printed as JSON."""
        if not is_main_process():
            return Reporter(io.StringIO(), "quiet", jax.process_index())
        return Reporter(sys.stderr if self.json else sys.stdout,
                        "quiet" if self.quiet else "verbose" if self.verbose else "normal", jax.process_index())


Result = tuple[dict[str, Any], str]
"""The result of a mode, as plain data and as human-readable text."""


def run(mode: str, request: Request) -> Result:
    """Runs one of `MODES`.

    Raises:
      UserError, KeyboardInterrupt: raised by the mode.
    """
    if jax.process_count() > 1 and mode not in ("train", "evaluate"):
        raise UserError(f"--distributed: --mode={mode} runs in one process; only train and evaluate are distributed.")
    for name, modes in MODES_BY_FLAG.items():
        if mode not in modes and getattr(request, name) not in (getattr(Request, name), []):  # () or [] by default
            raise UserError(f"--{name} is only valid with --mode={' or '.join(modes)}, not with --mode={mode}.")
    _check_output(mode, request)
    return MODES[mode](request)


def _check_output(mode: str, request: Request) -> None:
    """Checks before a long computation that --output can be written.

    Raises:
      UserError: --output is a directory instead of a file or vice versa, or its parent directory does not exist.
    """
    if not request.output:
        return
    takes_directory, parent = mode in ("analyze", "report"), as_path(request.output).parent
    if not takes_directory and not open_files(parent).is_directory():
        raise UserError(f"--output={request.output}: the directory {parent} does not exist; create it, or change "
                        "--output.")
    if os.path.exists(request.output) and os.path.isdir(request.output) != takes_directory:
        is_one, other = ("file", "directory") if takes_directory else ("directory", "file")
        raise UserError(f"--output={request.output} is a {is_one}, but --mode={mode} writes a {other}; "
                        "choose another path.")


def _train(request: Request) -> Result:
    for name in ("classes", "calibration", "budget", "budget_of"):
        if not request.init and getattr(request, name) != getattr(Request, name):
            also = "import or compress" if name == "classes" else "compress"
            raise UserError(f"--{name} requires --init in --mode=train, or --mode={also}; add --init, or omit "
                            f"--{name}.")
    init = start.Init(request.init, request.classes, request.calibration, request.budget, request.budget_of)
    with request.reporter:
        result = train.train(request.config, request.workdir, request.reporter, tensorboard=request.tensorboard,
                             init=init if request.init else None)
        if request.report and is_main_process():
            result["report"] = run_report.after_training(request.workdir, request.reporter, jax.process_count() == 1)
    return result, train.render(result) if is_main_process() else ""


def _evaluate(request: Request) -> Result:
    with request.reporter:
        result = evaluate.evaluate(request.workdir, request.checkpoint, request.overrides, request.reporter)
    return result, evaluate.render(result)


def _predict(request: Request) -> Result:
    with request.reporter:
        result = predict.predict(request.workdir, request.images, request.checkpoint, request.overrides,
                                 request.output, request.reporter.progress("classifying images"), request.reporter.warn)
    return result, predict.render(result)


def _export(request: Request) -> Result:
    if request.format == "pytorch":
        if request.fold != Request.fold:
            raise UserError(f"--fold={request.fold}: --format=pytorch writes the weights unchanged; omit --fold.")
        quantization.check(request.format, request.quantize, request.tolerance)
        result = pytorch.export_weights(request.workdir, request.checkpoint, request.overrides, request.output)
        return result, pytorch.render(result)
    with request.reporter:
        result = export.export(request.workdir, request.format, request.fold, request.checkpoint, request.overrides,
                               request.output, request.quantize, request.tolerance, request.reporter)
    return result, export.render(result)


def _report(request: Request) -> Result:
    if request.runs:
        if request.overrides or request.checkpoint != "latest":
            raise UserError("--runs compares the metrics.jsonl of runs; omit --checkpoint and --config.")
        own = [request.workdir] if request.workdir_given else []
        result = compare.compare([*own, *request.runs], request.output or "comparison")
        return result, compare.render(result)
    result = run_report.report(request.workdir, request.checkpoint, request.overrides, request.reporter, request.output)
    return result, run_report.render(result)


def _inspect(request: Request) -> Result:
    result = inspect.inspect(request.workdir, request.checkpoint, request.against)
    return result, inspect.render(result)


def _analyze(request: Request) -> Result:
    result = analyze.analyze(request.workdir, request.checkpoint, request.overrides, request.against, request.output,
                             request.reporter)
    return result, tables.render(result)


def _summary(request: Request) -> Result:
    config = request.config
    if request.workdir_given:
        Workdir(request.workdir).load()  # raises if there is no run
    spec = data.describe(config.data)
    result = summary.compare_with_plain(config.model, len(spec.classes), spec.image_shape)
    return result, summary.render(result)


def _prepare(request: Request) -> Result:
    with request.reporter:
        text = data.prepare(request.config.data, request.reporter)
    return {"name": request.config.data.name, "prepared": text}, text


def _import(request: Request) -> Result:
    file = request.weights
    if not file and request.checkpoint != "latest":
        note_renamed("--checkpoint=FILE of --mode=import", "--weights=FILE")
        file = request.checkpoint
    with request.reporter:
        result = start.import_weights(request.config, request.workdir, file, request.reporter, request.classes)
    return result, start.render(result)


def _compress(request: Request) -> Result:
    source, named = find_weights(request.source, "--source") if request.source else ("", None)
    which = request.checkpoint if named in (None, "latest") else named
    if request.checkpoint not in ("latest", which):
        raise UserError(f"--source={request.source} and --checkpoint={request.checkpoint} name two checkpoints of one "
                        "run; leave one out.")
    if request.classes and named is not None:
        raise only_for_files(request.classes, source)
    if request.spectra:
        with request.reporter:
            result = spectra.write_spectra(source, request.reporter, which=which,
                                           overrides=request.overrides, calibration=request.calibration,
                                           output=request.output)
        return result, spectra.render(result)
    if request.output:
        raise UserError("--output only applies to --spectra; set the directory of the compressed run with --workdir.")
    workdir = request.workdir if request.workdir_given else f"{request.workdir}-compressed"
    with request.reporter:
        result = start.compress_run(
            request.config, workdir, source, request.reporter, which=which,
            calibration=request.calibration, budget=request.budget, measure=request.budget_of, classes=request.classes)
    return result, compress.render(result)


MODES: dict[str, Callable[[Request], Result]] = {
    "train": _train, "evaluate": _evaluate, "predict": _predict, "export": _export, "inspect": _inspect,
    "analyze": _analyze, "report": _report, "summary": _summary, "prepare": _prepare, "import": _import,
    "compress": _compress}
