"""The training step and its state: pure functions, compiled by the caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from shared_basis.evaluation.evaluator import Metrics
from shared_basis.models.parameters import init_variables
from shared_basis.nn import ops
from shared_basis.nn.types import Array, Tree
from shared_basis.training.losses import Targets


class TrainState(struct.PyTreeNode):
    """The state of training. The batch and its augmentation are functions of the seed and `step`."""

    step: Array
    """Number of updates so far, int32."""
    params: Tree
    batch_stats: Tree
    """Running statistics; empty for a network without batch normalisation."""
    opt_state: optax.OptState
    totals: Metrics
    """Sums over the images of the current epoch so far: `loss` (without penalty and weight decay), `correct` and
    `count`, float32."""

    @property
    def scored(self) -> Tree:
        """The variables to evaluate."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class AveragedState(TrainState):
    """A state with a moving average of its variables."""

    averaged: Tree
    """The averages of `params` and `batch_stats`."""

    @property
    def scored(self) -> Tree:
        """The averages, which are evaluated instead of the variables."""
        return self.averaged


@dataclasses.dataclass(frozen=True)
class Functions:
    """The pure functions that make up a step; see `shared_basis.training.composition`."""

    augment: Callable[[Array, Array], Array]
    """Augmentation: maps images uint8 `[N, H, W, C]` and a key to images."""
    mix: Callable[[Array, Array, Array], tuple[Array, Array]]
    """Mixing: maps images, classes int32 `[N]` and a key to images and classes or probabilities `[N, classes]`."""
    normalize: Callable[[Array], Array]
    """Preprocessing: maps images to the network's inputs."""
    teach: Callable[[Tree, Array], Array | None]
    """Maps the teacher's variables and images to its logits; None without a teacher."""
    forward: Callable[[Tree, Tree, Array, Array], tuple[Array, Tree]]
    """Maps parameters, batch statistics, inputs and the dropout key to logits and new statistics."""
    loss: Callable[[Array, Targets], Array]
    """Maps logits and targets to the loss of each image, `[N]`."""
    optimizer: optax.GradientTransformation
    finish: Callable[[TrainState], TrainState]
    """Maps the new state to the state with updated averages."""


def create_train_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int | Array,
                       image_shape: tuple[int, int, int], averaged: bool = False) -> TrainState:
    """Returns the initial state from `seed`, for images `[H, W, C]`."""
    return start_from(init_variables(model, jax.random.key(seed), image_shape), optimizer, averaged)


def start_from(variables: Tree, optimizer: optax.GradientTransformation, averaged: bool = False) -> TrainState:
    """Returns the initial state with given `variables` (`params` and, if any, `batch_stats`).

    Args:
      averaged: whether the state contains moving averages, which are initialised to the variables.
    """
    params = variables["params"]
    totals = {name: jnp.zeros(()) for name in ("loss", "correct", "count")}
    state = TrainState(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}), optimizer.init(params),
                       totals)
    # Copies, as the step donates the arrays of the state.
    return AveragedState(**vars(state), averaged=jax.tree.map(jnp.copy, state.scored)) if averaged else state


