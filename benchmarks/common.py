"""What the benchmarks have in common: measuring in turns, tables, sections of README.md, options, the trainer."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:  # JAX is imported by what needs it: benchmarks/data.py measures the memory of a process without it
    from jax.sharding import Mesh

    from shared_basis.config import Config
    from shared_basis.data.feeds import Images
    from shared_basis.models import Network
    from shared_basis.training.program import Program

README = Path(__file__).parent / "README.md"

Table = list[list[str]]
Measure = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """Ends at a mistake with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser`."""
        self.exit(2, f"error: {message}\n")

    def end_with(self, run: Callable[..., Result], *arguments: Any) -> Result:
        """Returns what `run` returns; a `UserError` is a mistake in the arguments."""
        from shared_basis.errors import UserError  # imports JAX, which some benchmarks prepare for first

        try:
            return run(*arguments)
        except UserError as error:
            self.error(str(error))


def names(text: str, choices: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names in a list with commas; raises argparse's error for one that is none of `choices`, or none."""
    given = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in given if choices and name not in choices]
    if unknown or not given:
        known = f"; choose from {', '.join(choices)}" if choices else ""
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown)) or 'nothing'} given{known}")
    return given


def positive(text: str) -> int:
    """Returns a whole number from 1 to 999,999; raises argparse's error for any other text."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def in_turns(subjects: Mapping[Key, Measure], rounds: int) -> dict[Key, list[float]]:
    """Returns what each subject returns, `rounds` times, called in turns."""
    values: dict[Key, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, measure in subjects.items():
            values[name].append(measure())
    return values


def medians(values: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Returns the median of each subject's values."""
    return {name: statistics.median(part) for name, part in values.items()}


def markdown(table: Table) -> str:
    """Returns a table in Markdown, numbers to the right."""
    head, *rows = table
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those `packages` that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine(packages: Iterable[str]) -> str:
    """Returns the day, and what is measured on."""
    named = (f"{name} {version}" for name, version in versions(packages).items())
    return (f"{datetime.date.today().isoformat()}, {os.cpu_count()} cores ({platform.machine()}), Python "
            f"{platform.python_version()}, {', '.join(named)}")


def replace_section(path: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between the marks `begin` and `end` of a file."""
    before, _, rest = path.read_text().partition(begin)
    path.write_text(before + begin + text + end + rest.partition(end)[2])


def build(config: Config, images: Images, model: Network, mesh: Mesh, root: Path) -> tuple[Any, Program]:
    """Returns the state before the first step, and the trainer's compiled program; `root` is for its checkpoints."""
    from shared_basis.runs.checkpoints import Checkpoints
    from shared_basis.training import program

    with contextlib.closing(Checkpoints(root)) as checkpoints:
        return program.build(config, images, model, mesh, checkpoints)


class BareStep:
    """The trainer's compiled step, called on one batch again and again, from the beginning of training each time."""

    def __init__(self, state: Any, program: Program, mesh: Mesh) -> None:
        import jax

        self.program, self._mesh = program, mesh
        self._inputs = next(program.batches(0))
        self._beginning = jax.device_get(state)  # steps donate the state they are given

    def state(self) -> Any:
        """Returns the state before the first step, on the devices."""
        import jax

        from shared_basis.runtime.distributed import replicated
        return jax.device_put(self._beginning, replicated(self._mesh))

    def run(self, steps: int) -> float:
        """Returns the seconds that a step takes, without the first one."""
        import jax

        # Several steps in flight can deadlock virtual devices that outnumber the cores.
        virtual = self._mesh.size > 1 and self._mesh.devices.flat[0].platform == "cpu"
        state, _ = self.program.step(self.state(), *self._inputs)
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(steps):
            state, _ = self.program.step(state, *self._inputs)
            if virtual:
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / steps


def trainers(config: Config, load: Callable[[Config, Mesh], Images], placements: Sequence[str],
             root: Path) -> dict[str, Measure]:
    """Returns functions that train two epochs and return images per second: 'bare', the step alone, and by placement.

    Args:
      load: returns the images of a configuration.
      placements: of `data.placement`; the training loop is measured with each, the step alone with the first.
      root: an empty directory, for workdirs.
    """
    from shared_basis.runs.checkpoints import Checkpoints
    from shared_basis.runs.trained import build_model
    from shared_basis.runs.workdir import Workdir, make_record
    from shared_basis.runtime.distributed import make_mesh
    from shared_basis.runtime.preemption import StopSignals
    from shared_basis.runtime.reporter import Reporter
    from shared_basis.training.loop import Training

    mesh, numbers = make_mesh(), iter(range(10**6))
    steps = {}
    for placement in placements:
        placed = replace_placement(config, placement)
        images = load(placed, mesh)
        steps[placement] = placed, BareStep(
            *build(placed, images, build_model(placed, images.spec), mesh, root / f"compiled-{placement}"), mesh)

    def bare() -> float:
        _, step = steps[placements[0]]
        return config.train.batch_size / step.run(2 * step.program.steps_per_epoch)

    def whole(placement: str) -> Measure:
        def measure() -> float:
            placed, step = steps[placement]
            workdir = Workdir(root / str(next(numbers)))
            workdir.claim(make_record(placed, {"classes": [], "image_shape": []}))
            checkpoints = Checkpoints(workdir.checkpoints)
            with StopSignals() as signals:
                Training(placed, step.program, workdir, checkpoints, {}, Reporter(io.StringIO()),
                               signals).loop(step.state())
            checkpoints.close()
            return workdir.metrics()[-1]["images_per_second"]
        return measure
    return {"bare": bare, **{placement: whole(placement) for placement in placements}}


def replace_placement(config: Config, placement: str) -> Config:
    """Returns `config` for two epochs that are evaluated once, with images that wait in `placement`."""
    from shared_basis.config import replace

    return replace(config, {"data.placement": placement, "train.epochs": 2, "train.evaluate_every": 2})
