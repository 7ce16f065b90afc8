"""One training step and the state that it moves on: pure functions, compiled by their caller."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from shared_basis.config import DataConfig
from shared_basis.data.augment import augment, normalize
from shared_basis.evaluation.evaluator import Metrics
from shared_basis.models.parameters import init_variables
from shared_basis.nn import ops
from shared_basis.nn.types import Array, Tree


class TrainState(struct.PyTreeNode):
    """All that training carries from step to step. Batch and augmentation follow from the seed and `step`."""

    step: Array
    """Updates made so far, int32."""
    params: Tree
    batch_stats: Tree
    """Running statistics; empty for a network without batch normalisation."""
    opt_state: optax.OptState
    totals: Metrics
    """Sums over the images of the running epoch so far: `loss` (cross entropy), `correct` and `count`, float32."""


def create_train_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int | Array,
                       image_shape: tuple[int, int, int]) -> TrainState:
    """Returns the state before the first step, initialised from `seed`, for images `[H, W, C]`."""
    return start_from(init_variables(model, jax.random.key(seed), image_shape), optimizer)


def start_from(variables: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step that starts from `variables` (`params` and, if any, `batch_stats`)."""
    params = variables["params"]
    totals = {name: jnp.zeros(()) for name in ("loss", "correct", "count")}
    return TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params),
                      totals)


def train_step(state: TrainState, images: Array, labels: Array, *, model: nn.Module,
               optimizer: optax.GradientTransformation, data: DataConfig, seed: int | Array, steps_per_epoch: int,
               batch_sharding: NamedSharding, grad_accumulation_steps: int = 1,
               norm_images: int = 0) -> tuple[TrainState, Metrics]:
    """Makes one update; its augmentation is determined by `seed` and `state.step`.

    Args:
      images: the batch, uint8 `[B, H, W, C]`.
      labels: its classes, int32 `[B]`.
      batch_sharding: how the batch lies on the devices; batch statistics are those of the whole batch.
      grad_accumulation_steps: the number of parts that the batch is divided into; their gradients are computed one
        after another and averaged. That equals the gradient of the whole batch but for what sees a part alone: batch
        normalisation, whose running statistics then move once for each part, and dropout's draws.
      norm_images: the number of images that batch normalisation takes its statistics over; 0 is the batch, or its part.

    Returns:
      The new state and, for reading while the state moves on, its `totals` with `gradient_norm`, the global norm of the
      cross entropy's gradient, and `parameter_norm`, that of the new parameters.
    """
    inputs = normalize(augment(images, _stream(seed, 1, state.step), data), data)
    inputs = jax.lax.with_sharding_constraint(inputs, batch_sharding)
    dropout = _stream(seed, 2, state.step)
    differentiate = jax.grad(functools.partial(_loss, model, norm_images), has_aux=True)
    if grad_accumulation_steps == 1:
        gradient, (batch_stats, sums) = differentiate(state.params, state.batch_stats, inputs, labels, dropout)
    else:
        gradient, (batch_stats, sums) = _accumulate(differentiate, state, inputs, labels, dropout,
                                                    grad_accumulation_steps, batch_sharding)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    first = state.step % steps_per_epoch == 0
    totals = jax.tree.map(lambda total, new: jnp.where(first, new, total + new), state.totals, sums)
    norms = {"gradient_norm": _norm(gradient), "parameter_norm": _norm(params)}
    return TrainState(state.step + 1, params, batch_stats, opt_state, totals), {**totals, **norms}


def _stream(seed: int | Array, stream: int, index: int | Array) -> Array:
    """Returns the key of `index` in an independent stream of the seed (1: augmentation, 2: dropout)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)


def _loss(model: nn.Module, norm_images: int, params: Tree, batch_stats: Tree, inputs: Array, labels: Array,
          key: Array) -> tuple[Array, tuple[Tree, Metrics]]:
    """Returns the mean cross entropy, and with it the new running statistics and the sums of `TrainState.totals`."""
    logits, batch_stats = _apply(model, norm_images or len(inputs), params, batch_stats, inputs, key)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    sums = {"loss": cross_entropy * len(labels), "count": jnp.asarray(len(labels), jnp.float32),
            "correct": jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)}
    return cross_entropy, (batch_stats, sums)


def _apply(model: nn.Module, norm_images: int, params: Tree, batch_stats: Tree, inputs: Array,
           key: Array) -> tuple[Array, Tree]:
    """Returns the logits in training `[B, classes]` and the new running statistics.

    Each group of `norm_images` images, which follow one another, is a batch of its own to the network.
    """
    def apply(images: Array, key: Array) -> tuple[Array, Tree]:
        logits, updated = model.apply({"params": params, "batch_stats": batch_stats}, images, train=True,
                                      mutable=["batch_stats"], rngs={"dropout": key})
        return logits, updated["batch_stats"]
    if norm_images == len(inputs):
        return apply(inputs, key)
    groups = inputs.reshape(-1, norm_images, *inputs.shape[1:])
    logits, moved = jax.vmap(apply)(groups, jax.random.split(key, len(groups)))
    return logits.reshape(len(inputs), -1), jax.tree.map(lambda x: jnp.mean(x, 0).astype(x.dtype), moved)


def _accumulate(differentiate: Callable[..., tuple[Tree, tuple[Tree, Metrics]]], state: TrainState, inputs: Array,
                labels: Array, dropout: Array, steps: int, batch_sharding: NamedSharding) -> Any:
    """Returns what `differentiate` does for the whole batch, computed in `steps` parts; the gradient is their mean."""
    def add_part(carry: Any, part: Any) -> tuple[Any, None]:
        batch_stats, totals = carry
        *batch, index = part
        gradient, (batch_stats, sums) = differentiate(state.params, batch_stats, *batch,
                                                      jax.random.fold_in(dropout, index))
        return (batch_stats, jax.tree.map(jnp.add, totals, (gradient, sums))), None

    # Part i has the images i, i + steps, …, so that no image changes its device.
    parts = [jax.lax.with_sharding_constraint(
        jnp.swapaxes(array.reshape(-1, steps, *array.shape[1:]), 0, 1),
        NamedSharding(batch_sharding.mesh, PartitionSpec(None, *batch_sharding.spec))) for array in (inputs, labels)]
    zeros = jax.tree.map(jnp.zeros_like, (state.params, state.totals))
    # A loop on CPU runs convolutions 15 times slower (resnet20-s16u1-double); unrolled, it saves no memory there.
    (batch_stats, (gradient, sums)), _ = jax.lax.scan(
        add_part, (state.batch_stats, zeros), (*parts, jnp.arange(steps)), unroll=ops.use_cpu_forms())
    return jax.tree.map(lambda leaf: leaf / steps, gradient), (batch_stats, sums)


def _norm(tree: Tree) -> Array:
    """Returns the norm of all leaves together, joined first: a sum for each of them takes long to compile."""
    return jnp.linalg.norm(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]))
