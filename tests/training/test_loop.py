"""The loop with a program that is not compiled: what it evaluates, saves, resumes and refuses to save, and when."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Watcher, assert_trees_equal, read_arrays, read_metrics, user_error

from shared_basis.config import Config, TrainConfig, replace
from shared_basis.errors import UserError
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.workdir import Workdir, make_record
from shared_basis.runtime.memory import Memory
from shared_basis.runtime.preemption import STOPPING, Interrupted, StopSignals
from shared_basis.training.loop import Clock, SaveTimer, Training
from shared_basis.training.program import Program
from shared_basis.training.steps import TrainState
from shared_basis.training.train import read_outcome, render

NAN, INF = float("nan"), float("inf")
PER_EPOCH = 5
CONFIG = Config(train=TrainConfig(epochs=3, batch_size=8))
"""Five steps an epoch, fifteen in all; each epoch is evaluated and saved."""

FACTS = {"classes": ["a", "b"], "image_shape": [8, 8, 1]}

Step = tuple[TrainState, dict[str, Any]]


def first_state() -> TrainState:
    totals = {name: jnp.zeros(()) for name in ("loss", "correct", "count")}
    return TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(3)}, {"mean": jnp.zeros(2)}, optax.sgd(0.1).init({}),
                      totals)


def make_step(state: TrainState, batch: jax.Array) -> Step:
    """Moves the weights in a way that depends on all steps before, and adds up the epoch's totals."""
    count = 8.0 * (1 + int(state.step) % PER_EPOCH)
    weights = 0.9 * state.params["w"] + batch
    totals = {"loss": 2 * jnp.asarray(count), "correct": jnp.asarray(count / 4), "count": jnp.asarray(count)}
    norms = {"gradient_norm": jnp.linalg.norm(batch), "parameter_norm": jnp.linalg.norm(weights)}
    return state.replace(step=state.step + 1, params={"w": weights}, totals=totals), {**totals, **norms}


def batches(first: int) -> Iterator[tuple[jax.Array]]:
    return ((jnp.full(3, step / 10),) for step in range(first, 10**6))


def evaluator(accuracies: Sequence[float] = (), images: Sequence[int] = (8, 16)) -> Callable[..., dict[str, float]]:
    """Returns an evaluator that gives these accuracies one after another; without any, what the weights make of it."""
    given = iter(accuracies)

    def evaluate(variables: Any, after_batch: Callable[[int], None]) -> dict[str, float]:
        for scored in images:
            after_batch(scored)
        weight = float(variables["params"]["w"].sum())
        return {"loss": 1.5, "accuracy": next(given) if accuracies else weight / 100, "accuracy_top5": 0.5, "count": 16}
    return evaluate


def fake_program(**changes: Any) -> Program:
    return Program(**{
        "step": make_step, "batches": batches, "evaluate": {"test": evaluator()}, "diagnose": lambda params: {},
        "schedule": lambda step: (step + 1) / 100, "steps_per_epoch": PER_EPOCH, "memory": Memory(0, 0, 0, 0),
        **changes})


def altered(at: int, change: Callable[[TrainState, dict[str, Any]], Step]) -> Program:
    """Returns a program whose step gives what `change` makes of its results, from step `at` on."""
    def step(state: TrainState, batch: jax.Array) -> Step:
        new, metrics = make_step(state, batch)
        return change(new, metrics) if int(new.step) >= at else (new, metrics)
    return fake_program(step=step)


def spoil(state: TrainState, metrics: dict[str, Any]) -> Step:
    return (state.replace(params={"w": state.params["w"].at[1].set(NAN)}),
            {**metrics, "parameter_norm": jnp.asarray(NAN)})


def loop(workdir: Path, program: Program, config: Config = CONFIG, **watch: Any) -> Watcher:
    """Trains from the latest checkpoint in `workdir`, if there is one, and returns what was shown."""
    run, reporter, record = Workdir(workdir), Watcher(**watch), make_record(config, FACTS)
    run.claim(record)
    state = first_state()
    with contextlib.closing(Checkpoints(run.checkpoints)) as checkpoints, StopSignals() as signals:
        if checkpoints.steps:
            state = checkpoints.restore_latest(jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state))
        run.rewind_metrics(int(state.step))
        Training(config, program, run, checkpoints, record, reporter, signals).loop(state)
    return reporter


