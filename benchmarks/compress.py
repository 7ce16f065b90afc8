"""Compression of a trained network at several budgets, before and after fine-tuning, beside training from scratch.

    python benchmarks/compress.py --write                                       ResNet-20 on the digits
    python benchmarks/compress.py --data=DIR --network=resnet56 --write         on a directory of images (32×32)

Runs are kept below --runs: the same command goes on where it was stopped. What is finished is added to
results/compress.csv; --write puts the table of all that is there into docs/compress.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from benchmarks.common import Table, markdown, replace_section
from benchmarks.records import ROOT, commit
from configs import cifar_resnet, digits_resnet
from shared_basis import compressing, train
from shared_basis.config import Config, from_config_dict, replace
from shared_basis.errors import UserError, end_with
from shared_basis.screen import Screen

RECORDS, PAGE = ROOT / "results" / "compress.csv", ROOT / "docs" / "compress.md"
BEGIN, END = "<!-- compress -->\n", "<!-- end of compress -->\n"

COLUMNS = ("date", "commit", "command", "data", "plain", "seed", "budget", "network", "parameters", "macs",
           "plain_parameters", "plain_macs", "plain_accuracy", "compressed_accuracy", "tuned_epochs", "tuned_accuracy",
           "scratch_epochs", "scratch_accuracy", "test_examples")

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


def measure(options: argparse.Namespace, screen: Screen) -> Iterator[Row]:
    """Yields a row for each budget as soon as it is finished; what is finished already takes no time."""
    runs = Path(options.runs) / f"{Path(options.data).name}-{options.network}-{options.seed}"
    plain = recipe(options, options.network)
    train.train(plain, runs / "plain", screen)
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
        alone = train.train(scratch, runs / found["model"], screen)
        yield {"data": Path(options.data).name, "plain": options.network, "seed": options.seed, "budget": budget,
               "network": found["model"], "parameters": found["parameters"], "macs": found["macs"],
               "plain_parameters": found["plain"]["parameters"], "plain_macs": found["plain"]["macs"],
               "plain_accuracy": found["test_accuracy"]["plain"],
               "compressed_accuracy": found["test_accuracy"]["compressed"],
               "tuned_epochs": options.tuning, "tuned_accuracy": tuned["test_accuracy"],
               "scratch_epochs": scratch.train.epochs, "scratch_accuracy": alone["test_accuracy"],
               "test_examples": found["test_examples"]}


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of the file, if there is one."""
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
    if any(all(each[name] == str(value) for name, value in row.items()) for each in read(path)):
        return
    kept = [each for each in read(path)
            if any(each[name] != new[name] for name in ("data", "plain", "seed", "budget"))]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, new])
    os.replace(temporary, path)


def table(rows: list[dict[str, str]]) -> Table:
    """Returns the rows as a table for a person."""
    def percent(value: str) -> str:
        return f"{100 * float(value):.2f}"
    lines = [["data, plain network", "budget", "network", "parameters", "MACs", "plain", "compressed", "fine-tuned",
              "from scratch", "date"]]
    for row in rows:
        parts = [f"{100 * int(row[name]) / int(row[f'plain_{name}']):.0f} %" for name in ("parameters", "macs")]
        lines.append([f"{row['data']}, {row['plain']}", row["budget"], row["network"], *parts,
                      *(percent(row[f"{name}_accuracy"]) for name in ("plain", "compressed")),
                      *(f"{percent(row[f'{name}_accuracy'])} ({row[f'{name}_epochs']})"
                        for name in ("tuned", "scratch")), row["date"]])
    return lines


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10, fashion_mnist, or a directory of images")
    parser.add_argument("--network", default="resnet20", help="the plain network")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.5, 0.75], help="parts of its parameters")
    parser.add_argument("--epochs", type=int, default=12, help="of training from scratch; of digits the recipe's 24")
    parser.add_argument("--tuning", type=int, default=4, help="epochs of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="runs/compress", help="where runs are kept")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/compress.md")
    options = parser.parse_args(arguments)
    if any(not 0 < budget <= 1 for budget in options.budgets):
        raise UserError(f"--budgets={options.budgets}: each must be above 0 and at most 1.")
    if min(options.epochs, options.tuning) < 1:
        raise UserError("--epochs and --tuning: must be positive.")
    return options


def main() -> None:
    """Measures, records, and writes the table if asked to."""
    options = parse(sys.argv[1:])
    words = [f"--data={Path(options.data).name}" if word.startswith("--data=") else word for word in sys.argv[1:]
             if not word.startswith("--runs")]  # no path of this machine
    command = shlex.join(["python", "benchmarks/compress.py", *words])
    with Screen(sys.stderr) as screen:
        for row in measure(options, screen):
            record(RECORDS, row, command)
    text = "\n" + markdown(table(read(RECORDS))) + "\n"
    print(text)
    if options.write:
        replace_section(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    end_with(main)
