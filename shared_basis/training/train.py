"""Trains a run from its configuration: checks, data, workdir, and the loop from the latest checkpoint on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import Config, differences
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.interop.weights import normalization_of
from shared_basis.models import Network, create_model
from shared_basis.models.summary import compare_with_plain, render_saving
from shared_basis.optim.optimizer import Descent
from shared_basis.runs import tensorboard as event_files
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.continuation import require_continuation
from shared_basis.runs.metrics import evaluations, last_and_best, render_outcome
from shared_basis.runs.trained import build_model
from shared_basis.runs.workdir import FILES, Workdir, make_record, stored_config, versions
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import check_batch_size, is_main_process, make_mesh, raise_on_all_processes
from shared_basis.runtime.files import Place
from shared_basis.runtime.preemption import StopSignals
from shared_basis.runtime.reporter import Reporter, count, duration
from shared_basis.training.composition import Own, check_optimizer
from shared_basis.training.loop import Training
from shared_basis.training.losses import Loss
from shared_basis.training.program import Program, build
from shared_basis.training.settle import Normalization, settle
from shared_basis.training.start import Init, Start, begins, describe, make, save_start, with_chosen_ranks
from shared_basis.training.steps import TrainState
from shared_basis.training.teacher import Teacher, open_teacher


def train(config: Config, workdir: Place, reporter: Reporter | None = None, *,
          tensorboard: bool = False, init: str | Init | None = None, optimizer: Descent | None = None,
          loss: Loss | None = None,
          augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None) -> dict[str, Any]:
    """Trains or resumes the run of `config` in `workdir`, as `--mode=train` does.

        train(config, "runs/mine", optimizer=optax.adabelief, loss=optax.losses.poly_loss_cross_entropy, augment=rotate)

    The run's record stores the names of user-supplied functions; the run only resumes with functions of the same names.

    Args:
      reporter: shows messages and progress; None prints as the command line does.
      tensorboard: whether metrics are also written as event files.
      init: the initial weights of a new run: the workdir of another run (optionally with :best or :STEP) or a file of
        PyTorch weights. May be omitted when the run resumes.
      optimizer: maps the learning-rate schedule of `config` to an optax transformation, which replaces
        `optimizer.name`, momentum and weight decay; orthogonality, freezing and `learning_rate_factors` still apply.
      loss: maps logits and probabilities, both float32 `[N, classes]`, to the loss of each image, `[N]`; replaces the
        cross entropy.
      augment: maps images uint8 `[N, H, W, C]` and a `jax.random` key to images of the same shape and range; replaces
        `data.pad` and `data.flip`. The key is a function of the seed and the step.

    Returns:
      The counts of `compare_with_plain`. In the first process also the `device`, the last line of metrics.jsonl, and
      `best_epoch`, `best_test_accuracy` and `chosen_on`: 'validation', or 'test' for the published protocol.

    Raises:
      UserError: the configuration does not fit the data or the devices, or the workdir holds another run or is
        among the images.
      TypeError, ValueError: a user-supplied function returns an invalid value.
      Interrupted: a signal arrived; the run was saved, and the same call resumes it.
    """
    if reporter is None:
        with Reporter(None if is_main_process() else io.StringIO(), process=jax.process_index()) as printing:
            return train(config, workdir, printing, tensorboard=tensorboard, init=init, optimizer=optimizer, loss=loss,
                         augment=augment)
    mesh = make_mesh()
    check_batch_size(config.train.batch_size, mesh, config.optimizer.grad_accumulation_steps, config.model.norm_images)
    if tensorboard:
        event_files.require()
    run, own = Workdir(workdir, tensorboard), Own(optimizer, loss, augment)
    what = _set_up(config, run, Init(init) if isinstance(init, str) else init, own, mesh, reporter)
    config = what.config
    # A run whose recipe leaves the batch open keeps its batch, also on other devices.
    check_batch_size(config.train.batch_size, mesh, config.optimizer.grad_accumulation_steps, config.model.norm_images)
    with raise_on_all_processes(), memory.oom_as_user_error(config):  # separate, as processes communicate in it
        images = feeds.load(what.source, config.data, mesh, reporter)
    device = _describe_devices(mesh)
    record = _record_of(what, images, own, device)
    with _claimed(run, record, reporter), reporter.logging(run.path):
        reporter.info(f"{config.model.name}: {render_saving(what.comparison)}")
        _log_setup(config, images, device, run, reporter)
        for field, (now, then) in differences(config, what.saved or config).items():
            reporter.info(f"resumes with {field}={now!r}; it was {then!r}")
        _finish(what, images, mesh, run, record, own, reporter)
    if not is_main_process():
        return what.comparison
    return {**what.comparison, "device": device, **read_outcome(run)}


@dataclasses.dataclass(frozen=True)
class _Setup:
    """The parts of a run before its images are decoded."""

    config: Config
    saved: Config | None
    """The configuration of the existing run in the workdir, if any."""
    source: data.Source
    model: Network
    comparison: dict[str, Any]
    """The network's counts compared with its plain counterpart."""
    start: Start | None
    """The given initial weights of a new run, if any."""
    teacher: Teacher | None


