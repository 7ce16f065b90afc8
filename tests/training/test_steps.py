"""The training step against NumPy: what a batch holds, and what an update is."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Linear, assert_trees_equal, cross_entropies, make_images, mesh_of, tiny_network

from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, OrthogonalityConfig
from shared_basis.data import epoch_order
from shared_basis.data.augment import augment, normalize
from shared_basis.data.feeds import select_batch
from shared_basis.evaluation.evaluator import Metrics
from shared_basis.nn.ops import forms_for
from shared_basis.optim.optimizer import make_optimizer
from shared_basis.optim.penalty import orthogonality_diagnostics, orthogonality_penalty
from shared_basis.runtime.distributed import batch_sharding, replicated
from shared_basis.training.composition import compose
from shared_basis.training.steps import TrainState, create_train_state, train_step

PIXELS = DataConfig(mean=(0.0,), std=(1 / 255,))
"""Leaves pixel values as they are."""
CENTRED = DataConfig(mean=(0.5,), std=(0.25,))


# Images

@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))])
def test_normalize_is_affine_by_channel(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images, _ = make_images(3, channels=3)
    result = normalize(images, DataConfig(mean=mean, std=std))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - np.array(mean)) / np.array(std), atol=1e-5)


def crops(image: np.ndarray, pad: int, flip: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Returns every image that augmentation may make of `image`, with its corner and whether it is mirrored."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    cut = {(y, x): padded[y:y + height, x:x + width] for y, x in itertools.product(range(2 * pad + 1), repeat=2)}
    return {(part[:, ::-1] if mirrored else part).tobytes(): (*corner, mirrored)
            for corner, part in cut.items() for mirrored in ((False, True) if flip else (False,))}


@pytest.mark.parametrize(("pad", "flip"), [(1, False), (0, True), (2, True)])
def test_augment_crops_and_mirrors_each_image_in_every_way(pad: int, flip: bool) -> None:
    images = make_images(500, size=5, channels=3)[0]
    augmented = np.asarray(augment(images, jax.random.key(0), DataConfig(pad=pad, flip=flip)))
    assert augmented.dtype == np.uint8
    assert augmented.shape == images.shape
    drawn = [crops(before, pad, flip)[after.tobytes()] for before, after in zip(images, augmented, strict=True)]
    ways = (2 * pad + 1) ** 2 * (1 + flip)
    assert len(set(drawn)) == ways  # all of them; a draw of 500 misses one of 50 in 0.2 % of keys, and this is one key
    assert max(drawn.count(way) for way in set(drawn)) < 3 * 500 / ways if ways > 1 else True


def test_augment_follows_its_key_alone() -> None:
    images, config = make_images(20)[0], DataConfig(pad=2, flip=True)
    first, again, other = (augment(images, jax.random.key(seed), config) for seed in (0, 0, 1))
    assert_trees_equal(first, again)
    assert not np.array_equal(first, other)


def test_augment_changes_nothing_unless_asked() -> None:
    images = make_images(20)[0]
    np.testing.assert_array_equal(augment(images, jax.random.key(0), DataConfig(pad=0, flip=False)), images)


# Batches

def test_batches_are_the_order_cut_up_and_what_is_left_over_is_not_used() -> None:
    images, labels = make_images(11, size=2)
    order = np.random.default_rng(1).permutation(11).astype(np.int32)
    select = jax.jit(functools.partial(select_batch, batch_size=4, batch_sharding=batch_sharding(mesh_of(4))))
    for step in range(5):  # of two steps an epoch
        first = step % 2 * 4
        pixels, classes = select(jnp.asarray(step, jnp.int32), images, labels, order)
        np.testing.assert_array_equal(pixels, images[order[first:first + 4]])
        np.testing.assert_array_equal(classes, labels[order[first:first + 4]])
        assert (pixels.dtype, classes.dtype) == (np.uint8, np.int32)


# Training

class Trainer:
    """The training step of a small problem, and its states."""

    def __init__(self, model: nn.Module, images: np.ndarray, labels: np.ndarray, batch_size: int, *,
                 data: DataConfig = PIXELS, optimizer: optax.GradientTransformation | None = None, seed: int = 0,
                 devices: int = 1) -> None:
        mesh = mesh_of(devices)
        self.seed, self.per_epoch = seed, len(images) // batch_size
        self.images, self.labels = jax.device_put((images, labels), replicated(mesh))
        select = functools.partial(select_batch, batch_size=batch_size, batch_sharding=batch_sharding(mesh))
        update = functools.partial(
            train_step, functions=compose(Config(data=data), model, 10, optimizer or optax.sgd(0.1)), seed=seed,
            steps_per_epoch=self.per_epoch, batch_sharding=batch_sharding(mesh))
        self._step = jax.jit(lambda state, *inputs: update(state, *select(state.step, *inputs)),
                             out_shardings=replicated(mesh))
        create = functools.partial(create_train_state, model, optimizer or optax.sgd(0.1), seed, images.shape[1:])
        self.first = jax.jit(create, out_shardings=replicated(mesh))()

    def order(self, step: int) -> np.ndarray:
        return epoch_order(self.seed, step // self.per_epoch, len(self.images))

    def step(self, state: TrainState) -> TrainState:
        state, metrics = self._step(state, self.images, self.labels, self.order(int(state.step)))
        norm = metrics.pop("parameter_norm")
        assert norm == pytest.approx(math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64))
                                                   for leaf in jax.tree.leaves(jax.device_get(state.params)))))
        assert metrics.pop("gradient_norm") > 0
        assert_trees_equal(metrics, state.totals)
        return state

    def run(self, steps: int) -> list[TrainState]:
        """Returns the states after 0, 1, ..., `steps` updates."""
        return list(itertools.accumulate(range(steps), lambda state, _: self.step(state), initial=self.first))


def recorder(data: DataConfig = PIXELS, seed: int = 0) -> Trainer:
    """Returns a trainer of eleven images, three a batch, whose `batch_stats` show the batch; pixels name the image."""
    images = np.broadcast_to(np.arange(1, 12, dtype=np.uint8)[:, None, None, None], (11, 4, 4, 1)).copy()
    return Trainer(Linear(batch=3), images, np.arange(11, dtype=np.int32) % 10, 3, data=data, seed=seed)


def seen(state: TrainState) -> np.ndarray:
    return np.rint(np.asarray(state.batch_stats["seen"])).astype(int)


def test_an_epoch_of_steps_trains_on_every_image_once_apart_from_the_remainder() -> None:
    trainer = recorder()
    states = trainer.run(6)
    for epoch in (0, 1):
        images = [int(image.max()) - 1 for state in states[1 + 3 * epoch:4 + 3 * epoch] for image in seen(state)]
        assert images == epoch_order(0, epoch, 11)[:9].tolist()
        assert len(set(images)) == 9


def test_batch_and_augmentation_are_functions_of_seed_and_step_alone() -> None:
    config = DataConfig(mean=(0.0,), std=(1 / 255,), pad=2, flip=True)
    trainer, other = recorder(config), recorder(config, seed=1)
    states = trainer.run(5)
    jumped = trainer.step(trainer.first.replace(step=jnp.asarray(4, jnp.int32)))
    np.testing.assert_array_equal(seen(jumped), seen(states[5]))
    assert int(jumped.step) == 5
    assert not np.array_equal(seen(other.run(1)[1]), seen(states[1]))
    offsets = {tuple(np.argwhere(image).min(0)) for state in states[1:] for image in seen(state)}
    assert len(offsets) > 3  # crops differ from step to step, too


def test_totals_add_up_over_an_epoch_and_begin_anew_with_the_next() -> None:
    images, labels = make_images(10, size=3)
    data = DataConfig(mean=(0.5,), std=(0.5,))
    trainer = Trainer(Linear(batch=3), images, labels, 3, data=data)
    states = trainer.run(6)
    expected = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        chosen = trainer.order(step)[step % 3 * 3:][:3]
        head = before.params["head"]
        logits = (images[chosen].reshape(3, -1) / 255 - 0.5) / 0.5 @ np.asarray(head["kernel"]) + head["bias"]
        batch = {"loss": cross_entropies(logits, labels[chosen]).sum(), "count": 3.0,
                 "correct": float((logits.argmax(-1) == labels[chosen]).sum())}
        expected = {name: batch[name] + (expected[name] if step % 3 else 0) for name in batch}
        assert {name: float(value) for name, value in after.totals.items()} == pytest.approx(expected, rel=1e-5)


def test_two_updates_equal_ones_built_by_hand() -> None:
    images, labels = make_images(16)
    model, sets = tiny_network(), tiny_network().basis_groups("shared+unique")
    config = OptimizerConfig(learning_rate=0.05, momentum=0.9, weight_decay=0.01,
                             weight_decay_labels=("kernel", "basis"))
    optimizer = make_optimizer(Config(optimizer=config, orthogonality=OrthogonalityConfig(weight=3.0)), sets,
                               optax.constant_schedule(0.05))
    trainer = Trainer(model, images, labels, 8, data=DataConfig(), optimizer=optimizer)
    states = trainer.run(2)

    params, stats = trainer.first.params, trainer.first.batch_stats
    velocity = jax.tree.map(jnp.zeros_like, params)
    decays = jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "bases" or path[-1].key in ("kernel", "unique"), params)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params: Any, stats: Any, inputs: Any, labels: Any) -> tuple[jax.Array, Any]:
        logits, new = model.apply({"params": params, "batch_stats": stats}, inputs, train=True, mutable=["batch_stats"])
        log_likelihood = jax.nn.log_softmax(logits)[jnp.arange(8), labels]
        return -jnp.mean(log_likelihood) + 3.0 * orthogonality_penalty(params, sets), new["batch_stats"]

    for step in (0, 1):
        chosen = epoch_order(0, 0, 16)[8 * step:8 * step + 8]
        inputs = (images[chosen] / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        gradient, stats = gradients(params, stats, inputs, labels[chosen])
        gradient = jax.tree.map(lambda g, p, d: g + 0.01 * p * d, gradient, params, decays)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity)
    for actual, desired in ((states[2].params, params), (states[2].batch_stats, stats)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), actual, desired)
    assert int(states[2].step) == 2


@pytest.mark.slow
def test_a_small_problem_is_learnt() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.int32) % 4
    images = np.zeros((32, 8, 8, 1), np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = np.array(divmod(int(label), 2)) * 4
        image[y:y + 4, x:x + 4] = rng.integers(100, 256, (4, 4, 1))
    trainer = Trainer(tiny_network(num_classes=4), images, labels, 16, data=DataConfig(mean=(0.2,), std=(0.3,)),
                      optimizer=optax.sgd(0.1, momentum=0.9))
    states = trainer.run(40)
    assert float(states[2].totals["correct"]) < 24
    assert float(states[-1].totals["correct"]) == 32


@pytest.mark.slow
def test_bfloat16_computes_and_leaves_what_is_kept_in_float32() -> None:
    images, labels = make_images(16)
    trainer = Trainer(tiny_network(dtype=jnp.bfloat16), images, labels, 16, data=DataConfig(),
                      optimizer=optax.sgd(0.1, momentum=0.9))
    half = trainer.run(1)[-1]
    floats = jax.tree.leaves((half.params, half.batch_stats, half.opt_state, half.totals))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    diagnostics = orthogonality_diagnostics(half.params, tiny_network().basis_groups())
    assert {value.dtype for value in diagnostics.values()} == {jnp.dtype("float32")}

    @jax.jit
    def logits_in_float32() -> jax.Array:
        inputs = (images[trainer.order(0)] / np.float32(255) - 0.5) / 0.5
        return tiny_network().apply({"params": trainer.first.params, "batch_stats": trainer.first.batch_stats}, inputs,
                                    train=True, mutable=["batch_stats"])[0]
    loss, expected = float(half.totals["loss"]), cross_entropies(logits_in_float32(), labels[trainer.order(0)]).sum()
    assert abs(loss / expected - 1) > 1e-6
    assert loss == pytest.approx(expected, rel=0.02)


# What is not finite

class Cliff(nn.Module):
    """A network whose loss is finite and whose gradient is not: √x at 0."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        self.variable("batch_stats", "seen", jnp.zeros, ())
        bias = self.param("bias", nn.initializers.zeros, (10,))
        return jnp.zeros((len(images), 1)) + jnp.sqrt(bias)


