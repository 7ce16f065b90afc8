"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

from shared_basis.config import Config
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluator import Metrics
from shared_basis.optim.gradient_norms import recorded_norms
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.metrics import render_line
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import is_main_process, process_allgather
from shared_basis.runtime.files import first_line
from shared_basis.runtime.preemption import Interrupted, StopNow, StopSignals
from shared_basis.runtime.reporter import Reporter, count, duration
from shared_basis.training.program import Program, debugging_nans
from shared_basis.training.steps import TrainState


class Clock:
    """Measures training speed, excluding the first step, which warms up, and evaluations."""

    def __init__(self) -> None:
        self.steps = -1
        """Steps measured."""
        self._training = 0.0
        self._began = self._last = time.monotonic()

    def tick(self) -> None:
        """Records the end of a step."""
        now = time.monotonic()
        self.steps += 1
        if self.steps:
            self._training += now - self._last
        else:
            self._began = now
        self._last = now

    def skip(self) -> None:
        """Excludes the time since the last step or skip."""
        self._last = time.monotonic()

    def speed(self, batch_size: int) -> float:
        """Returns images per second; 0 before two steps have finished."""
        return self.steps * batch_size / self._training if self.steps > 0 else 0.0

    def left(self, steps: int) -> float:
        """Estimates the seconds for `steps` more steps, including evaluations; 0 before two steps have finished."""
        return (time.monotonic() - self._began) / self.steps * steps if self.steps > 0 else 0.0


class SaveTimer:
    """Tracks the time since the last save, by the clock of the first process, so that all processes agree."""

    def __init__(self, minutes: float, step: int) -> None:
        """Starts at `step`; with 0 `minutes`, a save is never due."""
        self._seconds = 60 * minutes
        self.restart(step)

    def restart(self, step: int) -> None:
        """Restarts the timer at `step`, which has been saved."""
        self._step, self._began, self._question = step, time.monotonic(), step + 1

    def asks(self, step: int) -> bool:
        """Returns whether to call `due` after `step`; each such call also agrees on the step of the next one."""
        return self._seconds > 0 and step >= self._question

    def due(self, step: int) -> bool:
        """Returns whether to save now. All processes must call it together, with no step running."""
        passed = time.monotonic() - self._began
        half_of_the_rest = max(1, int((self._seconds - passed) / 2 * (step - self._step) / max(passed, 1e-9)))
        wait = 0 if passed >= self._seconds else min(half_of_the_rest, 2**30)
        if jax.process_count() > 1:
            wait = int(process_allgather(wait)[0])
        self._question = step + max(1, wait)
        return wait == 0


