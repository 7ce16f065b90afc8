"""The per-image losses of a step. The orthogonality penalty and weight decay are part of the optimizer chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from shared_basis.config import DistillationConfig
from shared_basis.nn.types import Array

Loss = Callable[[Array, Array], Array]
"""Maps logits `[N, classes]` and targets to the loss of each image, `[N]`."""


class Targets(NamedTuple):
    """The targets for the logits of a batch."""

    labels: Array
    """Classes int32 `[N]`, or probabilities float32 `[N, classes]`."""
    teacher: Array | None = None
    """The teacher's logits, `[N, classes]`; None without a teacher."""

    def hits(self, logits: Array) -> Array:
        """Returns the number of images whose largest logit is their class, or their most probable class."""
        classes = self.labels if self.labels.ndim == 1 else jnp.argmax(self.labels, -1)
        return jnp.sum(jnp.argmax(logits, -1) == classes, dtype=jnp.float32)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross entropy of each image in nats; `labels` are classes or probabilities."""
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def divergence(logits: Array, teacher: Array, temperature: float) -> Array:
    """Returns T² · KL(teacher ‖ network) of each image, with both logits divided by T (Hinton et al. 2015, section 2).

    The factor T² keeps the gradient's magnitude independent of T.
    """
    return temperature ** 2 * optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(teacher / temperature))


def make_loss(config: DistillationConfig, labels: Loss = cross_entropy) -> Callable[[Array, Targets], Array]:
    """Returns the loss of each image: by its label and, with a teacher, also by the teacher's logits."""
    def loss(logits: Array, targets: Targets) -> Array:
        if targets.teacher is None:
            return labels(logits, targets.labels)
        return ((1 - config.weight) * labels(logits, targets.labels)
                + config.weight * divergence(logits, targets.teacher, config.temperature))
    return loss


def checked_loss(own: Loss) -> Loss:
    """Returns the user's loss, wrapped to raise a ValueError unless it returns one number per image."""
    def loss(logits: Array, labels: Array) -> Array:
        losses = own(logits, labels)
        if jnp.shape(losses) != labels.shape[:1]:
            raise ValueError(f"loss must return one number for each image, of shape {labels.shape[:1]} here: from "
                             f"logits and probabilities, both {labels.shape}, it returned {jnp.shape(losses)}")
        return losses
    return loss
