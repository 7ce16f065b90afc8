"""Measures size and latency of exported files relative to the plain network's, and their agreement with the network.

    python -m benchmarks.export --append --write
    python -m benchmarks.export --workdirs=runs/NAME

Files are ONNX and run with onnxruntime. Networks given by name have random weights; runs given by workdir are compared
with their network on all of their test images. --append adds the rows to results/export.csv; --write updates the tables
in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # python benchmarks/export.py, deprecated
    from moved import run_as_module
    run_as_module("benchmarks.export")

import jax
import numpy as np

from benchmarks import records
from benchmarks.cases import SECONDS, Case, Timed, make_case, repeated
from benchmarks.common import PAGE, Parser, Table, in_turns, machine, names, positive, replace_section
from benchmarks.processes import ask
from benchmarks.records import ROOT
from benchmarks.session import Part, Session, SpeedRow, spread
from shared_basis.cli.app import run_and_exit
from shared_basis.config import DataConfig
from shared_basis.data import feeds
from shared_basis.data.augment import normalize
from shared_basis.export import onnx
from shared_basis.export.folding import CHOICES, fold
from shared_basis.export.graph import Node, count_macs
from shared_basis.export.jaxpr import trace
from shared_basis.models import create_model
from shared_basis.models.parameters import abstract_variables
from shared_basis.runs.trained import Trained
from shared_basis.runtime.reporter import Reporter

FILE = Path("results") / "export.csv"
"""Relative to the repository's root."""
NETWORKS = ("resnet32-s16u1-double", "resnet56-s8u1", "resnet34-s32u1", "densenet121-s64u4", "mobilenetv2-shared")
"""The default networks."""
FOLDS = tuple(choice for choice in CHOICES if choice != "none")

Key = tuple[str, str]
"""Identifies a file by network and fold."""


def graph_of(case: Case) -> Node:
    """Returns the graph of a network with random weights, which do not affect its speed."""
    model = create_model(case.network, num_classes=case.classes, stem=case.stem, scan_blocks=False)
    shape, random = (case.image_size, case.image_size, 3), np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        width = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10  # small but non-zero offsets and means
        return random.normal(0, width**-0.5, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, dict(abstract_variables(model, shape)))
    return trace(model, variables, shape, lambda images: normalize(images, DataConfig(name="digits")))


def session_of(content: bytes) -> Any:
    """Returns an inference session for an ONNX model."""
    import onnxruntime

    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def files(session: Session, cases: Sequence[Case]) -> Table:
    """Measures size and latency of each case's files relative to those of its plain network, which is folded too."""
    contents: dict[Key, bytes] = {}
    macs: dict[Key, int] = {}
    by_network = {name: case for case in cases for name in (case.plain, case.network)}
    made = {name: make_case(name, "cpu", case.batch) for name, case in by_network.items()}
    for name, case in made.items():
        session.print_progress(f"export: {name}")
        graph = graph_of(case)
        for choice in FOLDS if case.form else ("auto",):
            folded = fold(graph, choice)[0]
            contents[name, choice], macs[name, choice] = onnx.serialise(folded, {})[""], count_macs(folded)
    images = {name: np.random.default_rng(0).integers(0, 256, (case.batch, case.image_size, case.image_size, 3),
                                                      dtype=np.uint8) for name, case in made.items()}
    timed = {key: Timed(repeated(functools.partial(session_of(content).run, None, {"images": images[key[0]]})),
                        session.seconds) for key, content in contents.items()}
    for measure in timed.values():
        measure()  # determines the number of calls
    seconds = in_turns(timed, session.rounds)
    table = [["network, fold", "MACs, million", "file, KiB", "over plain's", "latency, ms", "over plain's"]]
    for (name, choice), content in contents.items():
        case, plain = made[name], (made[name].plain, "auto")
        for quantity, values in (("file (bytes)", [float(len(content))]), ("latency (s)", seconds[name, choice])):
            session.add(f"export --fold={choice}", case, quantity, values, framework="onnxruntime")
        ratios = [one / other for one, other in zip(seconds[name, choice], seconds[plain], strict=True)]
        table.append([f"{name}, {choice}" if case.form else name, f"{macs[name, choice] / 1e6:,.1f}",
                      f"{len(content) / 1024:,.0f}", f"{len(content) / len(contents[plain]):.2f}",
                      spread(seconds[name, choice], 1000), spread(ratios) if case.form else "1"])
    return table


