"""The teacher of a run that learns by distillation: another run's network, held to the images of this one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import jax
import numpy as np

from shared_basis import data
from shared_basis.config import Config, DataConfig
from shared_basis.errors import UserError
from shared_basis.models import Network
from shared_basis.nn.types import Tree
from shared_basis.runs import nearby
from shared_basis.runs.inspect import named_checkpoint
from shared_basis.runs.trained import Trained
from shared_basis.runs.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network that is evaluated in the steps of another's training."""

    model: Network
    data: DataConfig
    """How its images are normalised."""
    variables: Tree
    """On all devices."""
    description: str
    """Its network and step, and a digest of its variables, by which a run that resumes knows it again."""


def open_teacher(config: Config, spec: data.Spec, warn: Callable[[str], None] = lambda text: None) -> Teacher | None:
    """Returns the teacher that `config` names, on all devices, or None.

    Args:
      spec: of the images that both see.
      warn: gets a line where its classes have other names.

    Raises:
      UserError: there is no such run or checkpoint, or it is for other images or another number of classes.
    """
    if not config.distillation.teacher:
        return None
    field = f"distillation.teacher={config.distillation.teacher!r}"
    path, which = named_checkpoint(config.distillation.teacher)
    if Workdir(path).read_record() is None:
        raise UserError(f"{field}: {path} holds no run (no run.json); give the workdir of a trained one, "
                        f"RUN[:latest|best|STEP].{nearby.hint(path)}")
    try:
        trained = Trained.open(path, which)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    theirs, ours = _describe(trained.spec), _describe(spec)
    if theirs != ours:
        raise UserError(f"{field}: {trained.config.model.name} there is for {theirs}, and these are {ours}; choose a "
                        "teacher for images of this shape and number of classes, or set --config.data.image_size to "
                        "its own.")
    if trained.spec.classes != spec.classes:
        warn(f"the teacher's classes have other names ({', '.join(trained.spec.classes[:3])}, …) than these images' "
             f"({', '.join(spec.classes[:3])}, …); they are taken to be the same in the same order.")
    variables = dict(trained.variables)
    return Teacher(trained.model, trained.config.data, variables,
                   f"{trained.config.model.name} at step {trained.step}, {_digest(variables)}")


def _describe(spec: data.Spec) -> str:
    return f"{len(spec.classes)} classes of {'×'.join(map(str, spec.image_shape))} images"


def _digest(variables: Tree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf.addressable_data(0)).tobytes())
    return digest.hexdigest()[:12]
