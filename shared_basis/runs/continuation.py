"""Checks which configuration changes are allowed when a run resumes: those that do not affect past steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from shared_basis.config import ADJUSTABLE_FIELDS, SCHEDULE_FIELDS, Config, differences
from shared_basis.errors import UserError
from shared_basis.optim.optimizer import learning_rate_schedule

Changes = dict[str, tuple[Any, Any]]
"""New and old value of each changed field, keyed by dotted path."""


def settled_from(config: Config, then: Config) -> dict[str, Any]:
    """Returns the fields, by dotted path, that `config` leaves open and the run `then` has settled."""
    fields: dict[str, Any] = {}
    if not config.data.is_measured and then.data.is_measured:
        fields |= {"data.mean": then.data.mean, "data.std": then.data.std}
    if not config.train.batch_size and then.train.batch_size:
        fields["train.batch_size"] = then.train.batch_size
    return fields


def require_continuation(path: PurePath, now: Config, then: Config, examples: int, step: int) -> None:
    """Checks that the run `then` in `path`, trained for `step` steps, can resume with the configuration `now`.

    `ADJUSTABLE_FIELDS` may differ, as may `SCHEDULE_FIELDS` if the learning rates of all past steps are the same, and
    fields that `then` left open. Fields that `now` leaves open keep their settled values.

    Args:
      examples: the number of training images.

    Raises:
      UserError: another field differs, or `now` has fewer epochs than were already trained.
    """
    # A teacher may have moved; whether it is the same is checked by the digest of its weights (`Workdir.require`).
    moved = ("distillation.teacher",) if now.distillation.teacher and then.distillation.teacher else ()
    changes = {field: values for field, values in differences(now, then).items()
               if field not in (*ADJUSTABLE_FIELDS, *moved, *settled_from(then, now), *settled_from(now, then))}
    if changes.keys() - set(SCHEDULE_FIELDS):
        raise UserError(f"workdir {path} holds a run with another configuration ({render(changes)}); choose another "
                        f"--workdir, or use the same values. To start a new run from its weights, add "
                        f"--init={path} and another --workdir to the command.")
    if not changes or not step:
        return
    per_epoch = max(1, examples // max(1, then.train.batch_size))
    if now.train.epochs * per_epoch < step:
        raise UserError(f"train.epochs={now.train.epochs}: the run in {path} has trained {step / per_epoch:g} epochs "
                        "already; give at least as many, or choose another --workdir.")
    if not np.array_equal(past_rates(now, per_epoch, step), past_rates(then, per_epoch, step)):
        raise UserError(f"workdir {path} holds a run with another configuration ({render(changes)}): {_why(now, then)}"
                        f", so that the first {step} steps would have had other learning rates. Use the same values"
                        f"{_kept(now, then)}; or start a new run from these weights: add --init={path} and another "
                        "--workdir to the command.")


def past_rates(config: Config, steps_per_epoch: int, steps: int) -> np.ndarray:
    """Returns the learning rates, float32 `[steps]`, of the first `steps` steps."""
    schedule = learning_rate_schedule(config.optimizer, config.train.epochs, steps_per_epoch)
    return np.broadcast_to(np.asarray(schedule(np.arange(steps, dtype=np.int32)), np.float32), steps)


def render(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns the differing fields as text for a message."""
    return "; ".join(f"{path}: {now!r} now, {then!r} there" for path, (now, then) in changes.items())


def _why(now: Config, then: Config) -> str:
    """Returns the reason why the learning rates of past steps differ."""
    if "cosine" in (now.optimizer.schedule, then.optimizer.schedule):
        return "the cosine schedule falls to 0 at the last epoch"
    if now.optimizer.boundaries and now.optimizer.boundaries == then.optimizer.boundaries:
        return f"the boundaries {now.optimizer.boundaries} are fractions of the run"
    return "the schedule differs"


def _kept(now: Config, then: Config) -> str:
    """Returns the part of a message with the flag that keeps fractional boundaries at their previous epochs."""
    epochs = then.optimizer.boundary_epochs(then.train.epochs)
    if now.optimizer.boundaries != then.optimizer.boundaries or now.optimizer.schedule != "piecewise" or not (
            epochs and epochs != then.optimizer.boundaries and 1 <= epochs[-1] < now.train.epochs):
        return ""
    return f", or these boundaries in epochs: --config.optimizer.boundaries='({','.join(map(str, epochs))},)'"
