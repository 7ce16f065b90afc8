"""The record of gradients' norms by training: what it holds, that it changes nothing, and that it survives a stop."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, Watcher, assert_trees_equal, read_arrays, read_metrics, tiny_network, user_error

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
from shared_basis.optim.gradient_norms import recorded_paths
from shared_basis.optim.optimizer import make_optimizer
from shared_basis.runtime.preemption import Interrupted
from shared_basis.training.train import train

PER_EPOCH = 5
CONFIG = Config(
    model=ModelConfig(name=TINY), data=DataConfig(train_examples=44, test_examples=30),
    orthogonality=OrthogonalityConfig(elements="shared+unique"), optimizer=OptimizerConfig(learning_rate=0.05),
    train=TrainConfig(epochs=2, batch_size=8, record_gradients=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(CONFIG, workdir, Watcher())
    return workdir


def read_gradients(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "gradients.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_evaluation_adds_the_means_of_its_epoch(finished: Path) -> None:
    lines = read_gradients(finished)
    assert [(line["step"], line["epoch"]) for line in lines] == [(5, 1), (10, 2)]
    params = read_arrays(finished, 10)["params"]
    assert sorted(lines[1]["norms"]) == sorted(map("/".join, recorded_paths(params)))

    # The first epoch again, step by step, each gradient by hand.
    model, (images, labels) = tiny_network(), _training_images()
    steps = [read_initial_state()]
    order = data.epoch_order(CONFIG.seed, 0, 44)
    sums = np.zeros(len(lines[0]["norms"]))
    optimizer = make_optimizer(replace(CONFIG, {"train.record_gradients": False}), model.basis_groups("shared+unique"),
                               lambda count: 0.05)

    @jax.jit
    def differentiate(params: Any, stats: Any, inputs: Any, targets: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, updated = model.apply({"params": params, "batch_stats": stats}, inputs, train=True,
                                          mutable=["batch_stats"])
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), targets]), updated["batch_stats"]
        return jax.grad(loss, has_aux=True)(params)

    params, stats = steps[0]["params"], steps[0]["batch_stats"]
    state = optimizer.init(params)
    for step in range(PER_EPOCH):
        chosen = order[8 * step:8 * step + 8]
        gradient, stats = differentiate(params, stats, (images[chosen] / np.float32(255) - 0.5) / 0.5, labels[chosen])
        sums += [np.linalg.norm(np.asarray(_leaf(gradient, path))) for path in recorded_paths(gradient)]
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert lines[0]["norms"] == pytest.approx(
        dict(zip(map("/".join, recorded_paths(params)), sums / PER_EPOCH, strict=True)), rel=2e-3)


def _training_images() -> tuple[np.ndarray, np.ndarray]:
    split = data.open_source(CONFIG.data, ("train",)).splits["train"]
    pixels, labels = zip(*split.read(range(len(split))), strict=True)
    return np.stack(pixels), np.array(labels)


def read_initial_state() -> dict[str, Any]:
    return dict(tiny_network().init(jax.random.key(CONFIG.seed), jnp.zeros((1, 8, 8, 1)), train=False))


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4])  # amid the epoch, and as it is evaluated
def test_a_run_that_was_stopped_has_the_same_record_bit_for_bit(finished: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(Interrupted):
        train(CONFIG, tmp_path / "run", Watcher([at], signal.SIGTERM))
    train(CONFIG, tmp_path / "run", Watcher())
    assert (tmp_path / "run" / "gradients.jsonl").read_bytes() == (finished / "gradients.jsonl").read_bytes()
    assert_trees_equal(read_arrays(tmp_path / "run", 10), read_arrays(finished, 10))


@pytest.mark.slow
def test_a_run_killed_between_record_and_checkpoint_writes_the_line_once(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    train(CONFIG, tmp_path / "run", Watcher())
    assert (tmp_path / "run" / "gradients.jsonl").read_bytes() == (finished / "gradients.jsonl").read_bytes()


@pytest.mark.slow
def test_without_the_record_the_same_is_trained_and_nothing_is_written(finished: Path, tmp_path: Path) -> None:
    plain = replace(CONFIG, {"train.record_gradients": False})
    train(plain, tmp_path / "run", Watcher())
    assert not (tmp_path / "run" / "gradients.jsonl").exists()
    assert_trees_equal(*(read_arrays(path, 10)["params"] for path in (tmp_path / "run", finished)))
    assert read_metrics(tmp_path / "run") == read_metrics(finished)
    with user_error("train.record_gradients: True now, False there"):
        train(CONFIG, tmp_path / "run", Watcher())


@pytest.mark.slow
def test_the_number_of_devices_does_not_change_the_record(finished: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    assert jax.device_count() == 4
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: alone)
    train(replace(CONFIG, {"train.epochs": 1}), tmp_path / "one", Watcher())
    assert read_gradients(tmp_path / "one")[0]["norms"] == pytest.approx(read_gradients(finished)[0]["norms"], rel=1e-3)