def train_step(state: TrainState, images: Array, labels: Array, teacher: Tree = None, *, functions: Functions,
               seed: int | Array, steps_per_epoch: int, batch_sharding: NamedSharding,
               grad_accumulation_steps: int = 1) -> tuple[TrainState, Metrics]:
    """Performs one update, with augmentation determined by `seed` and `state.step`.

    Args:
      images: the batch, uint8 `[B, H, W, C]`.
      labels: its classes, int32 `[B]`.
      teacher: the variables of the teacher.
      batch_sharding: the sharding of the batch; batch statistics cover the whole batch.
      grad_accumulation_steps: the number of micro-batches, whose gradients are computed one after another and averaged.
        The result equals the gradient of the whole batch except for batch normalisation, which uses the statistics of
        each micro-batch and updates its running statistics once for each, and for the random numbers of dropout.

    Returns:
      The new state and a copy of its `totals`, which stays readable after the state is donated, plus `gradient_norm`,
      the global norm of the loss's gradient, and `parameter_norm`, the global norm of the new parameters.
    """
    pixels = functions.augment(images, _stream(seed, 1, state.step))
    pixels, labels = functions.mix(pixels, labels, _stream(seed, 3, state.step))
    inputs = jax.lax.with_sharding_constraint(functions.normalize(pixels), batch_sharding)
    targets = Targets(labels, functions.teach(teacher, pixels))
    dropout = _stream(seed, 2, state.step)

    def loss(params: Tree, batch_stats: Tree, inputs: Array, targets: Targets, key: Array) -> Any:
        """Returns the mean loss and, as auxiliary output, running statistics and the sums of `TrainState.totals`."""
        logits, batch_stats = functions.forward(params, batch_stats, inputs, key)
        mean, count = functions.loss(logits, targets).mean(), len(inputs)
        return mean, (batch_stats, {"loss": mean * count, "count": jnp.asarray(count, jnp.float32),
                                    "correct": targets.hits(logits)})

    differentiate = jax.grad(loss, has_aux=True)
    if grad_accumulation_steps == 1:
        gradient, (batch_stats, sums) = differentiate(state.params, state.batch_stats, inputs, targets, dropout)
    else:
        gradient, (batch_stats, sums) = _accumulate(differentiate, state, (inputs, targets), dropout,
                                                    grad_accumulation_steps, batch_sharding)
    updates, opt_state = functions.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    first = state.step % steps_per_epoch == 0
    totals = jax.tree.map(lambda total, new: jnp.where(first, new, total + new), state.totals, sums)
    norms = {"gradient_norm": _norm(gradient), "parameter_norm": _norm(params)}
    new = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, totals=totals)
    return functions.finish(new), {**totals, **norms}


def _stream(seed: int | Array, stream: int, index: int | Array) -> Array:
    """Returns key number `index` of an independent stream of the seed (1: augmentation, 2: dropout, 3: mixing)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)


def _accumulate(differentiate: Callable[..., tuple[Tree, tuple[Tree, Metrics]]], state: TrainState, batch: Tree,
                dropout: Array, steps: int, batch_sharding: NamedSharding) -> Any:
    """Returns the result of `differentiate` for the whole batch, accumulated over `steps` micro-batches."""
    def add_part(carry: Any, part: Any) -> tuple[Any, None]:
        batch_stats, totals = carry
        (inputs, targets), index = part
        gradient, (batch_stats, sums) = differentiate(state.params, batch_stats, inputs, targets,
                                                      jax.random.fold_in(dropout, index))
        return (batch_stats, jax.tree.map(jnp.add, totals, (gradient, sums))), None

    # Micro-batch i has the images i, i + steps, …, so that no image moves to another device.
    parts = jax.tree.map(lambda array: jax.lax.with_sharding_constraint(
        jnp.swapaxes(array.reshape(-1, steps, *array.shape[1:]), 0, 1),
        NamedSharding(batch_sharding.mesh, PartitionSpec(None, *batch_sharding.spec))), batch)
    zeros = jax.tree.map(jnp.zeros_like, (state.params, state.totals))
    # On CPU, convolutions in a loop run 15 times slower (resnet20-s16u1-double); unrolling would not save memory.
    (batch_stats, (gradient, sums)), _ = jax.lax.scan(
        add_part, (state.batch_stats, zeros), (parts, jnp.arange(steps)), unroll=ops.use_cpu_forms())
    return jax.tree.map(lambda leaf: leaf / steps, gradient), (batch_stats, sums)


def _norm(tree: Tree) -> Array:
    """Returns the global norm of all leaves, concatenated first, since one reduction per leaf is slow to compile."""
    return jnp.linalg.norm(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]))
