"""Training a run: what it leaves, bitwise resumption, and what is refused before anything is written."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_helpers
import jax
import numpy as np
import pytest
from helpers import (
    MAIN,
    ROOT,
    TINY,
    CommandLine,
    Watcher,
    assert_trees_equal,
    read_arrays,
    read_metrics,
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
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.distributed import make_mesh, replicated
from shared_basis.runtime.preemption import Interrupted
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.program import build
from shared_basis.training.train import train

PER_EPOCH = 5
CONFIG = Config(
    model=ModelConfig(name=TINY), data=DataConfig(train_examples=44, test_examples=30, pad=1, flip=True),
    orthogonality=OrthogonalityConfig(elements="shared+unique"),
    optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine", warmup_epochs=0.5),
    train=TrainConfig(epochs=4, batch_size=8, evaluate_every=2))
"""44 images are five steps an epoch, with four left over; evaluation at steps 10 and 20."""


def run(workdir: Path, config: Config = CONFIG, **watch: Any) -> tuple[dict[str, Any], Watcher]:
    reporter = Watcher(**watch)
    return train(config, workdir, reporter), reporter


def saved(workdir: Path) -> list[int]:
    """Returns the steps that are saved."""
    return Checkpoints(workdir / "checkpoints", read_only=True).steps


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
    assert saved(workdir) == [10, 20]
    assert lines[-1].items() <= result.items()
    best = max(lines, key=lambda line: line["test_accuracy"])
    assert (result["best_test_accuracy"], result["best_epoch"]) == (best["test_accuracy"], best["epoch"])
    assert result["chosen_on"] == "test"
    assert json.loads(json.dumps(result)) == result
    assert reporter.steps == list(range(1, 21))
    assert reporter.totals == {20}
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
    mesh = make_mesh()
    images = feeds.load(data.open_source(CONFIG.data), CONFIG.data, mesh, Reporter(verbosity="quiet"))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        state, program = build(CONFIG, images, tiny_network(), mesh, checkpoints)
    pixels, labels, _ = next(program.batches(0))
    for step in range(2 * PER_EPOCH):
        order = jax.device_put(data.epoch_order(CONFIG.seed, step // PER_EPOCH, 44), replicated(mesh))
        state, _ = program.step(state, pixels, labels, order)
    assert_trees_equal(read_arrays(finished[0], 10)["params"], state.params)


@pytest.mark.parametrize("stops", [
    pytest.param({10: 10}, marks=pytest.mark.slow),  # at an evaluation
    {2: 3, 12: 13},  # twice
], ids=str)
def test_an_interrupted_run_equals_one_that_was_not(finished: Any, tmp_path: Path, stops: dict[int, int]) -> None:
    """The signal comes while a step is shown, which is when the one after it has been started."""
    for at, step in stops.items():
        with pytest.raises(Interrupted, match=f"saved at step {step} of 20"):
            run(tmp_path / "run", at=[at], signum=signal.SIGTERM)
        assert saved(tmp_path / "run")[-1] == step
    result, reporter = run(tmp_path / "run")
    assert f"resumes at step {step} of 20" in reporter.text.getvalue()
    assert reporter.steps == list(range(step + 1, 21))

    workdir, expected, _ = finished
    assert read_metrics(tmp_path / "run") == read_metrics(workdir)
    assert_trees_equal(read_arrays(tmp_path / "run", 20), read_arrays(workdir, 20))
    assert {**result, "images_per_second": 0} == {**expected, "images_per_second": 0}


def test_a_run_killed_between_metrics_and_checkpoint_writes_the_line_once(finished: Any, tmp_path: Path) -> None:
    workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    _, reporter = run(tmp_path / "run")
    assert reporter.steps == list(range(11, 21))
    assert read_metrics(tmp_path / "run") == read_metrics(workdir)
    assert_trees_equal(read_arrays(tmp_path / "run", 20), read_arrays(workdir, 20))


@pytest.mark.slow
def test_a_line_of_an_evaluation_whose_figures_were_not_saved_is_written_once(finished: Any, tmp_path: Path) -> None:
    """As if it had been stopped in the evaluation, and killed when this was repeated before it was saved."""
    workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20" / "metrics")
    run(tmp_path / "run")
    assert read_metrics(tmp_path / "run") == read_metrics(workdir)


def test_a_finished_run_does_not_change(finished: Any) -> None:
    workdir, expected, _ = finished
    before = files(workdir)
    result, reporter = run(workdir)
    assert result == expected
    assert reporter.steps == []
    assert files(workdir) == before


@pytest.mark.slow
def test_the_seed_changes_the_run(finished: Any, tmp_path: Path) -> None:
    run(tmp_path / "other", replace(CONFIG, {"seed": 1}))
    assert read_metrics(tmp_path / "other")[-1]["train_loss"] != read_metrics(finished[0])[-1]["train_loss"]


def test_the_workdir_of_another_run_is_refused_and_left_alone(finished: Any) -> None:
    workdir, _, _ = finished
    before = files(workdir)
    with user_error("train.epochs: 5 now, 4 there"):
        run(workdir, replace(CONFIG, {"train.epochs": 5}))
    assert files(workdir) == before


def test_divergence_ends_the_run_and_saves_nothing(tmp_path: Path) -> None:
    config = replace(CONFIG, {"optimizer.learning_rate": 1e30, "optimizer.warmup_epochs": 0.0})
    with user_error("diverged", "e+", "penalty ", "norm max ", "--config.optimizer.learning_rate", "no checkpoint yet"):
        run(tmp_path / "run", config)
    assert saved(tmp_path / "run") == []
    assert read_metrics(tmp_path / "run") == []


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


def test_advice_can_be_followed_in_the_workdir_of_a_run_that_has_saved_nothing(finished: Any, tmp_path: Path) -> None:
    """As if a run had ended for lack of memory, or at a broken image, before its first checkpoint."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    _, reporter = run(tmp_path / "run", replace(CONFIG, {"train.batch_size": 20, "data.on_broken": "skip"}))
    assert "has saved nothing; it begins anew" in reporter.text.getvalue()
    assert reporter.steps[0] == 1
    assert {line["step"] for line in read_metrics(tmp_path / "run")} <= set(reporter.steps)
    assert Workdir(tmp_path / "run").load()[0].train.batch_size == 20


