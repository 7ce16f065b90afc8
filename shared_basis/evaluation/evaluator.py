"""Compiled evaluation: scores every image exactly once, in sums or per image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from shared_basis.config import DataConfig
from shared_basis.data.feeds import Inputs
from shared_basis.errors import UserError
from shared_basis.nn import ops
from shared_basis.nn.types import Array, Tree
from shared_basis.runs.trained import Trained, Variables, predict_logits
from shared_basis.runtime.distributed import platform_of, replicated

Metrics = dict[str, Array]


def score_examples(logits: Array, labels: Array) -> Metrics:
    """Scores each image.

    Args:
      logits: float32 `[N, classes]`.
      labels: int32 `[N]`; −1 marks an image that does not count: padding, or an image that could not be decoded.

    Returns:
      For each image, float32 `[N]`: its `loss` (cross entropy in nats), whether it is `correct`, or among the five
      largest logits (`correct_top5`), and `count`, 1. All are 0 for images that do not count.
    """
    counts = labels >= 0
    targets = jnp.maximum(labels, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    target_logit = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    valid = counts & ~jnp.isnan(target_logit[:, 0])  # argmax takes NaN for the largest, and no number exceeds it
    top5 = jnp.sum(logits > target_logit, axis=-1) < 5
    return {"loss": jnp.where(counts, loss, 0),
            "correct": jnp.float32((jnp.argmax(logits, -1) == targets) & valid),
            "correct_top5": jnp.float32(top5 & valid),
            "count": jnp.float32(counts)}


def require_finite(finite: np.ndarray, trained: Trained) -> None:
    """Raises `UserError` unless all are true of `finite` `[N]`: whether the logits of each image are finite."""
    if not finite.all():  # argmax would take NaN for the largest
        raise UserError(f"the run in {trained.run.path}, step {trained.step}: the logits of {np.sum(~finite):,} of "
                        f"{len(finite):,} images are not finite, so they have no class; use another --checkpoint, or "
                        "other weights.")


def eval_step(variables: Tree, images: Array, labels: Array, *, model: nn.Module, data: DataConfig) -> Metrics:
    """Returns the sums of `score_examples` over a batch, uint8 `[N, H, W, C]`, using running statistics."""
    scores = score_examples(predict_logits(model, variables, images, data), labels)
    return {name: jnp.sum(values) for name, values in scores.items()}


class Evaluator(Protocol):
    """Scores variables; calls `after_batch` after each batch with the number of images scored so far."""

    def __call__(self, variables: Variables, after_batch: Callable[[int], None] = ...) -> dict[str, float]:
        """Returns `loss`, `accuracy`, `accuracy_top5` and `count`; see `make_evaluator`."""


def define_step(model: nn.Module, config: DataConfig, mesh: Mesh) -> Any:
    """Returns `eval_step`, jitted for the devices of `mesh`, which need not exist if it is only compiled."""
    @ops.jit_for(platform_of(mesh), out_shardings=replicated(mesh))
    def step(variables: Variables, images: jax.Array, labels: jax.Array) -> Metrics:
        return eval_step(variables, images, labels, model=model, data=config)
    return step


def make_evaluator(model: nn.Module, config: DataConfig, batches: Callable[[], Iterable[Inputs]],
                   mesh: Mesh) -> Evaluator:
    """Returns a function that evaluates variables (`params`, `batch_stats`) on all images of `batches`.

    It returns `loss` (mean cross entropy), `accuracy`, `accuracy_top5` (both in [0, 1]) and `count`, over all images
    whose label is not −1 (see `shared_basis.data.feeds.Images.batches`), and raises `UserError` if there are none.
    """
    step = define_step(model, config, mesh)

    def evaluator(variables: Variables, after_batch: Callable[[int], None] = lambda scored: None) -> dict[str, float]:
        # Fetched batch by batch: several collectives in flight can deadlock virtual CPU devices. Summed in float64 on
        # the host, so that counts are exact and the loss does not depend on the batch size.
        total: dict[str, float] = defaultdict(float)
        for images, labels in batches():
            for name, value in jax.device_get(step(variables, images, labels)).items():
                total[name] += float(value)
            after_batch(int(total["count"]))
        count = total["count"]
        if not count:
            raise UserError("none of the images to score can be decoded.")
        return {"loss": total["loss"] / count, "accuracy": total["correct"] / count,
                "accuracy_top5": total["correct_top5"] / count, "count": count}

    return evaluator
