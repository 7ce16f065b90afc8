"""A trained network compressed at several budgets: before and after fine-tuning, from scratch, and as a file to ship.

    python benchmarks/compress.py --write                                       ResNet-20 on the digits
    python benchmarks/compress.py --data=fashion_mnist --epochs=4 --tuning=1 --noscratch --write
    python benchmarks/compress.py --data=DIR --network=resnet56 --write         on a directory of images (32×32)

Runs are kept below --runs: the same command goes on where it was stopped. Fine-tuned networks are exported folded, as
ONNX, and classify all test images by onnxruntime; files are timed in turns with the plain network's. The rows go to
results/compress.csv; --write puts the tables of all that is there into docs/compress.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

import numpy as np

from benchmarks.cases import Timed, repeated
from benchmarks.common import Table, in_turns, markdown, replace_section
from benchmarks.export import classify, graph_of_run, load_tests, session_of
from benchmarks.records import ROOT, check_file, commit
from configs import cifar_resnet, digits_resnet
from shared_basis import compressing, train
from shared_basis.config import Config, from_config_dict, replace
from shared_basis.errors import UserError, end_with
from shared_basis.evaluate import Trained
from shared_basis.export import onnx_file
from shared_basis.export.folding import fold
from shared_basis.screen import Screen

RECORDS, PAGE = ROOT / "results" / "compress.csv", ROOT / "docs" / "compress.md"
BEGIN, END = "<!-- compress -->\n", "<!-- end of compress -->\n"

COLUMNS = ("date", "commit", "command", "data", "plain", "seed", "budget", "network", "parameters", "macs",
           "plain_parameters", "plain_macs", "plain_accuracy", "compressed_accuracy", "tuned_epochs", "tuned_accuracy",
           "scratch_epochs", "scratch_accuracy", "test_examples", "file_bytes", "plain_file_bytes", "file_accuracy",
           "latency", "latency_over_plain", "rounds")
TIMES = ("latency", "latency_over_plain")
"""Columns that differ from call to call."""

Row = Mapping[str, Any]


def recipe(options: argparse.Namespace, network: str) -> Config:
    """Returns the recipe of `network` from scratch."""
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
    """Returns the recipe of fine-tuning: a tenth of the learning rate, which falls to 0 as a cosine."""
    return replace(config, {
        "train.epochs": epochs, "train.evaluate_every": epochs, "optimizer.schedule": "cosine",
        "optimizer.boundaries": (), "optimizer.factors": (), "optimizer.warmup_epochs": 0.0,
        "optimizer.learning_rate": config.optimizer.learning_rate / 10})


def measure(options: argparse.Namespace, screen: Screen) -> list[Row]:
    """Returns a row for each budget; runs that are finished already take no time."""
    runs = Path(options.runs) / f"{Path(options.data).name}-{options.network}-{options.seed}"
    plain = recipe(options, options.network)
    train.train(plain, runs / "plain", screen)
    rows = []
    for budget in options.budgets:
        workdir, told = runs / f"{budget:g}", runs / f"{budget:g}.json"
        if not told.exists():
            result = compressing.compress(tuning(plain, options.tuning), workdir, str(runs / "plain"), screen,
                                          budget=budget)
            temporary = told.with_suffix(".tmp")
            temporary.write_text(json.dumps(result))
            os.replace(temporary, told)
        found = json.loads(told.read_text())
        scratch = recipe(options, found["model"])
        tuned = train.train(tuning(scratch, options.tuning), workdir, screen)
        alone = {} if options.noscratch else train.train(scratch, runs / found["model"], screen)
        rows.append({
            "data": Path(options.data).name, "plain": options.network, "seed": options.seed, "budget": budget,
            "network": found["model"], "parameters": found["parameters"], "macs": found["macs"],
            "plain_parameters": found["plain"]["parameters"], "plain_macs": found["plain"]["macs"],
            "plain_accuracy": found["test_accuracy"]["plain"],
            "compressed_accuracy": found["test_accuracy"]["compressed"],
            "tuned_epochs": options.tuning, "tuned_accuracy": tuned["test_accuracy"],
            "scratch_epochs": scratch.train.epochs if alone else "", "scratch_accuracy": alone.get("test_accuracy", ""),
            "test_examples": found["test_examples"]})
    shipped = ship([runs / "plain", *(runs / f"{budget:g}" for budget in options.budgets)], options.rounds, screen)
    return [{**row, **file} for row, file in zip(rows, shipped, strict=True)]


def ship(workdirs: Sequence[Path], rounds: int, screen: Screen) -> list[Row]:
    """Exports runs, folded, and returns of each but the first, the plain one, how large, right and fast its file is."""
    opened = [Trained.open(workdir) for workdir in workdirs]
    tests = load_tests(opened[0], screen)
    labels = np.concatenate([classes for _, classes in tests])
    contents = [onnx_file.serialise(fold(graph_of_run(trained), "auto")[0], {})[""] for trained in opened]
    sessions = [session_of(content) for content in contents]
    one = {"images": tests[0][0][:1]}
    screen.line(f"timing {len(sessions)} files, an image at a time …")
    seconds = in_turns({index: Timed(repeated(functools.partial(session.run, None, one)))
                        for index, session in enumerate(sessions)}, rounds + 1)
    del seconds[0][0]  # the first round finds out how often
    ratios = [[a / b for a, b in zip(each[1:], seconds[0], strict=True)] for each in list(seconds.values())[1:]]
    return [{"file_bytes": len(contents[index]), "plain_file_bytes": len(contents[0]),
             "file_accuracy": float(np.mean(classify(sessions[index], tests).argmax(-1) == labels)),
             "latency": f"{statistics.median(seconds[index][1:]):.4g}",
             "latency_over_plain": f"{statistics.median(over_plain):.3f}", "rounds": rounds}
            for index, over_plain in enumerate(ratios, 1)]


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of the file, if there is one; raises `UserError` for one with other columns."""
    check_file(path, COLUMNS)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def record(path: Path, row: Row, command: str) -> None:
    """Adds a row to the file, in place of an older one of the same network, data, seed and budget.

    One that finds the same is kept, with the commit that it was found at.
    """
    new = {name: str(value) for name, value in {"date": datetime.date.today().isoformat(), "commit": commit(),
                                                "command": command, **row}.items()}
    if any(all(each[name] == str(value) for name, value in row.items() if name not in TIMES) for each in read(path)):
        return
    kept = [each for each in read(path)
            if any(each[name] != new[name] for name in ("data", "plain", "seed", "budget"))]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, new])
    os.replace(temporary, path)


