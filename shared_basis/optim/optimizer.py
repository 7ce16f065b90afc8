"""The learning-rate schedule and the optax chain.

To add a link, define a function here and add it to `LINKS`; each link receives the whole configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax

from shared_basis.config import Config, OptimizerConfig
from shared_basis.nn.types import Array, Tree
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.find import find_groups, paths_of
from shared_basis.optim.gradient_norms import record_gradient_norms
from shared_basis.optim.labels import label_parameters
from shared_basis.optim.orthonormal import retraction
from shared_basis.optim.paths import path_of
from shared_basis.optim.penalty import add_orthogonality_penalty
from shared_basis.optim.select import frozen, rate_factors

Descent = Callable[[optax.Schedule], optax.GradientTransformation]
"""Maps the learning rate to an optax transformation, such as `optax.adam`."""


class Setting(NamedTuple):
    """The information that links may use."""

    config: Config
    basis_groups: Sequence[BasisGroup]
    schedule: optax.Schedule
    steps_per_epoch: int
    descent: Descent | None
    """The user-supplied optimizer, if any."""

    @property
    def exact(self) -> Sequence[BasisGroup]:
        """The groups that are kept exactly orthonormal."""
        return self.basis_groups if self.config.orthogonality.method == "exact" else ()

    def decays(self, params: Tree) -> Tree:
        """Returns a mask like `params` of the parameters with weight decay."""
        kept = set(paths_of(find_groups(params, self.exact))) if self.exact else set()
        labels = self.config.optimizer.weight_decay_labels
        return jax.tree_util.tree_map_with_path(
            lambda entries, label: label in labels and path_of(entries) not in kept, label_parameters(params))


def learning_rate_schedule(config: OptimizerConfig, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made so far.

    Epochs are rounded to whole steps; a piecewise rate changes at its boundary step.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        steps = max(1, epochs * steps_per_epoch - warmup)  # the warm-up may round to the whole run
        main = optax.cosine_decay_schedule(config.learning_rate, steps)
    else:
        falls: dict[int, float] = {}
        for boundary, factor in zip(config.boundary_epochs(epochs), config.factors, strict=True):
            step = round(boundary * steps_per_epoch) - warmup
            falls[step] = falls.get(step, 1.0) * factor  # short runs may have several boundaries at one step
        main = optax.piecewise_constant_schedule(config.learning_rate, falls)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), main], [warmup])


def make_optimizer(config: Config, basis_groups: Sequence[BasisGroup], schedule: optax.Schedule,
                   steps_per_epoch: int = 1, descent: Descent | None = None) -> optax.GradientTransformation:
    """Returns the links of `LINKS` that `config` enables: by default penalty, weight decay, SGD with momentum.

    Penalty and weight decay precede momentum, so the chain equals descent on cross entropy + weight · penalty
    + ½ weight_decay · ‖decaying parameters‖². With exact orthogonality, `retraction` replaces the penalty, as in
    `keep_orthonormal`.

    Args:
      steps_per_epoch: the number of steps in an epoch; the initial state does not depend on it.
      descent: maps the schedule to a transformation that replaces weight decay and `config.optimizer.name`.

    Raises:
      TypeError: `descent` does not return an optax transformation.
    """
    setting = Setting(config, basis_groups, schedule, steps_per_epoch, descent)
    return optax.chain(*(made for link in LINKS if (made := link(setting)) is not None))


def _record(setting: Setting) -> optax.GradientTransformation | None:
    """Averages the norms of the unmodified gradient over an epoch."""
    return record_gradient_norms(setting.steps_per_epoch) if setting.config.train.record_gradients else None


def _penalize(setting: Setting) -> optax.GradientTransformation | None:
    given = setting.config.orthogonality
    if given.method != "penalty" or not given.weight or not setting.basis_groups:
        return None
    return add_orthogonality_penalty(given.weight, setting.basis_groups, given.reduction)


def _decay(setting: Setting) -> optax.GradientTransformation | None:
    """Adds weight decay to the gradient, for sgd; the other optimizers have their own."""
    given = setting.config.optimizer
    coupled = given.weight_decay and given.name == "sgd" and setting.descent is None
    return optax.add_decayed_weights(given.weight_decay, mask=setting.decays) if coupled else None


def _descend(setting: Setting) -> optax.GradientTransformation:
    given, rate = setting.config.optimizer, setting.schedule
    if setting.descent is not None:
        return _own(setting.descent, rate)
    decay = {"weight_decay": given.weight_decay, "mask": setting.decays}
    if given.name == "adamw":
        return optax.adamw(rate, b1=given.momentum, nesterov=given.nesterov, **decay)
    if given.name == "lion":
        return optax.lion(rate, b1=given.momentum, **decay)
    if given.name == "muon":
        return _muon(setting)
    return optax.sgd(rate, momentum=given.momentum, nesterov=given.nesterov)


def _own(descent: Descent, rate: optax.Schedule) -> optax.GradientTransformation:
    made = descent(rate) if callable(descent) else None
    if not isinstance(made, optax.GradientTransformation):
        raise TypeError("optimizer must be a function from the learning-rate schedule to an optax transformation, such "
                        f"as optax.adam or lambda rate: optax.adam(rate, b2=0.95), not {descent!r}")
    return made


def _muon(setting: Setting) -> optax.GradientTransformation:
    """Returns muon for parameters that map channels to channels, and Adam for the head, norms and biases.

    optax only masks the weight decay of muon's own part, so the rate is 1 (with its sign undone) and the decay common.
    """
    def matrices(params: Tree) -> Tree:
        def spec(label: str, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
            inner = label in ("basis", "coefficients") or (label == "kernel" and leaf.ndim > 2)
            return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if inner else None
        return jax.tree.map(spec, label_parameters(params), params)

    given = setting.config.optimizer
    return optax.chain(
        optax.contrib.muon(1.0, beta=given.momentum, adam_b1=given.momentum, nesterov=given.nesterov,
                           muon_weight_dimension_numbers=matrices), optax.scale(-1.0),
        optax.add_decayed_weights(given.weight_decay, mask=setting.decays),
        optax.scale_by_learning_rate(setting.schedule))


def _scale(setting: Setting) -> optax.GradientTransformation | None:
    """Multiplies updates by factors, which is equivalent to multiplying the learning rate."""
    entries = setting.config.optimizer.learning_rate_factors
    if not entries:
        return None
    return optax.stateless(lambda updates, params: jax.tree.map(
        lambda update, factor: update * factor, updates, rate_factors(updates, entries)))


def _retract(setting: Setting) -> optax.GradientTransformation | None:
    return retraction(setting.exact) if setting.exact else None


def _freeze(setting: Setting) -> optax.GradientTransformation | None:
    """The last link, as penalty, weight decay and retraction also change parameters."""
    given = setting.config.train
    if not given.freeze:
        return None
    link = optax.freeze(lambda updates: frozen(updates, given.freeze))
    steps = round(given.freeze_epochs * setting.steps_per_epoch)
    return optax.conditionally_transform(link, lambda step: step < steps) if given.freeze_epochs else link


LINKS: tuple[Callable[[Setting], optax.GradientTransformation | None], ...] = (
    _record, _penalize, _decay, _descend, _scale, _retract, _freeze)
"""The links of the chain in order; links that return None are omitted."""
