"""Training: the loop and what it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax

from shared_basis import data
from shared_basis.config import Config, differences
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluate import Evaluator, build_model, make_evaluator
from shared_basis.models import create_model
from shared_basis.models.summary import compare_with_plain, render_saving
from shared_basis.nn import ops
from shared_basis.optim.gradient_norms import recorded_norms
from shared_basis.optim.optimizer import learning_rate_schedule, make_optimizer
from shared_basis.optim.penalty import orthogonality_diagnostics
from shared_basis.runs.checkpoints import Checkpoints, chosen_on
from shared_basis.runs.tensorboard import require
from shared_basis.runs.workdir import Workdir, make_record, versions
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import agreed, check_batch_size, divided, leads, make_mesh, replicated
from shared_basis.runtime.preemption import Interrupted, StopNow, StopSignals
from shared_basis.runtime.reporter import Screen, count, duration
from shared_basis.training.steps import Metrics, TrainState, create_train_state, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run, with the shapes that they were compiled for."""

    step: Callable[..., tuple[TrainState, Metrics]]
    batches: Callable[[int], Generator[feeds.Inputs, None, None]]
    """What `step` reads beside the state, from a step on."""
    evaluate: Mapping[str, Evaluator]
    """By split: 'test', and 'validation' if there is one."""
    diagnose: Callable[[Any], dict[str, jax.Array]]
    schedule: optax.Schedule
    steps_per_epoch: int
    memory: memory.Memory


def train(config: Config, workdir: str | Path, screen: Screen, *, tensorboard: bool = False) -> dict[str, Any]:
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
    check_batch_size(config.train.batch_size, mesh, config.optimizer.accumulate)
    if tensorboard:
        require()
    run = Workdir(workdir, tensorboard)
    with agreed(), memory.explained(config):
        if leads():  # alone: what others looked for and did not find, a network's file system may hide from them
            run.read_record()  # an unreadable workdir is told before the images are read
        create_model(config.model.name, stem=config.model.stem)  # an unknown name is told before data is looked for
        source = data.open_source(config.data, progress=screen.counting("preparing images"))
        model = build_model(config, source.spec)
        comparison = compare_with_plain(config.model, len(source.spec.classes), source.spec.image_shape)
        examples = len(source.splits["train"])
        if examples < config.train.batch_size:
            raise UserError(f"train.batch_size={config.train.batch_size}: there are only {examples} training images.")
    with agreed(), memory.explained(config):  # apart, as processes settle something in it
        images = feeds.load(source, config.data, mesh, screen)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    device = f"{mesh.size} × {jax.devices()[0].device_kind}{processes}"
    record = make_record(config, {
        "classes": list(source.spec.classes), "image_shape": list(source.spec.image_shape),
        **{f"{name}_examples": images.count(name) for name in images.splits}}, device)
    with contextlib.ExitStack() as stack:
        with agreed():
            if leads():
                stack.enter_context(run.locked())
                run.claim(record)
        with agreed():
            run.require(record)
        stack.enter_context(screen.logging(run.path))
        screen.line(f"{config.model.name}: {render_saving(comparison)}")
        screen.detail(", ".join(f"{name} {version}" for name, version in versions().items()))
        for field, (value, default) in differences(config, Config()).items():
            screen.detail(f"{field}: {value!r}, by default {default!r}")
        *parts, last = (f"{count(images.count(name))} {'training' if name == 'train' else name}"
                        for name in images.splits)
        screen.line(f"data {config.data.name}: {', '.join(parts)} and {last} images of "
                    f"{'×'.join(map(str, source.spec.image_shape))}, {len(source.spec.classes)} classes; "
                    f"{device}; workdir {run.path}")
        checkpoints = Checkpoints(run.checkpoints, aside=run.damaged, tell=screen.warn)
        stack.callback(checkpoints.close)
        end = config.train.epochs * (examples // config.train.batch_size)
        if checkpoints.steps[-1:] == [end] and checkpoints.metrics(end) is not None:
            screen.line("this run is finished")
        else:
            with memory.explained(config, saved=lambda: f" Saved: {checkpoints.describe()}."):
                go_on(config, images, model, mesh, run, checkpoints, record, screen)
    return {**comparison, "device": device, **result(run)} if leads() else comparison


def go_on(config: Config, images: feeds.Images, model: Any, mesh: Any, run: Workdir, checkpoints: Checkpoints,
          record: dict[str, Any], screen: Screen) -> None:
    """Compiles, and trains from the latest checkpoint, or the beginning, to the end."""
    started = time.monotonic()
    screen.line("compiling …")
    state, program = build(config, images, model, mesh, checkpoints)
    with StopSignals() as signals:
        screen.line(f"ready in {duration(time.monotonic() - started)}; {program.memory.render()}")
        note_resume(run, state, program, config, screen)
        Training(config, program, run, checkpoints, record, screen, signals).loop(state)


def build(config: Config, images: feeds.Images, model: Any, mesh: Any,
          checkpoints: Checkpoints) -> tuple[TrainState, Program]:
    """Places the data, compiles the step, and returns the program with the latest saved state, or a new one.

    Raises:
      UserError: no checkpoint can be restored, or the devices have not the memory.
    """
    steps_per_epoch = images.count("train") // config.train.batch_size
    element_sets = model.element_sets(config.orthogonality.elements)
    schedule = learning_rate_schedule(config.optimizer, config.train.epochs, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, config.orthogonality, element_sets, schedule,
                               steps_per_epoch if config.train.record_gradients else 0)
    everywhere = replicated(mesh)
    seed = np.int32(config.seed)  # an argument of the compiled functions, which then serve all seeds
    create = jax.jit(functools.partial(create_train_state, model, optimizer, image_shape=images.spec.image_shape),
                     out_shardings=everywhere, compiler_options=ops.quick_compiler_options())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
                          create.eval_shape(seed))
    feed = images.feed(config, mesh)

    def diagnose(params: Any) -> dict[str, jax.Array]:
        return orthogonality_diagnostics(params, element_sets) if element_sets else {}

    @functools.partial(jax.jit, donate_argnums=() if debugging_nans() else 0, out_shardings=everywhere,
                       compiler_options=ops.compiler_options())
    def step(state: TrainState, seed: jax.Array, *inputs: jax.Array) -> tuple[TrainState, Metrics]:
        new, metrics = train_step(
            state, *feed.select(state.step, *inputs), model=model, optimizer=optimizer, data=config.data,
            seed=seed, steps_per_epoch=steps_per_epoch, batch_sharding=divided(mesh),
            accumulate=config.optimizer.accumulate)
        return new, {**metrics, **diagnose(state.params)}

    lowered = step.lower(target, seed, *feed.abstract)
    with ThreadPoolExecutor() as threads:  # XLA compiles without Python's lock
        creating = None if checkpoints.steps else threads.submit(create.lower(seed).compile)
        compiled = lowered.compile()
    needed = memory.measure(target, images.bytes_on_device(feed, mesh), compiled)
    with agreed():
        memory.check(needed, config, mesh)
    run = step if debugging_nans() else compiled
    program = Program(
        step=lambda state, *inputs: run(state, seed, *inputs),
        batches=feed.batches,
        evaluate={name: make_evaluator(model, config.data, images.batches(name, config.train.eval_batch_size, mesh),
                                       mesh) for name in images.splits if name != "train"},
        diagnose=jax.jit(diagnose), schedule=schedule, steps_per_epoch=steps_per_epoch, memory=needed)
    return checkpoints.restore_latest(target) if creating is None else creating.result()(seed), program


