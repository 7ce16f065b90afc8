"""Subclasses of Orbax components with modified behaviour."""

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
    """Disables Orbax's own preemption checks, which `shared_basis.runtime.preemption` replaces.

    JAX synchronises preemption on the numbers of such checks: all processes stop at an agreed one after the latest.
    Orbax numbers them by step, also from the thread that finishes a save; with both, the agreed one may never come.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False."""
        return False


@dataclasses.dataclass
class LatestEvaluated(preservation_policy.PreservationPolicy):
    """Keeps the latest `n` checkpoints that were evaluated or are initial, rather than saved in between."""

    n: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns whether to keep each of `checkpoints`, sorted by step."""
        evaluated = [info.step for info in checkpoints if info.metrics is not None or info.step == 0]
        return [info.step in evaluated[-self.n:] for info in checkpoints]


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Waits for all concurrent reads to finish before it raises.

    If one array cannot be read, Orbax leaves the other reads to threads, which print tracebacks once their event loop
    is closed.
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
    """Returns whether a checkpoint is complete: on disk by its final name, in a bucket by its commit file."""
    return bool(ocp.utils.is_checkpoint_finalized(os.fspath(checkpoint)))


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns the handler for trees of arrays, such as a training state."""
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler())))
