"""Compresses a trained plain network to one with shared filter bases, in closed form.

The mathematics is in `shared_basis.compression.factorize`, its use on plain arrays in
`shared_basis.compression.kernels`; this module applies it to a run. Layers that are not factorised are copied. The
running statistics of a following batch normalisation are corrected for the change of means and variances caused by the
approximation, which training would otherwise do gradually.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from shared_basis import data
from shared_basis.compression import ranks
from shared_basis.compression.kernels import LayerFactors, factorize_layer
from shared_basis.compression.layers import (
    Arrays,
    PlainLayers,
    check_family,
    extract_layers,
    following_norm,
    load_images,
    open_plain,
    require_plain,
)
from shared_basis.config import Config, replace
from shared_basis.data.feeds import Images
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluator import make_evaluator
from shared_basis.models import Network, create_model, family_of, plain_counterpart
from shared_basis.models.parameters import abstract_variables
from shared_basis.models.registry import BASIS, DOUBLE
from shared_basis.models.summary import compare_with_plain, render_saving
from shared_basis.nn.types import Path
from shared_basis.optim.penalty import orthogonality_penalty
from shared_basis.runs.continuation import settled_from
from shared_basis.runs.origin import Origin, fit
from shared_basis.runs.trained import Variables, build_model
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import replicated
from shared_basis.runtime.files import align
from shared_basis.runtime.reporter import Reporter, count


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A network with shared bases, computed from a trained plain one."""

    config: Config
    """Contains the name of `network`, whose ranks a budget may have chosen."""
    network: Network
    spec: data.Spec
    variables: Variables
    report: dict[str, Any]
    """`source`, `step` (None for a file), `calibration` (number of images), the counts of `compare_with_plain`,
    `layers` with relative errors of `filters` and, on the calibration images, of `activations` (None without),
    `penalty` (None without shared bases) and `head`: how the classifier was initialised. If it was kept, also
    `test_examples`, and `test_accuracy` and `test_loss` of the `plain` and the `compressed` network, otherwise None."""


def compress(config: Config, source: str | os.PathLike[str] | Origin, reporter: Reporter | None = None, *,
             which: str = "latest", calibration: int | None = None, budget: float | None = None,
             measure: str = "parameters") -> Compressed:
    """Computes the network of `config` in closed form from that of the run `source`, which must be plain.

    The data may differ from that of the source; if its classes differ, the classifier is initialised at random.

    Args:
      source: the workdir, or weights that are already open, e.g. from a file.
      reporter: shows messages and progress; None prints as the command line does.
      which: the checkpoint of `source`: 'latest', 'best' or a step number.
      calibration: number of training images on which the inputs of layers are measured; 0 for none, to compare only
        filters. None uses `shared_basis.compression.layers.CALIBRATION_IMAGES`.
      budget: chooses the ranks; `config` must then name a plain network. The compressed network may have this fraction,
        in (0, 1], of the `measure` ('parameters' or 'macs') of the plain one.

    Raises:
      UserError: `source` is not a run of the plain network of `config`, the network cannot be compressed, or the budget
        is too small.
    """
    if reporter is None:
        with Reporter() as printing:
            return compress(config, source, printing, which=which, calibration=calibration, budget=budget,
                            measure=measure)
    check_target(config, budget, measure)
    origin = require_plain(source) if isinstance(source, Origin) else open_plain(source, which)
    config = replace(config, settled_from(config, origin.config))
    spec = data.describe(config.data)
    check_alike(config, origin, spec)
    at_size = dataclasses.replace(origin, spec=data.Spec(spec.image_shape, origin.spec.classes))
    plain_network = build_model(origin.config, spec)
    plain = fit(origin, origin.variables, plain_network, spec, config.seed)
    images = load_images(config, origin, calibration, plain.kept, reporter)
    layers = extract_layers(at_size, config, images, reporter)
    if budget is not None:
        candidates = ranks.Candidates(layers, origin.config.model, spec)
        config = named(config, ranks.choose(candidates, budget, measure, reporter.debug))
    reporter.info(f"factorising the layers of {config.model.name} …")
    arrays, errors = factorised(layers, build_model(config, at_size.spec), spec.image_shape)
    network = build_model(config, spec)
    variables = fit(origin, unflatten_dict(arrays), network, spec, config.seed).variables
    kinds = {"plain": (plain_network, plain.variables), "compressed": (network, variables)} if plain.kept else {}
    groups = network.basis_groups(config.orthogonality.elements)
    return Compressed(config, network, spec, variables, {
        "source": origin.path, "step": origin.step, "head": plain.head,
        "epochs": config.train.epochs, "learning_rate": config.optimizer.learning_rate,
        "calibration": images.count("train") if "train" in images.splits else 0,
        **compare_with_plain(config.model, len(spec.classes), spec.image_shape),
        "layers": errors, "penalty": float(orthogonality_penalty(variables["params"], groups)) if groups else None,
        **_score(kinds, config, images, origin.mesh)})


