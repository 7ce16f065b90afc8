"""The compiled functions of training, and the initial state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from shared_basis.config import Config
from shared_basis.data import feeds
from shared_basis.evaluation.evaluator import Evaluator, Metrics, make_evaluator
from shared_basis.models import Network
from shared_basis.nn import ops
from shared_basis.nn.types import Tree
from shared_basis.optim.optimizer import Descent, learning_rate_schedule, make_optimizer
from shared_basis.optim.penalty import orthogonality_diagnostics
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import batch_sharding, platform_of, raise_on_all_processes, replicated
from shared_basis.training.composition import Own, compose
from shared_basis.training.steps import TrainState, create_train_state, start_from, train_step
from shared_basis.training.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run and the metadata that the loop needs."""

    step: Callable[..., tuple[TrainState, Metrics]]
    """Maps the state and the inputs of a step to the next state and the metrics of the epoch so far."""
    batches: Callable[[int], Generator[feeds.Inputs, None, None]]
    """Yields the inputs of each step, starting with the given step."""
    evaluate: Mapping[str, Evaluator]
    """The evaluators by split: 'test', and 'validation' if it exists."""
    diagnose: Callable[[Tree], dict[str, jax.Array]]
    """Maps parameters to the penalty and the norms of the bases; empty for a network without bases."""
    schedule: optax.Schedule
    """Maps the step, counted from 0, to the learning rate."""
    steps_per_epoch: int
    memory: memory.Memory
    """The memory of one device."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """The functions of training before compilation. With streamed images, the devices of the mesh need not exist."""

    feed: feeds.Feed
    schedule: optax.Schedule
    """Maps the step, counted from 0, to the learning rate."""
    steps_per_epoch: int
    seed: np.int32
    """An argument of the compiled functions, so that they can be reused for all seeds."""
    create: Any
    """Jitted: maps the seed to the initial state."""
    step: Any
    """Jitted: maps the state, the seed, `teacher` and the inputs of a step to the next state and the metrics of the
    epoch so far."""
    teacher: Tree
    """The variables of the teacher; None without a teacher."""
    state: TrainState
    """The shapes, dtypes and shardings of the state."""
    diagnose: Callable[[Tree], dict[str, jax.Array]]
    """See `Program`; not jitted."""

    def trace(self) -> Any:
        """Returns the traced step for the mesh; `trace().lower().compile()` is the training program."""
        return self.step.trace(self.state, self.seed, self.teacher, *self.feed.abstract)


def define(config: Config, images: feeds.Images, model: Network, mesh: Mesh, teacher: Teacher | None = None,
           own: Own | None = None) -> Definition:
    """Returns the uncompiled functions of a run, after placing resident images on the devices.

    Args:
      teacher: the teacher for distillation, if any.
      own: user-supplied functions that replace those of `config`.
    """
    steps_per_epoch = images.count("train") // config.train.batch_size
    basis_groups = model.basis_groups(config.orthogonality.elements)
    schedule = learning_rate_schedule(config.optimizer, config.train.epochs, steps_per_epoch)
    own = own or Own()
    optimizer = make_optimizer(config, basis_groups, schedule, steps_per_epoch, own.optimizer)
    functions = compose(config, model, len(images.spec.classes), optimizer, teacher, own)
    everywhere = replicated(mesh)
    feed = images.feed(config, mesh)

    def diagnose(params: Tree) -> dict[str, jax.Array]:
        return orthogonality_diagnostics(params, basis_groups) if basis_groups else {}

    @ops.jit_for(platform_of(mesh), quick=True, out_shardings=everywhere)
    def create(seed: jax.Array) -> TrainState:
        return create_train_state(model, optimizer, seed, images.spec.image_shape, averaged=config.train.ema_decay > 0)

    @ops.jit_for(platform_of(mesh), donate_argnums=() if debugging_nans() else 0, out_shardings=everywhere)
    def step(state: TrainState, seed: jax.Array, known: Tree, *inputs: jax.Array) -> tuple[TrainState, Metrics]:
        new, metrics = train_step(
            state, *feed.select(state.step, *inputs), known, functions=functions, seed=seed,
            steps_per_epoch=steps_per_epoch, batch_sharding=batch_sharding(mesh),
            grad_accumulation_steps=config.optimizer.grad_accumulation_steps)
        return new, {**metrics, **diagnose(state.params)}

    seed = np.int32(config.seed)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), create.eval_shape(seed))
    return Definition(feed, schedule, steps_per_epoch, seed, create, step, teacher and teacher.variables, state,
                      diagnose)


def first_state(config: Config, model: Network, variables: Tree, descent: Descent | None = None) -> TrainState:
    """Returns the initial state of a run of `config`, or with the optimizer `descent`, with the arrays `variables`."""
    # The optimizer state does not depend on the schedule, which would need the number of images.
    optimizer = make_optimizer(config, model.basis_groups(config.orthogonality.elements), optax.constant_schedule(0.0),
                               descent=descent)
    return start_from(variables, optimizer, averaged=config.train.ema_decay > 0)


def build(config: Config, images: feeds.Images, model: Network, mesh: Mesh, checkpoints: Checkpoints,
          teacher: Teacher | None = None, own: Own | None = None) -> tuple[TrainState, Program]:
    """Places the data, compiles the step, and returns the latest saved state, or a new one, with the program.

    Args:
      teacher, own: see `define`.

    Raises:
      UserError: no checkpoint can be restored, or the devices do not have enough memory.
    """
    defined = define(config, images, model, mesh, teacher, own)
    lowered, seed = defined.trace().lower(), defined.seed
    with ThreadPoolExecutor() as threads:  # XLA compiles without the GIL
        creating = None if checkpoints.steps else threads.submit(defined.create.lower(seed).compile)
        compiled = lowered.compile()
    needed = memory.measure(defined.state, images.bytes_on_device(defined.feed, mesh), compiled,
                            defined.teacher)
    with raise_on_all_processes():
        memory.check(needed, config, mesh)
    run = defined.step if debugging_nans() else compiled
    evaluators = {
        name: make_evaluator(model, config.data, images.batches(name, config.train.eval_batch_size, mesh), mesh)
        for name in images.splits if name != "train"}
    program = Program(step=lambda state, *inputs: run(state, seed, defined.teacher, *inputs),
                      batches=defined.feed.batches, evaluate=evaluators, diagnose=jax.jit(defined.diagnose),
                      schedule=defined.schedule, steps_per_epoch=defined.steps_per_epoch, memory=needed)
    return checkpoints.restore_latest(defined.state) if creating is None else creating.result()(seed), program


def debugging_nans() -> bool:
    """Returns whether JAX repeats a step that produces NaN, operation by operation (--debug_nans)."""
    return jax.config.jax_debug_nans  # type: ignore[attr-defined]