def note_resume(run: Workdir, state: TrainState, program: Program, config: Config, screen: Screen) -> None:
    """Says where a saved run goes on, and drops the metrics that it will compute again."""
    step = int(state.step)
    with agreed():
        if leads():
            run.rewind_metrics(step)
    if not step:
        return
    screen.line(f"resumes at step {count(step)} of {count(config.train.epochs * program.steps_per_epoch)}")
    _, record = run.load()
    changed = [f"{name} {then} → {versions().get(name)}" for name, then in record["versions"].items()
               if versions().get(name) != then]
    if changed:
        screen.line(f"note: other versions than the run began with ({', '.join(changed)}); "
                    "the result may differ in the last bits")


class Clock:
    """Measures training without its first step, which warms up, and without evaluations."""

    def __init__(self) -> None:
        self.steps = -1
        """Steps measured."""
        self._training = 0.0
        self._began = self._last = time.monotonic()

    def tick(self) -> None:
        """Counts a finished step."""
        now = time.monotonic()
        self.steps += 1
        if self.steps:
            self._training += now - self._last
        else:
            self._began = now
        self._last = now

    def skip(self) -> None:
        """Leaves out the time since the last step or skip."""
        self._last = time.monotonic()

    def speed(self, batch_size: int) -> float:
        """Returns images per second; 0 before two steps are done."""
        return self.steps * batch_size / self._training if self.steps > 0 else 0.0

    def left(self, steps: int) -> float:
        """Returns the seconds that `steps` more will take, with their evaluations; 0 before two steps are done."""
        return (time.monotonic() - self._began) / self.steps * steps if self.steps > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Training:
    """The loop, and all that it works with beside the state."""

    config: Config
    program: Program
    run: Workdir
    checkpoints: Checkpoints
    record: dict[str, Any]
    screen: Screen
    signals: StopSignals
    clock: Clock = dataclasses.field(default_factory=Clock)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.epochs * self.program.steps_per_epoch

    def loop(self, state: TrainState) -> None:
        """Trains from `state` to the last epoch, evaluating and saving as configured."""
        first = int(state.step)
        if self.ends_with_evaluation(first) and self.checkpoints.metrics(first) is None:
            self.evaluate(state, first)  # it was stopped in the middle of this
        running = None
        with contextlib.closing(self.program.batches(first)) as batches:
            for step, inputs in zip(range(first + 1, self.steps + 1), batches, strict=False):
                state, metrics = self.advance(state, inputs, step)
                if running is not None:  # waits for the step before, so that the devices always have one ahead
                    self.follow(running, step - 1)
                running = metrics
                evaluating = self.ends_with_evaluation(step)
                stopping = self.signals.due()
                if evaluating or stopping:  # what is saved is finite
                    self.follow(running, step)
                    running = None
                if evaluating and not stopping:
                    self.evaluate(state, step)
                if stopping:
                    self.stop(state, step)
        self.screen.end_progress()
        self.checkpoints.wait()

    def ends_with_evaluation(self, step: int) -> bool:
        """Returns whether the state after `step` is to be evaluated."""
        epoch, left = divmod(step, self.program.steps_per_epoch)
        every, epochs = self.config.train.evaluate_every, self.config.train.epochs
        return epoch > 0 and not left and (epoch % every == 0 or epoch == epochs)

    def advance(self, state: TrainState, inputs: feeds.Inputs, step: int) -> tuple[TrainState, Metrics]:
        """Makes `step`; with --debug_nans says which operation gives the first NaN."""
        try:
            # Set in this thread once more: the global setting is lost when jnp.var is traced (JAX 0.10.2).
            with jax.debug_nans(debugging_nans()):
                return self.program.step(state, *inputs)
        except FloatingPointError as error:
            raise UserError(f"step {count(step)}: {_where(error)}") from error

    def follow(self, metrics: Metrics, step: int) -> None:
        """Waits for `step`, makes sure that it is finite, and shows the means over its epoch so far."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.clock.tick()
        self.screen.step = step
        self.require_finite(values, step)
        text = (
            f"epoch {-(-step // self.program.steps_per_epoch)}/{self.config.train.epochs}  "
            f"loss {values['loss'] / values['count']:.4f}  accuracy {100 * values['correct'] / values['count']:.2f} %  "
            f"{count(self.clock.speed(self.config.train.batch_size))} images/s  "
            f"{duration(self.clock.left(self.steps - step))} left")
        self.screen.progress(step, self.steps, text)
        self.screen.detail(f"{text}  gradient norm {values['gradient_norm']:.4g}")

    def evaluate(self, state: TrainState, step: int) -> None:
        """Scores and saves `state`; a stop in the meantime saves it without its scores."""
        try:
            line = self.measure(state)
        except StopNow:
            self.stop(state, step)
        self.require_finite(line, step)
        self.checkpoints.wait()  # for the one before, so that a kill costs one evaluated interval at most
        if leads():
            self.run.append_metrics(line)
            if self.config.train.record_gradients:
                self.run.append_gradients({"step": step, "epoch": line["epoch"],
                                           "norms": recorded_norms(state.params, state.opt_state)})
        self.screen.line(render_metrics(line, self.config.train.epochs))
        self.checkpoints.save(step, state, self.record, line)
        self.screen.detail(f"checkpoint {step} is being written to {self.run.checkpoints}")
        self.clock.skip()

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Returns the line of metrics.jsonl at `state`, the end of an epoch."""
        step = int(state.step)
        totals = {name: float(value) for name, value in state.totals.items()}
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        scores: dict[str, float] = {}
        for name, evaluate in self.program.evaluate.items():
            result = evaluate(variables, functools.partial(self.follow_scoring, name, step))
            scores |= {f"{name}_{key}": result[key] for key in ("loss", "accuracy", "accuracy_top5")}
        return {
            "step": step, "epoch": step // self.program.steps_per_epoch,
            "learning_rate": float(self.program.schedule(step - 1)),
            "train_loss": totals["loss"] / totals["count"], "train_accuracy": totals["correct"] / totals["count"],
            **scores,
            **{name: float(value) for name, value in self.program.diagnose(state.params).items()},
            "images_per_second": self.clock.speed(self.config.train.batch_size),
        }

    def follow_scoring(self, name: str, step: int, scored: int) -> None:
        """Shows how far an evaluation is; raises `StopNow` if it is time to stop."""
        self.screen.progress(step, self.steps, f"epoch {step // self.program.steps_per_epoch}/"
                             f"{self.config.train.epochs}  {count(scored)} {name} images scored")
        self.signals.check()

    def require_finite(self, values: Mapping[str, float], step: int) -> None:
        """Raises `UserError` with all that helps to find the cause, unless all values of `step` are finite."""
        if all(math.isfinite(value) for value in values.values()):
            return
        self.checkpoints.wait()
        shown = ", ".join(f"{name.replace('_', ' ')} {values[name]:.4g}" for name in (
            "loss", "train_loss", "test_loss", "gradient_norm", "parameter_norm", "penalty", "norm_min", "norm_max")
            if name in values)
        rate = float(self.program.schedule(step - 1))
        raise UserError(
            f"training diverged at step {count(step)}: {shown}, at learning rate {rate:g}. Saved and finite: "
            f"{self.checkpoints.describe()}. In a new workdir lower --config.optimizer.learning_rate or raise "
            "--config.optimizer.warmup_epochs; --debug_nans finds the operation that gives the first NaN.")

    def stop(self, state: TrainState, step: int) -> NoReturn:
        """Saves `state` and raises `Interrupted`."""
        assert self.signals.received is not None
        self.screen.end_progress()
        self.checkpoints.save(step, state, self.record, None)
        self.checkpoints.wait()
        name = signal.Signals(self.signals.received).name
        raise Interrupted(self.signals.received, f"stopped by {name} and saved at step {count(step)} of "
                                                 f"{count(self.steps)}; the same command goes on from there")


