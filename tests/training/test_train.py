"""The training loop: it can be stopped anywhere, goes on as if it had not been, and keeps what is good."""

from __future__ import annotations

import gc
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    MAIN,
    Watcher,
    assert_trees_equal,
    read_arrays,
    read_metrics,
    small_networks,
    tiny_network,
    user_environment,
    user_error,
)

from shared_basis import data
from shared_basis.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    TrainConfig,
    replace,
)
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.evaluation import evaluate as evaluate_module
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runtime.distributed import make_mesh, replicated
from shared_basis.runtime.preemption import Interrupted, StopSignals
from shared_basis.runtime.reporter import Reporter
from shared_basis.training import program as program_module
from shared_basis.training import train as train_module
from shared_basis.training.train import render, train

PER_EPOCH = 5
CONFIG = Config(
    model=ModelConfig(name="resnet14"), data=DataConfig(train_examples=44, test_examples=30, pad=1, flip=True),
    orthogonality=OrthogonalityConfig(elements="shared+unique"),
    optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine", warmup_epochs=0.5),
    train=TrainConfig(epochs=4, batch_size=8, evaluate_every=2))
"""44 images are five steps an epoch, with four left over; evaluation at steps 10 and 20."""


@pytest.fixture(autouse=True, scope="module")
def small_network() -> Iterator[None]:
    """Trains a network that compiles fast, whatever the name: the loop does not look into it."""
    with small_networks(train_module, evaluate_module):
        yield


def run(workdir: Path, config: Config = CONFIG, **watch: Any) -> tuple[dict[str, Any], Watcher]:
    reporter = Watcher(**watch)
    return train(config, workdir, reporter), reporter


def stop(workdir: Path, at: int, signum: int = signal.SIGTERM) -> Interrupted:
    """Trains until a signal comes while step `at` is shown, which is when the one after it has been started."""
    with pytest.raises(Interrupted) as caught:
        run(workdir, at=[at], signum=signum)
    return caught.value


