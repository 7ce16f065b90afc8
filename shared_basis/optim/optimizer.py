"""The learning rate schedule and the optax chain."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import optax

from shared_basis.config import OptimizerConfig, OrthogonalityConfig
from shared_basis.nn.types import Tree
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.find import find_groups, paths_of
from shared_basis.optim.gradient_norms import record_gradient_norms
from shared_basis.optim.labels import label_parameters
from shared_basis.optim.orthonormal import retraction
from shared_basis.optim.paths import path_of
from shared_basis.optim.penalty import add_orthogonality_penalty


def learning_rate_schedule(config: OptimizerConfig, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made so far.

    Epochs of the configuration become the nearest whole steps; a piecewise rate falls at its boundary step.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.learning_rate, epochs * steps_per_epoch - warmup)
    else:
        boundaries = [round(boundary * steps_per_epoch) - warmup for boundary in config.boundary_epochs(epochs)]
        main = optax.piecewise_constant_schedule(
            config.learning_rate, dict(zip(boundaries, config.factors, strict=True)))
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), main], [warmup])


def make_optimizer(config: OptimizerConfig, orthogonality: OrthogonalityConfig, basis_groups: Sequence[BasisGroup],
                   schedule: optax.Schedule, recorded_steps: int = 0) -> optax.GradientTransformation:
    """Returns the chain: orthogonality penalty, weight decay, SGD with momentum.

    Both additions come before momentum, so that the chain equals descent on cross entropy + weight · penalty
    + ½ weight_decay · ‖decaying parameters‖². With exact orthogonality the chain ends with `retraction` in place of
    the penalty, as in `keep_orthonormal`.

    Args:
      recorded_steps: the steps over which `record_gradient_norms`, before all, averages; 0 leaves it out.
    """
    links = [record_gradient_norms(recorded_steps)] if recorded_steps else []
    if orthogonality.method == "penalty" and orthogonality.weight and basis_groups:
        links.append(add_orthogonality_penalty(orthogonality.weight, basis_groups, orthogonality.reduction))
    exact = basis_groups if orthogonality.method == "exact" else ()

    def decays(params: Tree) -> Tree:
        kept = set(paths_of(find_groups(params, exact))) if exact else set()
        return jax.tree_util.tree_map_with_path(
            lambda entries, label: label in config.weight_decay_labels and path_of(entries) not in kept,
            label_parameters(params))

    if config.weight_decay:
        links.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    links.append(optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov))
    if exact:
        links.append(retraction(exact))
    return optax.chain(*links)
