"""Parts of Orbax that behave otherwise than its own."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy


class Manager(ocp.CheckpointManager):
    """Does not ask JAX whether to stop, as `shared_basis.runtime.preemption` does.

    JAX agrees on the number of a question at which all processes are told to stop, from the last number it was asked.
    Orbax asks by steps, from the thread that ends a save too: with both, it can be a number that never comes again.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False."""
        return False


@dataclasses.dataclass
class LatestEvaluated(preservation_policy.PreservationPolicy):
    """Keeps the latest `n` checkpoints that were evaluated, or that the run began with: not those saved in between."""

    n: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns whether each of `checkpoints`, by rising step, is kept."""
        evaluated = [info.step for info in checkpoints if info.metrics is not None or info.step == 0]
        return [info.step in evaluated[-self.n:] for info in checkpoints]


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Ends no read before all that began with it have ended.

    Where one array cannot be read, Orbax leaves the reads of the others to threads, which print tracebacks once the
    event loop that they report to is closed.
    """

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
        """Reads arrays."""
        return await _with_all_it_began(super().deserialize(infos, args))

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Reads shapes and dtypes."""
        return await _with_all_it_began(super().metadata(infos))


async def _with_all_it_began(work: Awaitable[Sequence[Any]]) -> Sequence[Any]:
    before = asyncio.all_tasks()
    try:
        return await work
    finally:
        if left := asyncio.all_tasks() - before:
            await asyncio.wait(left)


def is_finished(checkpoint: os.PathLike[str]) -> bool:
    """Returns whether the save of a checkpoint was finished: on a disk by renaming it, in a bucket by its last file."""
    return bool(ocp.utils.is_checkpoint_finalized(os.fspath(checkpoint)))


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns what reads a tree of arrays, such as a training state."""
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler())))
