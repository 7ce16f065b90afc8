"""Initialises a run with existing weights, of another run or of a PyTorch file, unchanged or compressed.

Training with `--init`, `--mode=import` and `--mode=compress` share one mechanism: `make` computes the variables, which
are saved as step 0 of a run. Training then resumes from there like any other run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shared_basis import data
from shared_basis.compression import compress as compressing
from shared_basis.compression.compress import compress
from shared_basis.compression.layers import open_plain
from shared_basis.config import Config, DataConfig, replace
from shared_basis.errors import UserError
from shared_basis.interop.weights import find_weights, open_file, open_weights
from shared_basis.models import Network, plain_counterpart
from shared_basis.models.parameters import count_parameters
from shared_basis.optim.optimizer import Descent
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.origin import Origin, fit
from shared_basis.runs.trained import Variables, build_model
from shared_basis.runs.workdir import FILES, Workdir, make_record
from shared_basis.runtime.distributed import (
    is_main_process,
    make_mesh,
    process_allgather,
    raise_on_all_processes,
    replicated,
)
from shared_basis.runtime.files import Place, absolute
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.program import first_state


@dataclasses.dataclass(frozen=True)
class Init:
    """The initial weights of a new run, as specified on the command line."""

    source: str
    """The workdir of a run, optionally with :best or :STEP instead of its latest checkpoint, or a file of weights."""
    classes: str = ""
    """A file with the class names of a file of weights: see `shared_basis.interop.classes.read_classes`."""
    calibration: int | None = None
    budget: float | None = None
    measure: str = "parameters"
    """As for `shared_basis.compression.compress.compress`, when a plain network is compressed to a shared one."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The initial variables of a run."""

    config: Config
    """Contains the name of `network`, whose ranks a budget may have chosen."""
    network: Network
    spec: data.Spec
    variables: Variables
    init: dict[str, Any]
    """The entry in the run's record: `source`, `step` (None for a file), the source's `network`, `head` (how the
    classifier was initialised) and `budget`."""
    report: dict[str, Any] | None
    """The report of the compression, if there was one; see `Compressed`."""


def make(config: Config, spec: data.Spec, init: Init, reporter: Reporter) -> Start:
    """Computes the initial variables of a run of `config` on data of `spec`; writes nothing.

    Raises:
      UserError: see `open_weights`, `fit` and, when compressing a plain network, `compress`.
    """
    return _make(config, spec, open_weights(init.source, config, spec, init.classes, reporter), init, reporter)


def _make(config: Config, spec: data.Spec, origin: Origin, init: Init, reporter: Reporter) -> Start:
    its, mine = origin.config.model.name, config.model.name
    if init.budget is None and (its == mine or its != plain_counterpart(its)):
        return _copy(config, spec, origin, init, reporter)
    if jax.process_count() > 1:
        raise UserError(f"--init={init.source}: compressing plain {its} to {mine} runs in one process; first run "
                        f"--mode=compress --source={init.source}, then pass its workdir to --init.")
    return _compress(config, origin, init, reporter)


def _copy(config: Config, spec: data.Spec, origin: Origin, init: Init, reporter: Reporter) -> Start:
    """Returns the weights of `origin` unchanged, except for the classifier."""
    for flag, value, default in (("calibration", init.calibration, None), ("budget_of", init.measure, "parameters")):
        if value != default:
            raise UserError(f"--{flag}={value}: only applies when a plain network initialises one with shared "
                            f"bases, but {origin.where} holds {origin.config.model.name}; omit it.")
    network = build_model(config, spec)
    variables, _, head = fit(origin, origin.variables, network, spec, config.seed)
    there = origin.config.data
    if (there.mean, there.std) != (config.data.mean, config.data.std):
        fields = " ".join(f'--config.data.{field}="{getattr(there, field)}"' for field in ("mean", "std"))
        reporter.warn(f"the weights of {origin.where} were trained with a different image normalisation; set "
                      f"{fields.replace(', ', ',')}.")
    return Start(config, network, spec, variables, _record(init, origin, head), None)


