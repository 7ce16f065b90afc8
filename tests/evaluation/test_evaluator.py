"""The scorer against NumPy, and exact evaluation: every image is scored once, whatever the batches and devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Linear, cross_entropies, make_images, mesh_of, tiny_network, user_error
from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import feeds
from shared_basis.evaluation.evaluator import eval_step, make_evaluator, score_examples

PIXELS = DataConfig(mean=(0.0,), std=(1 / 255,))
"""Leaves pixel values as they are."""


class Pixels(nn.Module):
    """Takes the pixels of an image for its logits."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        assert not train
        return images.reshape(len(images), -1) / 50


def test_evaluation_counts_what_numpy_counts() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([rng.permutation(10) * 5 for _ in range(40)]).astype(np.uint8).reshape(40, 1, 10, 1)
    labels = rng.integers(-1, 10, 40).astype(np.int32)
    sums = jax.jit(functools.partial(eval_step, model=Pixels(), data=PIXELS))({}, images, labels)

    scored = labels >= 0
    logits, targets = images[scored].reshape(-1, 10) / 50, labels[scored]
    ranks = (-logits).argsort(-1)
    top = {k: (ranks[:, :k] == targets[:, None]).any(-1).sum() for k in (1, 5)}
    assert 0 < scored.sum() < 40
    assert {name: float(value) for name, value in sums.items()} == pytest.approx({
        "loss": cross_entropies(logits, targets).sum(), "correct": top[1], "correct_top5": top[5],
        "count": scored.sum()}, rel=1e-5)


def test_a_batch_of_filling_alone_counts_nothing() -> None:
    images = np.full((4, 1, 10, 1), 255, np.uint8)
    sums = eval_step({}, images, np.full(4, -1, np.int32), model=Pixels(), data=PIXELS)
    assert {float(value) for value in sums.values()} == {0.0}


def test_images_are_scored_one_by_one_in_range_where_exp_overflows() -> None:
    logits = np.random.default_rng(0).normal(0, 3000, (6, 7)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, -1, 2], np.int32)
    scores = {name: np.asarray(values) for name, values in jax.jit(score_examples)(logits, labels).items()}
    exact = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    expected = np.log(np.exp(exact).sum(-1)) - exact[np.arange(6), labels]
    counts = labels >= 0
    np.testing.assert_allclose(scores["loss"], np.where(counts, expected, 0), rtol=1e-6)
    np.testing.assert_array_equal(scores["count"], counts)
    np.testing.assert_array_equal(scores["correct"], (logits.argmax(-1) == labels) & counts)
    rank = (logits > logits[np.arange(6), labels][:, None]).sum(-1)
    np.testing.assert_array_equal(scores["correct_top5"], (rank < 5) & counts)


def test_logits_that_are_not_a_number_show_in_the_loss_and_count_as_wrong() -> None:
    scores = score_examples(jnp.full((3, 7), jnp.nan), jnp.array([0, 3, -1]))
    assert np.isnan(scores["loss"][:2]).all()
    assert float(scores["loss"][2]) == 0
    assert [float(scores[name].sum()) for name in ("correct", "correct_top5", "count")] == [0, 0, 2]


def random_variables(model: Any, image_shape: tuple[int, int, int]) -> Any:
    """Returns variables whose batch statistics are those of no batch (and variances positive)."""
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))()
    rng = np.random.default_rng(0)
    return {"params": variables["params"],
            "batch_stats": jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype),
                                        variables["batch_stats"])}


def evaluator(model: Any, config: DataConfig, split: data.Split, batch_size: int,
              mesh: Mesh) -> Callable[[Any], dict[str, float]]:
    """Returns the evaluator of images in memory."""
    images = feeds.Images(data.Spec(split.images.shape[1:], tuple("0123456789")), {"test": split}, config)
    return make_evaluator(model, config, images.batches("test", batch_size, mesh), mesh)


@pytest.fixture(scope="module")
def scored() -> tuple[Any, Any, data.Split, np.ndarray]:
    """Returns a network, its variables, 13 images and their logits, each computed alone."""
    images, labels = make_images(13)
    model = tiny_network()
    variables = random_variables(model, (8, 8, 1))
    apply = jax.jit(lambda image: model.apply(variables, image, train=False))
    logits = [apply((image[None] / np.float32(255) - np.float32(0.25)) / np.float32(0.5))[0] for image in images]
    return model, variables, data.Split(images, labels), np.asarray(logits)


@pytest.mark.parametrize(("examples", "batch_size", "devices"), [
    (13, 4, 1), (13, 5, 2), (13, 3, 4), (13, 13, 4), (13, 1000, 4), (12, 4, 4), (1, 1, 4), (2, 1000, 1)])
def test_every_image_is_scored_once(scored: Any, examples: int, batch_size: int, devices: int) -> None:
    model, variables, split, logits = scored
    split, logits = data.Split(split.images[:examples], split.labels[:examples]), logits[:examples]
    config = DataConfig(mean=(0.25,), std=(0.5,), pad=2, flip=True)  # the last two are for training alone
    scores = evaluator(model, config, split, batch_size, mesh_of(devices))(variables)
    ranks = (-logits).argsort(-1)
    assert scores == pytest.approx({
        "loss": cross_entropies(logits, split.labels).mean(), "count": examples,
        "accuracy": np.mean(ranks[:, 0] == split.labels),
        "accuracy_top5": np.mean((ranks[:, :5] == split.labels[:, None]).any(-1))}, rel=1e-5)


def test_a_mean_over_many_images_does_not_depend_on_the_batch_size() -> None:
    images, labels = make_images(3000, size=2)
    model = Linear()
    variables = random_variables(model, (2, 2, 1))
    scores = [evaluator(model, DataConfig(), data.Split(images, labels), size, mesh_of(4))(variables)
              for size in (7, 1024, 3000)]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-6)
        assert {k: other[k] for k in ("accuracy", "accuracy_top5", "count")} == {
            k: scores[0][k] for k in ("accuracy", "accuracy_top5", "count")}


def test_batches_are_asked_for_anew_each_time_and_what_does_not_count_is_left_out(scored: Any) -> None:
    model, variables, split, logits = scored
    fresh = iter([[(split.images[:4], split.labels[:4])], [(split.images[:4], np.array([-1, *split.labels[1:4]]))]])
    score = make_evaluator(model, DataConfig(mean=(0.25,), std=(0.5,)), lambda: next(fresh), mesh_of(1))
    for first in (0, 1):
        scores = score(variables)
        assert scores["count"] == 4 - first
        assert scores["loss"] == pytest.approx(cross_entropies(logits[first:4], split.labels[first:4]).mean(), rel=1e-5)


def test_images_none_of_which_counts_are_told(scored: Any) -> None:
    model, variables, split, _ = scored
    nothing = data.Split(split.images, np.full_like(split.labels, -1))
    with user_error("none of the images", "can be decoded"):
        evaluator(model, DataConfig(), nothing, 5, mesh_of(1))(variables)