@pytest.mark.parametrize(("model", "learning_rate", "gradient", "parameters"), [
    (Cliff(), 0.1, math.inf, math.inf),  # seen at its step though the loss is finite
    (Linear(batch=16), 1e30, None, math.inf)])  # an update whose norm has a square beyond float32
def test_the_norms_of_a_step_show_what_its_loss_does_not(model: nn.Module, learning_rate: float,
                                                         gradient: float | None, parameters: float) -> None:
    _, metrics = updates(model, 1, 1, learning_rate=learning_rate)
    assert np.isfinite(metrics[0]["loss"])
    assert metrics[0]["parameter_norm"] == parameters
    assert metrics[0]["gradient_norm"] == gradient if gradient else np.isfinite(metrics[0]["gradient_norm"])


# Gradient accumulation

class Plain(nn.Module):
    """A linear classifier that counts its calls, and keeps what dropout's stream draws in each."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        calls = self.variable("batch_stats", "calls", jnp.zeros, (), jnp.int32)
        draws = self.variable("batch_stats", "draws", jnp.zeros, (16,))
        if train:
            draws.value = draws.value.at[calls.value].set(jax.random.uniform(self.make_rng("dropout")))
            calls.value += 1
        return nn.Dense(10, name="head")(images.reshape(len(images), -1))


class Normalized(nn.Module):
    """Batch normalisation and a linear classifier."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        pixels = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-3, name="norm")(
            images.reshape(len(images), -1))
        return nn.Dense(10, name="head")(pixels)


