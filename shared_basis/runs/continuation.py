"""What a run may change when it goes on: what leaves the steps that are trained as they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from shared_basis.config import ADJUSTABLE_FIELDS, SCHEDULE_FIELDS, Config, differences
from shared_basis.errors import UserError
from shared_basis.optim.optimizer import learning_rate_schedule

Changes = dict[str, tuple[Any, Any]]
"""By dotted path, the value of a field now and then."""


def settled_from(config: Config, then: Config) -> dict[str, Any]:
    """Returns by dotted path the fields that `config` leaves open and the run `then` has settled."""
    fields: dict[str, Any] = {}
    if not config.data.is_measured and then.data.is_measured:
        fields |= {"data.mean": then.data.mean, "data.std": then.data.std}
    if not config.train.batch_size and then.train.batch_size:
        fields["train.batch_size"] = then.train.batch_size
    return fields


def require_continuation(path: PurePath, now: Config, then: Config, examples: int, step: int) -> None:
    """Makes sure that the run `then` in `path`, trained for `step` steps, can go on as `now`.

    `ADJUSTABLE_FIELDS` may differ, `SCHEDULE_FIELDS` where the learning rate of each past step is the same, and what
    `then` has left open; what `now` leaves open is as it was.

    Args:
      examples: the number of training images.

    Raises:
      UserError: something else differs, or fewer epochs are wanted than are trained.
    """
    changes = {field: values for field, values in differences(now, then).items()
               if field not in (*ADJUSTABLE_FIELDS, *settled_from(then, now), *settled_from(now, then))}
    if changes.keys() - set(SCHEDULE_FIELDS):
        raise UserError(f"workdir {path} holds a run of another configuration ({render(changes)}); choose another "
                        f"--workdir, or the same values. A new run begins from the weights of this one with "
                        f"--init={path} and another --workdir.")
    if not changes or not step:
        return
    per_epoch = max(1, examples // max(1, then.train.batch_size))
    if now.train.epochs * per_epoch < step:
        raise UserError(f"train.epochs={now.train.epochs}: the run in {path} has trained {step / per_epoch:g} epochs "
                        "already; give at least as many, or choose another --workdir.")
    if not np.array_equal(past_rates(now, per_epoch, step), past_rates(then, per_epoch, step)):
        raise UserError(f"workdir {path} holds a run of another configuration ({render(changes)}): {_why(now, then)}, "
                        f"so that {step} steps would have been trained at other learning rates. Give the same values"
                        f"{_kept(now, then)}; or begin a new run from these weights with --init={path} and another "
                        "--workdir.")


def past_rates(config: Config, steps_per_epoch: int, steps: int) -> np.ndarray:
    """Returns the learning rates float32 `[steps]` of the first `steps`."""
    schedule = learning_rate_schedule(config.optimizer, config.train.epochs, steps_per_epoch)
    return np.broadcast_to(np.asarray(schedule(np.arange(steps, dtype=np.int32)), np.float32), steps)


def render(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns what differs, for a message."""
    return "; ".join(f"{path}: {now!r} now, {then!r} there" for path, (now, then) in changes.items())


def _why(now: Config, then: Config) -> str:
    """Returns why the learning rates of the past differ."""
    if "cosine" in (now.optimizer.schedule, then.optimizer.schedule):
        return "the cosine schedule falls to 0 at the last epoch"
    if now.optimizer.boundaries and now.optimizer.boundaries == then.optimizer.boundaries:
        return f"the boundaries {now.optimizer.boundaries} are parts of the run"
    return "the schedule is another"


def _kept(now: Config, then: Config) -> str:
    """Returns the flag, as a part of a message, by which boundaries that are parts of the run stay where they were."""
    epochs = then.optimizer.boundary_epochs(then.train.epochs)
    if now.optimizer.boundaries != then.optimizer.boundaries or now.optimizer.schedule != "piecewise" or not (
            epochs and epochs != then.optimizer.boundaries and 1 <= epochs[-1] < now.train.epochs):
        return ""
    return f", or these boundaries in epochs: --config.optimizer.boundaries='({','.join(map(str, epochs))},)'"
