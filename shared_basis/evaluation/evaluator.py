"""The compiled step that scores: every image once."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shared_basis.config import DataConfig
from shared_basis.data.augment import normalize
from shared_basis.data.feeds import Inputs
from shared_basis.errors import UserError
from shared_basis.nn import ops
from shared_basis.nn.types import Array, Tree
from shared_basis.runs.trained import Variables
from shared_basis.runtime.distributed import replicated

Metrics = dict[str, Array]


def eval_step(variables: Tree, images: Array, labels: Array, *, model: nn.Module, data: DataConfig) -> Metrics:
    """Scores one batch with running statistics.

    Args:
      variables: `params` and `batch_stats`.
      images: uint8 `[N, H, W, C]`.
      labels: int32 `[N]`; −1 marks an image that only fills the batch and does not count.

    Returns:
      The sums over the images that count: `loss`, `correct`, `correct_top5` and `count`, float32.
    """
    logits: Any = model.apply(variables, normalize(images, data), train=False)
    counts = labels >= 0
    targets = jnp.maximum(labels, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    target_logit = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    top5 = (jnp.sum(logits > target_logit, axis=-1) < 5) & ~jnp.isnan(target_logit[:, 0])
    return {"loss": jnp.sum(loss * counts),
            "correct": jnp.sum((jnp.argmax(logits, -1) == targets) & counts, dtype=jnp.float32),
            "correct_top5": jnp.sum(top5 & counts, dtype=jnp.float32),
            "count": jnp.sum(counts, dtype=jnp.float32)}


class Evaluator(Protocol):
    """Scores variables; tells `between` after each batch how many images are scored."""

    def __call__(self, variables: Variables, between: Callable[[int], None] = ...) -> dict[str, float]:
        """See `make_evaluator`."""


def make_evaluator(model: nn.Module, config: DataConfig, batches: Callable[[], Iterable[Inputs]],
                   mesh: Mesh) -> Evaluator:
    """Returns a function that scores variables (`params`, `batch_stats`) on all images of `batches`.

    It returns `loss` (mean cross entropy), `accuracy`, `accuracy_top5` (both in [0, 1]) and `count`, over the images
    whose label is not −1 (see `shared_basis.data.feeds.Images.batches`).
    """
    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=ops.compiler_options())
    def step(variables: Variables, images: jax.Array, labels: jax.Array) -> Metrics:
        return eval_step(variables, images, labels, model=model, data=config)

    def evaluator(variables: Variables, between: Callable[[int], None] = lambda scored: None) -> dict[str, float]:
        # Fetched one by one: several collectives in flight can deadlock virtual CPU devices. Added in float64 on the
        # host, so that counts stay exact and the batch size does not show in the loss.
        total: dict[str, float] = defaultdict(float)
        for images, labels in batches():
            for name, value in jax.device_get(step(variables, images, labels)).items():
                total[name] += float(value)
            between(int(total["count"]))
        count = total["count"]
        if not count:
            raise UserError("none of the images to be scored can be decoded.")
        return {"loss": total["loss"] / count, "accuracy": total["correct"] / count,
                "accuracy_top5": total["correct_top5"] / count, "count": count}

    return evaluator