def updates(model: nn.Module, steps: int, parts: int, devices: int = 1, *, learning_rate: float = 0.1,
            data: DataConfig = CENTRED, norm_images: int = 0) -> tuple[TrainState, list[Metrics]]:
    """Returns the state after so many updates with batches of 16 images, each in `parts`, and the metrics of each."""
    mesh, optimizer = mesh_of(devices), optax.sgd(learning_rate)
    config = Config(data=data, model=ModelConfig(norm_images=norm_images))
    step = jax.jit(functools.partial(
        train_step, functions=compose(config, model, 10, optimizer), seed=0, steps_per_epoch=steps,
        batch_sharding=batch_sharding(mesh), grad_accumulation_steps=parts), out_shardings=replicated(mesh))
    state = jax.device_put(create_train_state(model, optimizer, 0, (4, 4, 1)), replicated(mesh))
    images, labels = make_images(16 * steps, size=4)
    metrics = []
    for first in range(0, len(images), 16):
        batch = jax.device_put((images[first:first + 16], labels[first:first + 16]), batch_sharding(mesh))
        state, values = step(state, *batch)
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.mark.parametrize(("parts", "devices"), [(1, 4), (4, 1), (2, 4)])
def test_a_network_without_batch_normalisation_trains_the_same_in_parts(parts: int, devices: int) -> None:
    data = DataConfig(mean=(0.5,), std=(0.25,), pad=1, flip=True)
    whole, expected = updates(Plain(), 3, 1, data=data)
    state, metrics = updates(Plain(), 3, parts, devices, data=data)
    for actual, desired in ((state.params, whole.params), (metrics, expected), (state.totals, whole.totals)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, desired)
    assert (int(state.step), float(state.totals["count"])) == (3, 48)
    assert int(state.batch_stats["calls"]) == 3 * parts


