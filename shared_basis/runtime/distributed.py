"""Devices and processes: the mesh, what lies where on it, and how processes agree.

Parameters lie on every device, batches are divided among all devices of all processes. One process, the first, writes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shared_basis.errors import UserError
from shared_basis.runtime.files import first_line

JOINING_SECONDS = 300
"""How long processes wait for one another at the start; those of one job do not start at once."""

PARTING_SECONDS = 2
"""What the first process leaves to the others, where all fail together: JAX ends them harshly once it is gone."""

HEARTBEAT_SECONDS = 60
"""After this time without a sign of life a process counts as lost, and JAX ends the others."""

CACHE_BYTES = 2**30
"""Compiled programs that are kept; the least recently used ones go first."""


@contextlib.contextmanager
def jax_runtime(distributed: bool, coordinator: str | None, processes: int | None, process: int | None,
                debug_nans: bool) -> Iterator[None]:
    """Starts JAX: within this context this process is one of several, if `distributed` or any of the next three is set.

    Errors of several processes begin with the number of the process. Their caller prints in the first one alone.

    Args:
      debug_nans: has JAX look for the operation that gives the first NaN.

    Raises:
      UserError: as `join`, or there are no devices.
    """
    if debug_nans:
        jax.config.update("jax_debug_nans", True)
    keep_compiled_programs()
    if distributed or not coordinator is processes is process is None:
        join(coordinator, processes, process)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # no such platform, or an accelerator that is in use
        reason = first_line(error) if str(error) else f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}"
        raise UserError(f"JAX cannot use the devices: {reason}; check that no other process uses them, or unset "
                        "JAX_PLATFORMS.") from error
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        if is_main_process():
            time.sleep(PARTING_SECONDS)
        raise UserError(f"process {jax.process_index()}: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise UserError(f"process {jax.process_index()}: another process was lost ({' '.join(str(error).split())[:150]}"
                        "). Start all of them again, with the same commands.") from error
    except KeyboardInterrupt as interrupt:
        if not is_main_process():  # the first process prints what there is to say
            raise SystemExit(getattr(interrupt, "exit_code", 130)) from interrupt
        raise


def keep_compiled_programs() -> None:
    """Has JAX keep compiled programs in the user's cache directory, unless `JAX_COMPILATION_CACHE_DIR` is set.

    They are kept by machine, as on CPU they hold its own instructions, and home directories may be shared. Where
    nothing can be written, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # an empty one turns it off
        return
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = os.path.join(root, "shared_basis", f"{platform.node() or 'host'}-{platform.machine()}")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError:
        return
    if not os.access(directory, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several that train together.

    Args:
      coordinator: HOST:PORT of process 0. With None, and also for the others, JAX auto-detects them: on TPU pods,
        under SLURM, Open MPI and Kubernetes.
      processes: the number of processes.
      process: the number of this one, from 0 on.

    Raises:
      UserError: nothing is detected, or the arguments do not fit. Where the others do not come in time, the process
        ends with a message and exit code 2, as nothing can be saved.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator={coordinator}: must be HOST:PORT of process 0, e.g. 10.0.0.1:8476.")
    if processes is not None and processes < 1:
        raise UserError(f"--processes={processes}: must be 1 or more.")
    if process is not None and (process < 0 or processes is None or process >= processes):
        raise UserError(f"--process={process}: must be 0 to {'--processes' if processes is None else processes} − 1.")
    if process == 0 and coordinator is not None:
        _check_port(coordinator)
    where = f"at {coordinator}" if coordinator else "as the cluster says"
    jax.config.update("jax_enable_preemption_service", True)  # `StopSignals` asks it after every step
    timer = threading.Timer(JOINING_SECONDS, _give_up, (where, processes))  # JAX itself ends with a stack trace
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                                   initialization_timeout=2 * JOINING_SECONDS)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise UserError(f"--distributed: the processes could not be auto-detected ({first_line(error)}). TPU pods, "
                        "SLURM, Open MPI and Kubernetes are recognised; elsewhere give --coordinator=HOST:PORT "
                        "--processes=N --process=I.") from error
    finally:
        timer.cancel()


def _check_port(coordinator: str) -> None:
    """Raises `UserError` if this process, the first, cannot listen on the coordinator's port."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise UserError(f"--coordinator={coordinator}: process 0 cannot listen on port {port} ({error.strerror}); "
                        "choose another one, for all processes.") from error


def _give_up(where: str, processes: int | None) -> None:
    number = f"the {processes} processes" if processes else "the processes of this job"
    sys.stderr.write(f"error: {number} did not find one another {where} within {JOINING_SECONDS} seconds: start all of "
                     "them, each with its own --process, and let them reach that address.\n")
    sys.stderr.flush()
    os._exit(2)


def is_main_process() -> bool:
    """Returns whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Ends in all processes, or in none: where one raises `UserError` in this context, the others do so after it.

    All processes must enter it together; otherwise those that go on would wait for the one that has failed.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    failed = np.flatnonzero(process_allgather(failure is not None))
    if failure is not None:
        raise failure
    if len(failed):
        raise UserError(f"process {failed[0]} has stopped with an error; see its output.")


def process_allgather(value: Any) -> np.ndarray:
    """Returns a number that each process gives, for all of them, `[processes]`."""
    return np.atleast_1d(multihost_utils.process_allgather(np.asarray(value)))


def from_main_process(text: str) -> str:
    """Returns in all processes the text that the first one gives."""
    if jax.process_count() == 1:
        return text
    size = int(process_allgather(len(text.encode()))[0])
    mine = np.frombuffer(text.encode(), np.uint8) if is_main_process() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8)).decode() if size else ""


def make_mesh() -> Mesh:
    """Returns a mesh of one axis, 'data', over all devices of all processes.

    The devices of a process follow one another, so that its part of a batch is one piece; on TPU their numbers do not.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def platform_of(mesh: Mesh) -> str:
    """Returns what programs for the devices of `mesh` are compiled for: 'cpu', 'gpu' or 'tpu'."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch whose first axis is divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def make_global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns `array`, which every process has whole, as one that lies on the devices as `sharding` says."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])  # sends nothing around


def check_batch_size(batch_size: int, mesh: Mesh, grad_accumulation_steps: int = 1) -> None:
    """Raises `UserError`, with the nearest sizes, unless every part of a batch divides evenly among the devices."""
    divisor = mesh.size * grad_accumulation_steps
    if batch_size % divisor:
        below = batch_size // divisor * divisor
        sizes = " or ".join(str(size) for size in (below, below + divisor) if size)
        parts = (f" times optimizer.grad_accumulation_steps={grad_accumulation_steps}" if grad_accumulation_steps > 1
                 else "")
        raise UserError(f"train.batch_size={batch_size}: must be a multiple of the {mesh.size} devices{parts}; the "
                        f"nearest: {sizes}.")
