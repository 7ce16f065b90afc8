"""Trains the networks of a study over several seeds, and regenerates from all rows the tables of the documentation.

These are the studies' sections of docs/results.md, and the overview in README.md.

    python benchmarks/experiments.py --study=digits              about an hour on two cores; the same command resumes
    python benchmarks/experiments.py --study=cifar60 --images=DIR --jobs=4 --devices=0,1
    python benchmarks/experiments.py --write                     the tables again, without training

Each run is `main.py` in a process of its own, and leaves a row in results/study-<name>.csv when it is finished. What
has its row is not run again; what was interrupted goes on from its last checkpoint (its time is then that of the rest).
Ctrl-C or SIGTERM stops the study: the runs that are going on save what they have, and no further one begins.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from benchmarks.common import Parser, markdown, positive, replace_section, versions
from benchmarks.findings import COLUMNS, Row, of, overview, section
from benchmarks.records import ROOT, append, commit, read
from benchmarks.studies import STUDIES, Study, Variant
from shared_basis.errors import UserError

RESULTS = ROOT / "results"
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BASES = ("penalty", "norm_min", "norm_mean", "norm_max", "coherence")


class Children:
    """The running processes of a study; once it is asked to stop, they are, and no further one begins."""

    def __init__(self) -> None:
        self.stopped_by = 0
        """The signal that asked for the stop."""
        self._running: set[subprocess.Popen[str]] = set()

    def stop(self, signum: int, _: Any) -> None:
        """Asks all processes to save and end: a signal handler."""
        self.stopped_by = signum
        for process in tuple(self._running):
            process.send_signal(signal.SIGTERM)

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
        """Returns the exit code and what a process printed on standard output and error."""
        # A session of its own, so that Ctrl-C of the terminal reaches it once, through this process.
        with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, start_new_session=True) as process:
            self._running.add(process)
            if self.stopped_by:  # between the check whether to begin and this line
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate()
            self._running.discard(process)
        return process.returncode, out, err


def parse(arguments: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Returns the parser, for later mistakes, and the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", choices=tuple(STUDIES), help="what to train; without it nothing is")
    parser.add_argument("--seeds", type=positive, help="how many; default: the study's own")
    parser.add_argument("--variants", default="", help="only those whose label holds one of these words, a,b")
    parser.add_argument("--images", type=Path, help="the directory of images, where the study needs one")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    parser.add_argument("--devices", default="", help="numbers of the GPUs to divide the jobs among, e.g. 0,1")
    parser.add_argument("--workdirs", type=Path, default=Path("runs") / "studies", help="where the runs are kept")
    parser.add_argument("--write", action="store_true",
                        help="replace the tables of docs/results.md and README.md (also at the end)")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns 0, 1 if a run failed, or 128 + the number of the signal that stopped it."""
    parser, options = parse(arguments)
    if not options.study and not options.write:
        parser.error(f"name a --study ({', '.join(STUDIES)}), or --write the tables again")
    failed, children = 0, Children()
    if options.study:
        before = {signum: signal.signal(signum, children.stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            failed = parser.end_with(run_study, options.study, STUDIES[options.study], options, children)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
    if children.stopped_by:
        print("stopped; the same command goes on from the last checkpoints", file=sys.stderr)
        return 128 + children.stopped_by
    parser.end_with(write_pages)
    return int(failed > 0)


def run_study(name: str, study: Study, options: argparse.Namespace, children: Children) -> int:
    """Trains what has no row yet; returns how many runs failed.

    Raises:
      UserError: the study needs images, no variant has such a label, or the rows cannot be read.
    """
    if study.needs_images and (options.images is None or not options.images.is_dir()):
        raise UserError(f"--study={name} needs --images=DIR, a directory with train/<class>/* and test/<class>/*.")
    words = [word.strip() for word in options.variants.split(",") if word.strip()]
    variants = [variant for variant in study.variants if not words or any(word in variant.label for word in words)]
    if not variants:
        raise UserError(f"--variants={options.variants}: none of {', '.join(v.label for v in study.variants)}.")
    path = RESULTS / f"study-{name}.csv"
    rows = read(path, Row)
    # Seeds last, so that one run of each variant is there early, and neighbours use the same compiled program.
    todo = [(variant, seed) for seed in range(study.first_seed, study.first_seed + (options.seeds or study.seeds))
            for variant in variants if seed not in of(rows, variant)]
    slots: queue.Queue[str] = queue.Queue()
    devices = [device for device in options.devices.split(",") if device]
    for slot in range(options.jobs):
        slots.put(devices[slot % len(devices)] if devices else "")
    failures = []

    def run(number: int, variant: Variant, seed: int) -> None:
        device = slots.get()
        try:
            if children.stopped_by:
                return
            print(f"{number + 1}/{len(todo)}: {variant.label}, seed {seed}", file=sys.stderr, flush=True)
            append(path, [train(name, study, variant, seed, options, device, children)], COLUMNS)
        except UserError as error:
            if children.stopped_by:
                return
            failures.append(f"{variant.label}, seed {seed}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
        finally:
            slots.put(device)

    with ThreadPoolExecutor(options.jobs) as threads:
        for future in [threads.submit(run, number, *each) for number, each in enumerate(todo)]:
            future.result()
    return len(failures)


def command(name: str, study: Study, variant: Variant, seed: int, images: Path | None, workdirs: Path) -> list[str]:
    """Returns the arguments of main.py."""
    label = "".join(char if char.isalnum() else "-" for char in variant.label)
    return [f"--config={study.config}:{variant.network}", f"--config.seed={seed}", *study.settings, *variant.settings,
            *([f"--config.data.directory={images}"] if study.needs_images else []),
            f"--workdir={workdirs / name / f'{label}-{seed}'}"]


def train(name: str, study: Study, variant: Variant, seed: int, options: argparse.Namespace, device: str,
          children: Children) -> Row:
    """Trains one network, or goes on training it, and returns its row.

    Raises:
      UserError: the run ended with an error.
    """
    arguments = command(name, study, variant, seed, options.images, options.workdirs)
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    began = time.monotonic()
    code, out, err = children.run(
        [sys.executable, "main.py", *arguments, "--json", "--quiet", "--noreport"], environment)
    if code:
        raise UserError((err.strip().splitlines() or [f"exit code {code}"])[-1])
    shown = [word for word in arguments if not word.startswith(("--config.data.directory=", "--workdir="))]
    return make_row(json.loads(out), name, variant, seed, time.monotonic() - began,
                    shlex.join(["python", "main.py", *shown]), device)


def make_row(result: Mapping[str, Any], name: str, variant: Variant, seed: int, seconds: float, shown: str,
             device: str) -> Row:
    """Returns the row of a finished run, of what `main.py --json` printed."""
    found = versions(("jax", "flax"))
    return Row(
        date=datetime.date.today().isoformat(), commit=commit(), study=name, variant=variant.label,
        network=variant.network, settings=" ".join(variant.settings), seed=seed, epochs=result["epoch"],
        device=result["device"] + (f" {device}" if device else ""), python=platform.python_version(),
        jax=found["jax"], flax=found["flax"], parameters=result["parameters"], macs=result["macs"],
        wall_seconds=round(seconds, 1), images_per_second=round(result["images_per_second"], 1),
        final_error=round(100 * (1 - result["test_accuracy"]), 4),
        best_error=round(100 * (1 - result["best_test_accuracy"]), 4), best_epoch=result["best_epoch"],
        chosen_on=result["chosen_on"], **{key: f"{result[key]:.6g}" if key in result else "" for key in BASES},
        command=shown)


def pages() -> list[tuple[Path, str, str]]:
    """Returns the generated parts of the documentation: file, mark, and what stands there by the rows."""
    rows = {name: read(RESULTS / f"study-{name}.csv", Row) for name in STUDIES}
    return [*((PAGE, f"study: {name}", section(name, study, rows[name])) for name, study in STUDIES.items()),
            (README, "studies", markdown(overview(STUDIES, rows)))]


def write_pages() -> None:
    """Replaces what stands between the marks of docs/results.md and README.md."""
    for page, mark, text in pages():
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
        if begin not in page.read_text():
            raise UserError(f"{page.name} has no mark {begin.strip()}.")
        replace_section(page, begin, end, text)


if __name__ == "__main__":
    sys.exit(main())
