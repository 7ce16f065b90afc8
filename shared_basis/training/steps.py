"""One training step and one evaluation step: pure functions, compiled by their caller."""

from __future__ import annotations

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
from shared_basis.nn.types import Array, Tree


class TrainState(struct.PyTreeNode):
    """All that training carries from step to step. Batch and augmentation follow from the seed and `step`."""

    step: Array
    """Updates made so far, int32."""
    params: Tree
    batch_stats: Tree
    opt_state: optax.OptState
    totals: Metrics
    """Sums over the images of the running epoch so far: `loss` (cross entropy), `correct` and `count`, float32."""


def create_train_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int | Array,
                       image_shape: tuple[int, int, int]) -> TrainState:
    """Returns the state before the first step, initialised from `seed`, for images `[H, W, C]`."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    return start_from(variables, optimizer)


def start_from(variables: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step that starts from `variables` (`params`, `batch_stats`)."""
    params = variables["params"]
    totals = {name: jnp.zeros(()) for name in ("loss", "correct", "count")}
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params), totals)


def _stream(seed: int | Array, stream: int, index: int | Array) -> Array:
    """Returns the key of `index` in an independent stream of the seed (1: augmentation, 2: dropout)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)


def train_step(state: TrainState, images: Array, labels: Array, *, model: nn.Module,
               optimizer: optax.GradientTransformation, data: DataConfig, seed: int | Array, steps_per_epoch: int,
               batch_sharding: NamedSharding, grad_accumulation_steps: int = 1) -> tuple[TrainState, Metrics]:
    """Makes one update; its augmentation is determined by `seed` and `state.step`.

    Args:
      state: the state to go on from.
      images: the batch, uint8 `[B, H, W, C]`.
      labels: its classes, int32 `[B]`.
      batch_sharding: how the batch lies on the devices; batch statistics are those of the whole batch.
      grad_accumulation_steps: parts, of B / `grad_accumulation_steps` images, whose gradients are computed one after another and averaged. That
        equals the gradient of the whole batch but for what sees a part alone: batch normalisation, whose running
        statistics then move once for each part, and dropout's draws.

    Returns:
      The new state and, for reading while the state moves on, its `totals` with `gradient_norm`, the global norm of the
      cross entropy's gradient, and `parameter_norm`, that of the new parameters.
    """
    inputs = normalize(augment(images, _stream(seed, 1, state.step), data), data)
    inputs = jax.lax.with_sharding_constraint(inputs, batch_sharding)
    dropout = _stream(seed, 2, state.step)

    def loss(params: Tree, batch_stats: Tree, inputs: Array, labels: Array,
             key: Array) -> tuple[Array, tuple[Tree, Metrics]]:
        logits, updated = model.apply({"params": params, "batch_stats": batch_stats}, inputs, train=True,
                                      mutable=["batch_stats"], rngs={"dropout": key})
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        sums = {"loss": cross_entropy * len(labels), "count": jnp.asarray(len(labels), jnp.float32),
                "correct": jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)}
        return cross_entropy, (updated["batch_stats"], sums)

    differentiate = jax.grad(loss, has_aux=True)
    if grad_accumulation_steps == 1:
        gradient, (batch_stats, batch) = differentiate(state.params, state.batch_stats, inputs, labels, dropout)
    else:
        def add_part(carry: Any, part: Any) -> tuple[Any, None]:
            batch_stats, sums = carry
            gradient, (batch_stats, batch) = differentiate(state.params, batch_stats, *part[:2],
                                                           jax.random.fold_in(dropout, part[2]))
            return (batch_stats, jax.tree.map(jnp.add, sums, (gradient, batch))), None

        # Part i has the images i, i + grad_accumulation_steps, …, so that no image changes its device.
        parts = [jax.lax.with_sharding_constraint(
            jnp.swapaxes(array.reshape(-1, grad_accumulation_steps, *array.shape[1:]), 0, 1),
            NamedSharding(batch_sharding.mesh, PartitionSpec(None, *batch_sharding.spec)))
            for array in (inputs, labels)]
        zeros = jax.tree.map(jnp.zeros_like, (state.params, state.totals))
        # A loop on CPU runs convolutions 15 times slower (resnet20-s16u1-double); unrolled, it saves no memory there.
        (batch_stats, (summed, batch)), _ = jax.lax.scan(
            add_part, (state.batch_stats, zeros), (*parts, jnp.arange(grad_accumulation_steps)),
            unroll=jax.default_backend() == "cpu")
        gradient = jax.tree.map(lambda leaf: leaf / grad_accumulation_steps, summed)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    first = state.step % steps_per_epoch == 0
    totals = jax.tree.map(lambda total, new: jnp.where(first, new, total + new), state.totals, batch)
    norms = {"gradient_norm": _norm(gradient), "parameter_norm": _norm(params)}
    return TrainState(state.step + 1, params, batch_stats, opt_state, totals), {**totals, **norms}


def _norm(tree: Tree) -> Array:
    """Returns the norm of all leaves together, joined first: a sum for each of them takes long to compile."""
    return jnp.linalg.norm(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]))


