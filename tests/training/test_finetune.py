"""What fine-tuning and distillation add to a step and to a run: against NumPy, and to the bit where it stops."""

from __future__ import annotations

import contextlib
import functools
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
from helpers import (
    TINY,
    Linear,
    Watcher,
    assert_trees_equal,
    cross_entropies,
    make_images,
    mesh_of,
    read_arrays,
    read_metrics,
    tiny_network,
    user_error,
)

from shared_basis.config import (
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    TrainConfig,
    replace,
)
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluate import evaluate
from shared_basis.runs.trained import load_run
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.distributed import batch_sharding, replicated
from shared_basis.runtime.preemption import Interrupted
from shared_basis.training.composition import Own, compose
from shared_basis.training.steps import TrainState, create_train_state, train_step
from shared_basis.training.teacher import Teacher
from shared_basis.training.train import train

CENTRED = DataConfig(mean=(0.5,), std=(0.25,))


# A step

def compiled(config: Config, count: int = 1, *, devices: int = 1, teacher: Teacher | None = None,
             own: Own | None = None) -> tuple[Any, TrainState]:
    """Returns the step of a linear classifier on batches of 8 images, `count` of them an epoch, and its first state."""
    mesh, optimizer = mesh_of(devices), optax.sgd(0.1)
    model = Linear(batch=8 // config.optimizer.grad_accumulation_steps)
    step = jax.jit(functools.partial(
        train_step, functions=compose(config, model, 10, optimizer, teacher, own), seed=0, steps_per_epoch=count,
        batch_sharding=batch_sharding(mesh), grad_accumulation_steps=config.optimizer.grad_accumulation_steps),
        out_shardings=replicated(mesh))
    state = create_train_state(model, optimizer, 0, (4, 4, 1), averaged=config.train.ema_decay > 0)
    return step, jax.device_put(state, replicated(mesh))


def steps(config: Config, count: int, *, devices: int = 1, teacher: Teacher | None = None,
          own: Own | None = None) -> list[tuple[TrainState, dict[str, Any]]]:
    """Returns the states after so many updates, with their metrics."""
    step, state = compiled(config, count, devices=devices, teacher=teacher, own=own)
    images, labels = make_images(8 * count, size=4)
    found = []
    for first in range(0, len(images), 8):
        batch = jax.device_put((images[first:first + 8], labels[first:first + 8]), batch_sharding(mesh_of(devices)))
        state, metrics = step(state, *batch, teacher and teacher.variables)
        found.append((state, metrics))
    return found


def test_averages_follow_the_variables_as_by_hand() -> None:
    states = [state for state, _ in steps(Config(data=CENTRED, train=TrainConfig(ema_decay=0.3)), 4)]
    first = create_train_state(Linear(batch=8), optax.sgd(0.1), 0, (4, 4, 1))
    kernel, seen = np.float64(first.params["head"]["kernel"]), np.float64(first.batch_stats["seen"])
    for index, state in enumerate(states, 1):
        decay = min(0.3, (1 + index) / (10 + index))
        kernel = decay * kernel + (1 - decay) * np.float64(state.params["head"]["kernel"])
        seen = decay * seen + (1 - decay) * np.float64(state.batch_stats["seen"])
        np.testing.assert_allclose(state.averaged["params"]["head"]["kernel"], kernel, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.averaged["batch_stats"]["seen"], seen, rtol=1e-5, atol=1e-6)
    assert_trees_equal(states[-1].scored, states[-1].averaged)


def linear_teacher(data: DataConfig) -> Teacher:
    rng = np.random.default_rng(5)
    variables = {"params": {"head": {"kernel": rng.normal(size=(16, 10)).astype(np.float32),
                                     "bias": np.zeros(10, np.float32)}},
                 "batch_stats": {"seen": np.zeros((8, 4, 4, 1), np.float32)}}
    return Teacher(Linear(batch=8), data, jax.tree.map(jnp.asarray, variables), "linear")  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_network_learns_from_a_teacher_that_normalises_images_in_its_own_way(parts: int) -> None:
    data, teacher = DataConfig(mean=(0.1,), std=(0.5,)), linear_teacher(DataConfig(mean=(0.1,), std=(0.5,)))
    config = Config(data=CENTRED, distillation=DistillationConfig(weight=0.6, temperature=2.0),
                    optimizer=OptimizerConfig(grad_accumulation_steps=parts))
    (state, metrics), = steps(config, 1, teacher=teacher)
    images, labels = make_images(8, size=4)
    head = create_train_state(Linear(batch=8), optax.sgd(0.1), 0, (4, 4, 1)).params["head"]
    inputs = (images.reshape(8, -1) / 255 - 0.5) / 0.25
    logits = inputs @ np.float64(head["kernel"])
    theirs = (images.reshape(8, -1) / 255 - data.mean[0]) / data.std[0] @ np.float64(
        teacher.variables["params"]["head"]["kernel"])
    softmax = [np.exp(values) / np.exp(values).sum(-1, keepdims=True) for values in (logits / 2, theirs / 2, logits)]
    ours, soft, plain = softmax
    loss = 0.4 * cross_entropies(logits, labels) + 0.6 * 4 * (soft * np.log(soft / ours)).sum(-1)
    assert float(metrics["loss"]) == pytest.approx(loss.sum(), rel=1e-4)
    gradient = inputs.T @ (0.4 * (plain - np.eye(10)[labels]) + 0.6 * 2 * (ours - soft)) / 8
    np.testing.assert_allclose(state.params["head"]["kernel"], head["kernel"] - 0.1 * gradient, rtol=1e-3, atol=1e-4)


def test_a_loss_and_an_augmentation_of_ones_own_are_what_is_computed() -> None:
    def darker(images: jax.Array, key: jax.Array) -> jax.Array:
        return images // jax.random.randint(key, (), 2, 3).astype(images.dtype)

    def squares(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.sum((logits - targets) ** 2, -1)

    (state, metrics), = steps(Config(data=CENTRED), 1, own=Own(loss=squares, augment=darker))
    images, labels = make_images(8, size=4)
    head = create_train_state(Linear(batch=8), optax.sgd(0.1), 0, (4, 4, 1)).params["head"]
    inputs = (images // 2 / 255 - 0.5) / 0.25
    np.testing.assert_allclose(state.batch_stats["seen"], inputs, rtol=1e-5, atol=1e-5)
    logits = inputs.reshape(8, -1) @ np.float64(head["kernel"])
    assert float(metrics["loss"]) == pytest.approx(((logits - np.eye(10)[labels]) ** 2).sum(), rel=1e-4)
    with pytest.raises(ValueError, match=r"augment must return images of the input shape \(8, 4, 4, 1\)"):
        steps(Config(data=CENTRED), 1, own=Own(augment=lambda images, key: images[:, 1:]))


def test_what_is_mixed_is_a_function_of_the_step_alone() -> None:
    step, state = compiled(Config(data=CENTRED, train=TrainConfig(mixup=1.0)))
    images = make_images(8, size=4)
    seen = [np.asarray(step(state.replace(step=jnp.asarray(at, jnp.int32)), *images)[0].batch_stats["seen"])
            for at in (3, 4, 3)]
    np.testing.assert_array_equal(seen[0], seen[2])
    assert np.abs(seen[0] - seen[1]).max() > 0.1


@pytest.mark.slow
def test_all_of_it_together_does_not_depend_on_the_number_of_devices() -> None:
    config = Config(data=DataConfig(mean=(0.5,), std=(0.25,), pad=1, flip=True),
                    train=TrainConfig(mixup=0.2, cutmix=1.0, label_smoothing=0.1, ema_decay=0.9))
    one, four = (steps(config, 3, devices=devices, teacher=linear_teacher(CENTRED))[-1] for devices in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, four)


# A run

CONFIG = Config(
    model=ModelConfig(name=TINY), data=DataConfig(train_examples=44, test_examples=30, pad=1, flip=True),
    orthogonality=OrthogonalityConfig(elements="shared+unique"),
    optimizer=OptimizerConfig(name="adamw", learning_rate=0.02, schedule="cosine", warmup_epochs=0.5,
                              learning_rate_factors="head/**=10"),
    train=TrainConfig(epochs=2, batch_size=8, freeze="**,!head/**", freeze_epochs=1.2, label_smoothing=0.1,
                      mixup=0.2, ema_decay=0.9))
"""Five steps an epoch; the head alone trains for six of them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(CONFIG, workdir, Watcher())
    return workdir


def test_a_fine_tuned_run_trains_the_head_first(finished: Path) -> None:
    config, record = Workdir(finished).load()
    classes, shape = len(record["data"]["classes"]), record["data"]["image_shape"]
    first = create_train_state(tiny_network(), optax.sgd(0.1), config.seed, tuple(shape)).params
    assert first["head"]["kernel"].shape[-1] == classes
    states = [first, *(read_arrays(finished, step)["params"] for step in (5, 10))]
    for before, after, same in ((states[0], states[1], True), (states[1], states[2], False)):
        equal = jax.tree.map(functools.partial(np.allclose, rtol=1e-5, atol=1e-7), before, after)
        assert not equal["head"]["kernel"]
        assert all(jax.tree.leaves({**equal, "head": {}})) == same


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_to_the_bit(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="saved at step 4 of 10"):
        train(CONFIG, tmp_path / "run", Watcher(at=[3], signum=signal.SIGTERM))
    train(CONFIG, tmp_path / "run", Watcher())
    assert_trees_equal(read_arrays(tmp_path / "run", 10), read_arrays(finished, 10))
    assert read_metrics(tmp_path / "run") == read_metrics(finished)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"optimizer.name": "muon"}, {"optimizer.name": "lion", "optimizer.momentum": 0.95},
    {"distillation.teacher": "finished", "optimizer.grad_accumulation_steps": 2}], ids=str)
def test_other_optimizers_and_taught_runs_resume_to_the_bit_too(finished: Path, tmp_path: Path,
                                                                changes: dict[str, Any]) -> None:
    config = replace(CONFIG, {name: str(finished) if value == "finished" else value for name, value in changes.items()})
    with pytest.raises(Interrupted, match="saved at step 4 of 10"):
        train(config, tmp_path / "run", Watcher(at=[3], signum=signal.SIGTERM))
    for workdir in ("run", "whole"):
        train(config, tmp_path / workdir, Watcher())
    assert_trees_equal(read_arrays(tmp_path / "run", 10), read_arrays(tmp_path / "whole", 10))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_the_averages_are_what_is_evaluated_and_opened(finished: Path) -> None:
    state = read_arrays(finished, 10)
    variables = load_run(finished).variables
    assert_trees_equal(jax.device_get(dict(variables)), state["averaged"])
    assert not np.array_equal(state["params"]["head"]["kernel"], state["averaged"]["params"]["head"]["kernel"])
    line, scored = read_metrics(finished)[-1], evaluate(finished)
    assert scored["test_accuracy"] == line["test_accuracy"]
    assert scored["test_loss"] == pytest.approx(line["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_frozen_statistics_stay_and_a_frozen_body_has_no_gradient(tmp_path: Path) -> None:
    config = replace(CONFIG, {"train.epochs": 1, "train.freeze_epochs": 0.0, "train.freeze_statistics": True,
                              "train.mixup": 0.0, "train.cutmix": 0.0, "train.ema_decay": 0.0,
                              "train.record_gradients": True})
    train(config, tmp_path, Watcher())
    initial, state = create_train_state(tiny_network(), optax.sgd(0.1), 0, (8, 8, 1)), read_arrays(tmp_path, 5)
    assert_trees_equal(state["batch_stats"], jax.device_get(initial.batch_stats))
    assert not np.array_equal(state["params"]["head"]["kernel"], initial.params["head"]["kernel"])

    norms = json.loads((tmp_path / "gradients.jsonl").read_text())["norms"]
    assert {name for name, norm in norms.items() if norm} == {"head/kernel"}


PLAIN = replace(CONFIG, {"optimizer.learning_rate_factors": "", "train.freeze": "", "train.mixup": 0.0,
                         "train.ema_decay": 0.0, "train.epochs": 1})


def test_a_teacher_that_does_not_fit_is_refused_before_the_workdir_is_made(finished: Path, tmp_path: Path) -> None:
    with user_error(f"distillation.teacher='{tmp_path}/none': {tmp_path}/none holds no run", "RUN[:latest|best|STEP]"):
        train(replace(PLAIN, {"distillation.teacher": str(tmp_path / "none")}), tmp_path / "new", Watcher())
    with user_error(f"distillation.teacher='{finished}': {TINY} was trained on 10 classes of 8×8×1 images, not on "
                    "10 classes of 16×16×1 images", "--config.data.image_size"):
        train(replace(PLAIN, {"distillation.teacher": str(finished), "data.image_size": 16}), tmp_path / "new",
              Watcher())
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_learns_from_another_and_from_no_other(finished: Path, tmp_path: Path) -> None:
    taught = replace(PLAIN, {"distillation.teacher": f"{finished}:best"})
    train(taught, tmp_path / "taught", Watcher())
    file = tmp_path / "taught" / "run.json"
    record = json.loads(file.read_text())
    assert record["data"]["teacher"].startswith(f"{TINY} at step ")
    file.write_text(json.dumps({**record, "data": {**record["data"], "teacher": f"{TINY} at step 10, 0123456789ab"}}))
    with user_error("other data (teacher: ", "0123456789ab"):  # as if the one of this name had been trained on
        train(taught, tmp_path / "taught", Watcher())
    file.write_text(json.dumps(record))
    other = replace(taught, {"distillation.teacher": str(tmp_path / "taught")})
    with user_error("other data (teacher: "):
        train(other, tmp_path / "taught", Watcher())
    moved = shutil.copytree(finished, tmp_path / "moved")
    train(replace(taught, {"distillation.teacher": f"{moved}:best"}), tmp_path / "taught", Watcher())


def test_what_a_pattern_says_of_the_network_is_told_before_the_workdir_is_made(tmp_path: Path) -> None:
    with user_error("train.freeze='heads/**': matches no parameter"):
        train(replace(CONFIG, {"train.freeze": "heads/**"}), tmp_path / "run", Watcher())
    with user_error("train.freeze='**': freezes all parameters"):
        train(replace(CONFIG, {"train.freeze": "**", "train.freeze_epochs": 0.0}), tmp_path / "run", Watcher())
    exact = replace(CONFIG, {"orthogonality.method": "exact", "orthogonality.elements": "shared+unique"})
    for patterns, epochs in (("**/unique", 0.0), ("group1/**", 0.0), ("bases/group1/first", 0.0), ("bases/**", 1.0)):
        with user_error(f"train.freeze={patterns!r}: freezes ", "orthogonality.method=exact moves together"):
            config = replace(exact, {"train.freeze": patterns, "train.freeze_epochs": epochs})
            train(config, tmp_path / "run", Watcher())
    with pytest.raises(TypeError, match="optimizer must be a function"):
        train(CONFIG, tmp_path / "run", Watcher(), optimizer=optax.adam(0.1))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_random_weights_that_are_frozen_are_warned_of(finished: Path, tmp_path: Path) -> None:
    def told(config: Config, workdir: Path, init: str | None = None) -> str:
        watcher = Watcher()
        with contextlib.suppress(UserError):
            train(config, workdir, watcher, init=init)
        return watcher.text.getvalue()

    frozen = replace(CONFIG, {"train.freeze": "**", "train.freeze_epochs": 0.0})  # which is refused later
    warning = "train.freeze='**' keeps random weights; to fine-tune trained ones, give --init=RUN or --init=FILE"
    assert warning in told(frozen, tmp_path / "run")
    assert "--init" not in told(frozen, tmp_path / "run", str(finished)) + told(CONFIG, finished)


def lighter(images: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.minimum(images, 250) + jax.random.randint(key, (len(images), 1, 1, 1), 0, 5).astype(images.dtype)


@pytest.mark.slow
def test_a_run_with_functions_of_ones_own_resumes_with_them_alone(tmp_path: Path) -> None:
    config = replace(CONFIG, {"train.epochs": 1, "train.freeze": "", "train.mixup": 0.0, "train.cutmix": 0.0,
                              "train.ema_decay": 0.0})
    own = {"optimizer": optax.adabelief, "loss": optax.losses.poly_loss_cross_entropy, "augment": lighter}
    with pytest.raises(Interrupted, match="saved at step 3 of 5"):
        train(config, tmp_path / "run", Watcher(at=[2], signum=signal.SIGTERM), **own)
    with user_error("other functions of your own", "loss: None now", "poly_loss_cross_entropy' there"):
        train(config, tmp_path / "run", Watcher(), optimizer=optax.adabelief, augment=lighter)
    train(config, tmp_path / "run", Watcher(), **own)
    train(config, tmp_path / "whole", Watcher(), **own)
    assert_trees_equal(read_arrays(tmp_path / "run", 5), read_arrays(tmp_path / "whole", 5))