def tables(rows: list[dict[str, str]]) -> str:
    """Returns the rows as two tables for a person: what was learned, and what is shipped."""
    def percent(value: str) -> str:
        return f"{100 * float(value):.2f}"

    def part(row: dict[str, str], one: str, other: str) -> str:
        return f"{100 * int(row[one]) / int(row[other]):.0f} %"
    learned: Table = [["data, plain network", "budget", "network", "parameters", "MACs", "plain", "compressed",
                       "fine-tuned", "from scratch", "date"]]
    shipped: Table = [["data, network", "file, KiB", "over plain's", "accuracy of the file", "latency, ms",
                       "over plain's"]]
    for row in rows:
        learned.append([f"{row['data']}, {row['plain']}", row["budget"], row["network"],
                        *(part(row, name, f"plain_{name}") for name in ("parameters", "macs")),
                        *(percent(row[f"{name}_accuracy"]) for name in ("plain", "compressed")),
                        *(f"{percent(row[f'{name}_accuracy'])} ({row[f'{name}_epochs']})" if row[f"{name}_epochs"]
                          else "not run" for name in ("tuned", "scratch")), row["date"]])
        shipped.append([f"{row['data']}, {row['network']}", f"{int(row['file_bytes']) / 1024:.0f}",
                        part(row, "file_bytes", "plain_file_bytes"), percent(row["file_accuracy"]),
                        f"{1000 * float(row['latency']):.3g}", f"{float(row['latency_over_plain']):.2f}"])
    return f"\n{markdown(learned)}\n{markdown(shipped)}\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10, fashion_mnist, or a directory of images")
    parser.add_argument("--network", default="resnet20", help="the plain network")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.5, 0.75], help="parts of its parameters")
    parser.add_argument("--epochs", type=int, default=12, help="of training from scratch; of digits the recipe's 24")
    parser.add_argument("--tuning", type=int, default=4, help="epochs of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noscratch", action="store_true", help="train nothing from scratch but the plain network")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each file's latency")
    parser.add_argument("--runs", default="runs/compress", help="where runs are kept")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/compress.md")
    options = parser.parse_args(arguments)
    if any(not 0 < budget <= 1 for budget in options.budgets):
        raise UserError(f"--budgets={options.budgets}: each must be above 0 and at most 1.")
    if min(options.epochs, options.tuning, options.rounds) < 1:
        raise UserError("--epochs, --tuning and --rounds: must be positive.")
    return options


def main() -> None:
    """Measures, records, and writes the table if asked to."""
    options = parse(sys.argv[1:])
    onnx_file.require_packages()
    words = [f"--data={Path(options.data).name}" if word.startswith("--data=") else word for word in sys.argv[1:]
             if not word.startswith("--runs")]  # no path of this machine
    command = shlex.join(["python", "benchmarks/compress.py", *words])
    with Screen(sys.stderr) as screen:
        for row in measure(options, screen):
            record(RECORDS, row, command)
    text = tables(read(RECORDS))
    print(text)
    if options.write:
        replace_section(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    end_with(main)
