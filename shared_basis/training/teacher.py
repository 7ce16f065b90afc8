"""The teacher for distillation: the trained network of another run, for the same kind of images."""

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
    """A trained network that is evaluated in the training steps of another network."""

    model: Network
    data: DataConfig
    """Contains the normalisation of its images."""
    variables: Tree
    """The variables, replicated on all devices."""
    description: str
    """Its network and step, and a digest of its variables, to verify the teacher when a run resumes."""


def open_teacher(config: Config, spec: data.Spec, warn: Callable[[str], None] = lambda text: None) -> Teacher | None:
    """Returns the teacher that `config` names, with its variables on all devices, or None.

    Args:
      spec: the spec of the images.
      warn: called with a message if its class names differ.

    Raises:
      UserError: there is no such run or checkpoint, or image shape or number of classes differ.
    """
    if not config.distillation.teacher:
        return None
    field = f"distillation.teacher={config.distillation.teacher!r}"
    path, which = named_checkpoint(config.distillation.teacher)
    if Workdir(path).read_record() is None:
        raise UserError(f"{field}: {path} holds no run (no run.json); give the workdir of a trained run, "
                        f"RUN[:latest|best|STEP].{nearby.hint(path)}")
    try:
        trained = Trained.open(path, which)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    theirs, ours = _describe(trained.spec), _describe(spec)
    if theirs != ours:
        raise UserError(f"{field}: {trained.config.model.name} was trained on {theirs}, not on {ours}; choose a "
                        "teacher with this image shape and number of classes, or set --config.data.image_size to that "
                        "of the teacher.")
    if trained.spec.classes != spec.classes:
        warn(f"the teacher's class names ({', '.join(trained.spec.classes[:3])}, …) differ from the data's "
             f"({', '.join(spec.classes[:3])}, …); assuming the same classes in the same order.")
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
