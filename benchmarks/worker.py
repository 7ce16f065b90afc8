"""A process of its own for what must begin afresh: `python -m benchmarks.worker REQUEST`, from the repository's root.

The request is JSON: a task, one of `TASKS`, and the fields of a `Case`. So is the answer, the last line printed.
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
"""Steps after which the memory of a process is read."""


def device(_: Case | None = None) -> dict[str, Any]:
    """Returns the platform, as JAX calls it, and the devices, human-readable and their number."""
    import jax

    devices = jax.devices()
    cores = f", {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    count = f"{len(devices)} × " if len(devices) > 1 else ""
    return {"platform": devices[0].platform, "device": f"{count}{devices[0].device_kind}{cores}",
            "devices": len(devices)}


def compiling(case: Case) -> dict[str, Any]:
    """Returns seconds: of tracing, lowering and compiling the step, and of all that precedes it once images are there.

    JAX says how long each function took. The step is the one that took longest.
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
    """Returns bytes: the process's peak, what its imports hold, the step's by XLA, and the device's peak if it says."""
    import jax

    imported = resident_bytes("VmRSS")
    made = make_step(case)
    made.run(STEPS)
    statistics = jax.devices()[0].memory_stats() or {}
    return {"peak": resident_bytes("VmHWM"), "imported": imported, "program": without_images(made.program.memory),
            "device": statistics.get("peak_bytes_in_use")}


def pytorch_memory(case: Case) -> dict[str, Any]:
    """Returns the same of PyTorch in channels_last, which has no analysis of a program."""
    from benchmarks.pytorch_trainer import make_trainer

    imported = resident_bytes("VmRSS")
    trainer = make_trainer(case, "channels_last" if case.dtype == "float32" else "channels_last bf16")
    trainer.run(STEPS)
    return {"peak": resident_bytes("VmHWM"), "imported": imported, "program": None, "device": trainer.peak_bytes()}


def timing(case: Case) -> dict[str, Any]:
    """Returns the seconds of a step, and its bytes on each device by XLA."""
    made = make_step(case)
    return {"seconds": Timed(made.run)(), "program": without_images(made.program.memory)}


def without_images(memory: Memory) -> int:
    """Returns the bytes of parameters, optimizer and step: the random images here are not those of a run."""
    return memory.total - memory.data


def resident_bytes(field: str) -> int:
    """Returns the resident memory of this process now ('VmRSS'), or at its peak ('VmHWM'); elsewhere always its peak.

    Not what getrusage says: on Linux that begins with the memory of the process that started this one.
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
