"""What is compiled for training, and the state that it begins with."""

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
from shared_basis.optim.optimizer import learning_rate_schedule, make_optimizer
from shared_basis.optim.penalty import orthogonality_diagnostics
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import batch_sharding, platform_of, raise_on_all_processes, replicated
from shared_basis.training.composition import Own, compose
from shared_basis.training.steps import TrainState, create_train_state, start_from, train_step
from shared_basis.training.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run, and what the loop must know of them."""

    step: Callable[..., tuple[TrainState, Metrics]]
    """From the state and the inputs of a step to the next state and the metrics of the epoch so far."""
    batches: Callable[[int], Generator[feeds.Inputs, None, None]]
    """The inputs of each step, from the given one on."""
    evaluate: Mapping[str, Evaluator]
    """By split: 'test', and 'validation' if there is one."""
    diagnose: Callable[[Tree], dict[str, jax.Array]]
    """From parameters to the penalty and the norms of the bases; nothing for a network without any."""
    schedule: optax.Schedule
    """The learning rate by step, from 0 on."""
    steps_per_epoch: int
    memory: memory.Memory
    """Of one device."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """What is compiled for training, before it is. With streamed images the devices of the mesh need not even exist."""

    feed: feeds.Feed
    schedule: optax.Schedule
    """The learning rate by step, from 0 on."""
    steps_per_epoch: int
    seed: np.int32
    """An argument of the compiled functions, which then serve all seeds."""
    create: Any
    """Jitted: from the seed to the state before the first step."""
    step: Any
    """Jitted: from the state, the seed, `teacher` and the inputs of a step to the next state and the metrics of the
    epoch."""
    teacher: Tree
    """The variables of the teacher, None without one."""
    state: TrainState
    """Shapes, dtypes and shardings of the state."""
    diagnose: Callable[[Tree], dict[str, jax.Array]]
    """See `Program`; not jitted."""

    def trace(self) -> Any:
        """Returns the traced step, for the mesh: `trace().lower().compile()` is the program that trains."""
        return self.step.trace(self.state, self.seed, self.teacher, *self.feed.abstract)


def define(config: Config, images: feeds.Images, model: Network, mesh: Mesh, teacher: Teacher | None = None,
           own: Own | None = None) -> Definition:
    """Returns the functions of a run, of which nothing is compiled yet; resident images are placed on the devices.

    Args:
      teacher: what the network learns from beside the labels.
      own: what the caller brings in place of what `config` says.
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


def first_state(config: Config, model: Network, variables: Tree) -> TrainState:
    """Returns the state before the first step of a run of `config` that starts from `variables`, arrays."""
    # The optimizer's state does not depend on the schedule, which needs the number of images.
    optimizer = make_optimizer(config, model.basis_groups(config.orthogonality.elements), optax.constant_schedule(0.0))
    return start_from(variables, optimizer, averaged=config.train.ema_decay > 0)


def build(config: Config, images: feeds.Images, model: Network, mesh: Mesh, checkpoints: Checkpoints,
          teacher: Teacher | None = None, own: Own | None = None) -> tuple[TrainState, Program]:
    """Places the data, compiles the step, and returns the program with the latest saved state, or a new one.

    Args:
      teacher, own: as in `define`.

    Raises:
      UserError: no checkpoint can be restored, or the devices have not enough memory.
    """
    defined = define(config, images, model, mesh, teacher, own)
    lowered, seed = defined.trace().lower(), defined.seed
    with ThreadPoolExecutor() as threads:  # XLA compiles without Python's lock
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
    """Returns whether JAX repeats a step that gives NaN, operation by operation (--debug_nans)."""
    return jax.config.jax_debug_nans  # type: ignore[attr-defined]