def _score(kinds: Mapping[str, tuple[Network, Variables]], config: Config, images: Images,
           mesh: Mesh) -> dict[str, Any]:
    """Returns the test entries of `Compressed.report` for networks and variables by kind; None without test images."""
    if not kinds:
        return dict.fromkeys(("test_examples", "test_accuracy", "test_loss"))
    batches = images.batches("test", config.train.eval_batch_size, mesh)
    with memory.oom_as_user_error(config, "train.eval_batch_size"):
        scores = {kind: make_evaluator(network, config.data, batches, mesh)(jax.device_put(variables, replicated(mesh)))
                  for kind, (network, variables) in kinds.items()}
    return {"test_examples": int(scores["plain"]["count"]),
            **{f"test_{name}": {kind: each[name] for kind, each in scores.items()} for name in ("accuracy", "loss")}}


def check_target(config: Config, budget: float | None, measure: str) -> None:
    """Raises `UserError` unless `config` names a network to which a plain one can be compressed."""
    name = config.model.name
    network = create_model(name, stem=config.model.stem)
    check_family(name)
    is_plain = name == plain_counterpart(name)
    forms = [form for form in (BASIS, DOUBLE) if form in family_of(name).forms]
    if budget is not None:
        ranks.check_budget(budget, measure)
        if not is_plain:
            raise UserError(f"--budget={budget:g} chooses the ranks, but {name} fixes them; use the plain network "
                            f"{plain_counterpart(name)} in --config, or omit --budget.")
    elif measure != "parameters":
        raise UserError(f"--budget_of={measure} requires a budget; add one, e.g. --budget=0.5.")
    elif is_plain:
        raise UserError(f"{name} is plain: choose a network to compress to, e.g. "
                        f"--config.model.name={name}-{forms[-1].replace('<S>', '16').replace('<U>', '1')}, or set "
                        "--budget=0.5 to choose its ranks.")
    elif not network.sharing.factorised:
        raise UserError(f"{name}: its layers share whole filters or templates, which are not a low-rank form; "
                        f"compress to {' or '.join(forms)}.")


def check_alike(config: Config, origin: Origin, spec: data.Spec) -> None:
    """Raises `UserError` unless network, normalisation and image channels (from `spec`) match those of `origin`."""
    mine, its, where = config.model, origin.config.model, origin.where
    if plain_counterpart(mine.name) != its.name:
        raise UserError(f"{mine.name} cannot be computed from {its.name}, the network of {where}: depths and widths "
                        f"must match; choose {its.name}-s<S>u<U>.")
    for field, value, other in (("model.stem", mine.stem, its.stem),
                                *((f"data.{name}", getattr(config.data, name), getattr(origin.config.data, name))
                                  for name in ("mean", "std"))):
        if value != other:
            raise UserError(f"{field}={value!r}: must equal {other!r}, the value of {where}.")
    (*_, channels), (*_, others) = spec.image_shape, origin.spec.image_shape
    if channels != others:
        raise UserError(f"the images of data.name={config.data.name!r} have {channels} channel{'s' * (channels > 1)}, "
                        f"but the weights of {where} require {others}.")


