"""What the record of gradients' norms (`train.record_gradients`) takes of a step, and of its compilation.

    python -m benchmarks.recording [--network=resnet32-s16u1-double] [--batch=64] [--rounds=9] [--steps=8]

measures the step with the record and without it in turns, and writes the median of the rounds' ratios, of wall time and
of the process's CPU time, which neighbours on a shared machine disturb less, to docs/analysis.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import machine, replace_section

PAGE = Path(__file__).parents[1] / "docs" / "analysis.md"

Times = tuple[float, float]
"""Seconds of wall time, and of CPU time."""


def timed(function: Callable[[], object]) -> Times:
    """Returns what calling `function` takes."""
    wall, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - used


def ratios(without: list[Times], recording: list[Times]) -> str:
    """Returns the medians of the rounds' ratios as text."""
    wall, used = (statistics.median(a[i] / b[i] for a, b in zip(recording, without, strict=True)) for i in (0, 1))
    return f"{wall:.3f} times the wall time and {used:.3f} times the CPU time (medians of {len(without)} rounds)"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet32-s16u1-double")
    for name, default in (("batch", 64), ("rounds", 9), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the first import of JAX reads it

    from benchmarks.cases import Case, make_step
    case = Case(arguments.network, arguments.batch)
    made = {recording: make_step(case, train__record_gradients=recording) for recording in (False, True)}

    steps: dict[bool, list[Times]] = {False: [], True: []}
    compilations: dict[bool, list[Times]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for recording, step in made.items():
            steps[recording].append(timed(lambda step=step: step.run(arguments.steps)))  # type: ignore[misc]
    for _ in range(3):
        for recording in made:
            compilations[recording].append(timed(lambda recording=recording: make_step(  # type: ignore[misc]
                case, train__record_gradients=recording)))
    text = (f"{arguments.network}, batches of {arguments.batch}; {machine(('jax', 'jaxlib'))}: a step with the record "
            f"takes {ratios(steps[False], steps[True])} of one without; compiling it and initialisation takes "
            f"{ratios(compilations[False], compilations[True])}.")
    print(text)
    replace_section(PAGE, "<!-- recording -->\n", "<!-- end of recording -->\n", f"{text}\n")


if __name__ == "__main__":
    main()
