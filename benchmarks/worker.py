"""A fresh process for one measurement: `python -m benchmarks.worker REQUEST`, from the repository's root.

The request is JSON with a task, one of `TASKS`, and the fields of a `Case`. The answer is the last line, also JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Timed, make_step
from shared_basis.runtime.memory import Memory

STEPS = 3
"""Number of steps after which the memory of a process is read."""


def device(_: Case | None = None) -> dict[str, Any]:
    """Returns the platform's name in JAX, a description of the devices, and their number."""
    import jax

    devices = jax.devices()
    cores = f", {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    count = f"{len(devices)} × " if len(devices) > 1 else ""
    return {"platform": devices[0].platform, "device": f"{count}{devices[0].device_kind}{cores}",
            "devices": len(devices)}


def compiling(case: Case) -> dict[str, Any]:
    """Returns the seconds for tracing, lowering and compiling the step, and for all before it except loading images.

    JAX reports the time per function; the step is the one that took longest.
    """
    import jax.monitoring

    seconds: defaultdict[str, float] = defaultdict(float)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds[str(kwargs["fun_name"]).removeprefix("jit(").removesuffix(")")] += duration_secs
    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    make_step(case)
    return {"build": time.perf_counter() - began, "step": max(seconds.values())}


def memory(case: Case) -> dict[str, Any]:
    """Returns bytes: the process's peak, the memory of its imports, the step by XLA, and the device's peak if known."""
    import jax

    imported = resident_bytes("VmRSS")
    made = make_step(case)
    made.run(STEPS)
    statistics = jax.devices()[0].memory_stats() or {}
    return {"peak": resident_bytes("VmHWM"), "imported": imported, "program": without_images(made.program.memory),
            "device": statistics.get("peak_bytes_in_use")}


def pytorch_memory(case: Case) -> dict[str, Any]:
    """Returns the same for PyTorch in channels_last, which has no analysis of a program."""
    from benchmarks.pytorch_trainer import make_trainer

    imported = resident_bytes("VmRSS")
    trainer = make_trainer(case, "channels_last" if case.dtype == "float32" else "channels_last bf16")
    trainer.run(STEPS)
    return {"peak": resident_bytes("VmHWM"), "imported": imported, "program": None, "device": trainer.peak_bytes()}


def timing(case: Case) -> dict[str, Any]:
    """Returns the seconds per step, and its bytes per device by XLA."""
    made = make_step(case)
    return {"seconds": Timed(made.run)(), "program": without_images(made.program.memory)}


def without_images(memory: Memory) -> int:
    """Returns the bytes of parameters, optimizer and step, excluding the random images."""
    return memory.total - memory.data


def resident_bytes(field: str) -> int:
    """Returns the current ('VmRSS') or peak ('VmHWM') resident memory of this process; without Linux always the peak.

    Does not use getrusage, which on Linux starts with the memory of the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


TASKS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "device": device, "compiling": compiling, "memory": memory, "pytorch memory": pytorch_memory, "timing": timing}


def main() -> None:
    """Answers the request of the command line."""
    request = json.loads(sys.argv[1])
    case = Case(**request["case"]) if request["case"] else None
    print(json.dumps(TASKS[request["task"]](case)))


if __name__ == "__main__":
    main()
