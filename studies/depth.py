"""Do gradients vanish or explode with the number of layers sharing a basis, and does orthogonality prevent it?

    python -m studies.depth [--layers=2,10] [--seeds=2]
    python -m studies.depth --write                      only update docs/results.md, without training

The paper argues (section 3.2) that a shared basis multiplies gradients along the chain of layers that share it, as a
recurrence does, so singular values other than 1 make them explode or vanish. This study trains ResNets of increasing
depth, in which one basis per group serves 2 or 10 layers, on the digits, and measures gradients by depth at
initialisation and during training: with the penalty, without it, exactly orthonormal, and from bases with
deliberately spread singular values. A plain network of the same depth is the control.

Finished trainings are stored as rows in results/depth.csv and not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import Parser, positive, versions
from benchmarks.records import ROOT, append, commit, read
from benchmarks.trainer import build
from configs.digits_resnet import get_config
from shared_basis import data
from shared_basis.analysis.gradient_flow import by_depth, gradient_flow, layer_paths
from shared_basis.cli.app import run_and_exit
from shared_basis.config import from_config_dict, replace
from shared_basis.data import feeds, in_memory
from shared_basis.data.augment import normalize
from shared_basis.runs.trained import build_model
from shared_basis.runtime.distributed import make_mesh
from shared_basis.runtime.reporter import Reporter
from studies.depth_findings import FILE, MEASURED, TREATMENTS, DepthRow, Treatment, write_page

SPREAD = 4.0
"""Deliberately spread singular values are between 1 / SPREAD and SPREAD."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=_even, default=(2, 10), help="layers per basis, e.g. 2,10")
    parser.add_argument("--seeds", type=positive, default=2, help="how many")
    parser.add_argument("--write", action="store_true", help="only update the section in docs/results.md")
    return parser.parse_args(arguments)


def _even(text: str) -> tuple[int, ...]:
    """Returns even numbers, since blocks have two layers; raises argparse's error for other text."""
    numbers = tuple(positive(part) for part in text.split(","))
    if any(number % 2 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: blocks have two layers, so numbers must be even")
    return numbers


def train(layers: int, treatment: Treatment, seed: int, measured: Sequence[int] = MEASURED) -> Iterator[DepthRow]:
    """Trains a network in which each basis serves `layers` layers.

    Yields a row after each of the epochs `measured`, the last of which is the end of training.
    """
    config = replace(from_config_dict(get_config(f"resnet20{treatment.form}")), {
        "seed": seed, "orthogonality.method": treatment.method, "train.epochs": measured[-1]})
    mesh = make_mesh()
    source, reporter = data.open_source(config.data), Reporter(verbosity="quiet")
    images = feeds.load(source, config.data, mesh, reporter)
    model = build_model(config, images.spec).clone(blocks=(layers // 2 + 1,) * 3)  # the first block of a group is plain
    split = in_memory.load_split(source.splits["train"], source.spec, config.data, reporter.warn)
    size = config.train.batch_size
    batch = normalize(jax.numpy.asarray(split.images[:size]), config.data), split.labels[:size]
    flow = gradient_flow(model)
    order = ["/".join(path) for path in layer_paths(model, images.spec.image_shape)]
    with tempfile.TemporaryDirectory() as root:
        state, program = build(config, images, model, mesh, Path(root))
    if treatment.spread:
        state = state.replace(params={**state.params, "bases": jax.tree.map(_spread, state.params["bases"])})
    batches = program.batches(0)
    for epoch in range(measured[-1] + 1):
        if epoch:
            for _ in range(program.steps_per_epoch):
                state, _ = program.step(state, *next(batches))
            jax.block_until_ready(state)
        if epoch in measured:
            outputs, parameters = flow(state.params, state.batch_stats, *batch)
            own = [parameters[path] for path in by_depth(order, parameters)
                   if path.startswith("group") and path.endswith(("/coefficients", "/kernel"))]
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            scores = program.evaluate["test"](variables, lambda scored: None)
            loss = float(state.totals["loss"] / state.totals["count"]) if epoch else 0.0
            yield DepthRow(datetime.date.today().isoformat(), commit(), jax.devices()[0].device_kind,
                           versions(("jax",))["jax"], layers, treatment.label, seed, epoch, loss,
                           100 * (1 - scores["accuracy"]), *_singular_values(state.params), _joined(outputs.values()),
                           _joined(own), f"python -m studies.depth --layers={layers}")
    batches.close()


def _spread(basis: Any) -> Any:
    """Returns `basis [k, k, C, s]` with the same singular vectors and singular values from 1 / SPREAD to SPREAD."""
    left, _, right = np.linalg.svd(np.asarray(basis).reshape(-1, basis.shape[-1]), full_matrices=False)
    return ((left * np.geomspace(1 / SPREAD, SPREAD, left.shape[1])) @ right).reshape(basis.shape).astype(np.float32)


def _singular_values(params: Any) -> tuple[float, float]:
    """Returns the smallest and largest singular value of the shared bases; zeros without bases."""
    values = [np.linalg.svd(np.asarray(basis).reshape(-1, basis.shape[-1]), compute_uv=False)
              for basis in jax.tree.leaves(params.get("bases", {}))]
    return (float(min(map(min, values))), float(max(map(max, values)))) if values else (0.0, 0.0)


def _joined(norms: Iterable[float]) -> str:
    return " ".join(f"{norm:.4g}" for norm in norms)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT,
         rows_of: Callable[[int, Treatment, int], Iterable[DepthRow]] = train) -> None:
    """Trains the networks that have no rows yet, and writes the section.

    Args:
      root: contains the rows and the page.
      rows_of: performs one training and returns its rows.

    Raises:
      UserError: the rows cannot be read, or the page lacks the marks.
      SystemExit: an option is invalid.
    """
    options = parse(arguments)
    if not options.write:
        done = {(row.layers, row.variant, row.seed) for row in read(root / FILE, DepthRow)}
        todo = [(layers, treatment, seed) for seed in range(options.seeds) for layers in options.layers
                for treatment in TREATMENTS if (layers, treatment.label, seed) not in done]
        for number, (layers, treatment, seed) in enumerate(todo):
            print(f"{number + 1}/{len(todo)}: {layers} layers, {treatment.label}, seed {seed}", file=sys.stderr,
                  flush=True)
            append(root / FILE, list(rows_of(layers, treatment, seed)))
    write_page(root)


if __name__ == "__main__":
    run_and_exit(main)