def test_a_batch_that_the_run_has_settled_must_fit_the_devices(finished: Any, tmp_path: Path) -> None:
    """As if a run whose recipe leaves the batch open had been trained on other devices."""
    shutil.copytree(finished[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["config"]["train"]["batch_size"] = 10
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with user_error("train.batch_size=10", "4 devices"):
        run(tmp_path / "run", replace(CONFIG, {"train.batch_size": 0}))


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
    with user_error("metrics.jsonl", "--mode=evaluate"):
        run(tmp_path / "run")


VALIDATED = replace(CONFIG, {"data.validation": 0.1, "train.evaluate_every": 4})
"""144 of 1,442 training images are held out."""


@pytest.mark.slow
def test_validation_figures_are_those_of_the_images_held_out(tmp_path: Path) -> None:
    result, reporter = run(tmp_path, VALIDATED)
    line, = read_metrics(tmp_path)
    assert result["chosen_on"] == "validation"
    assert "44 training, 30 test and 144 validation images" in reporter.text.getvalue()
    state, dataset = read_arrays(tmp_path, 20), data_helpers.load(VALIDATED.data)
    apply = jax.jit(lambda images: tiny_network().apply(
        {"params": state["params"], "batch_stats": state["batch_stats"]}, (images / np.float32(255) - 0.5) / 0.5,
        train=False))
    for name, split in (("validation", dataset.validation), ("test", dataset.test)):
        accuracy = np.mean(np.argmax(apply(split.images), -1) == split.labels)
        assert line[f"{name}_accuracy"] == pytest.approx(accuracy)
        assert {f"{name}_loss", f"{name}_accuracy_top5"} <= line.keys()


# --debug_nans

@pytest.fixture
def debugging() -> Iterator[None]:
    jax.config.update("jax_debug_nans", True)
    yield
    jax.config.update("jax_debug_nans", False)


@pytest.mark.slow
def test_the_operation_that_gives_the_first_nan_is_named_with_its_line(tmp_path: Path, debugging: None) -> None:
    config = replace(CONFIG, {"optimizer.learning_rate": 1e30, "optimizer.warmup_epochs": 0.0})
    with user_error("step ", "invalid value (nan) encountered in ", ", at shared_basis/", ".py:", ", in ") as caught:
        run(tmp_path / "run", config)
    place, line = re.search(r"at (shared_basis/\w+(?:/\w+)*\.py):(\d+), in ", str(caught.value)).groups()
    assert place.startswith(("shared_basis/models/", "shared_basis/nn/")), "the innermost line tells most"
    assert str(caught.value).endswith((ROOT / place).read_text().splitlines()[int(line) - 1].strip())
    assert saved(tmp_path / "run") == []


@pytest.mark.slow
def test_a_run_without_nan_computes_the_same_with_and_without(finished: Any, tmp_path: Path, debugging: None) -> None:
    run(tmp_path / "run")
    assert_trees_equal(read_arrays(tmp_path / "run", 20), read_arrays(finished[0], 20))
    assert read_metrics(tmp_path / "run") == read_metrics(finished[0])


@pytest.mark.slow
def test_divergence_ends_the_command_with_one_line(main: CommandLine, tmp_path: Path) -> None:
    command = (f"--config={ROOT / 'configs' / 'digits_resnet.py'}:resnet14-s4u1-double",
               "--config.data.train_examples=80", "--config.train.batch_size=40", "--config.train.epochs=3",
               "--config.optimizer.learning_rate=1e12", "--config.optimizer.warmup_epochs=0.0")
    done = main(*command, "--workdir=run", cwd=tmp_path)
    named = main(*command, "--workdir=named", "--debug_nans", cwd=tmp_path)
    assert (done.returncode, named.returncode) == (2, 2)
    assert re.fullmatch(r"error: training diverged at step \d: loss [^\n]+\n", done.stderr), done.stderr
    assert re.fullmatch(r"error: step \d: invalid value \(nan\) encountered in \w+, at shared_basis/[\w/]+\.py:\d+, in "
                        r"\w+: [^\n]+\n", named.stderr), named.stderr
    assert saved(tmp_path / "run") == saved(tmp_path / "named") == []


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
