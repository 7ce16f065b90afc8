"""Composes the functions of a training step from a configuration, a teacher, and user-supplied functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from shared_basis.config import Config
from shared_basis.data.augment import augment, normalize
from shared_basis.data.mixing import make_mix
from shared_basis.errors import UserError
from shared_basis.models import Network
from shared_basis.models.parameters import abstract_variables
from shared_basis.nn.types import Array, Tree
from shared_basis.optim.find import find_groups
from shared_basis.optim.optimizer import Descent, make_optimizer
from shared_basis.optim.paths import leaves_by_path
from shared_basis.optim.select import frozen
from shared_basis.runs.trained import predict_logits
from shared_basis.training.losses import Loss, checked_loss, cross_entropy, make_loss
from shared_basis.training.steps import AveragedState, Functions, TrainState
from shared_basis.training.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Own:
    """User-supplied functions; None selects the configured ones. See `shared_basis.train`."""

    optimizer: Descent | None = None
    loss: Loss | None = None
    augment: Callable[[Array, Array], Array] | None = None

    def names(self) -> dict[str, str]:
        """Returns the names of the supplied functions, for the record of a run."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _name(function) for name, function in given.items() if function is not None}


def _name(function: Any) -> str:
    """Returns module and name of a function, of the function inside a `functools.partial`, or of a class."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def check_optimizer(config: Config, model: Network, image_shape: tuple[int, int, int], own: Own) -> None:
    """Checks the optimizer of `config` against the network's parameters, before anything is compiled or written.

    Raises:
      UserError: a pattern of `config` matches no parameter, all parameters are frozen, or only a part of arrays that
        are kept exactly orthonormal.
      TypeError: the user's optimizer is not an optax transformation.
    """
    given, exact = config.train, config.orthogonality.method == "exact"
    if not (given.freeze or config.optimizer.learning_rate_factors or own.optimizer or exact):
        return  # nothing to check, which saves a second of tracing
    params = abstract_variables(model, image_shape)["params"]
    is_frozen = frozen(params, given.freeze)
    if not given.freeze_epochs and all(jax.tree.leaves(is_frozen)):
        raise UserError(f"train.freeze={given.freeze!r}: freezes all parameters; exclude e.g. the head, "
                        "as in **,!head/**, or set --config.train.freeze_epochs.")
    if exact:
        _require_whole_groups(config, model, params, is_frozen)
    optimizer = make_optimizer(config, model.basis_groups(config.orthogonality.elements),
                               optax.constant_schedule(0.0), descent=own.optimizer)
    jax.eval_shape(lambda params: optimizer.update(params, optimizer.init(params), params), params)


def _require_whole_groups(config: Config, model: Network, params: Tree, is_frozen: Tree) -> None:
    """Raises `UserError` if frozen arrays would have to follow others that exact orthogonality moves.

    Shared elements move together and unique ones follow them, so that only unique ones can be trained on their own, and
    only if the shared ones stay frozen: until then their discarded steps would still turn the unique ones.
    """
    frozen_at = leaves_by_path(is_frozen)
    for group in find_groups(params, model.basis_groups(config.orthogonality.elements)):
        held = {frozen_at[path]: "/".join(path) for path in group.paths}
        together = group.paths if config.train.freeze_epochs or not frozen_at[group.shared[0]] else group.shared
        if len({frozen_at[path] for path in together}) > 1:
            raise UserError(
                f"train.freeze={config.train.freeze!r}: freezes {held[True]} and trains {held[False]}, which "
                "orthogonality.method=exact moves together; freeze the whole group, or none of it, or set "
                "--config.orthogonality.method=penalty.")


def compose(config: Config, model: nn.Module, num_classes: int, optimizer: optax.GradientTransformation,
            teacher: Teacher | None = None, own: Own | None = None) -> Functions:
    """Returns the functions that `train_step` needs."""
    own = own or Own()
    return Functions(
        augment=functools.partial(augment, config=config.data) if own.augment is None else _checked(own.augment),
        mix=make_mix(config.train, num_classes, probabilities=own.loss is not None),
        normalize=functools.partial(normalize, config=config.data),
        teach=(lambda variables, images: None) if teacher is None else (
            lambda variables, images: predict_logits(teacher.model, variables, images, teacher.data)),
        forward=_forward(config, model),
        loss=make_loss(config.distillation, cross_entropy if own.loss is None else checked_loss(own.loss)),
        optimizer=optimizer,
        finish=functools.partial(move_averages, decay=config.train.ema_decay) if config.train.ema_decay else (
            lambda state: state))


def _forward(config: Config, model: nn.Module) -> Callable[[Tree, Tree, Array, Array], tuple[Array, Tree]]:
    given = config.train

    def hold(params: Tree) -> Tree:
        """Stops the gradient of parameters that are never trained."""
        if not given.freeze or given.freeze_epochs:
            return params
        return jax.tree.map(lambda leaf, fixed: jax.lax.stop_gradient(leaf) if fixed else leaf, params,
                            frozen(params, given.freeze))

    def forward(params: Tree, batch_stats: Tree, inputs: Array, key: Array) -> tuple[Array, Tree]:
        def apply(images: Array, key: Array) -> tuple[Array, Tree]:
            logits, updated = model.apply({"params": hold(params), "batch_stats": batch_stats}, images,
                                          train=not given.freeze_statistics, mutable=["batch_stats"],
                                          rngs={"dropout": key})
            return logits, updated["batch_stats"]
        return _by_groups(apply, config.model.norm_images or len(inputs), inputs, key)

    return forward


def _by_groups(apply: Callable[[Array, Array], tuple[Array, Tree]], size: int, inputs: Array,
               key: Array) -> tuple[Array, Tree]:
    """Returns logits and new running statistics, treating each `size` consecutive images as a separate batch."""
    if size == len(inputs):
        return apply(inputs, key)
    groups = inputs.reshape(-1, size, *inputs.shape[1:])
    logits, moved = jax.vmap(apply)(groups, jax.random.split(key, len(groups)))
    return logits.reshape(len(inputs), -1), jax.tree.map(lambda x: jnp.mean(x, 0).astype(x.dtype), moved)


def _checked(own: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Returns the user's augmentation, wrapped to raise a ValueError if it changes the shape of the batch."""
    def augmented(images: Array, key: Array) -> Array:
        result = own(images, key)
        if jnp.shape(result) != images.shape:
            raise ValueError(f"augment must return images of the input shape {images.shape}; it returned "
                             f"{jnp.shape(result)}")
        return result
    return augmented


def move_averages(state: TrainState, decay: float) -> TrainState:
    """Updates the moving averages of a state: d · averages + (1 − d) · variables.

    d is min(decay, (1 + t) / (10 + t)) at update t, counted from 1. Non-floating-point values are copied.
    """
    assert isinstance(state, AveragedState)
    kept = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def move(new: Array, average: Array) -> Array:
        return optax.incremental_update(new, average, 1 - kept) if jnp.issubdtype(new.dtype, jnp.floating) else new
    return state.replace(averaged=jax.tree.map(move, variables, state.averaged))