def test_each_part_of_each_step_makes_draws_of_its_own() -> None:
    draws = updates(Plain(), 4, 4)[0].batch_stats["draws"]
    assert len(set(draws.tolist())) == 16


def normalized_by_hand(params: Any, parts: int, norm_images: int) -> tuple[Any, Any, dict[str, float]]:
    """Returns parameters, running statistics and metrics of `Normalized` after two updates, in NumPy and float64."""
    images, labels = make_images(32, size=4)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(params))
    mean, var, sums = np.zeros(16), np.ones(16), {"loss": 0.0, "correct": 0.0, "count": 0.0}
    for first in (0, 16):
        batch = ((images[first:first + 16] / 255 - 0.5) / 0.25).reshape(16, -1)
        gradient = jax.tree.map(np.zeros_like, params)
        for part in range(parts):
            found = []
            for begin in range(0, 16 // parts, norm_images or 16):
                of_the_group = slice(begin, begin + (norm_images or 16))
                inputs = batch[part::parts][of_the_group]
                targets = labels[first:first + 16][part::parts][of_the_group]
                found.append((inputs.mean(0), inputs.var(0)))
                normal = (inputs - inputs.mean(0)) / np.sqrt(inputs.var(0) + 1e-3)
                outputs = normal * params["norm"]["scale"] + params["norm"]["bias"]
                logits = outputs @ params["head"]["kernel"] + params["head"]["bias"]
                slope = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(10)[targets]
                back = slope @ params["head"]["kernel"].T
                new = {"head": {"kernel": outputs.T @ slope, "bias": slope.sum(0)},
                       "norm": {"scale": (back * normal).sum(0), "bias": back.sum(0)}}
                gradient = jax.tree.map(lambda a, b: a + b / 16, gradient, new)
                sums["loss"] += cross_entropies(logits, targets).sum()
                sums["correct"] += (logits.argmax(-1) == targets).sum()
                sums["count"] += len(targets)
            mean, var = (0.9 * old + 0.1 * np.mean(new, 0)
                         for old, new in zip((mean, var), zip(*found, strict=True), strict=True))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    norms = [np.sqrt(sum((leaf ** 2).sum() for leaf in jax.tree.leaves(tree))) for tree in (gradient, params)]
    return params, {"norm": {"mean": mean, "var": var}}, {**sums, "gradient_norm": norms[0], "parameter_norm": norms[1]}


@pytest.mark.parametrize(("parts", "norm_images", "devices"), [
    (1, 0, 1), (4, 0, 1), (2, 0, 4), (1, 4, 1), (1, 4, 2), (1, 4, 4), (1, 8, 4), (1, 16, 2), (2, 2, 4)])
def test_batch_normalisation_sees_parts_of_a_batch_and_groups_of_images_on_any_number_of_devices(
        parts: int, norm_images: int, devices: int) -> None:
    first = create_train_state(Normalized(), optax.sgd(0.1), 0, (4, 4, 1)).params
    params, statistics, sums = normalized_by_hand(first, parts, norm_images)
    state, metrics = updates(Normalized(), 2, parts, devices, norm_images=norm_images)
    for actual, desired in ((state.params, params), (state.batch_stats, statistics), (metrics[-1], sums)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, desired)


def test_each_group_of_images_makes_draws_of_its_own_and_integers_stay_integers() -> None:
    drawn = updates(Plain(), 1, 1, norm_images=4)[0].batch_stats
    assert (int(drawn["calls"]), drawn["calls"].dtype) == (1, jnp.int32)
    assert float(drawn["draws"][0]) != float(updates(Plain(), 1, 1)[0].batch_stats["draws"][0])


def test_groups_of_images_within_a_device_leave_one_exchange_which_is_that_of_the_gradients() -> None:
    model, mesh, optimizer = tiny_network(), mesh_of(4), optax.sgd(0.1)

    def exchanges(norm_images: int) -> list[str]:
        config = Config(data=CENTRED, model=ModelConfig(norm_images=norm_images))
        with forms_for("gpu"):
            step = jax.jit(functools.partial(
                train_step, functions=compose(config, model, 10, optimizer), seed=0, steps_per_epoch=1,
                batch_sharding=batch_sharding(mesh)), out_shardings=replicated(mesh))
            state = jax.eval_shape(lambda: create_train_state(model, optimizer, 0, (8, 8, 1)))
            state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), state)
            batch = (jax.ShapeDtypeStruct((16, *shape), dtype, sharding=batch_sharding(mesh))
                     for shape, dtype in (((8, 8, 1), jnp.uint8), ((), jnp.int32)))
            program = step.lower(state, *batch).compile().as_text()
        return re.findall(r"(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program)
    assert exchanges(4) == ["all-reduce"]
    assert len(exchanges(0)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_groups_of_images_train_a_network_with_bases_the_same_on_any_number_of_devices(platform: str) -> None:
    with forms_for(platform):
        one, many = (updates(tiny_network(), 2, 1, devices, norm_images=4)[0] for devices in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), many, one)


def test_a_loop_over_the_parts_computes_what_the_unrolled_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    scan, unrolled, results = jax.lax.scan, [], []

    def spy(*arguments: Any, **options: Any) -> Any:
        unrolled.append(options["unroll"])
        return scan(*arguments, **options)
    for platform in ("cpu", "gpu"):
        with monkeypatch.context() as patch, forms_for(platform):
            patch.setattr(jax.lax, "scan", spy)
            results.append(updates(Normalized(), 2, 4, 2))
    assert unrolled == [True, False]
    for actual, desired in zip(*results, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=5e-5), actual, desired)
