"""The initial weights of a new run, from another run or a file, fitted to its network and classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import Config
from shared_basis.errors import UserError
from shared_basis.models import Network
from shared_basis.models.parameters import abstract_variables, init_variables
from shared_basis.nn.types import Array, Path
from shared_basis.runs.trained import Trained, Variables, require_finite_weights

SHOWN = 4
"""Maximum number of mismatched paths to list in a message."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """A network with weights, from a checkpoint of a run or a file."""

    path: str
    """The run's workdir, or the file."""
    step: int | None
    """The step of the checkpoint; None for a file."""
    config: Config
    """The run's configuration; for a file, the new run's, with the network stored in the file."""
    spec: data.Spec
    """The shape of the images and a name for each output."""
    named: bool
    """Whether `spec` contains real class names; otherwise the outputs are numbered."""
    mesh: Mesh
    model: Network
    variables: Variables
    files: str | None = None
    """See `Trained.files`; None for a file of weights."""

    @classmethod
    def of_run(cls, workdir: str | os.PathLike[str], which: str = "latest",
               overrides: Mapping[str, Any] | None = None) -> Origin:
        """Opens the checkpoint `which` of the run in `workdir`.

        Raises:
          UserError: see `Trained.open`.
        """
        trained = Trained.open(os.fspath(workdir), which, overrides)
        return cls(str(trained.run.path), trained.step, trained.config, trained.spec, True, trained.mesh,
                   trained.model, trained.variables, trained.files)

    @property
    def where(self) -> str:
        """The description of the origin for messages."""
        return f"the file {self.path}" if self.step is None else f"the run in {self.path}"

    def require_finite(self) -> None:
        """Raises `UserError`, naming the array, unless all weights are finite."""
        require_finite_weights(self.variables, self.where, self.step)


class Fitted(NamedTuple):
    """Weights fitted to a network."""

    variables: dict[str, Any]
    kept: bool
    """Whether the classifier was kept; otherwise it was initialised at random."""
    head: str
    """How the classifier was initialised, as human-readable text."""


def fit(origin: Origin, variables: Variables, network: Network, spec: data.Spec, seed: int) -> Fitted:
    """Fits `variables`, from `origin` or derived from it, to `network` and the classes of `spec`.

    The classifier consists of all arrays whose shapes depend on the number of classes. Its outputs are matched by class
    name, so order may differ and a subset of the classes is allowed. If a class is missing, or unnamed outputs differ
    in number, the classifier is initialised at random with `seed`, as in training from scratch.

    Raises:
      UserError: other arrays do not match; the message lists their paths and shapes.
    """
    arrays = flatten_dict(jax.device_get(dict(variables)))
    shapes = _shapes(network, spec)
    same = origin.named and origin.spec.classes == spec.classes
    axes = {} if same else _class_axes(shapes, _shapes(network.clone(num_classes=network.num_classes + 1), spec))
    outputs = len(origin.spec.classes)
    _require_fit(origin, arrays, {path: shape if path not in axes else (
        *shape[:axes[path]], outputs, *shape[axes[path] + 1:]) for path, shape in shapes.items()})
    order, head = (None, "kept") if same else _find_outputs(origin, spec)
    if order is not None:
        arrays |= {path: np.take(arrays[path], order, axis) for path, axis in axes.items()}
    elif not same:
        arrays |= _draw(network, tuple(axes), spec, seed)
    fitted = unflatten_dict({path: np.asarray(arrays[path]) for path in shapes})
    return Fitted({"batch_stats": {}, **fitted}, same or order is not None, head)  # a network may have no statistics


def _shapes(network: Network, spec: data.Spec) -> dict[Path, tuple[int, ...]]:
    variables = flatten_dict(dict(abstract_variables(network, spec.image_shape)))
    return {path: leaf.shape for path, leaf in variables.items()}


def _class_axes(shapes: Mapping[Path, tuple[int, ...]], wider: Mapping[Path, tuple[int, ...]]) -> dict[Path, int]:
    """Returns, by path, the axis of each array that depends on the number of classes."""
    return {path: next(axis for axis, sizes in enumerate(zip(shape, wider[path], strict=True)) if len({*sizes}) > 1)
            for path, shape in shapes.items() if shape != wider[path]}


def _find_outputs(origin: Origin, spec: data.Spec) -> tuple[list[int] | None, str]:
    """Returns the output index for each class, or None if the classifier must be initialised, and the reason."""
    there, here = origin.spec.classes, spec.classes
    if not origin.named:
        if len(there) == len(here):
            return list(range(len(here))), "kept, outputs in the order of the classes"
        return None, f"initialised at random: the weights have {len(there)} outputs and the data {len(here)} classes"
    numbers = {name: number for number, name in enumerate(there)}
    missing = [name for name in here if name not in numbers]
    if missing:
        return None, f"initialised at random: {missing[0]!r} is not among the {len(there)} classes of the weights"
    return [numbers[name] for name in here], f"kept, its outputs matched by name among {len(there)}"


def _require_fit(origin: Origin, arrays: Mapping[Path, Any], wanted: Mapping[Path, tuple[int, ...]]) -> None:
    """Raises `UserError` with paths and shapes unless the arrays have the shapes `wanted`."""
    def shown(shape: Sequence[int] | None) -> str:
        return "missing" if shape is None else str(list(shape))

    found = {path: np.shape(array) for path, array in arrays.items()}
    differing = [f"{'/'.join(path)} is {shown(found.get(path))} there and {shown(wanted.get(path))} here"
                 for path in sorted({*wanted, *found}, key=lambda path: (path[0] != "params", path))
                 if found.get(path) != wanted.get(path)]
    if differing:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise UserError(f"{origin.where} holds {origin.config.model.name}, which does not fit: "
                        f"{'; '.join(differing[:SHOWN])}{more}. Only the classifier may differ; use the same "
                        "network, stem and number of image channels.")


def _draw(network: Network, paths: Sequence[Path], spec: data.Spec, seed: int) -> dict[Path, np.ndarray]:
    """Returns newly initialised arrays for `paths`, as in training from scratch."""
    @jax.jit
    def draw(key: Array) -> list[Array]:  # unused arrays are eliminated by XLA
        made = flatten_dict(dict(init_variables(network, key, spec.image_shape)))
        return [made[path] for path in paths]
    return dict(zip(paths, map(np.asarray, draw(jax.random.key(seed))), strict=True))
