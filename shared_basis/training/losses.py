"""What a step minimises, image by image; the orthogonality penalty and weight decay are links of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from shared_basis.config import DistillationConfig
from shared_basis.nn.types import Array

Loss = Callable[[Array, Array], Array]
"""From logits `[N, classes]` and targets to the loss of each image, `[N]`."""


class Targets(NamedTuple):
    """What the logits of a batch are compared with."""

    labels: Array
    """Classes int32 `[N]`, or probabilities float32 `[N, classes]`."""
    teacher: Array | None = None
    """The logits of the teacher, `[N, classes]`; None where there is none."""

    def hits(self, logits: Array) -> Array:
        """Returns how many of the largest logits are of the class, or the most probable one, of their image."""
        classes = self.labels if self.labels.ndim == 1 else jnp.argmax(self.labels, -1)
        return jnp.sum(jnp.argmax(logits, -1) == classes, dtype=jnp.float32)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross entropy of each image in nats; `labels` are classes or probabilities."""
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def divergence(logits: Array, teacher: Array, temperature: float) -> Array:
    """Returns T² · KL(teacher ‖ network) of each image, both logits over T (Hinton et al. 2015, section 2).

    T² keeps the size of its gradient as T changes.
    """
    return temperature ** 2 * optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(teacher / temperature))


def make_loss(config: DistillationConfig, labels: Loss = cross_entropy) -> Callable[[Array, Targets], Array]:
    """Returns the loss of each image, by its label and, where there is a teacher, as `config` says, by its logits."""
    def loss(logits: Array, targets: Targets) -> Array:
        if targets.teacher is None:
            return labels(logits, targets.labels)
        return ((1 - config.weight) * labels(logits, targets.labels)
                + config.weight * divergence(logits, targets.teacher, config.temperature))
    return loss


def checked_loss(own: Loss) -> Loss:
    """Returns the user's `own` loss, which raises a ValueError unless it gives a number for each image."""
    def loss(logits: Array, labels: Array) -> Array:
        losses = own(logits, labels)
        if jnp.shape(losses) != labels.shape[:1]:
            raise ValueError(f"loss must return one number for each image, of shape {labels.shape[:1]} here: from "
                             f"logits and probabilities, both {labels.shape}, it returned {jnp.shape(losses)}")
        return losses
    return loss