def graph_of_run(trained: Trained) -> Node:
    """Returns the graph of a trained network, from images to logits."""
    return trace(trained.model.clone(dtype=np.float32, scan_blocks=False), jax.device_get(dict(trained.variables)),
                 trained.spec.image_shape, functools.partial(normalize, config=trained.config.data))


def load_tests(trained: Trained, reporter: Reporter) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns all test images of a run, uint8 `[N, H, W, C]`, and their classes, `[N]`, in batches."""
    images = feeds.load(trained.open_source(), trained.config.data, trained.mesh, reporter)
    batches = images.batches("test", trained.config.train.eval_batch_size, trained.mesh)()
    arrays = [(np.asarray(pixels), np.asarray(labels)) for pixels, labels in batches]
    return [(pixels[labels >= 0], labels[labels >= 0]) for pixels, labels in arrays]  # the last batch is padded


def classify(model: Any, tests: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns the logits of an ONNX model for all images."""
    return np.concatenate([model.run(None, {"images": pixels})[0] for pixels, _ in tests])


def agreement(session: Session, workdirs: Sequence[str]) -> Table:
    """Compares the exported files of runs with their networks on all test images."""
    table = [["network, fold", "test images", "largest difference of logits", "predictions that differ",
              "narrowest margin"]]
    for workdir in workdirs:
        trained = Trained.open(workdir)
        name = trained.config.model.name
        session.print_progress(f"export: {name}, test images")
        tests, network = load_tests(trained, Reporter(sys.stderr)), trained.classifier()
        expected = np.concatenate([np.asarray(network(jax.numpy.asarray(pixels))) for pixels, _ in tests])
        best = np.sort(expected, axis=-1)
        case, graph = Case(name, len(expected), trained.spec.image_shape[0]), graph_of_run(trained)
        for choice in CHOICES:
            found = classify(session_of(onnx.serialise(fold(graph, choice)[0], {})[""]), tests)
            figures = {"largest difference of logits": float(np.abs(found - expected).max()),
                       "predictions that differ": float(np.sum(found.argmax(-1) != expected.argmax(-1))),
                       "narrowest margin": float((best[:, -1] - best[:, -2]).min())}
            cells = [session.add(f"export --fold={choice}", case, quantity, [value], framework="onnxruntime")
                     for quantity, value in figures.items()]
            table.append([f"{name}, {choice}", f"{len(expected):,}", *cells])
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", type=names, help="networks; with --workdirs, there are no default ones")
    parser.add_argument("--workdirs", type=names, default=(), help="runs to compare with their networks")
    parser.add_argument("--batch", type=positive, default=1, help="batch size")
    parser.add_argument("--rounds", type=positive, default=5, help="number of measurements to take the median of")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="minimum duration of a latency measurement")
    parser.add_argument("--append", action="store_true", help="add the rows to results/export.csv")
    parser.add_argument("--write", action="store_true", help="update the figures in benchmarks/README.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Measures, prints, and stores rows and tables below `root` if requested.

    Raises:
      UserError: a network or a run does not exist, or a package is missing.
      SystemExit: an option is invalid.
    """
    options = parse(arguments)
    onnx.require_packages()
    records.check_file(root / FILE, SpeedRow)
    networks = options.networks or (() if options.workdirs else NETWORKS)
    cases = [make_case(network, "cpu", options.batch) for network in networks]
    words = [f"--batch={options.batch}", f"--rounds={options.rounds}"]
    if networks:
        words.insert(0, f"--networks={','.join(networks)}")
    if options.workdirs:
        words.append(f"--workdirs={','.join(Path(workdir).name for workdir in options.workdirs)}")
    device = ask("device")
    session = Session(device["device"], device["platform"], " ".join(["python -m benchmarks.export", *words]),
                      options.rounds, options.seconds)
    tables = [files(session, cases)] if cases else []
    if options.workdirs:
        tables.append(agreement(session, options.workdirs))
    text = f"`{session.command}`, {machine(('jax', 'onnx', 'onnxruntime'))}:\n\n{Part(tables).render()}"
    print(text)
    if options.append:
        records.append(root / FILE, session.rows)
    if options.write:
        replace_section(root / PAGE, "export", text)


if __name__ == "__main__":
    run_and_exit(main)