def saved(workdir: Path) -> list[int]:
    """Returns the steps that are saved, after making sure that all arrays of them are finite."""
    steps = Checkpoints(workdir / "checkpoints", read_only=True).steps
    for step in steps:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read_arrays(workdir, step)))
    return steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of an uninterrupted run; for reading only."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert loop(workdir, fake_program()).steps == list(range(1, 16))
    return workdir


def test_an_evaluation_that_runs_out_of_memory_loses_nothing_and_names_its_own_field(tmp_path: Path) -> None:
    def exhausted(variables: Any, after_batch: Any) -> dict[str, float]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")
    with user_error("out of memory", "--config.train.eval_batch_size") as caught:
        loop(tmp_path / "run", fake_program(evaluate={"test": exhausted}))
    assert "train.batch_size" not in str(caught.value)
    assert saved(tmp_path / "run") == [PER_EPOCH]
    assert loop(tmp_path / "run", fake_program()).steps == list(range(PER_EPOCH + 1, 16))


# What is computed, evaluated and shown

def test_every_step_gets_its_batch_and_its_line(tmp_path: Path) -> None:
    got: list[float] = []

    def step(state: TrainState, batch: jax.Array) -> Step:
        got.append(round(float(batch[0]), 1))
        return make_step(state, batch)
    texts: dict[int, str] = {}

    class Lines(Watcher):
        def show_progress(self, done: int, total: int, text: str) -> None:
            texts.setdefault(done, text)
            assert total == 15
    run, record = Workdir(tmp_path / "run"), make_record(CONFIG, FACTS)
    run.claim(record)
    with contextlib.closing(Checkpoints(run.checkpoints)) as checkpoints, StopSignals() as signals:
        Training(CONFIG, fake_program(step=step), run, checkpoints, record, Lines(), signals).loop(first_state())
    assert got == [step / 10 for step in range(15)]
    assert list(texts) == list(range(1, 16))
    for at, epoch in ((1, 1), (5, 1), (6, 2), (15, 3)):
        assert texts[at].startswith(f"epoch {epoch}/3  loss 2.0000  accuracy 25.00 %  ")


@pytest.mark.parametrize(("epochs", "every", "expected"), [
    (3, 1, [5, 10, 15]), (3, 2, [10, 15]), (4, 3, [15, 20]), (2, 9, [10])])
