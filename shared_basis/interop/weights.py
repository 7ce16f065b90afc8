"""Opens weights by the name that the user gives: a run or a file of PyTorch weights."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import numpy as np

from shared_basis import data
from shared_basis.config import Config, replace
from shared_basis.errors import UserError
from shared_basis.interop.classes import describe_order, name_outputs, read_classes
from shared_basis.interop.pytorch import load_network
from shared_basis.interop.state_dict import read_metadata
from shared_basis.models import create_model, plain_counterpart
from shared_basis.runs.inspect import named_checkpoint
from shared_basis.runs.nearby import hint, run_around
from shared_basis.runs.origin import Origin
from shared_basis.runs.trained import build_model
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.distributed import make_mesh
from shared_basis.runtime.files import open_files
from shared_basis.runtime.reporter import Reporter

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The normalisation of torchvision, timm and the official implementation."""


def find_weights(source: str, flag: str = "--init") -> tuple[str, str | None]:
    """Splits `source`, RUN[:best|STEP] or FILE, into its path and a run's checkpoint: 'latest', 'best' or a step.

    Args:
      flag: the name of the flag that `source` was given with, for messages.

    Raises:
      UserError: there is no such run or file.
    """
    source = os.path.expanduser(source)
    if os.path.isfile(source):
        own = run_around(source)
        if own and (os.path.basename(source) == "run.json" or "checkpoints" in PurePath(source).parts[:-1]):
            raise UserError(f"{flag}={source} is a file of the run in {own}; give the run: {flag}={own}.")
        return source, None
    run, step = named_checkpoint(source)
    files = open_files(run)
    if files.exists("run.json"):
        return run, step
    if files.is_directory():
        raise UserError(f"{flag}={source}: the directory holds no run (no run.json); give the workdir of a trained "
                        f"run, or a file of PyTorch weights.{hint(run)}")
    raise UserError(f"{flag}={source}: no such run or file; give RUN, RUN:best or RUN:STEP, where RUN is a "
                    "workdir, or a file of PyTorch weights.")


def normalization_of(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the standard deviation with which the weights in `source` were trained.

    Most files do not store them; ImageNet's are assumed, as used for the published weights.

    Raises:
      UserError: see `find_weights`; or the directory holds no run.
    """
    path, which = find_weights(source)
    if which is None:
        said = _said(path)
        return said.get("mean", IMAGENET_MEAN), said.get("std", IMAGENET_STD)
    config, _ = Workdir(path).load()
    return config.data.mean, config.data.std


def _said(path: str) -> dict[str, Any]:
    """Returns the metadata in a file, as written by --mode=export --format=pytorch: `classes`, `mean`, `std`."""
    found = read_metadata(path)
    kinds = {"classes": str, "mean": float, "std": float}
    return {name: tuple(found[name]) for name, kind in kinds.items() if isinstance(found.get(name), list)
            and found[name] and all(isinstance(item, kind) for item in found[name])}


def open_weights(source: str, config: Config, spec: data.Spec, classes: str, reporter: Reporter) -> Origin:
    """Opens the weights in `source` (see `find_weights`) for a run of `config` on data of `spec`.

    Args:
      classes: a file with the class names of a file of weights, see `read_classes`; empty for none.

    Raises:
      UserError: there are no such weights, a file contains neither the network of `config` nor its plain counterpart,
        or `classes` is given for a run.
    """
    path, which = find_weights(source)
    if which is None:
        return open_file(path, config, spec, classes, reporter)
    if classes:
        raise only_for_files(classes, path)
    return Origin.of_run(path, which)


def only_for_files(classes: str, run: str) -> UserError:
    """Returns the error for a list of `classes` that is given for a run."""
    return UserError(f"--classes={classes} only applies to files of weights; the run in {run} has class names.")


def open_file(path: str, config: Config, spec: data.Spec, classes: str, reporter: Reporter) -> Origin:
    """Opens the file of weights `path` like `open_weights`; logs the assumed order of the outputs.

    Raises:
      UserError: see `open_weights`; or the weights are not finite.
    """
    names = read_classes(classes) if classes else None
    plain, said = plain_counterpart(config.model.name), _said(path)
    config = replace(config, {f"data.{name}": said[name] for name in ("mean", "std") if name in said})
    target = build_model(config, spec)
    network, variables = load_network(path, target, create_model(plain, stem=config.model.stem))
    if network.sharing != target.sharing:
        config = replace(config, {"model.name": plain})
    channels, count = np.shape(variables["params"]["stem"]["kernel"])[-2], network.num_classes
    outputs = said.get("classes", ())
    if names is not None:
        outputs = name_outputs(names, count, spec.classes, classes, path)
    elif len(outputs) != count:
        outputs = ()
        if count == len(spec.classes) and config.data.name == "folder":
            note = describe_order(spec.classes, path)  # data sets define an order, which published weights use
            (reporter.warn if note.surprising else reporter.info)(note.text)
    origin = Origin(path, None, config, data.Spec((*spec.image_shape[:2], channels),
                                                  outputs or tuple(map(str, range(count)))), bool(outputs),
                    make_mesh(), network, variables)
    origin.require_finite()
    return origin