def _set_up(config: Config, run: Workdir, init: Init | None, own: Own, mesh: Mesh, reporter: Reporter) -> _Setup:
    """Opens the data, the network and the weights that the configuration names, and validates the combination.

    Raises:
      UserError: see `train`.
    """
    start, fresh = None, begins(run, init)
    saved = None if fresh else stored_config(run.path, begun=True)
    config = config if fresh else with_chosen_ranks(config, run, init)
    if config.train.freeze and init is None and saved is None:
        reporter.warn(f"train.freeze={config.train.freeze!r} keeps random weights; to fine-tune trained ones, give "
                      "--init=RUN or --init=FILE")
    with raise_on_all_processes(), memory.oom_as_user_error(config):
        weights = normalization_of(init.source) if init is not None and fresh else None
        config, source, model, comparison = _open(config, saved, weights, mesh, reporter)
        if source.single_tree:
            run.require_outside(config.data.directory)
        if saved is not None and is_main_process():  # before images are decoded, which may take long
            require_continuation(run.path, config, saved, len(source.splits["train"]), run.latest_step)
    with raise_on_all_processes(), memory.oom_as_user_error(config):
        if init is not None and fresh:
            start = make(config, source.spec, init, reporter)
            config, model = start.config, start.network
            comparison = compare_with_plain(config.model, len(source.spec.classes), source.spec.image_shape)
        check_optimizer(config, model, source.spec.image_shape, own)
        teacher = open_teacher(config, source.spec, reporter.warn)
    return _Setup(config, saved, source, model, comparison, start, teacher)


def _open(config: Config, saved: Config | None, weights: Normalization | None, mesh: Mesh,
          reporter: Reporter) -> tuple[Config, data.Source, Network, dict[str, Any]]:
    """Returns the settled configuration, the source of the images, the network, and its counts compared with its plain
    counterpart.

    Args:
      saved: the configuration of the existing run in the workdir, if any.
      weights: mean and standard deviation for the given initial weights, if any.

    Raises:
      UserError: the network or the data is unknown, or there are too few images.
    """
    create_model(config.model.name, stem=config.model.stem)  # cheap checks first
    source = data.open_source(config.data, reporter=reporter)
    config = settle(config, source, mesh, reporter, saved=saved, weights=weights)
    model = build_model(config, source.spec)
    comparison = compare_with_plain(config.model, len(source.spec.classes), source.spec.image_shape)
    return config, source, model, comparison