def _compress(config: Config, origin: Origin, init: Init, reporter: Reporter) -> Start:
    """Returns the plain network `origin`, compressed in closed form."""
    found = compress(config, origin, reporter, calibration=init.calibration, budget=init.budget, measure=init.measure)
    return Start(found.config, found.network, found.spec, found.variables,
                 _record(init, origin, found.report["head"]), found.report)


def _record(init: Init, origin: Origin, head: str) -> dict[str, Any]:
    return {"source": absolute(init.source), "step": origin.step, "network": origin.config.model.name, "head": head,
            "budget": init.budget}


# Runs


def begins(run: Workdir, init: Init | None) -> bool:
    """Returns whether a run in `run` has yet to be initialised with the weights of `init`; agrees on all processes.

    Raises:
      UserError: the run began with other weights, its interrupted start needs `init` again, or there are no weights.
    """
    answer = False
    with raise_on_all_processes():
        if is_main_process():
            answer = _begins(run, init)
    return bool(process_allgather(answer)[0]) if jax.process_count() > 1 else answer


def _begins(run: Workdir, init: Init | None) -> bool:
    record = run.read_record()
    if record is None or not run.has_begun:
        if init is not None:
            find_weights(init.source)
        return init is not None
    began = record["init"]
    saved = bool(run.saved_steps)  # Orbax's managers would need all processes
    if init is None:
        if began and not saved:
            raise UserError(f"workdir {run.path} was started with --init={began['source']} but holds no checkpoint "
                            "yet; give that --init again.")
        return False
    if not began or began["source"] != absolute(init.source):
        how = f"began with --init={began['source']}" if began else "began without --init"
        raise UserError(f"workdir {run.path} holds a run that {how}; omit --init to resume it, or choose "
                        "another --workdir.")
    return not saved


def with_chosen_ranks(config: Config, run: Workdir, init: Init | None) -> Config:
    """Returns `config` with the network that the budget of `init` chose when the run began."""
    record = run.read_record() if init is not None and init.budget is not None else None
    return config if record is None else compressing.named(config, record["config"]["model"]["name"])


def describe(start: Start) -> str:
    """Returns human-readable lines about the initial weights of a run."""
    init = start.init
    step = "" if init["step"] is None else f"step {init['step']:,} of "
    said = f"starts from {step}{init['source']} ({init['network']}); the classifier is {init['head']}"
    if start.report is None:
        return said
    return f"{said}\n{_compressed(start.config.model.name, start.report)}"


def _compressed(name: str, report: Mapping[str, Any]) -> str:
    errors = [layer["filters"] for layer in report["layers"]]
    return (f"compressed in closed form to {name}: mean relative error of filters "
            f"{100 * sum(errors) / len(errors):.2f} %; {compressing.render_scores(report)}")


def import_weights(config: Config, workdir: Place, file: str, reporter: Reporter | None = None,
                   classes: str = "") -> dict[str, Any]:
    """Saves the published weights in `file` as step 0 of a run of `config` in `workdir`.

    The result is an ordinary run, which can be evaluated, and trained further.

    Args:
      reporter: shows how the outputs are mapped to classes; None prints as the command line does.
      classes: see `Init`.

    Returns:
      `workdir`, `model`, `file`, the number of `parameters`, `head` (how the classifier was initialised), and
      `compressed`: the report of `Compressed` if the file is of the plain network, otherwise None.

    Raises:
      UserError: the file does not match this network (see `load_pytorch_weights`), or the workdir already holds
        checkpoints or is among the images.
    """
    if reporter is None:
        with Reporter() as printing:
            return import_weights(config, workdir, file, printing, classes)
    if not file:
        raise UserError("--mode=import needs --weights=FILE, a file of PyTorch weights.")
    if not os.path.isfile(file):
        problem = "is a directory" if os.path.isdir(file) else "no such file"
        raise UserError(f"--weights={file}: {problem}; give a file of PyTorch weights, or train with --init=RUN.")
    require_new(workdir, config.data)
    spec = data.describe(config.data)
    origin = open_file(file, config, spec, classes, reporter)
    config = replace(config, {f"data.{name}": getattr(origin.config.data, name) for name in ("mean", "std")
                              if not getattr(config.data, name)})
    start = _make(config, spec, origin, Init(file, classes), reporter)
    parameters = _write(start, workdir, reporter)
    return {"workdir": str(workdir), "model": config.model.name, "file": str(file), "parameters": parameters,
            "head": start.init["head"], "compressed": start.report}


