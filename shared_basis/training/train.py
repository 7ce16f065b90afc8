"""Training: the loop and what it needs."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import jax

from shared_basis import data
from shared_basis.config import Config, differences
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.models import create_model
from shared_basis.models.summary import compare_with_plain, render_saving
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.metrics import last_and_best
from shared_basis.runs.tensorboard import require
from shared_basis.runs.trained import build_model
from shared_basis.runs.workdir import Workdir, make_record, versions
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import check_batch_size, is_main_process, make_mesh, raise_on_all_processes
from shared_basis.runtime.preemption import StopSignals
from shared_basis.runtime.reporter import Reporter, count, duration
from shared_basis.training.loop import Training
from shared_basis.training.program import Program, build
from shared_basis.training.steps import TrainState


def train(config: Config, workdir: str | Path, reporter: Reporter, *, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, or goes on training, the run of `config` in `workdir`.

    Args:
      tensorboard: whether metrics are also written as event files.

    Returns:
      `compare_with_plain`'s counts and, in the first process, the `device`, the last line of metrics.jsonl, and of the
      best epoch `best_epoch`, `best_test_accuracy` and `chosen_on`: 'validation', or 'test', the published protocol.

    Raises:
      UserError: the configuration does not fit the data or the devices, or the workdir holds another run.
      Interrupted: a signal came; the run is saved and the same call goes on.
    """
    mesh = make_mesh()
    check_batch_size(config.train.batch_size, mesh, config.optimizer.grad_accumulation_steps)
    if tensorboard:
        require()
    run = Workdir(workdir, tensorboard)
    with raise_on_all_processes(), memory.oom_as_user_error(config):
        if is_main_process():  # alone: what others looked for and did not find, a network's file system may hide from them
            run.read_record()  # an unreadable workdir is told before the images are read
        create_model(config.model.name, stem=config.model.stem)  # an unknown name is told before data is looked for
        source = data.open_source(config.data, reporter=reporter)
        model = build_model(config, source.spec)
        comparison = compare_with_plain(config.model, len(source.spec.classes), source.spec.image_shape)
        examples = len(source.splits["train"])
        if examples < config.train.batch_size:
            raise UserError(f"train.batch_size={config.train.batch_size}: there are only {examples} training images.")
    with raise_on_all_processes(), memory.oom_as_user_error(config):  # apart, as processes settle something in it
        images = feeds.load(source, config.data, mesh, reporter)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    device = f"{mesh.size} × {jax.devices()[0].device_kind}{processes}"
    record = make_record(config, {
        "classes": list(source.spec.classes), "image_shape": list(source.spec.image_shape),
        **{f"{name}_examples": images.count(name) for name in images.splits}}, device)
    with contextlib.ExitStack() as stack:
        with raise_on_all_processes():
            if is_main_process():
                stack.enter_context(run.locked())
                run.claim(record)
        with raise_on_all_processes():
            run.require(record)
        stack.enter_context(reporter.logging(run.path))
        reporter.info(f"{config.model.name}: {render_saving(comparison)}")
        reporter.debug(", ".join(f"{name} {version}" for name, version in versions().items()))
        for field, (value, default) in differences(config, Config()).items():
            reporter.debug(f"{field}: {value!r}, by default {default!r}")
        *parts, last = (f"{count(images.count(name))} {'training' if name == 'train' else name}"
                        for name in images.splits)
        reporter.info(f"data {config.data.name}: {', '.join(parts)} and {last} images of "
                    f"{'×'.join(map(str, source.spec.image_shape))}, {len(source.spec.classes)} classes; "
                    f"{device}; workdir {run.path}")
        checkpoints = Checkpoints(run.checkpoints, aside=run.damaged, tell=reporter.warn)
        stack.callback(checkpoints.close)
        end = config.train.epochs * (examples // config.train.batch_size)
        if checkpoints.steps[-1:] == [end] and checkpoints.metrics(end) is not None:
            reporter.info("this run is finished")
        else:
            with memory.oom_as_user_error(config, saved=lambda: f" Saved: {checkpoints.describe()}."):
                resume(config, images, model, mesh, run, checkpoints, record, reporter)
    return {**comparison, "device": device, **result(run)} if is_main_process() else comparison


def resume(config: Config, images: feeds.Images, model: Any, mesh: Any, run: Workdir, checkpoints: Checkpoints,
          record: dict[str, Any], reporter: Reporter) -> None:
    """Compiles, and trains from the latest checkpoint, or the beginning, to the end."""
    started = time.monotonic()
    reporter.info("compiling …")
    state, program = build(config, images, model, mesh, checkpoints)
    with StopSignals() as signals:
        reporter.info(f"ready in {duration(time.monotonic() - started)}; {program.memory.render()}")
        note_resume(run, state, program, config, reporter)
        Training(config, program, run, checkpoints, record, reporter, signals).loop(state)


def note_resume(run: Workdir, state: TrainState, program: Program, config: Config, reporter: Reporter) -> None:
    """Says where a saved run goes on, and drops the metrics that it will compute again."""
    step = int(state.step)
    with raise_on_all_processes():
        if is_main_process():
            run.rewind_metrics(step)
    if not step:
        return
    reporter.info(f"resumes at step {count(step)} of {count(config.train.epochs * program.steps_per_epoch)}")
    _, record = run.load()
    changed = [f"{name} {then} → {versions().get(name)}" for name, then in record["versions"].items()
               if versions().get(name) != then]
    if changed:
        reporter.info(f"note: other versions than the run began with ({', '.join(changed)}); "
                    "the result may differ in the last bits")


def result(run: Workdir) -> dict[str, Any]:
    """Returns the last line of metrics.jsonl, and of the best epoch its number, test accuracy and what chose it."""
    lines = [line for line in run.metrics() if isinstance(line.get("test_accuracy"), float)]
    if not lines:
        raise UserError(f"{run.path / 'metrics.jsonl'} is missing or empty; the checkpoints are there: score them with "
                        f"--mode=evaluate --workdir={run.path}.")
    return last_and_best(lines)


def render(outcome: dict[str, Any]) -> str:
    """Returns `train`'s result as lines for a person."""
    protocol = ("best validation epoch" if outcome["chosen_on"] == "validation" else
                "best test epoch, the published protocol, which is chosen on the test images")
    return (f"{outcome['model']}: {100 * outcome['test_accuracy']:.2f} % test accuracy after {outcome['epoch']} epochs"
            f", {100 * outcome['best_test_accuracy']:.2f} % after {outcome['best_epoch']} ({protocol})\n"
            f"{render_saving(outcome)}")