@dataclasses.dataclass(frozen=True)
class Training:
    """The loop over the steps of a run."""

    config: Config
    program: Program
    run: Workdir
    checkpoints: Checkpoints
    record: dict[str, Any]
    reporter: Reporter
    signals: StopSignals
    clock: Clock = dataclasses.field(default_factory=Clock)

    @property
    def steps(self) -> int:
        """Total number of steps of the run."""
        return self.config.train.epochs * self.program.steps_per_epoch

    def loop(self, state: TrainState) -> None:
        """Trains from `state` to the last epoch; evaluates and saves as configured."""
        first = int(state.step)
        if self.evaluates_after(first) and self.checkpoints.metrics(first) is None:
            self.evaluate(state, first)  # the run was interrupted during this evaluation
        running: Metrics | None = None
        timer = SaveTimer(self.config.train.checkpoint_minutes, first)
        with contextlib.closing(self.program.batches(first)) as batches:
            for step, inputs in zip(range(first + 1, self.steps + 1), batches, strict=False):
                state, metrics = self.advance(state, inputs, step)
                if running is not None:  # waits for the previous step; one step stays queued on the devices
                    self.log_step(running, step - 1)
                running = metrics
                evaluating = self.evaluates_after(step)
                stopping = self.signals.due()
                asking = timer.asks(step)
                if evaluating or stopping or asking:  # only finite states are saved
                    self.log_step(running, step)
                    running = None
                if stopping:
                    self.stop(state, step)
                if evaluating:
                    self.evaluate(state, step)
                    timer.restart(step)
                elif asking and timer.due(step):
                    self.save(state, step, None)
                    timer.restart(step)
        self.reporter.end_progress()
        self.checkpoints.wait()

    def evaluates_after(self, step: int) -> bool:
        """Returns whether the state after `step` is evaluated: after every n-th epoch and after the last."""
        epoch, rest = divmod(step, self.program.steps_per_epoch)
        every, epochs = self.config.train.evaluate_every, self.config.train.epochs
        return epoch > 0 and not rest and (epoch % every == 0 or epoch == epochs)

    def advance(self, state: TrainState, inputs: feeds.Inputs, step: int) -> tuple[TrainState, Metrics]:
        """Runs `step`.

        Raises:
          UserError: with --debug_nans, an operation produced NaN; the message names it and its source line.
        """
        try:
            # Set again in this thread: tracing jnp.var resets the global setting (JAX 0.10.2).
            with jax.debug_nans(debugging_nans()):
                return self.program.step(state, *inputs)
        except FloatingPointError as error:
            raise UserError(f"step {count(step)}: {_where(error)}") from error

    def log_step(self, metrics: Metrics, step: int) -> None:
        """Waits for `step`, checks that its metrics are finite, and shows their means over the epoch so far."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.clock.tick()
        self.reporter.step = step
        self.require_finite(values, step)
        pace = (f"{count(self.clock.speed(self.config.train.batch_size))} images/s  "
                f"{duration(self.clock.left(self.steps - step))} left") if self.clock.steps > 0 else "first steps"
        text = (
            f"epoch {-(-step // self.program.steps_per_epoch)}/{self.config.train.epochs}  "
            f"loss {values['loss'] / values['count']:.4f}  accuracy {100 * values['correct'] / values['count']:.2f} %  "
            f"{pace}")
        self.reporter.show_progress(step, self.steps, text)
        self.reporter.debug(f"{text}  gradient norm {values['gradient_norm']:.4g}")

    def evaluate(self, state: TrainState, step: int) -> None:
        """Evaluates and saves `state`; saves it without metrics if a signal or an error ends the evaluation."""
        try:
            with memory.oom_as_user_error(self.config, "train.eval_batch_size"):
                line = self.measure(state)
        except StopNow:
            self.stop(state, step)
        except UserError:  # e.g. a test image is damaged: the epochs before must not be lost with it
            if jax.process_count() == 1:  # others do not know of it, and saving needs all
                self.save(state, step, None)
                self.checkpoints.wait()
            raise
        self.require_finite(line, step)
        self.checkpoints.wait()  # completes the previous save, so that a kill loses at most one interval
        if is_main_process():
            self.run.append_metrics(line)
            if self.config.train.record_gradients:
                self.run.append_gradients({"step": step, "epoch": line["epoch"],
                                           "norms": recorded_norms(state.params, state.opt_state)})
        self.reporter.info(render_line(line, self.config.train.epochs))
        self.save(state, step, line)

    def save(self, state: TrainState, step: int, metrics: dict[str, Any] | None) -> None:
        """Starts saving `state`, which must be finite, as `step`, with the `metrics` of its evaluation, if any.

        Raises:
          UserError: the state cannot be saved, or another process has taken over the run.
        """
        if is_main_process():
            self.run.files.require_lock()
        self.checkpoints.save(step, state, self.record, metrics)
        self.reporter.debug(f"checkpoint {step} is being written to {self.run.checkpoints}")
        self.clock.skip()

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Evaluates `state` at the end of an epoch and returns its line of metrics.jsonl."""
        step = int(state.step)
        totals = {name: float(value) for name, value in state.totals.items()}
        scores: dict[str, float] = {}
        for split, evaluator in self.program.evaluate.items():
            result = evaluator(state.scored, functools.partial(self.on_eval_batch, split, step))
            scores |= {f"{split}_{key}": result[key] for key in ("loss", "accuracy", "accuracy_top5")}
        return {
            "step": step, "epoch": step // self.program.steps_per_epoch,
            "learning_rate": float(self.program.schedule(step - 1)),
            "train_loss": totals["loss"] / totals["count"], "train_accuracy": totals["correct"] / totals["count"],
            **scores,
            **{name: float(value) for name, value in self.program.diagnose(state.params).items()},
            "images_per_second": self.clock.speed(self.config.train.batch_size),
        }

    def on_eval_batch(self, split: str, step: int, scored: int) -> None:
        """Shows the number of `split` images scored; raises `StopNow` if a signal requests a stop."""
        self.reporter.show_progress(
            step, self.steps, f"epoch {step // self.program.steps_per_epoch}/{self.config.train.epochs}  "
                              f"{count(scored)} {split} images scored")
        self.signals.check()

    def require_finite(self, values: Mapping[str, float], step: int) -> None:
        """Raises `UserError`, with advice on finding the cause, unless all `values` of `step` are finite."""
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
            "--config.optimizer.warmup_epochs; --debug_nans finds the operation that produces the first NaN.")

    def stop(self, state: TrainState, step: int) -> NoReturn:
        """Saves `state`, which must be finite, as `step` and raises `Interrupted`."""
        assert self.signals.received is not None
        self.reporter.end_progress()
        self.save(state, step, None)
        self.checkpoints.wait()
        name = signal.Signals(self.signals.received).name
        raise Interrupted(self.signals.received, f"stopped by {name} and saved at step {count(step)} of "
                                                 f"{count(self.steps)}; the same command resumes from there")


def _where(error: FloatingPointError) -> str:
    """Returns JAX's message with the innermost source line of this package in the traceback."""
    package = Path(__file__).parents[1]
    places = [f"{Path(frame.filename).relative_to(package.parent)}:{frame.lineno}, in {frame.name}: {frame.line}"
              for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).is_relative_to(package) and frame.filename != __file__]
    return f"{first_line(error).rstrip('.')}, at {places[-1] if places else 'a line outside of this package'}"
