"""The trainer's own step, alone and within the training loop, for `speed` and `data`."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.common import Measure
from shared_basis.config import Config, replace
from shared_basis.data.feeds import Images
from shared_basis.models import Network
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.trained import build_model
from shared_basis.runs.workdir import Workdir, make_record
from shared_basis.runtime.distributed import make_mesh, replicated
from shared_basis.runtime.preemption import StopSignals
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.loop import Training
from shared_basis.training.program import Program
from shared_basis.training.program import build as build_program


def build(config: Config, images: Images, model: Network, mesh: Mesh, root: Path) -> tuple[Any, Program]:
    """Returns the initial state and the trainer's compiled program; `root` is for its checkpoints."""
    with contextlib.closing(Checkpoints(root)) as checkpoints:
        return build_program(config, images, model, mesh, checkpoints)


class BareStep:
    """The trainer's compiled step, called repeatedly on one batch, starting from the initial state."""

    def __init__(self, state: Any, program: Program, mesh: Mesh) -> None:
        self.program, self._mesh = program, mesh
        self._inputs = next(program.batches(0))
        self._beginning = jax.device_get(state)  # steps donate their input state

    def state(self) -> Any:
        """Returns the initial state on the devices."""
        return jax.device_put(self._beginning, replicated(self._mesh))

    def run(self, steps: int) -> float:
        """Returns the seconds per step, excluding the first one."""
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
    """Returns functions that train two epochs and return images per second: 'bare', only the step, and by placement.

    Args:
      load: returns the images of a configuration.
      placements: values of `data.placement`; the loop is measured with each, the step only with the first.
      root: an empty directory, for workdirs.
    """
    mesh, numbers = make_mesh(), iter(range(10**6))
    steps = {}
    for placement in placements:
        placed = _two_epochs(config, placement)
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


def _two_epochs(config: Config, placement: str) -> Config:
    """Returns `config` for two epochs with a single evaluation, and the given `placement` of images."""
    return replace(config, {"data.placement": placement, "train.epochs": 2, "train.evaluate_every": 2})