def _finish(what: _Setup, images: feeds.Images, mesh: Mesh, run: Workdir, record: dict[str, Any], own: Own,
            reporter: Reporter) -> None:
    """Trains the remaining steps of the run, if any."""
    config = what.config
    with contextlib.closing(Checkpoints(run.checkpoints, aside=run.damaged, tell=reporter.warn)) as checkpoints:
        if what.start is not None:
            reporter.info(describe(what.start))
            save_start(checkpoints, config, what.model, what.start.variables, record, own.optimizer)
        end = config.train.epochs * (images.count("train") // config.train.batch_size)
        if checkpoints.steps[-1:] == [end] and checkpoints.metrics(end) is not None:
            reporter.info("this run is finished")
            return
        with memory.oom_as_user_error(config, saved=lambda: f" Saved: {checkpoints.describe()}."):
            resume(config, images, what.model, mesh, run, checkpoints, record, reporter, what.teacher, own)


def _record_of(what: _Setup, images: feeds.Images, own: Own, device: str) -> dict[str, Any]:
    """Returns the record of the run; see `make_record`."""
    files = data.fingerprint(what.source.splits)
    return make_record(what.config, {
        "classes": list(images.spec.classes), "image_shape": list(images.spec.image_shape),
        **{f"{name}_examples": images.count(name) for name in images.splits},
        **{f"{name}_broken": images.broken(name) for name in images.splits if images.broken(name)},
        **({"teacher": what.teacher.description} if what.teacher else {}), **({FILES: files} if files else {})
    }, device, own.names(), what.start.init if what.start else None)


@contextlib.contextmanager
def _claimed(run: Workdir, record: dict[str, Any], reporter: Reporter) -> Iterator[None]:
    """Locks the directory of the run `record` in the first process, after checking that all processes see that run.

    If the run resumes, its initial weights are added to `record`.

    Raises:
      UserError: see `Workdir.locked`, `Workdir.claim` and `Workdir.require`.
    """
    with contextlib.ExitStack() as stack:
        with raise_on_all_processes():
            if is_main_process():
                stack.enter_context(run.locked(tell=reporter.info))
                if run.read_record() is not None and not run.has_begun:
                    reporter.info(f"the run in {run.path} has saved nothing; it begins anew")
                run.claim(record)
        with raise_on_all_processes():
            record["init"] = run.require(record)["init"]
        yield


def _describe_devices(mesh: Mesh) -> str:
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} × {jax.devices()[0].device_kind}{processes}"


def _log_setup(config: Config, images: feeds.Images, device: str, run: Workdir, reporter: Reporter) -> None:
    """Logs data, network, devices and workdir; on a verbose reporter also versions and non-default fields."""
    reporter.debug(", ".join(f"{name} {version}" for name, version in versions().items()))
    for field, (value, default) in differences(config, Config()).items():
        reporter.debug(f"{field}: {value!r} (default {default!r})")
    reporter.info(f"data {config.data.name}: {images.describe()}, {len(images.spec.classes)} classes; {device}; "
                  f"workdir {run.path}")


def resume(config: Config, images: feeds.Images, model: Network, mesh: Mesh, run: Workdir, checkpoints: Checkpoints,
           record: dict[str, Any], reporter: Reporter, teacher: Teacher | None = None, own: Own | None = None) -> None:
    """Compiles, and trains from the latest checkpoint, or from the beginning if there is none, to the end."""
    started = time.monotonic()
    reporter.info("compiling …")
    state, program = build(config, images, model, mesh, checkpoints, teacher, own)
    with StopSignals() as signals:
        reporter.info(f"ready in {duration(time.monotonic() - started)}; {program.memory.render()}")
        evaluated = checkpoints.metrics(int(state.step)) is not None
        _rewind(run, state, evaluated, program, config, reporter)
        Training(config, program, run, checkpoints, record, reporter, signals).loop(state)


def _rewind(run: Workdir, state: TrainState, evaluated: bool, program: Program, config: Config,
            reporter: Reporter) -> None:
    """Drops the metrics after `state`, which will be recomputed, and logs the step from which a saved run resumes."""
    step = int(state.step)
    with raise_on_all_processes():
        if is_main_process():
            # Without saved metrics the evaluation of this step is repeated, and so is its line.
            run.rewind_metrics(step if evaluated else step - 1)
    if not step:
        return
    reporter.info(f"resumes at step {count(step)} of {count(config.train.epochs * program.steps_per_epoch)}")
    _, record = run.load()
    changed = [f"{name} {then} → {versions().get(name)}" for name, then in record["versions"].items()
               if versions().get(name) != then]
    if changed:
        reporter.info(f"note: package versions have changed since the run began ({', '.join(changed)}); "
                      "the result may differ in the last bits")


def read_outcome(run: Workdir) -> dict[str, Any]:
    """Returns the last line of metrics.jsonl, with epoch and test accuracy of the best epoch and how it was chosen.

    Raises:
      UserError: the file is missing or empty.
    """
    lines = evaluations(run.metrics())
    if not lines:
        raise UserError(f"{run.path / 'metrics.jsonl'} is missing or empty; the checkpoints exist: evaluate them with "
                        f"--mode=evaluate --workdir={run.path}.")
    return last_and_best(lines)


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `train` as human-readable text."""
    return f"{render_outcome(result)}\n{render_saving(dict(result))}"