def compress_run(config: Config, workdir: Place, source: str, reporter: Reporter, *, which: str = "latest",
                 calibration: int | None = None, budget: float | None = None, measure: str = "parameters",
                 classes: str = "") -> dict[str, Any]:
    """Compresses the plain network in `source` to that of `config`, and saves it as step 0 of a run in `workdir`.

    Args:
      source: the workdir of a run, or a file of PyTorch weights.
      which, calibration, budget, measure: see `shared_basis.compression.compress.compress`.
      classes: see `open_weights`; only for a file.

    Returns:
      `workdir` and the report of `Compressed`.

    Raises:
      UserError: see `shared_basis.compression.compress.compress`; or `workdir` already holds checkpoints or is
        among the images.
    """
    origin = None if os.path.isfile(source) else open_plain(source, which)
    require_new(workdir, config.data)
    compressing.check_target(config, budget, measure)
    if origin is None:
        origin = open_file(source, config, data.describe(config.data), classes, reporter)
    start = _compress(config, origin, Init(source, classes, calibration, budget, measure), reporter)
    _write(start, workdir, reporter)
    return {"workdir": str(workdir), **(start.report or {})}


def require_new(workdir: Place, images: DataConfig) -> None:
    """Raises `UserError` if `workdir` holds checkpoints, or is among the `images`."""
    run = Workdir(workdir)
    if images.name == "folder" and data.open_source(images).single_tree:
        run.require_outside(images.directory)
    if Checkpoints(run.checkpoints, read_only=True).steps:
        raise UserError(f"workdir {run.path} already holds checkpoints; choose a new --workdir.")


def _write(start: Start, workdir: Place, reporter: Reporter) -> int:
    return start_run(start.config, workdir, start.network, start.spec, start.variables, start.init, reporter.info)


def start_run(config: Config, workdir: Place, model: Network, spec: data.Spec, variables: Variables,
              init: Mapping[str, Any] | None = None, tell: Callable[[str], None] = lambda text: None) -> int:
    """Saves `variables` (`params`, `batch_stats`) of `model` as step 0 of a run of `config`.

    Args:
      init: the record's entry about the origin of the weights; see `Start`.
      tell: called with a message while waiting for another process.

    Returns:
      The number of parameters.

    Raises:
      UserError: the workdir holds a different run, or cannot be written; or a folder of images cannot be opened.
    """
    about = {"classes": list(spec.classes), "image_shape": list(spec.image_shape)}
    if config.data.name == "folder":  # other data need not be prepared yet
        about[FILES] = data.fingerprint(data.open_source(config.data).splits)
    record, run = make_record(config, about, init=init), Workdir(workdir)
    with run.locked(tell=tell):
        run.claim(record)
        checkpoints = Checkpoints(run.checkpoints)
        save_start(checkpoints, config, model, variables, record)
        checkpoints.close()
    return sum(count_parameters(variables["params"]).values())


def save_start(checkpoints: Checkpoints, config: Config, model: Network, variables: Variables,
               record: Mapping[str, Any], descent: Descent | None = None) -> None:
    """Saves `variables` of `model` as step 0 of the run `record`, on all processes together; waits for completion.

    Args:
      descent: the user-supplied optimizer, if any.
    """
    state = first_state(config, model, jax.tree.map(jnp.asarray, variables), descent)
    checkpoints.save(0, jax.device_put(jax.device_get(state), replicated(make_mesh())), record, None)
    checkpoints.wait()


def render(result: dict[str, Any]) -> str:
    """Returns the result of `import_weights` as human-readable text."""
    use = "evaluate it with --mode=evaluate" if result["head"].startswith("kept") else "train it with"
    said = (f"{result['file']}: {result['model']}, {result['parameters']:,} parameters, classifier "
            f"{result['head']}; now step 0 of {result['workdir']}; {use} --workdir={result['workdir']}")
    return said if result["compressed"] is None else f"{said}\n{_compressed(result['model'], result['compressed'])}"