def files(workdir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*")
            if path.is_file() and path.name != "log.txt"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Watcher]:
    """Returns the workdir of an uninterrupted run, its result and what it showed; for reading only."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, *run(workdir)


def test_a_run_leaves_metrics_checkpoints_and_its_result(finished: Any) -> None:
    workdir, result, reporter = finished
    lines = read_metrics(workdir)
    assert [(line["step"], line["epoch"]) for line in lines] == [(10, 2), (20, 4)]
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps == [10, 20]
    assert lines[-1].items() <= result.items()
    best = max(lines, key=lambda line: line["test_accuracy"])
    assert (result["best_test_accuracy"], result["best_epoch"]) == (best["test_accuracy"], best["epoch"])
    assert result["chosen_on"] == "test"
    assert json.loads(json.dumps(result)) == result
    assert reporter.steps == list(range(1, 21))
    assert reporter.totals == {20}
    assert "images are resident on the device (decoded, the images take 4.6 KiB (×5 here)" in reporter.text.getvalue()
    assert "44 training and 30 test images of 8×8×1" in reporter.text.getvalue()
    assert "epoch 2/4" in reporter.text.getvalue()
    assert "epoch 4/4" in reporter.text.getvalue()


def test_metrics_are_those_of_the_saved_state(finished: Any) -> None:
    workdir, _, _ = finished
    for line in read_metrics(workdir):
        state = read_arrays(workdir, line["step"])
        assert state["step"] == line["step"]
        assert state["totals"]["count"] == PER_EPOCH * 8
        assert line["train_loss"] == float(state["totals"]["loss"]) / (PER_EPOCH * 8)
        assert line["train_accuracy"] == float(state["totals"]["correct"]) / (PER_EPOCH * 8)
        norms = [np.linalg.norm(basis.reshape(-1, basis.shape[-1]), axis=0)
                 for basis in (*state["params"]["bases"]["group1"].values(),
                               *(state["params"]["group1"]["block2"][name]["unique"] for name in ("first", "second")))]
        assert line["norm_max"] == pytest.approx(np.concatenate(norms).max(), rel=1e-5)
    # Half an epoch of warm-up is 2 steps, and the cosine falls over the other 18; step 20 used the rate of 19 updates.
    rate = 0.05 * (1 + math.cos(math.pi * 17 / 18)) / 2
    assert read_metrics(workdir)[-1]["learning_rate"] == pytest.approx(rate, rel=1e-5)


def test_each_epoch_trains_in_the_order_of_its_own(finished: Any, tmp_path: Path) -> None:
    mesh, checkpoints = make_mesh(), Checkpoints(tmp_path)
    images = feeds.load(data.open_source(CONFIG.data), CONFIG.data, mesh, Reporter(verbosity="quiet"))
    state, program = program_module.build(CONFIG, images, tiny_network(), mesh, checkpoints)
    pixels, labels, _ = next(program.batches(0))
    for step in range(2 * PER_EPOCH):
        order = jax.device_put(data.epoch_order(CONFIG.seed, step // PER_EPOCH, 44), replicated(mesh))
        state, _ = program.step(state, pixels, labels, order)
    checkpoints.close()
    assert_trees_equal(read_arrays(finished[0], 10)["params"], state.params)


@pytest.mark.parametrize("stops", [
    {1: 2},  # in the first epoch
    {4: 5},  # at an epoch's end without an evaluation
    {9: 10},  # as it is evaluated
    {10: 10},  # after its evaluation
    {2: 3, 12: 13},  # twice
    {3: 4, 5: 6, 7: 8},  # again and again
], ids=str)
def test_an_interrupted_run_equals_one_that_was_not(finished: Any, tmp_path: Path, stops: dict[int, int]) -> None:
    for at, saved in stops.items():
        message = str(stop(tmp_path / "run", at))
        assert f"saved at step {saved} of 20" in message
        assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps[-1] == saved
    result, reporter = run(tmp_path / "run")
    assert f"resumes at step {saved} of 20" in reporter.text.getvalue()
    assert reporter.steps == list(range(saved + 1, 21))

    workdir, expected, _ = finished
    assert read_metrics(tmp_path / "run") == read_metrics(workdir)
    assert_trees_equal(read_arrays(tmp_path / "run", 20), read_arrays(workdir, 20))
    assert {**result, "images_per_second": 0} == {**expected, "images_per_second": 0}


@pytest.mark.parametrize("at", [10, 20])  # the first evaluation, and that at the end
def test_a_run_stopped_in_the_middle_of_an_evaluation_saves_at_once_and_evaluates_when_it_goes_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    config = replace(CONFIG, {"train.eval_batch_size": 12})  # three batches
    run(tmp_path / "whole", config)
    make_evaluator, scored = train_module.make_evaluator, []

    def make_interrupting(model: Any, config: Any, batches: Callable[[], Any], mesh: Any) -> Any:
        def interrupting() -> Iterator[Any]:
            for batch in batches():
                scored.append(batch)
                if len(scored) == 3 * at / 10 - 1:
                    signal.raise_signal(signal.SIGTERM)
                yield batch
        return make_evaluator(model, config, interrupting, mesh)
    monkeypatch.setattr(train_module, "make_evaluator", make_interrupting)
    with pytest.raises(Interrupted, match=f"saved at step {at} of 20"):
        run(tmp_path / "run", config)
    assert len(scored) == 3 * at / 10 - 1
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(10, at, 10))
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).metrics(at) is None
    monkeypatch.setattr(train_module, "make_evaluator", make_evaluator)

    _, reporter = run(tmp_path / "run", config)
    assert reporter.steps == list(range(at + 1, 21))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    assert_trees_equal(read_arrays(tmp_path / "run", 20), read_arrays(tmp_path / "whole", 20))
    whole, resumed = (Checkpoints(tmp_path / name / "checkpoints", read_only=True) for name in ("whole", "run"))
    assert (resumed.steps, resumed.find("best")) == (whole.steps, whole.find("best"))
    assert {**resumed.metrics(at), "images_per_second": 0} == {**whole.metrics(at), "images_per_second": 0}


def test_a_run_killed_between_metrics_and_checkpoint_writes_the_line_once(finished: Any, tmp_path: Path) -> None:
    workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    _, reporter = run(tmp_path / "run")
    assert reporter.steps == list(range(11, 21))
    assert read_metrics(tmp_path / "run") == read_metrics(workdir)
    assert_trees_equal(read_arrays(tmp_path / "run", 20), read_arrays(workdir, 20))


def test_a_finished_run_does_not_change(finished: Any) -> None:
    workdir, expected, _ = finished
    before = files(workdir)
    result, reporter = run(workdir)
    assert result == expected
    assert reporter.steps == []
    assert files(workdir) == before


def test_two_equal_runs_are_equal_and_the_seed_tells_others(finished: Any, tmp_path: Path) -> None:
    workdir, _, _ = finished
    run(tmp_path / "equal")
    assert_trees_equal(read_arrays(tmp_path / "equal", 20), read_arrays(workdir, 20))
    assert read_metrics(tmp_path / "equal") == read_metrics(workdir)
    run(tmp_path / "other", replace(CONFIG, {"seed": 1}))
    assert read_metrics(tmp_path / "other")[-1]["train_loss"] != read_metrics(workdir)[-1]["train_loss"]


def test_the_workdir_of_another_run_is_refused_and_left_alone(finished: Any) -> None:
    workdir, _, _ = finished
    before = files(workdir)
    with user_error("train.epochs: 5 now, 4 there"):
        run(workdir, replace(CONFIG, {"train.epochs": 5}))
    assert files(workdir) == before


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_told_with_the_shells_exit_code(tmp_path: Path, signum: int, code: int) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt = stop(tmp_path / "run", 1, signum)
    assert interrupt.exit_code == code
    assert signal.Signals(signum).name in str(interrupt)
    assert "the same command goes on" in str(interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_signal_acts_as_usual() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("batch_size", [8, 44])  # five steps an epoch, or one, whose loss is that before its update
def test_divergence_ends_the_run_and_saves_nothing(tmp_path: Path, batch_size: int) -> None:
    config = replace(CONFIG, {"optimizer.learning_rate": 1e30, "optimizer.warmup_epochs": 0.0,
                              "train.batch_size": batch_size, "train.evaluate_every": 1})
    with user_error("diverged", "e+", "--config.optimizer.learning_rate", "no checkpoint yet"):
        run(tmp_path / "run", config)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps == []
    assert read_metrics(tmp_path / "run") == []


def test_divergence_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, {"optimizer.schedule": "piecewise", "optimizer.boundaries": [2.2],
                              "optimizer.factors": [1e30]})
    with user_error("diverged at step 12", "loss ", "gradient norm", "parameter norm", "penalty", "norm max",
                    "at learning rate 5e+28", "Saved and finite: checkpoint 10 in "):
        run(tmp_path / "run", config)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps == [10]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [10]
    assert all(np.isfinite(leaf).all() for leaf in _leaves(read_arrays(tmp_path / "run", 10)))


def _leaves(tree: Any) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else (
        [leaf for value in tree for leaf in _leaves(value)] if isinstance(tree, (list, tuple)) else
        [] if tree is None else [np.asarray(tree)])


@pytest.mark.parametrize(("fields", "parts"), [
    ({"train.batch_size": 10}, ("train.batch_size=10", "4 devices", "8 or 12")),
    ({"train.batch_size": 3}, ("train.batch_size=3", "4 devices", "nearest: 4.")),
    ({"train.batch_size": 48}, ("train.batch_size=48", "only 44 training images")),
    ({"data.train_examples": 10**6}, ("data.train_examples=1000000", "1442")),
], ids=str)
def test_sizes_that_do_not_fit_are_told_before_the_workdir_is_made(tmp_path: Path, fields: dict[str, Any],
                                                                   parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        run(tmp_path / "run", replace(CONFIG, fields))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax leaves unfinished
def test_a_damaged_checkpoint_stops_a_resume(finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")  # as if it had been killed before its end
    (tmp_path / "run" / "checkpoints" / "10" / "state" / "manifest.ocdbt").unlink()
    before = files(tmp_path / "run")
    with user_error("checkpoint 10", "cannot be restored"):
        run(tmp_path / "run")
    gc.collect()
    assert files(tmp_path / "run") == before


def test_a_finished_run_without_its_metrics_is_told(finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        run(tmp_path / "run")


# Which epoch is the best, and on whose word

VALIDATED = replace(CONFIG, {"data.validation": 0.1, "train.evaluate_every": 1})
"""144 of 1,442 training images are held out; evaluation at steps 5, 10, 15 and 20."""


def fake_accuracies(monkeypatch: pytest.MonkeyPatch, validation: list[float], test: list[float]) -> None:
    """Has evaluations of 144 and of 30 images give these accuracies, one after another."""
    make_evaluator = train_module.make_evaluator
    accuracies = {144: iter(validation), 30: iter(test)}

    def make_fake(*arguments: Any) -> Callable[[Any], dict[str, float]]:
        evaluate = make_evaluator(*arguments)

        def fake(variables: Any, between: Callable[[int], None]) -> dict[str, float]:
            scores = evaluate(variables, between)
            return {**scores, "accuracy": next(accuracies[int(scores["count"])])}
        return fake
    monkeypatch.setattr(train_module, "make_evaluator", make_fake)


def test_validation_images_choose_the_best_checkpoint_and_test_images_do_not(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_accuracies(monkeypatch, validation=[0.2, 0.9, 0.3, 0.4], test=[0.8, 0.1, 0.5, 0.3])
    result, reporter = run(tmp_path, VALIDATED)
    assert (result["chosen_on"], result["best_epoch"], result["best_test_accuracy"]) == ("validation", 2, 0.1)
    assert (result["epoch"], result["validation_accuracy"], result["test_accuracy"]) == (4, 0.4, 0.3)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert (checkpoints.steps, checkpoints.find("best")) == ([10, 15, 20], 10)
    assert "44 training, 30 test and 144 validation images" in reporter.text.getvalue()
    assert "validation accuracy 90.00 %  test loss" in reporter.text.getvalue()
    assert "30.00 % test accuracy after 4 epochs, 10.00 % after 2 (best validation epoch)" in render(result)
    assert "published" not in render(result)

    best = evaluate_module.evaluate(tmp_path, "best")
    assert (best["step"], best["chosen_on"]) == (10, "validation")
    assert "best validation epoch" in evaluate_module.render(best)
    assert evaluate_module.evaluate(tmp_path)["chosen_on"] is None


def test_without_validation_images_the_test_images_choose_and_this_is_said(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_accuracies(monkeypatch, validation=[], test=[0.2, 0.8, 0.3, 0.1])
    result, _ = run(tmp_path, replace(CONFIG, {"train.evaluate_every": 1}))
    assert (result["chosen_on"], result["best_epoch"], result["best_test_accuracy"]) == ("test", 2, 0.8)
    assert not any(name.startswith("validation") for name in result)
    assert "10.00 % test accuracy after 4 epochs, 80.00 % after 2 (best test epoch, the published protocol" in (
        render(result))
    best = evaluate_module.evaluate(tmp_path, "best")
    assert (best["step"], best["chosen_on"]) == (10, "test")
    assert "best test epoch" in evaluate_module.render(best)


@pytest.mark.parametrize(("validation", "test"), [([0.5, 0.7, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]),
                                                  ([], [0.5, 0.7, 0.7, 0.6])], ids=["validation", "test"])
def test_the_best_epoch_is_that_of_the_best_checkpoint_also_where_two_are_equal(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: list[float], test: list[float]) -> None:
    fake_accuracies(monkeypatch, validation, test)
    result, _ = run(tmp_path, VALIDATED if validation else replace(VALIDATED, {"data.validation": 0.0}))
    best = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert result["best_epoch"] * PER_EPOCH == best.find("best")
    assert result["best_test_accuracy"] == best.metrics(best.find("best"))["test_accuracy"]


def test_validation_figures_are_those_of_the_images_held_out(tmp_path: Path) -> None:
    run(tmp_path, replace(VALIDATED, {"train.epochs": 1}))
    line, = read_metrics(tmp_path)
    state, dataset = read_arrays(tmp_path, PER_EPOCH), data.load(VALIDATED.data)
    apply = jax.jit(lambda images: tiny_network().apply(
        {"params": state["params"], "batch_stats": state["batch_stats"]}, (images / np.float32(255) - 0.5) / 0.5,
        train=False))
    for name, split in (("validation", dataset.validation), ("test", dataset.test)):
        accuracy = np.mean(np.argmax(apply(split.images), -1) == split.labels)
        assert line[f"{name}_accuracy"] == pytest.approx(accuracy)
        assert {f"{name}_loss", f"{name}_accuracy_top5"} <= line.keys()


@pytest.mark.slow
def test_the_default_learns_digits(tmp_path: Path) -> None:
    def main(*arguments: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, MAIN, "--json", "--noreport", *arguments], cwd=MAIN.parent,
                              env=user_environment(), text=True, capture_output=True, timeout=900, check=True)
        return json.loads(done.stdout)

    trained = main(f"--workdir={tmp_path / 'run'}")
    assert trained["test_accuracy"] >= 0.98
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    scored = main("--mode=evaluate", f"--workdir={tmp_path / 'run'}")
    assert scored["test_examples"] == 355
    for result in (trained, scored):
        assert {name: result[name] for name in ("test_accuracy", "test_accuracy_top5", "step")} == {
            name: last[name] for name in ("test_accuracy", "test_accuracy_top5", "step")}
        assert result["test_loss"] == pytest.approx(last["test_loss"], rel=1e-5)
