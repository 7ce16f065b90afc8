"""Measures what new classes with few images gain from a network trained on other classes: by seed, with and without.

    python -m studies.transfer --data=DIR --write              a directory of images (32×32), in train/ and test/

Classes are split by name: the first --source of them train a network, with --source-examples images. The others are
learned twice from --examples images: from scratch with the CIFAR-10 recipe, and from that network with the fine-tuning
recipe (configs/finetune.py). Both train for --epochs. Runs are stored below --runs, and the same command resumes them.
Rows are appended to results/transfer.csv; --write updates the table of all rows in docs/transfer.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import Parser, Table, markdown, positive
from benchmarks.records import ROOT, commit
from configs import cifar_resnet, finetune
from shared_basis.cli.app import run_and_exit
from shared_basis.config import Config, from_config_dict, replace
from shared_basis.errors import UserError
from shared_basis.runtime.reporter import Reporter
from shared_basis.training import train
from studies.findings import mean_and_deviation
from studies.kept import Kept, by_seed, gain


@dataclasses.dataclass(frozen=True)
class TransferRow:
    """A network for some classes, and one for the others trained twice; accuracies in [0, 1] are of all test images."""

    date: str
    commit: str
    command: str
    data: str
    network: str
    source_classes: int
    source_examples: int
    source_epochs: int
    classes: int
    examples: int
    """Number of available training images of the other classes."""
    epochs: int
    seed: int
    source_accuracy: float
    scratch_accuracy: float
    transfer_accuracy: float


def divide(images: Path, into: Path, source: int) -> tuple[Path, Path]:
    """Links the first `source` classes below one directory and the others below another; returns both.

    Raises:
      UserError: `images` has no train/ and test/, or too few classes for two parts.
    """
    splits = [images / "train", images / "test"]
    if not all(split.is_dir() for split in splits):
        raise UserError(f"--data={images}: must be a directory with train/ and test/, each with class directories.")
    names = sorted(path.name for path in splits[0].iterdir() if path.is_dir())
    if not 2 <= source <= len(names) - 2:
        raise UserError(f"--source={source}: {images} has {len(names)} classes; each part needs at least two.")
    parts = into / f"first-{source}", into / f"other-{len(names) - source}"
    for part, classes in zip(parts, (names[:source], names[source:]), strict=True):
        for split in splits:
            (part / split.name).mkdir(parents=True, exist_ok=True)
            for name in classes:
                link = part / split.name / name
                if not link.is_symlink():
                    link.symlink_to((split / name).resolve(), target_is_directory=True)
    return parts


def recipes(options: argparse.Namespace, source: Path, others: Path) -> dict[str, Config]:
    """Returns the recipe of each of the three networks."""
    def of(config: Config, directory: Path, examples: int, epochs: int) -> Config:
        return replace(config, {
            "data.name": "folder", "data.directory": str(directory), "data.image_size": 32,
            "data.train_examples": examples, "data.validation": 0.0, "seed": options.seed, "train.epochs": epochs,
            "train.evaluate_every": epochs, "train.batch_size": options.batch})

    scratch = from_config_dict(cifar_resnet.get_config(options.network))
    scratch = replace(scratch, {"optimizer.boundaries": (0.5, 0.75)})
    fields = finetune.get_config(options.network)
    fields.data.directory = str(others)
    tuned = from_config_dict(fields)
    return {"source": of(scratch, source, options.source_examples, options.source_epochs),
            "scratch": of(scratch, others, options.examples, options.epochs),
            "transfer": of(tuned, others, options.examples, options.epochs)}


def measure(options: argparse.Namespace, command: str, reporter: Reporter) -> TransferRow:
    """Returns the row of `options.seed`; finished runs are not repeated."""
    runs = Path(options.runs) / f"{Path(options.data).name}-{options.network}"
    source, others = divide(Path(options.data), runs / "classes", options.source)
    configs = recipes(options, source, others)
    base = runs / f"source-{options.source_examples}-{options.source_epochs}-{options.seed}"
    found = {"source": train.train(configs["source"], base, reporter)}
    for way, init in (("scratch", None), ("transfer", str(base))):
        workdir = runs / f"{way}-{options.examples}-{options.epochs}-{options.seed}"
        found[way] = train.train(configs[way], workdir, reporter, init=init)
    return TransferRow(
        datetime.date.today().isoformat(), commit(), command, Path(options.data).name, options.network, options.source,
        options.source_examples, options.source_epochs, len(list((others / "train").iterdir())), options.examples,
        options.epochs, options.seed, *(found[way]["test_accuracy"] for way in ("source", "scratch", "transfer")))


def table(rows: Sequence[TransferRow]) -> str:
    """Returns a Markdown table of means and deviations over seeds, and of paired differences."""
    if not rows:
        return "\nNot run yet.\n\n"
    lines: Table = [["data, network", "classes: images, before", "classes: images, new", "epochs", "before",
                     "new, from scratch", "new, with `--init`", "gain, points"]]
    for runs in STUDY.over_seeds(rows):
        accuracies = [mean_and_deviation([100 * getattr(row, f"{name}_accuracy") for row in runs])
                      for name in ("source", "scratch", "transfer")]
        lines.append([f"{runs[0].data}, {runs[0].network}", f"{runs[0].source_classes}: {runs[0].source_examples:,}",
                      f"{runs[0].classes}: {runs[0].examples:,}", str(runs[0].epochs), *accuracies,
                      gain([100 * (row.transfer_accuracy - row.scratch_accuracy) for row in runs])])
    return f"\n{markdown(lines)}\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a directory of images, in train/ and test/, by class")
    parser.add_argument("--network", default="resnet20-s8u1-double", help="the network, for 32×32 images")
    parser.add_argument("--source", type=positive, default=5, help="number of classes of the source network")
    parser.add_argument("--source-examples", type=positive, default=10000, help="training images of the source")
    parser.add_argument("--source-epochs", type=positive, default=12, help="its epochs")
    parser.add_argument("--examples", type=positive, default=500, help="number of training images of the other classes")
    parser.add_argument("--epochs", type=positive, default=20, help="epochs on the other classes")
    parser.add_argument("--batch", type=positive, default=50, help="images per step")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, starting from 0")
    parser.add_argument("--runs", default="runs/transfer", help="directory for the runs")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/transfer.md")
    return parser.parse_args(arguments)


STUDY = Kept("transfer", TransferRow, Path("docs") / "transfer.md", noted=("date", "commit", "command"),
             subject=("data", "network", "source_classes", "source_examples", "source_epochs", "classes", "examples",
                      "epochs", "seed"),
             table=table)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT,
         row_of: Callable[[argparse.Namespace, str, Reporter], TransferRow] = measure) -> None:
    """Measures, stores the rows below `root`, prints the table, and writes it to the page if requested.

    Args:
      row_of: measures one seed according to the options and returns its row, which contains the command.

    Raises:
      UserError: the directory has an invalid layout, or the rows cannot be read.
      SystemExit: an option is invalid.
    """
    STUDY.run(parse(arguments), arguments, root, by_seed(row_of))


if __name__ == "__main__":
    run_and_exit(main)