def debugging_nans() -> bool:
    """Returns whether JAX is to compute a step again that gives NaN, operation by operation (--debug_nans)."""
    return jax.config.jax_debug_nans  # type: ignore[attr-defined]


def _where(error: FloatingPointError) -> str:
    """Returns JAX's message with the line of code that it comes from."""
    ours = Path(__file__).parent
    places = [f"{Path(frame.filename).relative_to(ours.parent)}:{frame.lineno}, in {frame.name}: {frame.line}"
              for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).is_relative_to(ours) and frame.filename != __file__]
    return f"{str(error).splitlines()[0].rstrip('.')}, at {places[-1] if places else 'a line outside of this package'}"


def render_metrics(line: dict[str, Any], epochs: int) -> str:
    """Returns a line of metrics.jsonl as one line for a person."""
    penalty = f"  penalty {line['penalty']:.1e}" if "penalty" in line else ""
    validation = (f"  validation accuracy {100 * line['validation_accuracy']:.2f} %" if "validation_accuracy" in line
                  else "")
    return (f"epoch {line['epoch']}/{epochs}  loss {line['train_loss']:.4f}  accuracy "
            f"{100 * line['train_accuracy']:.2f} %{validation}  test loss {line['test_loss']:.4f}  test accuracy "
            f"{100 * line['test_accuracy']:.2f} %{penalty}  {count(line['images_per_second'])} images/s")


