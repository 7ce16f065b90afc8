"""Measures what a compressed network gains by distillation from its source: fine-tuned with and without, by seed.

    python -m studies.distill --write                                              ResNet-20 on the digits
    python -m studies.distill --data=fashion_mnist --examples=6000 --epochs=10 --tuning=3 --write
    python -m studies.distill --data=DIR --examples=5000 --epochs=15 --tuning=3 --write      a directory (32×32)

For each seed, a plain network is trained and compressed to a fraction of its parameters. Two copies are fine-tuned with
the same batches and augmentation: one by labels only, one also by the plain network's logits. Runs are stored below
--runs, and the same command resumes them. Rows are appended to results/distill.csv; --write updates the table of all
rows in docs/finetune.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import Parser, Table, markdown, positive
from benchmarks.records import ROOT, commit
from shared_basis.cli.app import run_and_exit
from shared_basis.config import Config, DistillationConfig, replace
from shared_basis.runtime.files import write_atomic
from shared_basis.runtime.reporter import Reporter
from shared_basis.training import start, train
from studies.compress import recipe, tuning
from studies.findings import mean_and_deviation
from studies.kept import Kept, by_seed, gain


@dataclasses.dataclass(frozen=True)
class DistillationRow:
    """A network that was compressed and fine-tuned twice; the fields are the columns. Accuracies are in [0, 1]."""

    date: str
    commit: str
    command: str
    data: str
    plain: str
    budget: float
    tuned_epochs: int
    weight: float
    temperature: float
    train_examples: int
    """0 for all images."""
    seed: int
    network: str
    plain_accuracy: float
    compressed_accuracy: float
    labels_accuracy: float
    taught_accuracy: float
    test_examples: int


def recipes(options: argparse.Namespace, network: str, teacher: Path) -> dict[str, Config]:
    """Returns the fine-tuning recipes for `network`: by labels only, and also by the teacher's logits."""
    labels = replace(tuning(recipe(options, network), options.tuning), {"data.train_examples": options.examples})
    return {"labels": labels, "taught": replace(labels, {
        "distillation.teacher": str(teacher), "distillation.weight": options.weight,
        "distillation.temperature": options.temperature})}


def measure(options: argparse.Namespace, command: str, reporter: Reporter) -> DistillationRow:
    """Returns the row of `options.seed`; finished runs are not repeated."""
    runs = Path(options.runs) / f"{Path(options.data).name}-{options.network}-{options.examples}-{options.seed}"
    plain = runs / "plain"
    train.train(replace(recipe(options, options.network), {"data.train_examples": options.examples}), plain, reporter)
    tuned: dict[str, float] = {}
    for way, config in recipes(options, options.network, plain).items():
        taught = f"-{options.weight:g}-{options.temperature:g}" * (way == "taught")
        workdir = runs / f"{way}-{options.budget:g}-{options.tuning}{taught}"
        kept = workdir.with_suffix(f"{workdir.suffix}.json")
        if not kept.exists():
            result = start.compress_run(config, workdir, str(plain), reporter, budget=options.budget)
            write_atomic(kept, json.dumps(result))
        found = json.loads(kept.read_text())
        tuned[way] = train.train(recipes(options, found["model"], plain)[way], workdir, reporter)["test_accuracy"]
    return DistillationRow(
        datetime.date.today().isoformat(), commit(), command, Path(options.data).name, options.network, options.budget,
        options.tuning, options.weight, options.temperature, options.examples, options.seed, found["model"],
        found["test_accuracy"]["plain"], found["test_accuracy"]["compressed"], tuned["labels"], tuned["taught"],
        found["test_examples"])


def table(rows: Sequence[DistillationRow]) -> str:
    """Returns a Markdown table of means and deviations over seeds, and of paired differences."""
    if not rows:
        return "\nNot run yet.\n\n"
    lines: Table = [["data, plain network", "budget", "images", "epochs", "plain", "compressed", "labels alone",
                     "with the teacher", "gain, points"]]
    for runs in STUDY.over_seeds(rows):
        accuracies = [mean_and_deviation([100 * getattr(row, f"{name}_accuracy") for row in runs])
                      for name in ("plain", "compressed", "labels", "taught")]
        lines.append([f"{runs[0].data}, {runs[0].plain}", f"{runs[0].budget:g}",
                      f"{runs[0].train_examples:,}" if runs[0].train_examples else "all", str(runs[0].tuned_epochs),
                      *accuracies, gain([100 * (row.taught_accuracy - row.labels_accuracy) for row in runs])])
    return f"\n{markdown(lines)}\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    taught = DistillationConfig()
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10, fashion_mnist, or a directory of images")
    parser.add_argument("--network", default="resnet20", help="name of the plain network")
    parser.add_argument("--budget", type=float, default=0.35, help="the fraction of its parameters")
    parser.add_argument("--epochs", type=positive, default=12, help="epochs of the plain network (digits: always 24)")
    parser.add_argument("--tuning", type=positive, default=4, help="epochs of fine-tuning")
    parser.add_argument("--examples", type=int, default=0, help="number of training images; 0 for all")
    parser.add_argument("--weight", type=float, default=taught.weight, help="distillation.weight")
    parser.add_argument("--temperature", type=float, default=taught.temperature, help="distillation.temperature")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, starting from 0")
    parser.add_argument("--runs", default="runs/distill", help="directory for the runs")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/finetune.md")
    return parser.parse_args(arguments)


STUDY = Kept("distill", DistillationRow, Path("docs") / "finetune.md", noted=("date", "commit", "command"),
             subject=("data", "plain", "budget", "tuned_epochs", "weight", "temperature", "train_examples", "seed"),
             table=table)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT,
         row_of: Callable[[argparse.Namespace, str, Reporter], DistillationRow] = measure) -> None:
    """Measures, stores the rows below `root`, prints the table, and writes it to the page if requested.

    Args:
      row_of: measures one seed according to the options and returns its row, which contains the command.

    Raises:
      UserError: an option does not fit the data, or the rows cannot be read.
      SystemExit: an option is invalid.
    """
    STUDY.run(parse(arguments), arguments, root, by_seed(row_of))


if __name__ == "__main__":
    run_and_exit(main)
