"""Collects the data for an analysis: bases, coefficients and gradients of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from shared_basis import data
from shared_basis.analysis import bases
from shared_basis.analysis.bases import BasisSet
from shared_basis.analysis.gradient_flow import gradient_flow, layer_paths
from shared_basis.config import replace
from shared_basis.data import feeds
from shared_basis.data.augment import normalize
from shared_basis.errors import UserError
from shared_basis.models.parameters import init_variables
from shared_basis.nn import ops
from shared_basis.plotting import drawable
from shared_basis.runs.trained import Trained
from shared_basis.runtime import memory
from shared_basis.runtime.files import absolute, as_path
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.settle import settle

Flow = dict[int, dict[str, dict[str, float]]]
"""By step (0 is initialisation), the norms of `blocks` and `parameters` by path, see `gradient_flow`."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The data of one run for tables and plots."""

    label: str
    """The name of the run in plots: that of its directory."""
    model: str
    step: int
    sets: list[BasisSet]
    described: dict[str, list[dict[str, Any]]]
    """The result of `bases.describe_set`, by name of the set."""
    stem: np.ndarray | None
    """The kernel `[k, k, channels, T]` of the layer `stem`, or None."""
    layers: list[str]
    """The paths of all layers, ordered by depth."""
    flow: Flow
    recorded: list[dict[str, Any]]
    """The lines of gradients.jsonl."""
    notes: list[str]
    """What does not apply to this network or run, and the reasons."""

    def drawn_name(self, limit: int = 40) -> str:
        """Returns the run's name for plots: its label, or the model if the font lacks one of its characters."""
        return drawable(self.label, self.model, limit)

    @classmethod
    def of(cls, trained: Trained, reporter: Reporter) -> Analysis:
        """Analyses a checkpoint, and the gradients at all kept checkpoints."""
        trained.require_finite()
        variables = jax.device_get(trained.variables)
        sets = bases.basis_sets(trained.model, variables)
        notes = list(_notes(trained, sets))
        flow: Flow = {}
        try:
            inputs = training_batch(trained, reporter)
        except UserError as error:
            notes.append(f"no gradients at the checkpoints, since the images are not available: {error}")
        else:
            reporter.info("gradients: compiling …")
            flow = flows(trained, *inputs)
            if 0 not in flow:
                notes.append("no gradients at initialisation: the checkpoint with the weights that the run began with "
                             "is no longer kept")
        recorded = trained.run.gradients()
        if not recorded:
            notes.append("no gradients during training: the run did not set --config.train.record_gradients")
        return cls(
            label=as_path(absolute(str(trained.run.path))).name, model=trained.config.model.name, step=trained.step,
            sets=sets, described={found.name: bases.describe_set(found) for found in sets},
            stem=variables["params"].get("stem", {}).get("kernel"),
            layers=["/".join(path) for path in layer_paths(trained.model, trained.spec.image_shape)],
            flow=flow, recorded=recorded, notes=notes)


def _notes(trained: Trained, sets: Sequence[BasisSet]) -> Iterator[str]:
    """Yields a line for each part of the analysis that does not apply to the network."""
    sharing = trained.model.sharing
    if not sets:
        yield "a plain network: it has no bases and no coefficients"
        return
    if sharing.templates:
        yield "templates are not drawn orthonormal and not penalised; coefficients combine whole kernels"
    elif not sharing.orthonormal:
        yield "the shared filters are whole layers (naive recursion), not drawn orthonormal and not penalised"
    elif sharing.whole_filters:
        yield "the shared filters are whole layers: there are no unique elements"
    if sharing.whole_filters:
        yield "no coefficients: the layers share their filters themselves"
    if not any(found.shared for found in sets):
        yield "nothing is shared: coefficients of different layers belong to different elements and are not compared"
    if not all(found.comparable for found in sets):
        yield ("unique elements see other channels than shared ones (channel groups): no products between them, and "
               "the unique elements of each layer are described separately")


def training_batch(trained: Trained, reporter: Reporter) -> tuple[jax.Array, jax.Array]:
    """Returns the run's first batch of training images, normalised, not mirrored or shifted, and its labels.

    With `data.crop=random_resized` it has the random crops of the run's first step.

    Raises:
      UserError: the images cannot be found or read, or are fewer than a batch.
    """
    # Streamed by threads, so that only this batch is read.
    config = replace(trained.config, {"data.placement": "stream", "data.workers": 0})
    source = data.open_source(config.data, ("train",), trained.spec, reporter)
    config = settle(config, source, trained.mesh, reporter)  # a run that is only imported has an open batch size
    feed = feeds.load(source, config.data, trained.mesh, reporter).feed(config, trained.mesh)
    batches = feed.batches(0)
    images, labels = next(batches)
    batches.close()
    reporter.info(f"gradients: on the first {len(labels)} training images")
    return normalize(images, config.data), labels


def flows(trained: Trained, images: jax.Array, labels: jax.Array) -> Flow:
    """Returns the norms of gradients at each kept checkpoint, and at initialisation (step 0) if it is known."""
    flow = gradient_flow(trained.model)

    def initial() -> Any:
        return init_variables(trained.model, jax.random.key(trained.config.seed), trained.spec.image_shape)

    steps = {step: trained.at(step).variables for step in trained.checkpoints.steps}
    # A run with given weights saves them as step 0, which may be removed later; other runs are drawn from the seed.
    if 0 not in steps and trained.run.load()[1]["init"] is None:
        steps[0] = ops.jit_for(jax.default_backend(), quick=True)(initial)()
    with memory.oom_as_user_error(trained.config, "train.batch_size"):
        return {step: dict(zip(("blocks", "parameters"), flow(
            variables["params"], variables["batch_stats"], images, labels), strict=True))
            for step, variables in sorted(steps.items())}