def test_every_nth_epoch_is_evaluated_and_the_last(tmp_path: Path, epochs: int, every: int,
                                                   expected: list[int]) -> None:
    reporter = loop(tmp_path, fake_program(), replace(CONFIG, {"train.epochs": epochs, "train.evaluate_every": every}))
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["epoch"]) for line in lines] == [(step, step // PER_EPOCH) for step in expected]
    assert reporter.steps == list(range(1, epochs * PER_EPOCH + 1))
    assert f"epoch {epochs}/{epochs}  loss 2.0000  accuracy 25.00 %  test loss 1.5000" in reporter.text.getvalue()


def test_a_line_of_metrics_is_of_the_state_that_is_saved(whole: Path) -> None:
    for line in read_metrics(whole):
        state = read_arrays(whole, line["step"]) if line["step"] > 5 else None
        assert line["learning_rate"] == line["step"] / 100
        assert (line["train_loss"], line["train_accuracy"], line["test_loss"]) == (2.0, 0.25, 1.5)
        assert line["test_accuracy_top5"] == 0.5
        if state is not None:
            assert line["test_accuracy"] == float(state["params"]["w"].sum()) / 100


def test_speed_leaves_out_the_first_step_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()

    def after(seconds: float, call: Callable[[], None]) -> None:
        now[0] += seconds
        call()
    after(60, clock.tick)  # compiles
    assert (clock.steps, clock.speed(8), clock.left(10)) == (0, 0, 0)
    after(2, clock.tick)
    after(2, clock.tick)
    assert (clock.steps, clock.speed(8), clock.left(10)) == (2, 4, 20)
    after(6, clock.skip)
    after(2, clock.tick)
    assert clock.speed(8) == 4
    assert clock.left(9) == 12 / 3 * 9  # with its evaluations


# What is not finite

@pytest.mark.parametrize(("name", "at", "value", "checkpoints"), [
    ("loss", 1, NAN, "no checkpoint yet"), ("correct", 5, INF, "no checkpoint yet"),
    ("gradient_norm", 6, -INF, "checkpoint 5 in "), ("parameter_norm", 15, NAN, "checkpoints 5, 10 in ")])
def test_any_metric_that_is_not_finite_ends_the_run_at_its_step(tmp_path: Path, name: str, at: int, value: float,
                                                                checkpoints: str) -> None:
    program = altered(at, lambda state, metrics: (state, {**metrics, name: jnp.asarray(value)}))
    with user_error(f"diverged at step {at}: loss ", ", gradient norm ", ", parameter norm ",
                    f"learning rate {at / 100:g}", checkpoints, "--config.optimizer.learning_rate",
                    "--config.optimizer.warmup_epochs", "--debug_nans") as caught:
        loop(tmp_path, program)
    assert name == "correct" or f"{name.replace('_', ' ')} {value:.4g}" in str(caught.value)
    assert saved(tmp_path) == [step for step in (5, 10) if step < at]
    assert [line["step"] for line in read_metrics(tmp_path)] == saved(tmp_path)


def test_an_evaluation_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    scores = iter([1.0, INF])

    def evaluate(variables: Any, after_batch: Callable[[int], None]) -> dict[str, float]:
        return {"loss": next(scores), "accuracy": 0.5, "accuracy_top5": 0.5}
    with user_error("diverged at step 10: ", "test loss inf", "checkpoint 5 in"):
        loop(tmp_path, fake_program(evaluate={"test": evaluate}))
    assert saved(tmp_path) == [5]
    assert [line["step"] for line in read_metrics(tmp_path)] == [5]


def test_the_penalty_and_the_norms_of_the_bases_are_reported_and_must_be_finite(tmp_path: Path) -> None:
    found = {"penalty": 0.25, "norm_min": 0.5, "norm_max": 1.5}
    loop(tmp_path / "good", fake_program(diagnose=lambda params: {k: jnp.asarray(v) for k, v in found.items()}))
    assert all(found.items() <= line.items() for line in read_metrics(tmp_path / "good"))
    with user_error("diverged at step 5: ", "penalty inf", "norm min 0.5", "norm max 1.5"):
        loop(tmp_path / "bad", fake_program(diagnose=lambda params: {**found, "penalty": jnp.asarray(INF)}))


def test_a_run_that_diverged_resumes_from_its_last_good_step(whole: Path, tmp_path: Path) -> None:
    """What was only a passing fault, of a device, leaves no trace."""
    with user_error("diverged at step 13", "checkpoints 5, 10 in"):
        loop(tmp_path, altered(13, spoil))
    assert loop(tmp_path, fake_program()).steps == list(range(11, 16))
    assert_trees_equal(read_arrays(tmp_path, 15), read_arrays(whole, 15))
    assert read_metrics(tmp_path) == read_metrics(whole)


# Signals

@pytest.mark.parametrize(("at", "signum"), [(6, signal.SIGTERM), (9, signal.SIGINT)])
def test_a_stop_saves_nothing_that_is_not_finite(tmp_path: Path, at: int, signum: int) -> None:
    """The signal comes while the step before is shown: the one that diverges is made, and not looked at yet."""
    with user_error(f"diverged at step {at + 1}: ", "checkpoint 5 in"):
        loop(tmp_path, altered(at + 1, spoil), at=[at], signum=signum)
    assert saved(tmp_path) == [5]


def test_a_stop_after_a_good_step_saves_it_though_the_next_would_diverge(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="saved at step 7 of 15"):
        loop(tmp_path, altered(8, spoil), at=[6])
    assert saved(tmp_path) == [5, 7]


@pytest.mark.parametrize(("signum", "code"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140),
    (signal.SIGXCPU, 152)])
def test_a_signal_stops_the_run_with_the_exit_code_of_the_shell(tmp_path: Path, signum: int, code: int) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    handlers = [signal.getsignal(each) for each in STOPPING]
    with pytest.raises(Interrupted) as caught:
        loop(tmp_path, fake_program(), at=[1], signum=signum)
    assert caught.value.exit_code == code
    assert signal.Signals(signum).name in str(caught.value)
    assert "saved at step 2 of 15; the same command resumes" in str(caught.value)
    assert [signal.getsignal(each) for each in STOPPING] == handlers


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As nohup has it."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_run_in_a_thread_leaves_signals_to_the_program(tmp_path: Path, whole: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(loop, tmp_path, fake_program()).result()
    assert read_metrics(tmp_path) == read_metrics(whole)


def test_what_was_trained_before_an_evaluation_that_fails_is_saved(whole: Path, tmp_path: Path) -> None:
    def fail(*_: Any) -> dict[str, float]:
        raise UserError("an image is damaged")
    with user_error("an image is damaged"):
        loop(tmp_path, fake_program(evaluate={"test": fail}))
    assert saved(tmp_path) == [5]
    assert loop(tmp_path, fake_program()).steps == list(range(6, 16))
    assert read_metrics(tmp_path) == read_metrics(whole)
    assert_trees_equal(read_arrays(tmp_path, 15), read_arrays(whole, 15))


def test_a_second_signal_acts_as_usual() -> None:
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize("stops", [
    {4: 5},  # at the end of an epoch, before its evaluation
    {5: 5},  # in it
    {14: 15},  # at the last step
    {2: 3, 4: 5, 7: 8, 9: 10},  # again and again
], ids=str)
def test_an_interrupted_run_equals_one_that_was_not(whole: Path, tmp_path: Path, stops: dict[int, int]) -> None:
    for at, step in stops.items():
        with pytest.raises(Interrupted, match=f"saved at step {step} of 15"):
            loop(tmp_path, fake_program(), at=[at])
        assert saved(tmp_path)[-1] == step
    assert loop(tmp_path, fake_program()).steps == list(range(step + 1, 16))
    assert read_metrics(tmp_path) == read_metrics(whole)
    assert_trees_equal(read_arrays(tmp_path, 15), read_arrays(whole, 15))


@pytest.mark.parametrize("at", [10, 15])  # the second evaluation, and that at the end
def test_a_run_stopped_in_an_evaluation_saves_at_once_and_evaluates_when_it_resumes(whole: Path, tmp_path: Path,
                                                                                   at: int) -> None:
    test, batches_scored = evaluator(images=(8, 16, 24)), []

    def stopping(variables: Any, after_batch: Callable[[int], None]) -> dict[str, float]:
        def count(scored: int) -> None:
            batches_scored.append(scored)
            if len(batches_scored) == 3 * at / 5 - 1:  # before the last batch of this evaluation
                signal.raise_signal(signal.SIGTERM)
            after_batch(scored)
        return test(variables, count)
    with pytest.raises(Interrupted, match=f"saved at step {at} of 15"):
        loop(tmp_path, fake_program(evaluate={"test": stopping}))
    assert batches_scored[-1] == 16
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(5, at, 5))
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).metrics(at) is None

    assert loop(tmp_path, fake_program()).steps == list(range(at + 1, 16))
    assert read_metrics(tmp_path) == read_metrics(whole)
    assert_trees_equal(read_arrays(tmp_path, 15), read_arrays(whole, 15))
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps == Checkpoints(whole / "checkpoints", read_only=True).steps
    assert checkpoints.metrics(at)["step"] == at


