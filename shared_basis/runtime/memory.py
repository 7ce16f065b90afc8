"""Device memory of a run, estimated before its first step, and advice on how to reduce it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from shared_basis.config import Config
from shared_basis.errors import UserError
from shared_basis.runtime.distributed import is_failure_of_xla
from shared_basis.runtime.reporter import size_text


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    parameters: int
    """Parameters and batch statistics, their moving averages, and those of a teacher."""
    optimizer: int
    data: int
    """Resident images of all splits, or the batches of a stream."""
    step: int
    """Temporary memory of the compiled step: activations and gradients, by XLA's analysis."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.parameters + self.optimizer + self.data + self.step

    def render(self) -> str:
        """Returns a human-readable line."""
        return (f"memory per device: {size_text(self.parameters)} for parameters, {size_text(self.optimizer)} for "
                f"the optimizer, {size_text(self.data)} for data; {size_text(self.total)} with the step at its peak")


def bytes_on_device(tree: Any) -> int:
    """Returns the bytes on one device of the arrays in `tree`, which must have shardings."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def measure(state: Any, data: int, compiled: Any, teacher: Any = None) -> Memory:
    """Returns the memory of a training state (arrays, or abstract ones with shardings), `data` and the compiled step.

    Args:
      teacher: other variables that the step reads.
    """
    variables = state.replace(step=None, opt_state=None, totals=None)
    parameters = bytes_on_device((variables, teacher))
    analysis = compiled.memory_analysis()  # for one device; None if the backend has none
    step = 0 if analysis is None else int(
        analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    return Memory(parameters, bytes_on_device(state.opt_state), data, step)


def check(memory: Memory, config: Config, mesh: Mesh, available: Callable[[], int | None] | None = None) -> None:
    """Raises `UserError`, with advice, if the devices have less than `memory`, before training starts.

    Args:
      available: returns the free bytes of this machine; `available_memory` if None.
    """
    device = mesh.local_mesh.devices.flat[0]
    if device.platform == "cpu":  # all devices of this process share the memory
        free, copies = (available or available_memory)(), mesh.local_mesh.size
        free = None if free is None else free + memory.data * copies  # already allocated
    else:
        free, copies = (device.memory_stats() or {}).get("bytes_limit"), 1
    if free is not None and memory.total * copies > free:
        times = f" × {copies} devices" if copies > 1 else ""
        raise UserError(f"out of memory: {memory.render()}{times}, of {size_text(free)}. "
                        f"{advice(config, memory)}")


def advice(config: Config, needed: Memory | None = None, batch: str = "train.batch_size") -> str:
    """Returns which fields to reduce; if the memory `needed` is known, only those of its largest part."""
    data = "set --config.data.placement=stream"
    step = f"set a smaller --config.{batch}, or a smaller --config.data.image_size"
    if jax.default_backend() != "cpu" and batch == "train.batch_size":
        parts = 2 * config.optimizer.grad_accumulation_steps
        step = f"set --config.optimizer.grad_accumulation_steps={parts} or more, {step[4:]}"
    if needed is None:
        return f"To reduce it, {step}, or {data}."
    return f"The largest part is {'the images: ' + data if needed.data > needed.step else 'the step: ' + step}."


@contextlib.contextmanager
def oom_as_user_error(config: Config, batch: str = "train.batch_size",
                      saved: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Converts failed allocations, and the loss of another process, to `UserError`.

    Args:
      batch: the field for the number of images computed at once.
      saved: returns a sentence on the saved checkpoints for the message.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, ValueError) as error:
        if not isinstance(error, MemoryError) and not is_failure_of_xla(error):
            raise
        text = " ".join(str(error).split())[:150] or type(error).__name__
        if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
            raise UserError(f"out of memory ({text}). {advice(config, batch=batch)}{saved()}") from error
        if jax.process_count() > 1:
            raise UserError(f"another process was lost ({text}).{saved()} Start all of them again, with the same "
                            "commands.") from error
        raise


def available_memory() -> int | None:
    """Returns the bytes of memory available without swapping; the total if only that is known; or None."""
    free = [value for value in (_free_in_system(), _free_in_cgroup()) if value is not None]
    return min(free, default=None)


def _free_in_system() -> int | None:
    try:  # sysconf's free pages exclude the reclaimable file cache
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _free_in_cgroup() -> int | None:
    """Returns the bytes left of a container's limit, counting its file cache as free; None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = next(int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines()
                     if line.startswith("inactive_file "))
        return None if limit == "max" else max(0, int(limit) - int(used) + cache)
    except (OSError, ValueError, StopIteration):
        return None