def named(config: Config, name: str) -> Config:
    """Returns `config` with the network `name`, and the run named as recipes do."""
    return replace(config, {"model.name": name, "name": named_for(config.name, config.model.name, name)})


def named_for(run: str, network: str, other: str) -> str:
    """Returns the name `run` of a run of `network` as that of a run of the network `other`."""
    return run if other == network else f"{run.removesuffix(network).rstrip('-')}-{other}".lstrip("-")


def factorised(plain: PlainLayers, network: Network,
               image_shape: tuple[int, int, int]) -> tuple[Arrays, list[dict[str, Any]]]:
    """Returns the variables of `network` by path, and the `path` and relative errors of each factorised layer.

    Raises:
      UserError: a parameter has no counterpart in the plain network.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(dict(abstract_variables(network, image_shape))).items()}
    arrays = dict(plain.arrays)
    layers = []
    for name, paths in network.basis_layer_paths().items():
        group = plain.group(network, name)
        shared_shapes = network.shared_shapes().get(name, {})
        bases = group.bases(next(iter(shared_shapes.values()))[-1] if shared_shapes else 0)
        for shared, basis in bases.items():
            arrays["params", "bases", name, shared] = basis.reshape(shared_shapes[shared])
        for path in paths:
            space = arrays.pop(("params", *path, "kernel")).shape[:-1]
            unique_rank = shapes.get(("params", *path, "unique"), (0,))[-1]
            found = factorize_layer(group.layers[path], space, group.basis_of(path, bases), unique_rank,
                                    plain.moments.get(path))
            arrays.update({(kind, *path, *rest): array for (kind, *rest), array in
                           flatten_dict(found.variables()).items()})
            if plain.is_normalised(path):
                arrays.update(corrected_bn_statistics(plain, path, found))
            layers.append({"path": "/".join(path), "filters": found.filter_error,
                           "activations": found.activation_error})
    for path in shapes.keys() ^ arrays.keys():
        raise UserError(f"{'/'.join(path)} exists in only one of the two networks; only their sharing may differ.")
    return {path: np.asarray(arrays[path], np.float32) for path in shapes}, layers


def corrected_bn_statistics(plain: PlainLayers, path: Path, found: LayerFactors) -> Arrays:
    """Returns the corrected running statistics after the layer at `path`, whose kernel `found` replaces."""
    norm = ("batch_stats", *following_norm(path))
    return {(*norm, "mean"): plain.arrays[*norm, "mean"] + found.mean_shift,
            (*norm, "var"): plain.arrays[*norm, "var"] * found.var_ratio}


def render_scores(result: Mapping[str, Any]) -> str:
    """Returns human-readable text on the test scores in `Compressed.report`, before training."""
    if result["test_accuracy"] is None:
        return f"not scored before training: the classifier is {result['head']}"
    accuracy = {kind: f"{100 * value:.2f} %" for kind, value in result["test_accuracy"].items()}
    return (f"test accuracy {accuracy['plain']} plain, {accuracy['compressed']} compressed, before training, on "
            f"{count(result['test_examples'])} images")


def render(result: Mapping[str, Any]) -> str:
    """Returns a `Compressed.report` with its `workdir` as human-readable lines."""
    images = result["calibration"]
    head = "relative errors of each layer's filters" + (
        f", and of its outputs on {count(images)} training images (which matter)" if images else "")
    kinds = ("filters", "activations") if images else ("filters",)
    table = align([[layer["path"], *(f"{100 * layer[kind]:.2f} %" for kind in kinds)] for layer in result["layers"]],
                  right=True)
    penalty = "" if result["penalty"] is None else f"; the orthogonality penalty is {result['penalty']:.2g}"
    return "\n".join([
        f"{head}:", *(f"  {line}" for line in table), f"{result['model']}: {render_saving(dict(result))}",
        f"{render_scores(result)}{penalty}",
        f"now step 0 of {result['workdir']}; fine-tune it with --workdir={result['workdir']} ({result['epochs']} "
        f"epochs, learning rate {result['learning_rate']:g}; change them with --config.train.epochs and "
        "--config.optimizer.learning_rate)"])
