"""Exact evaluation: every image is scored once."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import Config, DataConfig, replace
from shared_basis.data import feeds
from shared_basis.data.feeds import Inputs
from shared_basis.errors import UserError
from shared_basis.models import Network, create_model
from shared_basis.models.parameters import abstract_variables
from shared_basis.nn import ops
from shared_basis.runs.checkpoints import Checkpoints, chosen_on
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import agreed, make_mesh, replicated
from shared_basis.runtime.reporter import Screen
from shared_basis.training.steps import Metrics, eval_step, normalize

Variables = Mapping[str, Any]


def build_model(config: Config, spec: data.Spec) -> Network:
    """Returns the network of `config` for data of `spec`.

    Raises:
      UserError: as `create_model`, or the normalisation does not fit the channels of the images.
    """
    channels = spec.image_shape[2]
    for field in ("mean", "std"):
        values = getattr(config.data, field)
        if len(values) not in (1, channels):
            raise UserError(f"data.{field}={values}: the images have {channels} channel{'s' * (channels > 1)}; give "
                            "one value, or one for each channel.")
    return create_model(config.model.name, num_classes=len(spec.classes), stem=config.model.stem,
                        dtype=jnp.dtype(config.model.dtype),
                        loop={"auto": None, "yes": True, "no": False}[config.model.loop])


class Evaluator(Protocol):
    """Scores variables; tells `between` after each batch how many images are scored."""

    def __call__(self, variables: Variables, between: Callable[[int], None] = ...) -> dict[str, float]:
        """See `make_evaluator`."""


def make_evaluator(model: nn.Module, config: DataConfig, batches: Callable[[], Iterable[Inputs]],
                   mesh: Mesh) -> Evaluator:
    """Returns a function that scores variables (`params`, `batch_stats`) on all images of `batches`.

    It returns `loss` (mean cross entropy), `accuracy`, `accuracy_top5` (both in [0, 1]) and `count`, over the images
    whose label is not −1 (see `shared_basis.data.feeds.Images.batches`).
    """
    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=ops.compiler_options())
    def step(variables: Variables, images: jax.Array, labels: jax.Array) -> Metrics:
        return eval_step(variables, images, labels, model=model, data=config)

    def evaluator(variables: Variables, between: Callable[[int], None] = lambda scored: None) -> dict[str, float]:
        # Fetched one by one: several collectives in flight can deadlock virtual CPU devices. Added in float64 on the
        # host, so that counts stay exact and the batch size does not show in the loss.
        total: dict[str, float] = defaultdict(float)
        for images, labels in batches():
            for name, value in jax.device_get(step(variables, images, labels)).items():
                total[name] += float(value)
            between(int(total["count"]))
        count = total["count"]
        if not count:
            raise UserError("none of the images to be scored can be decoded.")
        return {"loss": total["loss"] / count, "accuracy": total["correct"] / count,
                "accuracy_top5": total["correct_top5"] / count, "count": count}

    return evaluator


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network: a checkpoint of a run, with its variables on the devices."""

    run: Workdir
    config: Config
    """The run's, with what the caller overrides."""
    spec: data.Spec
    mesh: Mesh
    checkpoints: Checkpoints
    step: int
    """Of the checkpoint."""
    model: Network
    variables: Variables
    """`params` and `batch_stats`."""

    @classmethod
    def open(cls, workdir: str | Path, which: str = "latest", overrides: Mapping[str, Any] | None = None) -> Trained:
        """Restores the checkpoint `which` ('latest', 'best' or the number of a step) of the run in `workdir`.

        Args:
          overrides: fields of the run's configuration to replace by dotted path: those of `data`, where the images lie
            elsewhere now, and `train.eval_batch_size`.

        Raises:
          UserError: no such run or checkpoint, or it is damaged or of another network, or other overrides.
        """
        run = Workdir(workdir)
        config, record = run.load()
        for path in overrides or {}:
            if not path.startswith("data.") and path != "train.eval_batch_size":
                raise UserError(f"--config.{path} cannot be changed for the trained run in {run.path}; only fields of "
                                "data, and train.eval_batch_size, can.")
        config = replace(config, overrides or {})
        mesh = make_mesh()
        with memory.explained(config, "train.eval_batch_size"):
            checkpoints = Checkpoints(run.checkpoints, read_only=True)
            step = checkpoints.find(which)
            spec = data.Spec(tuple(record["data"]["image_shape"]), tuple(record["data"]["classes"]))
            model = build_model(config, spec)
            variables = _restore(checkpoints, step, model, spec, mesh)
        return cls(run, config, spec, mesh, checkpoints, step, model, variables)

    def at(self, step: int) -> Trained:
        """Restores another checkpoint of the same run.

        Raises:
          UserError: it is damaged.
        """
        variables = _restore(self.checkpoints, step, self.model, self.spec, self.mesh)
        return dataclasses.replace(self, step=step, variables=variables)

    def open_source(self) -> data.Source:
        """Opens the run's test images, which must have its classes and shape."""
        return data.open_source(self.config.data, ("test",), self.spec)

    def classifier(self) -> Callable[[jax.Array], jax.Array]:
        """Returns the compiled function from images uint8 `[N, H, W, C]` to logits float32 `[N, classes]`."""
        @functools.partial(jax.jit, out_shardings=replicated(self.mesh), compiler_options=ops.compiler_options())
        def classify(variables: Variables, images: jax.Array) -> jax.Array:
            logits: Any = self.model.apply(variables, normalize(images, self.config.data), train=False)
            return logits

        return functools.partial(classify, self.variables)


