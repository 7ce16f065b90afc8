"""Devices and processes: the mesh, shardings, and communication between processes.

Parameters are replicated on every device; batches are sharded over all devices of all processes. Process 0 writes.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
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
"""Timeout for processes to connect at the start; the processes of a job may start at different times."""

PARTING_SECONDS = 2
"""Time that the first process waits after a common failure, since JAX aborts the others once it exits."""

HEARTBEAT_SECONDS = 60
"""Time without a heartbeat after which a process counts as lost, and JAX ends the others."""

CACHE_BYTES = 2**30
"""Maximum size of the cache of compiled programs; the least recently used ones are removed first."""


@contextlib.contextmanager
def jax_runtime(distributed: bool, coordinator: str | None, processes: int | None, process: int | None,
                debug_nans: bool) -> Iterator[None]:
    """Starts JAX and, if `distributed` or any of the next three is set, joins a multi-process computation.

    Errors of several processes begin with the process number. The caller prints only in the first process.

    Args:
      debug_nans: makes JAX locate the operation that produces the first NaN.

    Raises:
      UserError: see `join`; or there are no devices.
    """
    if debug_nans:
        jax.config.update("jax_debug_nans", True)
    keep_compiled_programs()
    if distributed or not coordinator is processes is process is None:
        join(coordinator, processes, process)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # unknown platform, or an accelerator in use
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
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not is_failure_of_xla(error):
            raise
        raise UserError(f"process {jax.process_index()}: another process was lost ({' '.join(str(error).split())[:150]}"
                        "). Start all of them again, with the same commands.") from error
    except KeyboardInterrupt as interrupt:
        if not is_main_process():  # only the first process prints the message
            raise SystemExit(getattr(interrupt, "exit_code", 130)) from interrupt
        raise


def keep_compiled_programs() -> None:
    """Makes JAX cache compiled programs in the user's cache directory, unless `JAX_COMPILATION_CACHE_DIR` is set.

    The cache is per machine, since CPU programs use its specific instructions and home directories may be shared.
    Without a writable directory, nothing is cached.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # an empty value disables caching
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
    """Makes this process part of a multi-process computation.

    Args:
      coordinator: HOST:PORT of process 0. If None, as for the other arguments, JAX auto-detects it: on TPU pods, under
        SLURM, Open MPI and Kubernetes.
      processes: the number of processes.
      process: the index of this process, starting from 0.

    Raises:
      UserError: detection fails, or the arguments are inconsistent. If the other processes do not connect in time, this
        process exits with a message and code 2, as there is nothing to save yet.
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
    where = f"at {coordinator}" if coordinator else "at the address given by the cluster"
    jax.config.update("jax_enable_preemption_service", True)  # `StopSignals` asks it after every step
    timer = threading.Timer(JOINING_SECONDS, _give_up, (where, processes))  # JAX itself would end with a stack trace
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
    """Raises `UserError` if this process, which must be the first, cannot listen on the coordinator's port."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise UserError(f"--coordinator={coordinator}: process 0 cannot listen on port {port} ({error.strerror}); "
                        "choose another port for all processes.") from error


def _give_up(where: str, processes: int | None) -> None:
    number = f"the {processes} processes" if processes else "the processes of this job"
    sys.stderr.write(f"error: {number} could not connect {where} within {JOINING_SECONDS} seconds; start all of "
                     "them, each with its own --process, and make that address reachable.\n")
    sys.stderr.flush()
    os._exit(2)


def is_failure_of_xla(error: Exception) -> bool:
    """Returns whether `error` is a failure of XLA at run time, such as a collective after the loss of a process.

    JAX raises `JaxRuntimeError` for these, and for some a ValueError with the status in front of its text.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or re.match("[A-Z_]{5,}: ", str(error)) is not None


def is_main_process() -> bool:
    """Returns whether this process is the one that prints and writes, process 0."""
    return jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Makes a `UserError` in this context end all processes: the others raise after the one that failed.

    All processes must enter it together; otherwise the remaining ones would wait for the failed one forever.
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
    """Gathers one number from each process and returns all of them, `[processes]`, in every process."""
    return np.atleast_1d(multihost_utils.process_allgather(np.asarray(value)))


def from_main_process(text: str) -> str:
    """Broadcasts the text of the first process and returns it in all processes."""
    if jax.process_count() == 1:
        return text
    size = int(process_allgather(len(text.encode()))[0])
    mine = np.frombuffer(text.encode(), np.uint8) if is_main_process() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8)).decode() if size else ""


def make_mesh() -> Mesh:
    """Returns a mesh with one axis, 'data', over all devices of all processes.

    Devices are grouped by process, so that its part of a batch is contiguous; TPU device ids are not in this order.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def platform_of(mesh: Mesh) -> str:
    """Returns the platform of the devices of `mesh`: 'cpu', 'gpu' or 'tpu'."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch whose first axis is divided among all devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def make_global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns `array`, of which every process has a copy, as a global array with the given sharding."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])  # no communication


def check_batch_size(batch_size: int, mesh: Mesh, grad_accumulation_steps: int = 1, norm_images: int = 0) -> None:
    """Raises `UserError`, with the nearest valid sizes, unless micro-batches divide evenly among the devices.

    Args:
      norm_images: as in the configuration; only for the sizes.
    """
    if batch_size % (mesh.size * grad_accumulation_steps):
        divisor = math.lcm(mesh.size, norm_images or 1) * grad_accumulation_steps
        below = batch_size // divisor * divisor
        sizes = " or ".join(str(size) for size in (below, below + divisor) if size)
        parts = (f" times optimizer.grad_accumulation_steps={grad_accumulation_steps}" if grad_accumulation_steps > 1
                 else "")
        raise UserError(f"train.batch_size={batch_size}: must be a multiple of the {mesh.size} devices{parts}; the "
                        f"nearest: {sizes}. A run that has begun keeps its size: resume it on a number of devices that "
                        "divides it.")
