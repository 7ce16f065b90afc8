"""Divergence: a run ends at the first step that is not finite, says what helps, and never saves what is not finite."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ROOT,
    CommandLine,
    Linear,
    Watcher,
    assert_trees_equal,
    read_arrays,
    read_metrics,
    tiny_network,
    user_error,
)

from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, replace
from shared_basis.errors import UserError
from shared_basis.evaluation import evaluate as evaluate_module
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.preemption import Interrupted
from shared_basis.training import loop, program
from shared_basis.training import train as train_module
from shared_basis.training.steps import TrainState
from shared_basis.training.train import train

NAN, INF = float("nan"), float("inf")

CONFIG = Config(
    model=ModelConfig(name="resnet14"), data=DataConfig(train_examples=44, test_examples=30),
    optimizer=OptimizerConfig(learning_rate=0.05), train=TrainConfig(epochs=3, batch_size=8))
"""Five steps an epoch, fifteen in all; each epoch is evaluated and saved."""


class Plain(Linear):
    """`Linear` as training wants it: with sets of basis elements, of which it has none."""

    def basis_groups(self, elements: str) -> tuple[()]:
        return ()


class Cliff(nn.Module):
    """A network whose loss is finite and whose gradient is not: √x at 0."""

    num_classes: int = 10

    def basis_groups(self, elements: str) -> tuple[()]:
        return ()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        self.variable("batch_stats", "seen", jnp.zeros, ())
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return jnp.zeros((len(images), 1)) + jnp.sqrt(bias)


def use(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> None:
    """Trains the network that `make` returns, whatever the name."""
    for module in (train_module, evaluate_module):
        monkeypatch.setattr(module, "build_model", lambda config, spec: make())


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda: Plain(batch=8))


Change = Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, Any]]]


def alter(monkeypatch: pytest.MonkeyPatch, step: int, change: Change) -> None:
    """Has the compiled step give what `change` makes of its results, from `step` on."""
    build = program.build

    def build_altered(*arguments: Any) -> Any:
        state, program = build(*arguments)

        def altered(state: TrainState, *inputs: Any) -> Any:
            new, metrics = program.step(state, *inputs)
            return change(new, metrics) if int(new.step) >= step else (new, metrics)
        return state, train_module.dataclasses.replace(program, step=altered)
    monkeypatch.setattr(train_module, "build", build_altered)


def spoil_parameters(state: TrainState) -> TrainState:
    kernel = state.params["head"]["kernel"]
    return state.replace(params={"head": {**state.params["head"], "kernel": kernel.at[3, 4].set(NAN)}})


def norm(state: TrainState) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state.params)))


def saved(workdir: Path) -> list[int]:
    """Returns the steps that are saved, after making sure that all arrays of them are finite."""
    steps = Checkpoints(workdir / "checkpoints", read_only=True).steps
    for step in steps:
        for leaf in jax.tree.leaves(read_arrays(workdir, step)):
            assert np.isfinite(np.asarray(leaf)).all()
    return steps


# What is not finite, and when

@pytest.mark.parametrize("name", ["loss", "correct", "gradient_norm", "parameter_norm"])
@pytest.mark.parametrize(("at", "value", "checkpoint"), [
    (1, NAN, "no checkpoint yet"), (5, INF, "no checkpoint yet"), (6, -INF, "checkpoint 5 in "),
    (15, NAN, "checkpoints 5, 10 in ")], ids=str)
def test_any_figure_that_is_not_finite_ends_the_run_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                name: str, value: float, at: int,
                                                                checkpoint: str) -> None:
    alter(monkeypatch, at, lambda state, metrics: (state, {**metrics, name: jnp.asarray(value)}))
    with user_error(f"training diverged at step {at}: loss ", ", gradient norm ", ", parameter norm ",
                    "at learning rate 0.05.", f"Saved and finite: {checkpoint}", "--config.optimizer.learning_rate",
                    "--config.optimizer.warmup_epochs", "--debug_nans") as caught:
        train(CONFIG, tmp_path / "run", Watcher())
    if name != "correct":
        assert f"{name.replace('_', ' ')} {value:.4g}" in str(caught.value)
    assert saved(tmp_path / "run") == [step for step in (5, 10) if step < at]
    assert [line["step"] for line in Workdir(tmp_path / "run").metrics()] == saved(tmp_path / "run")


def test_a_gradient_that_is_not_finite_is_seen_at_its_step_though_the_loss_is(tmp_path: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Cliff)
    reporter = Watcher()
    with user_error("diverged at step 1: ", f"loss {math.log(10) * 8:.4g}, gradient norm inf, parameter norm inf"):
        train(CONFIG, tmp_path / "run", reporter)
    assert reporter.steps == []
    assert saved(tmp_path / "run") == []


def test_parameters_that_overflow_where_their_gradient_does_not_are_seen_at_their_step(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of 1e30 times the gradient has a norm whose square is beyond float32."""
    config = replace(CONFIG, {"optimizer.learning_rate": 1e30, "optimizer.weight_decay": 0.0})
    with user_error("diverged at step 1: loss ", "parameter norm inf", "at learning rate 1e+30") as caught:
        train(config, tmp_path / "run", Watcher())
    assert re.search(r"gradient norm \d", str(caught.value))
    assert saved(tmp_path / "run") == []