def _restore(checkpoints: Checkpoints, step: int, model: Network, spec: data.Spec, mesh: Mesh) -> Variables:
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
                          dict(abstract_variables(model, spec.image_shape)))
    return checkpoints.restore_variables(step, target)


def evaluate(workdir: str | Path, which: str = "latest", overrides: Mapping[str, Any] | None = None,
             screen: Screen | None = None) -> dict[str, Any]:
    """Scores a checkpoint of `workdir` on the test images.

    Args:
      which, overrides: as in `Trained.open`.
      screen: is told of the images and of the progress; None for none.

    Returns:
      `workdir`, `step`, `model`, `test_loss`, `test_accuracy`, `test_accuracy_top5`, `test_examples`, and `chosen_on`:
      the images that 'best' was chosen on, 'validation' or 'test' (the published protocol), and None otherwise.

    Raises:
      UserError: as `Trained.open`, or other data than the run was trained for.
    """
    screen = screen or Screen(verbosity="quiet")
    with agreed():
        trained = Trained.open(workdir, which, overrides)
    config, mesh = trained.config, trained.mesh
    with memory.explained(config, "train.eval_batch_size"):
        with agreed():
            source = trained.open_source()
        with agreed():  # apart, as processes settle something in it
            images = feeds.load(source, config.data, mesh, screen)
        evaluator = make_evaluator(trained.model, config.data,
                                   images.batches("test", config.train.eval_batch_size, mesh), mesh)
        show = screen.counting("scoring test images")
        scores = evaluator(trained.variables, lambda scored: show(scored, images.count("test")))
        screen.end_progress()  # where broken images were left out it has not come to its end
    return {"workdir": str(trained.run.path), "step": trained.step, "model": config.model.name,
            "test_loss": scores["loss"], "test_accuracy": scores["accuracy"],
            "test_accuracy_top5": scores["accuracy_top5"], "test_examples": int(scores["count"]),
            "chosen_on": chosen_on(trained.checkpoints.metrics(trained.step) or {}) if which == "best" else None}


def render(result: Mapping[str, Any]) -> str:
    """Returns `evaluate`'s result as a line for a person."""
    chosen = {None: "", "validation": " (best validation epoch)",
              "test": " (best test epoch, the published protocol, which is chosen on these very images)"}[
                  result["chosen_on"]]
    return (f"{result['model']} at step {result['step']:,} of {result['workdir']}{chosen}: test accuracy "
            f"{100 * result['test_accuracy']:.2f} %, top-5 {100 * result['test_accuracy_top5']:.2f} %, loss "
            f"{result['test_loss']:.4f}, on {result['test_examples']:,} images")
