"""Compresses a trained network at several budgets: before and after fine-tuning, from scratch, and exported.

    python -m studies.compress --write                                       ResNet-20 on the digits
    python -m studies.compress --data=fashion_mnist --epochs=3 --tuning=1 --write           an hour on two cores
    python -m studies.compress --data=DIR --network=resnet56 --write         on a directory of images (32×32)

Runs are stored below --runs, and the same command resumes them. Fine-tuned networks are exported to ONNX with folding,
and classify all test images with onnxruntime; latency is measured alternately with the plain network's file. Rows are
appended to results/compress.csv; --write updates the tables of all rows in docs/compress.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Timed, repeated
from benchmarks.common import Parser, Table, in_turns, markdown, positive
from benchmarks.export import classify, graph_of_run, load_tests, session_of
from benchmarks.records import ROOT, commit
from configs import cifar_resnet, digits_resnet
from shared_basis.cli.app import run_and_exit
from shared_basis.config import Config, from_config_dict, replace
from shared_basis.export import onnx
from shared_basis.export.folding import fold
from shared_basis.runs.trained import Trained
from shared_basis.runtime.files import write_atomic
from shared_basis.runtime.reporter import Reporter
from shared_basis.training import start, train
from studies.kept import Kept, RowsOf


@dataclasses.dataclass(frozen=True)
class CompressionRow:
    """A compressed network; the fields are the columns. Accuracies are in [0, 1]."""

    date: str
    commit: str
    command: str
    data: str
    plain: str
    seed: int
    budget: float
    network: str
    parameters: int
    macs: int
    plain_parameters: int
    plain_macs: int
    plain_accuracy: float
    compressed_accuracy: float
    tuned_epochs: int
    tuned_accuracy: float
    scratch_epochs: str
    """Empty if the network was not trained from scratch, as is its accuracy."""
    scratch_accuracy: str
    test_examples: int
    file_bytes: int
    plain_file_bytes: int
    file_accuracy: float
    latency: float
    """Seconds per image."""
    latency_over_plain: float
    rounds: int


def recipe(options: argparse.Namespace, network: str) -> Config:
    """Returns the recipe for training `network` from scratch."""
    if options.data == "digits":
        return replace(from_config_dict(digits_resnet.get_config(network)), {"seed": options.seed})
    data = {"data.name": options.data} if options.data in ("cifar10", "fashion_mnist") else {
        "data.name": "folder", "data.directory": options.data}
    if options.data == "fashion_mnist":
        data |= {"data.mean": (0.286,), "data.std": (0.353,), "data.pad": 2}
    epochs = options.epochs
    config = from_config_dict(cifar_resnet.get_config(network))
    return replace(config, {**data, "seed": options.seed, "train.epochs": epochs, "train.evaluate_every": epochs,
                            "optimizer.boundaries": (epochs / 2, epochs * 3 / 4)})


def tuning(config: Config, epochs: int) -> Config:
    """Returns the fine-tuning recipe: a tenth of the learning rate, with cosine decay to 0."""
    return replace(config, {
        "train.epochs": epochs, "train.evaluate_every": epochs, "optimizer.schedule": "cosine",
        "optimizer.boundaries": (), "optimizer.factors": (), "optimizer.warmup_epochs": 0.0,
        "optimizer.learning_rate": config.optimizer.learning_rate / 10})


def measure(options: argparse.Namespace, command: str, reporter: Reporter) -> list[CompressionRow]:
    """Returns a row for each budget; finished runs are not repeated."""
    runs = Path(options.runs) / f"{Path(options.data).name}-{options.network}-{options.seed}"
    plain = recipe(options, options.network)
    train.train(plain, runs / "plain", reporter)
    learned: list[dict[str, Any]] = []
    for budget in options.budgets:
        workdir, kept = runs / f"{budget:g}", runs / f"{budget:g}.json"
        if not kept.exists():
            result = start.compress_run(tuning(plain, options.tuning), workdir, str(runs / "plain"), reporter,
                                        budget=budget)
            write_atomic(kept, json.dumps(result))
        found = json.loads(kept.read_text())
        scratch = recipe(options, found["model"])
        tuned = train.train(tuning(scratch, options.tuning), workdir, reporter)
        alone = {} if options.noscratch else train.train(scratch, runs / found["model"], reporter)
        learned.append({
            "date": datetime.date.today().isoformat(), "commit": commit(), "command": command,
            "data": Path(options.data).name, "plain": options.network, "seed": options.seed, "budget": budget,
            "network": found["model"], "parameters": found["parameters"], "macs": found["macs"],
            "plain_parameters": found["plain"]["parameters"], "plain_macs": found["plain"]["macs"],
            "plain_accuracy": found["test_accuracy"]["plain"],
            "compressed_accuracy": found["test_accuracy"]["compressed"],
            "tuned_epochs": options.tuning, "tuned_accuracy": tuned["test_accuracy"],
            "scratch_epochs": str(scratch.train.epochs) if alone else "",
            "scratch_accuracy": str(alone["test_accuracy"]) if alone else "",
            "test_examples": found["test_examples"]})
    shipped = ship([runs / "plain", *(runs / f"{budget:g}" for budget in options.budgets)], options.rounds, reporter)
    return [CompressionRow(**row, **file) for row, file in zip(learned, shipped, strict=True)]


def ship(workdirs: Sequence[Path], rounds: int, reporter: Reporter) -> list[dict[str, Any]]:
    """Exports runs with folding; returns size, accuracy and latency of each file, except for the first, plain one."""
    opened = [Trained.open(workdir) for workdir in workdirs]
    tests = load_tests(opened[0], reporter)
    labels = np.concatenate([classes for _, classes in tests])
    contents = [onnx.serialise(fold(graph_of_run(trained), "auto")[0], {})[""] for trained in opened]
    sessions = [session_of(content) for content in contents]
    one = {"images": tests[0][0][:1]}
    timed = {index: Timed(repeated(functools.partial(session.run, None, one)))
             for index, session in enumerate(sessions)}
    reporter.info(f"timing {len(sessions)} files, an image at a time …")
    for measure_one in timed.values():
        measure_one()  # determines the number of calls
    plain, *others = in_turns(timed, rounds).values()
    return [{"file_bytes": len(content), "plain_file_bytes": len(contents[0]),
             "file_accuracy": float(np.mean(classify(session, tests).argmax(-1) == labels)),
             "latency": float(f"{statistics.median(seconds):.4g}"),
             "latency_over_plain": round(statistics.median(a / b for a, b in zip(seconds, plain, strict=True)), 3),
             "rounds": rounds} for content, session, seconds in zip(contents[1:], sessions[1:], others, strict=True)]


def tables(rows: Sequence[CompressionRow]) -> str:
    """Returns two Markdown tables: on accuracy and on the exported files."""
    def percent(value: float) -> str:
        return f"{100 * value:.2f}"

    def part(one: int, other: int) -> str:
        return f"{100 * one / other:.0f} %"
    learned: Table = [["data, plain network", "budget", "network", "parameters", "MACs", "plain", "compressed",
                       "fine-tuned", "from scratch", "date"]]
    shipped: Table = [["data, network", "file, KiB", "over plain's", "accuracy of the file", "latency, ms",
                       "over plain's"]]
    for row in rows:
        scratch = f"{percent(float(row.scratch_accuracy))} ({row.scratch_epochs})" if row.scratch_epochs else "not run"
        learned.append([f"{row.data}, {row.plain}", f"{row.budget:g}", row.network,
                        part(row.parameters, row.plain_parameters), part(row.macs, row.plain_macs),
                        percent(row.plain_accuracy), percent(row.compressed_accuracy),
                        f"{percent(row.tuned_accuracy)} ({row.tuned_epochs})", scratch, row.date])
        shipped.append([f"{row.data}, {row.network}", f"{row.file_bytes / 1024:.0f}",
                        part(row.file_bytes, row.plain_file_bytes), percent(row.file_accuracy),
                        f"{1000 * row.latency:.3g}", f"{row.latency_over_plain:.2f}"])
    return f"\n{markdown(learned)}\n{markdown(shipped)}\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10, fashion_mnist, or a directory of images")
    parser.add_argument("--network", default="resnet20", help="name of the plain network")
    parser.add_argument("--budgets", type=_budget, nargs="+", default=[0.35, 0.5, 0.75],
                        help="fractions of its parameters")
    parser.add_argument("--epochs", type=positive, default=12, help="epochs from scratch (digits: always 24)")
    parser.add_argument("--tuning", type=positive, default=4, help="epochs of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noscratch", action="store_true", help="train only the plain network from scratch")
    parser.add_argument("--rounds", type=positive, default=9, help="number of latency measurements per file")
    parser.add_argument("--runs", default="runs/compress", help="directory for the runs")
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/compress.md")
    return parser.parse_args(arguments)


def _budget(text: str) -> float:
    """Returns a number above 0 and at most 1; raises argparse's error for other text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a budget is above 0 and at most 1")
    return value


STUDY = Kept("compress", CompressionRow, Path("docs") / "compress.md",
             noted=("date", "commit", "command", "latency", "latency_over_plain"),
             subject=("data", "plain", "seed", "budget"), table=tables)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, rows_of: RowsOf[CompressionRow] = measure) -> None:
    """Measures, stores the rows below `root`, prints the tables, and writes them to the page if requested.

    Args:
      rows_of: measures according to the options and returns rows, which contain the command.

    Raises:
      UserError: an option does not fit the data, a package is missing, or the rows cannot be read.
      SystemExit: an option is invalid.
    """
    options = parse(arguments)
    onnx.require_packages()
    STUDY.run(options, arguments, root, rows_of)


if __name__ == "__main__":
    run_and_exit(main)