def test_parameters_alone_that_are_not_finite_are_seen_at_their_step(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def change(state: TrainState, metrics: Mapping[str, Any]) -> Any:
        state = spoil_parameters(state)
        return state, {**metrics, "parameter_norm": norm(state)}
    alter(monkeypatch, 10, change)
    with user_error("diverged at step 10: loss ", "parameter norm nan", "Saved and finite: checkpoint 5 in"):
        train(CONFIG, tmp_path / "run", Watcher())
    assert saved(tmp_path / "run") == [5]


def test_the_norms_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the parameters is of the new ones, which would be saved."""
    seen = []

    def watch(state: TrainState, metrics: Mapping[str, Any]) -> Any:
        seen.append((float(metrics["parameter_norm"]), float(norm(state)), float(metrics["gradient_norm"])))
        return state, metrics
    alter(monkeypatch, 1, watch)
    train(replace(CONFIG, {"train.epochs": 1}), tmp_path / "run", Watcher())
    assert len(seen) == 5
    for found, expected, gradient in seen:
        assert found == pytest.approx(expected, rel=1e-6)
        assert gradient > 0


@pytest.mark.parametrize("name", ["test_loss", "train_loss"])
def test_an_evaluation_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       name: str) -> None:
    measure = loop.Training.measure
    monkeypatch.setattr(loop.Training, "measure", lambda training, state: {
        **measure(training, state), **({name: INF} if int(state.step) == 10 else {})})
    with user_error("diverged at step 10: ", f"{name.replace('_', ' ')} inf", "Saved and finite: checkpoint 5 in"):
        train(CONFIG, tmp_path / "run", Watcher())
    assert saved(tmp_path / "run") == [5]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [5]


def test_running_statistics_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They show in no figure of a step, only in the evaluation, which reads them: at the end of the epoch."""
    use(monkeypatch, tiny_network)

    def change(state: TrainState, metrics: Mapping[str, Any]) -> Any:
        return state.replace(batch_stats=jax.tree.map(lambda leaf: leaf * NAN, state.batch_stats)), metrics
    alter(monkeypatch, 7, change)
    with user_error("diverged at step 10: ", "test loss nan", "Saved and finite: checkpoint 5 in"):
        train(CONFIG, tmp_path / "run", Watcher())
    assert saved(tmp_path / "run") == [5]


def test_the_penalty_and_the_norms_of_the_bases_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tiny_network)
    config = replace(CONFIG, {"orthogonality.weight": 1e30})
    with user_error("training diverged at step ", "penalty ", "norm min ", "norm max ", "no checkpoint yet"):
        train(config, tmp_path / "run", Watcher())
    assert saved(tmp_path / "run") == []


def test_the_learning_rate_told_is_that_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, {"optimizer.warmup_epochs": 2.0})
    alter(monkeypatch, 4, lambda state, metrics: (state, {**metrics, "loss": jnp.asarray(NAN)}))
    with user_error("at step 4", f"at learning rate {0.05 * 3 / 10:g}."):
        train(config, tmp_path / "run", Watcher())


# Signals and resumes

