"""Trains the networks of a study over several seeds, and regenerates the tables of the documentation from all rows.

The tables are in the sections of docs/results.md, its overview, and the results in README.md; a figure of all errors
against numbers of parameters is in docs/images (results-light.svg and results-dark.svg).

    python -m studies.experiments --study=digits              about an hour on two cores; the same command resumes
    python -m studies.experiments --study=cifar60 --images=DIR --jobs=4 --devices=0,1
    python -m studies.experiments --write                     only update the tables, without training

Each run executes `main.py` in a separate process, and adds a row to results/study-<name>.csv when it is finished. Runs
with a row are not repeated; interrupted runs resume from their last checkpoint (their time only includes the rest).
Ctrl-C or SIGTERM stops the study: current runs save their state, and no others are started.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import Parser, markdown, positive, replace_section, section_of, versions
from benchmarks.records import ROOT, append, commit, read
from shared_basis.cli.app import run_and_exit
from shared_basis.errors import UserError
from studies.definitions import STUDIES, Study, Variant
from studies.figure import write_pictures
from studies.findings import StudyRow, glance, of, overview, section

BASES = ("penalty", "norm_min", "norm_mean", "norm_max", "coherence")
"""Columns that only apply to networks with bases."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A network of a study, trained with one seed."""

    name: str
    """The name of the study."""
    study: Study
    variant: Variant
    seed: int

    def __str__(self) -> str:
        return f"{self.variant.label}, seed {self.seed}"

    def arguments(self, images: Path | None, workdirs: Path) -> list[str]:
        """Returns the arguments of main.py."""
        label = "".join(char if char.isalnum() else "-" for char in self.variant.label)
        return [f"--config={self.study.config}:{self.variant.network}", f"--config.seed={self.seed}",
                *self.study.settings, *self.variant.settings,
                *([f"--config.data.directory={images}"] if self.study.needs_images else []),
                f"--workdir={workdirs / self.name / f'{label}-{self.seed}'}"]