def result(run: Workdir) -> dict[str, Any]:
    """Returns the last line of metrics.jsonl, and of the best epoch its number, test accuracy and what chose it."""
    lines = [line for line in run.metrics() if isinstance(line.get("test_accuracy"), float)]
    if not lines:
        raise UserError(f"{run.path / 'metrics.jsonl'} is missing or empty; the checkpoints are there: score them with "
                        f"--mode=evaluate --workdir={run.path}.")
    return last_and_best(lines)


def last_and_best(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns likewise what `lines` of metrics.jsonl, one at least, say."""
    chosen = chosen_on(lines[-1])
    best = max(reversed(lines), key=lambda line: line[f"{chosen}_accuracy"])  # of equal ones the last, as Orbax
    return {**lines[-1], "chosen_on": chosen, "best_epoch": best["epoch"], "best_test_accuracy": best["test_accuracy"]}


def render(outcome: dict[str, Any]) -> str:
    """Returns `train`'s result as lines for a person."""
    protocol = ("best validation epoch" if outcome["chosen_on"] == "validation" else
                "best test epoch, the published protocol, which is chosen on the test images")
    return (f"{outcome['model']}: {100 * outcome['test_accuracy']:.2f} % test accuracy after {outcome['epoch']} epochs"
            f", {100 * outcome['best_test_accuracy']:.2f} % after {outcome['best_epoch']} ({protocol})\n"
            f"{render_saving(outcome)}")
