"""Evaluation against one image at a time, and what a trained run may be evaluated on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Linear, cross_entropies, make_images, mesh_of, save_run, tiny_network, user_error, write_folder
from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.data import feeds
from shared_basis.evaluation import evaluate
from shared_basis.evaluation.evaluator import make_evaluator
from shared_basis.runs.trained import build_model


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


@pytest.mark.parametrize("field", ["mean", "std"])
def test_normalisation_must_fit_the_channels(field: str) -> None:
    config = Config(data=DataConfig(**{field: (0.1, 0.2, 0.3)}))
    with user_error(f"data.{field}=(0.1, 0.2, 0.3)", "1 channel;"):
        build_model(config, data.Spec((8, 8, 1), ("a", "b")))
    assert build_model(config, data.Spec((8, 8, 3), ("a", "b"))).num_classes == 2


def test_build_model_follows_the_configuration() -> None:
    model = build_model(Config(model=ModelConfig(name="resnet14-s2u1", dtype="bfloat16")),
                        data.Spec((8, 8, 1), tuple("abcdefg")))
    assert (model.num_classes, model.sharing.shared_rank, model.sharing.unique_rank) == (7, 2, 1)
    assert model.dtype == jnp.bfloat16


# Runs. Their networks are random, and evaluation does not mind.

@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run on two classes of four images, with checkpoints 10 (the best) and 20."""
    root = tmp_path_factory.mktemp("runs")
    images = write_folder(root / "images", classes=("cat", "dog"), count=2)
    return save_run(root / "run", Config(model=ModelConfig(name="resnet14"),
                                         data=DataConfig(name="folder", directory=str(images))), {10: 0.9, 20: 0.1})


def test_a_run_is_scored_by_its_workdir_alone(run: Path) -> None:
    latest, best = evaluate.evaluate(run), evaluate.evaluate(str(run), "best")
    assert (latest["step"], best["step"]) == (20, 10)
    assert latest["test_loss"] != best["test_loss"]
    assert latest["test_examples"] == 4
    assert latest["model"] == "resnet14"
    assert json.loads(json.dumps(latest)) == latest
    text = evaluate.render(latest)
    assert "\n" not in text
    assert f"{100 * latest['test_accuracy']:.2f} %" in text


def test_only_the_best_checkpoint_is_called_best_with_the_images_that_chose_it(run: Path) -> None:
    best = evaluate.evaluate(run, "best")
    assert best["chosen_on"] == "test"
    assert "best test epoch" in evaluate.render(best)
    assert "published" in evaluate.render(best)
    for which in ("latest", "10", "20"):  # 10 is the best, and was not asked for as such
        other = evaluate.evaluate(run, which)
        assert other["chosen_on"] is None
        assert "best" not in evaluate.render(other)
        assert "published" not in evaluate.render(other)
    validated = evaluate.render({**best, "chosen_on": "validation"})
    assert "best validation epoch" in validated
    assert "published" not in validated


def test_the_images_and_the_batch_size_may_change(run: Path, tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "images", classes=("cat", "dog"), count=3)
    moved = evaluate.evaluate(run, "10", {"data.directory": str(elsewhere), "train.eval_batch_size": 4})
    assert (moved["step"], moved["test_examples"]) == (10, 6)


@pytest.mark.parametrize("field", ["model.name", "seed", "train.batch_size", "optimizer.learning_rate", "name"])
def test_other_fields_may_not_change(run: Path, field: str) -> None:
    with user_error(f"--config.{field}", "cannot be changed", "data", "train.eval_batch_size"):
        evaluate.evaluate(run, overrides={"data.flip": True, field: 1})


def test_other_data_is_refused(run: Path, tmp_path: Path) -> None:
    others = write_folder(tmp_path / "others", classes=("cat", "cow"), count=2)
    with user_error("other classes", "'cow'", "cat, dog", str(others)):
        evaluate.evaluate(run, overrides={"data.directory": str(others)})
    with user_error("other image shape", "the run was trained on"):
        evaluate.evaluate(run, overrides={"data.image_size": 16})
    with user_error("other classes", "digits"):
        evaluate.evaluate(run, overrides={"data.name": "digits"})


def test_what_is_not_there_is_told(run: Path, tmp_path: Path) -> None:
    with user_error("checkpoint '7'", "10, 20"):
        evaluate.evaluate(run, "7")
    with user_error("holds no run"):
        evaluate.evaluate(tmp_path)
    assert list(tmp_path.iterdir()) == []