class Children:
    """The running processes of a study; after a stop request they are stopped, and no others are started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """The working directory of the processes."""
        self.stopped_by = 0
        """The signal that requested the stop."""
        self._running: set[subprocess.Popen[str]] = set()

    def stop(self, signum: int, _: Any) -> None:
        """Signal handler: requests all processes to save and exit."""
        self.stopped_by = signum
        for process in tuple(self._running):
            process.send_signal(signal.SIGTERM)

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
        """Runs a process; returns its exit code and its standard output and error."""
        # In a new session, so that Ctrl-C in the terminal only reaches it once, through this process.
        with subprocess.Popen(words, cwd=self.directory, env=environment, text=True, start_new_session=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            self._running.add(process)
            if self.stopped_by:  # stopped after the check before starting
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate()
            self._running.discard(process)
        return process.returncode, out, err


def parse(arguments: Sequence[str] | None, studies: Mapping[str, Study] = STUDIES) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", choices=tuple(studies), help="the study to train; by default nothing is trained")
    parser.add_argument("--seeds", type=positive, help="number of seeds; default: that of the study")
    parser.add_argument("--variants", default="", help="only variants whose label contains one of these words, a,b")
    parser.add_argument("--images", type=Path, help="the directory of images, if the study needs one")
    parser.add_argument("--jobs", type=positive, default=1, help="number of concurrent runs")
    parser.add_argument("--devices", default="", help="indices of the GPUs for the jobs, e.g. 0,1")
    parser.add_argument("--workdirs", type=Path, default=Path("runs") / "studies", help="directory for the runs")
    parser.add_argument("--write", action="store_true",
                        help="update the tables in docs/results.md and README.md (also done at the end)")
    options = parser.parse_args(arguments)
    if not options.study and not options.write:
        parser.error(f"give --study ({', '.join(studies)}), or --write to update the tables")
    return options


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, studies: Mapping[str, Study] = STUDIES) -> int:
    """Runs the study; returns 0, 1 if a run failed, or 128 + the number of the signal that stopped it.

    Args:
      root: contains main.py, the rows and the pages.

    Raises:
      UserError: see `run_study` and `write_pages`.
      SystemExit: an option is invalid.
    """
    options = parse(arguments, studies)
    failed, children = 0, Children(root)
    if options.study:
        before = {signum: signal.signal(signum, children.stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            failed = run_study(options.study, studies[options.study], options, children)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
    if children.stopped_by:
        print("stopped; the same command resumes from the last checkpoints", file=sys.stderr)
        return 128 + children.stopped_by
    write_pages(root, studies)
    return int(failed > 0)


def run_study(name: str, study: Study, options: argparse.Namespace, children: Children) -> int:
    """Trains the runs that have no row yet; returns the number of failed runs.

    Raises:
      UserError: the study needs images, no variant matches, or the rows cannot be read.
    """
    if study.needs_images and (options.images is None or not options.images.is_dir()):
        raise UserError(f"--study={name} needs --images=DIR, a directory with train/<class>/* and test/<class>/*.")
    words = [word.strip() for word in options.variants.split(",") if word.strip()]
    variants = [variant for variant in study.variants if not words or any(word in variant.label for word in words)]
    if not variants:
        raise UserError(f"--variants={options.variants}: matches none of {', '.join(v.label for v in study.variants)}.")
    path = _rows_of(name, children.directory)
    rows = read(path, StudyRow)
    # Seeds vary slowest, so that each variant has a run early, and consecutive runs share a compiled program.
    todo = [Run(name, study, variant, seed)
            for seed in range(study.first_seed, study.first_seed + (options.seeds or study.seeds))
            for variant in variants if seed not in of(rows, variant)]
    slots: queue.Queue[str] = queue.Queue()
    devices = [device for device in options.devices.split(",") if device]
    for slot in range(options.jobs):
        slots.put(devices[slot % len(devices)] if devices else "")
    failures = []

    def train_one(number: int, run: Run) -> None:
        device = slots.get()
        try:
            if children.stopped_by:
                return
            print(f"{number + 1}/{len(todo)}: {run}", file=sys.stderr, flush=True)
            append(path, [train(run, options, device, children)])
        except UserError as error:
            if children.stopped_by:
                return
            failures.append(f"{run}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
        finally:
            slots.put(device)

    with ThreadPoolExecutor(options.jobs) as threads:
        for future in [threads.submit(train_one, *each) for each in enumerate(todo)]:
            future.result()
    return len(failures)


def train(run: Run, options: argparse.Namespace, device: str, children: Children) -> StudyRow:
    """Trains a network, or resumes its training, and returns its row.

    Args:
      device: the index of a GPU; empty for all devices.

    Raises:
      UserError: the run failed.
    """
    arguments = run.arguments(options.images, options.workdirs)
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    began = time.monotonic()
    code, out, err = children.run(
        [sys.executable, "main.py", *arguments, "--json", "--quiet", "--noreport"], environment)
    if code:
        raise UserError((err.strip().splitlines() or [f"exit code {code}"])[-1])
    result, found = json.loads(out), versions(("jax", "flax"))
    shown = [word for word in arguments if not word.startswith(("--config.data.directory=", "--workdir="))]
    return StudyRow(
        date=datetime.date.today().isoformat(), commit=commit(children.directory), study=run.name,
        variant=run.variant.label, network=run.variant.network, settings=" ".join(run.variant.settings), seed=run.seed,
        epochs=result["epoch"], device=result["device"] + (f" {device}" if device else ""),
        python=platform.python_version(), jax=found["jax"], flax=found["flax"], parameters=result["parameters"],
        macs=result["macs"], wall_seconds=round(time.monotonic() - began, 1),
        images_per_second=round(result["images_per_second"], 1),
        final_error=round(100 * (1 - result["test_accuracy"]), 4),
        best_error=round(100 * (1 - result["best_test_accuracy"]), 4), best_epoch=result["best_epoch"],
        chosen_on=result["chosen_on"], **{key: f"{result[key]:.6g}" if key in result else "" for key in BASES},
        command=shlex.join(["python", "main.py", *shown]))


def pages(root: Path = ROOT, studies: Mapping[str, Study] = STUDIES) -> list[tuple[Path, str, str]]:
    """Returns the generated parts of the documentation: file, mark and contents.

    Raises:
      UserError: the rows cannot be read.
    """
    rows = _all_rows(root, studies)
    page = root / "docs" / "results.md"
    networks = section_of(root / "docs" / "networks.md", "networks")
    return [*((page, f"study: {name}", section(name, study, rows[name])) for name, study in studies.items()),
            (page, "studies", markdown(overview(studies, rows))),
            (root / "README.md", "results", markdown(glance(networks, studies, rows)))]


def write_pages(root: Path = ROOT, studies: Mapping[str, Study] = STUDIES) -> None:
    """Updates the sections between the marks of docs/results.md and README.md, and the figure.

    Raises:
      UserError: the rows cannot be read, or a mark is missing.
    """
    for page, mark, text in pages(root, studies):
        replace_section(page, mark, text)
    write_pictures(root, studies, _all_rows(root, studies))


def _all_rows(root: Path, studies: Mapping[str, Study]) -> dict[str, list[StudyRow]]:
    """Returns the rows of each study."""
    return {name: read(_rows_of(name, root), StudyRow) for name in studies}


def _rows_of(name: str, root: Path) -> Path:
    """Returns the path of a study's rows."""
    return root / "results" / f"study-{name}.csv"


if __name__ == "__main__":
    run_and_exit(lambda: sys.exit(main()))
