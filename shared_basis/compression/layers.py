"""The layers of a trained plain network that can be factorised, and the moments of their inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from shared_basis import data
from shared_basis.compression.factorize import Group, Layer
from shared_basis.compression.kernels import measured_layer
from shared_basis.compression.moments import input_moments
from shared_basis.compression.patches import Moments
from shared_basis.config import Config, replace
from shared_basis.data import feeds
from shared_basis.data.feeds import Images
from shared_basis.errors import UserError
from shared_basis.models import Network, create_model, family_of, plain_counterpart
from shared_basis.nn.types import Path
from shared_basis.runs.origin import Origin
from shared_basis.runs.trained import build_model, warn_if_redrawn
from shared_basis.runtime import memory
from shared_basis.runtime.reporter import Reporter

Arrays = Mapping[Path, np.ndarray]
"""Variables by path: ('params', 'group1', …)."""

BASIS_FORM = "s<S>u<U>"
"""The form of sharing that a network must support: 3×3 layers as coefficients of a basis."""

CALIBRATION_IMAGES = 1000
"""Default number of training images for measuring inputs; all of them if there are fewer."""


@dataclasses.dataclass(frozen=True)
class PlainLayers:
    """The layers of a trained plain network."""

    arrays: Arrays
    moments: Mapping[Path, Moments]
    """Moments of the inputs of layers that can be factorised, by path; empty if only filters are compared."""

    def group(self, network: Network, name: str) -> Group:
        """Returns the layers of group `name` by path, with the shared bases that they use in `network`."""
        uses, layers = dict(network.sharing.layers), network.basis_layer_paths()[name]
        return Group({path: self.layer(path) for path in layers},
                     {path: uses[layer] for path, layer in layers.items() if layer in uses})

    def layer(self, path: Path) -> Layer:
        """Returns the layer at `path`.

        Errors are measured about the mean output if batch normalisation follows, which removes the mean.
        """
        kernel = self.arrays["params", *path, "kernel"]
        return measured_layer(kernel, self.moments.get(path), centered=self.is_normalised(path))

    def is_normalised(self, path: Path) -> bool:
        """Returns whether batch normalisation follows the layer at `path`; in DenseNet it does not."""
        return ("batch_stats", *following_norm(path), "mean") in self.arrays


def following_norm(path: Path) -> Path:
    """Returns the path where a batch normalisation after the layer at `path` would be."""
    return (*path[:-1], f"{path[-1]}_norm")


def open_plain(source: str | os.PathLike[str], which: str = "latest",
               overrides: Mapping[str, Any] | None = None) -> Origin:
    """Opens the run in `source` and checks it with `require_plain`.

    Raises:
      UserError: see `Trained.open` and `require_plain`; or `source` is empty.
    """
    if not source:
        raise UserError("--mode=compress needs --source=RUN, the workdir of a trained plain network.")
    return require_plain(Origin.of_run(source, which, overrides))


def require_plain(origin: Origin) -> Origin:
    """Returns `origin` with its blocks unrolled, after checking that it is a plain network that can be factorised.

    Raises:
      UserError: the network is not suitable, or its weights are not finite.
    """
    name = origin.config.model.name
    if name != plain_counterpart(name):
        raise UserError(f"{origin.where} holds {name}, which already shares; use a run of plain "
                        f"{plain_counterpart(name)}.")
    check_family(name)
    origin.require_finite()
    model = build_model(replace(origin.config, {"model.scan_blocks": "no"}), origin.spec)
    return dataclasses.replace(origin, model=model)


def check_family(name: str) -> None:
    """Raises `UserError` unless the layers of the plain network `name` are linear in the elements of a basis."""
    base = plain_counterpart(name)
    if not create_model(base).basis_is_linear():
        raise UserError(f"{base} cannot be compressed: its layers are not linear in their basis (a ReLU is between "
                        "it and the coefficients), so there is no closed form; train it from scratch.")
    if BASIS_FORM not in family_of(base).forms:
        raise UserError(f"{base} cannot be compressed: it shares whole filters, which are not a low-rank form; "
                        "train it from scratch.")


def load_images(config: Config, origin: Origin, calibration: int | None, tests: bool, reporter: Reporter,
                known: data.Spec | None = None) -> Images:
    """Loads the calibration images: the first ones in a fixed random order of the training images.

    Args:
      calibration: the number of images; 0 for none, None for `CALIBRATION_IMAGES`.
      tests: whether to load the test images too.
      known: the classes and shape that the images must have; None for any.

    Raises:
      UserError: there are fewer images than requested, or they do not match `known`.
    """
    if calibration is not None and calibration < 0:
        raise UserError(f"--calibration={calibration}: must be a number of training images, or 0 for none.")
    names = (*(("train",) if calibration != 0 else ()), *(("test",) if tests else ()))
    source = data.open_source(config.data, names, known, reporter)
    if tests:
        warn_if_redrawn(source, config.data, origin.config.data, origin.files, reporter)
    splits = {name: source.splits[name] for name in names}
    if "train" in splits:
        total = len(splits["train"])
        wanted = min(CALIBRATION_IMAGES, total) if calibration is None else calibration
        if wanted > total:
            raise UserError(f"--calibration={wanted}: there are only {total} training images; give at most {total}.")
        splits["train"] = splits["train"].take(np.sort(np.random.default_rng(0).permutation(total)[:wanted]))
    with memory.oom_as_user_error(config, "train.eval_batch_size"):
        return feeds.load(data.Source(source.spec, splits), config.data, origin.mesh, reporter)


def extract_layers(origin: Origin, config: Config, images: Images | None, reporter: Reporter) -> PlainLayers:
    """Returns the layers of `origin`, with moments measured on the training images in `images`, if any."""
    moments: Mapping[Path, Moments] = {}
    if images is not None and "train" in images.splits:
        total = images.count("train")
        show = reporter.progress("measuring the inputs of layers on training images")
        with memory.oom_as_user_error(config, "train.eval_batch_size"):
            moments = input_moments(
                origin.model, origin.variables, config.data,
                [path for paths in origin.model.basis_layer_paths().values() for path in paths],
                images.batches("train", config.train.eval_batch_size, origin.mesh)(),
                lambda seen: show(seen, total))
        reporter.end_progress()
    for path, each in moments.items():
        if not np.isfinite(each.products).all():
            raise UserError(f"{origin.where}: on the calibration images the inputs of {'/'.join(path)} are not finite, "
                            "or their squares are too large; --calibration=0 compares only filters.")
    return PlainLayers(flatten_dict(jax.device_get(dict(origin.variables))), moments)