@pytest.mark.parametrize("at", [6, 7, 9])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_stop_saves_nothing_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int,
                                                 signum: int) -> None:
    """The signal comes while the step before is shown: the one that diverges has been made and not been looked at."""
    def change(state: TrainState, metrics: Mapping[str, Any]) -> Any:
        state = spoil_parameters(state)
        return state, {**metrics, "parameter_norm": norm(state)}
    alter(monkeypatch, at + 1, change)
    message = rf"diverged at step {at + 1}: .* Saved and finite: checkpoint 5 in"
    with pytest.raises((UserError, Interrupted), match=message):
        train(CONFIG, tmp_path / "run", Watcher(at=[at], signum=signum))
    assert saved(tmp_path / "run") == [5]


def test_a_stop_after_a_good_step_saves_it_though_the_next_would_diverge(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def change(state: TrainState, metrics: Mapping[str, Any]) -> Any:
        return spoil_parameters(state), {**metrics, "parameter_norm": jnp.asarray(NAN)}
    alter(monkeypatch, 8, change)
    with pytest.raises(Interrupted, match="saved at step 7 of 15"):
        train(CONFIG, tmp_path / "run", Watcher(at=[6]))
    assert saved(tmp_path / "run") == [5, 7]


def test_a_run_that_diverged_goes_on_from_its_last_good_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was only a passing fault, of a device, leaves no trace."""
    train(CONFIG, tmp_path / "whole", Watcher())
    with monkeypatch.context() as patch:
        alter(patch, 13, lambda state, metrics: (spoil_parameters(state), {**metrics, "loss": jnp.asarray(NAN)}))
        with user_error("diverged at step 13", "checkpoints 5, 10 in"):
            train(CONFIG, tmp_path / "run", Watcher())
    reporter = Watcher()
    train(CONFIG, tmp_path / "run", reporter)
    assert reporter.steps == list(range(11, 16))
    assert_trees_equal(read_arrays(tmp_path / "run", 15), read_arrays(tmp_path / "whole", 15))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


# --debug_nans

@pytest.fixture
def debugging() -> Iterator[None]:
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


def test_the_operation_that_gives_the_first_nan_is_named_with_its_line(tmp_path: Path, debugging: None,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tiny_network)
    config = replace(CONFIG, {"optimizer.learning_rate": 1e30})
    with user_error("step ", "invalid value (nan) encountered in ", ", at shared_basis/", ".py:", ", in ") as caught:
        train(config, tmp_path / "run", Watcher())
    place, line = re.search(r"at (shared_basis/\w+(?:/\w+)*\.py):(\d+), in ", str(caught.value)).groups()
    assert place.startswith(("shared_basis/models/", "shared_basis/ops.py")), "the innermost line tells most"
    assert str(caught.value).endswith((ROOT / place).read_text().splitlines()[int(line) - 1].strip())
    assert saved(tmp_path / "run") == []


def test_a_run_without_nan_computes_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tiny_network)
    config = replace(CONFIG, {"train.epochs": 2})
    train(config, tmp_path / "plain", Watcher())
    jax.config.update("jax_debug_nans", True)
    try:
        train(config, tmp_path / "watched", Watcher())
    finally:
        jax.config.update("jax_debug_nans", False)
    assert_trees_equal(read_arrays(tmp_path / "watched", 10), read_arrays(tmp_path / "plain", 10))
    assert read_metrics(tmp_path / "watched") == read_metrics(tmp_path / "plain")


def test_the_command_line_ends_with_one_line(main: CommandLine, tmp_path: Path) -> None:
    command = (f"--config={ROOT / 'configs' / 'digits_resnet.py'}:resnet14-s4u1-double",
               "--config.data.train_examples=80", "--config.train.batch_size=40", "--config.train.epochs=3",
               "--config.optimizer.learning_rate=1e12", "--config.optimizer.warmup_epochs=0.0")
    done = main(*command, "--workdir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: training diverged at step \d: loss \S+, gradient norm \S+, parameter norm \S+, "
                        r"[^\n]+, at learning rate \S+e\+1[12]\. Saved and finite: no checkpoint yet\. [^\n]+\n",
                        done.stderr), done.stderr
    assert "diverged" not in done.stdout
    named = main(*command, "--workdir=named", "--debug_nans", cwd=tmp_path)
    assert named.returncode == 2
    assert re.fullmatch(r"error: step \d: invalid value \(nan\) encountered in \w+, at shared_basis/[\w/]+\.py:\d+, in "
                        r"\w+: [^\n]+\n", named.stderr), named.stderr
    for name in ("run", "named"):
        assert saved(tmp_path / name) == []