# Saves by time

@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the loop's clock shows; each step advances it."""
    now = [0.0]
    monkeypatch.setattr("shared_basis.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def timed(clock: list[float], seconds: Sequence[float]) -> Program:
    """Returns a program whose steps take so many seconds, over and over."""
    def step(state: TrainState, batch: jax.Array) -> Step:
        clock[0] += seconds[int(state.step) % len(seconds)]
        return make_step(state, batch)
    return fake_program(step=step)


@pytest.mark.parametrize(("minutes", "seconds", "expected"), [
    (0.0, [60.0], []), (0.5, [10.0], [3, 8, 13]), (0.5, [16.0], [2, 4, 7, 9, 12, 14]),
    (1.0, [10.0], []),  # an evaluation comes first
    (0.01, [100.0], [1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14])])
def test_a_run_is_saved_after_so_many_minutes_without_a_save(
        tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, minutes: float, seconds: list[float],
        expected: list[int]) -> None:
    saves: list[int] = []
    save = Checkpoints.save

    def record(self: Checkpoints, step: int, state: Any, run: Any, metrics: Any) -> None:
        saves.extend([step] if metrics is None else [])
        save(self, step, state, run, metrics)
    monkeypatch.setattr(Checkpoints, "save", record)
    loop(tmp_path, timed(clock, seconds), replace(CONFIG, {"train.checkpoint_minutes": minutes}))
    assert saves == expected


def test_a_run_that_is_killed_in_an_epoch_goes_on_from_the_last_save_by_time(whole: Path, tmp_path: Path,
                                                                            clock: list[float]) -> None:
    config, at = replace(CONFIG, {"train.checkpoint_minutes": 0.5}), 10

    class Killed(BaseException):
        """Ends the run without a save."""

    def step(state: TrainState, batch: jax.Array) -> Step:
        if int(state.step) == at + 4:
            raise Killed
        clock[0] += 10
        return make_step(state, batch)
    with pytest.raises(Killed):
        loop(tmp_path, fake_program(step=step), config)
    assert saved(tmp_path)[-1] == at + 3
    assert loop(tmp_path, timed(clock, [10.0]), config).steps == [14, 15]
    assert read_metrics(tmp_path) == read_metrics(whole)
    assert_trees_equal(read_arrays(tmp_path, 15), read_arrays(whole, 15))


def test_processes_ask_one_another_seldom_when_to_save(clock: list[float]) -> None:
    timer, asked = SaveTimer(60.0, 0), []
    for step in range(1, 3601):
        clock[0] += 1.0
        if timer.asks(step):
            asked.append(step)
            if timer.due(step):
                break
    assert step == 3600
    assert len(asked) <= 15


# The best epoch

def run_with(workdir: Path, validation: Sequence[float], test: Sequence[float]) -> tuple[dict[str, Any], Watcher]:
    """Trains with evaluations that give these accuracies, and returns the outcome of the run and what was shown."""
    evaluators = {**({"validation": evaluator(validation)} if validation else {}), "test": evaluator(test)}
    reporter = loop(workdir, fake_program(evaluate=evaluators), replace(CONFIG, {"train.epochs": 4}))
    return read_outcome(Workdir(workdir)), reporter


def test_validation_images_choose_the_best_checkpoint_and_test_images_do_not(tmp_path: Path) -> None:
    outcome, reporter = run_with(tmp_path, validation=[0.2, 0.9, 0.3, 0.4], test=[0.8, 0.1, 0.5, 0.3])
    assert (outcome["chosen_on"], outcome["best_epoch"], outcome["best_test_accuracy"]) == ("validation", 2, 0.1)
    assert (outcome["epoch"], outcome["validation_accuracy"], outcome["test_accuracy"]) == (4, 0.4, 0.3)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert (checkpoints.steps, checkpoints.find("best")) == ([10, 15, 20], 10)
    assert "validation accuracy 90.00 %  test loss" in reporter.text.getvalue()
    text = render({**outcome, **COUNTS})
    assert ("30.00 % test accuracy after 4 epochs, 10.00 % after 2 (best validation epoch; use it with "
            "--checkpoint=best)") in text
    assert "published" not in text


def test_without_validation_images_the_test_images_choose_and_this_is_said(tmp_path: Path) -> None:
    outcome, _ = run_with(tmp_path, validation=[], test=[0.2, 0.8, 0.3, 0.1])
    assert (outcome["chosen_on"], outcome["best_epoch"], outcome["best_test_accuracy"]) == ("test", 2, 0.8)
    assert not any(name.startswith("validation") for name in outcome)
    text = render({**outcome, **COUNTS})
    assert "10.00 % test accuracy after 4 epochs, 80.00 % after 2 (best test epoch, chosen on" in text
    assert "3 parameters" in text
    last, _ = run_with(tmp_path / "last", validation=[], test=[0.2, 0.3, 0.4, 0.8])
    assert "80.00 % test accuracy after 4 epochs (best test epoch, chosen on" in render({**last, **COUNTS})


COUNTS = {"model": "x", "parameters": 3, "macs": 5, "saving": {"parameters": 0.0, "macs": 0.0},
          "plain": {"model": "x", "parameters": 3, "macs": 5}}
"""Of a network that is plain."""


@pytest.mark.parametrize(("validation", "test"), [([0.5, 0.7, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]),
                                                  ([], [0.5, 0.7, 0.7, 0.6])], ids=["validation", "test"])
def test_the_best_epoch_is_that_of_the_best_checkpoint_also_where_two_are_equal(
        tmp_path: Path, validation: list[float], test: list[float]) -> None:
    outcome, _ = run_with(tmp_path, validation, test)
    best = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert outcome["best_epoch"] * PER_EPOCH == best.find("best")
    assert outcome["best_test_accuracy"] == best.metrics(best.find("best"))["test_accuracy"]
