"""Measures speed and memory of training; prints tables, ratios first, which benchmarks/README.md explains.

    python -m benchmarks.speed --append --write

Subjects are measured alternately in one session over several rounds; a cell shows the median and, in parentheses,
minimum and maximum. --append adds the rows to results/speed.csv; --write updates the tables in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # python benchmarks/speed.py, deprecated
    from moved import run_as_module
    run_as_module("benchmarks.speed")
# As in main.py; PyTorch is measured in the same process and also uses huge pages.
if __name__ == "__main__" and sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
# Waiting PyTorch threads spin; if other work occupies a core, a step would then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves device memory for PyTorch

from benchmarks import growth, processes, records, subjects
from benchmarks.cases import MODES, SECONDS, Case, default_networks, make_case
from benchmarks.common import PAGE, Parser, machine, names, positive, replace_section, section_of
from benchmarks.records import ROOT
from benchmarks.session import Part, Session, SpeedRow
from shared_basis.cli.app import run_and_exit
from shared_basis.models import create_model

RESULTS = Path("results")
FILE, PICTURE = RESULTS / "speed.csv", RESULTS / "speed_growth.png"
"""Relative to the repository's root."""
PACKAGES = ("jax", "flax", "torch")

_DEPTHS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
_SHARING = "-s16u1-double"

SUBJECTS: dict[str, tuple[str, Callable[[Session, Sequence[Case]], Part] | None, tuple[str, ...]]] = {
    "step": ("Train step", subjects.step, ()),
    "trainer": ("Whole trainer", subjects.trainer, ()),
    "evaluation": ("Evaluation", subjects.evaluation, ()),
    "compile": ("Compile time", processes.compiling,
                ("resnet32", "resnet110", f"resnet32{_SHARING}", f"resnet110{_SHARING}")),
    "latency": ("Latency of the first step", processes.latency, (f"resnet56{_SHARING}",)),
    "memory": ("Peak memory", processes.memory, ()),
    "penalty": ("Penalty", subjects.penalty, ()),
    "growth": ("Growth", None, (*_DEPTHS, *(depth + _SHARING for depth in _DEPTHS))),
}
"""By name: title, measuring function, and networks, if other than `cases.NETWORKS`."""

_SHARING_ALONE = ("trainer", "penalty")
"""Subjects without the plain ones of the default networks."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--subjects", type=functools.partial(names, choices=tuple(SUBJECTS)),
                        default=tuple(SUBJECTS), help=f"some of {','.join(SUBJECTS)}; default: all")
    parser.add_argument("--networks", type=names, default=(),
                        help="networks to measure instead of the default ones, e.g. resnet56,resnet56-s16u1")
    parser.add_argument("--batch", type=positive,
                        help="images per step and per evaluation batch; default: the usual number")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--modes", type=functools.partial(names, choices=tuple(MODES)), default=(),
                        help="modes of PyTorch to compare steps and evaluations with (not on TPUs), some of "
                             f"{','.join(MODES)}; default: the usual ones")
    parser.add_argument("--rounds", type=positive, default=5, help="number of measurements to take the median of")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="minimum duration of a measurement")
    parser.add_argument("--append", action="store_true", help="add the rows to results/speed.csv")
    parser.add_argument("--write", action="store_true", help="update the figures in benchmarks/README.md")
    return parser.parse_args(arguments)


def cases_of(subject: str, options: argparse.Namespace, platform: str) -> list[Case]:
    """Returns the cases to measure for a subject.

    Raises:
      UserError: a network is unknown.
    """
    networks = options.networks or SUBJECTS[subject][2] or default_networks(platform)
    cases = [make_case(network, platform, options.batch, options.dtype) for network in networks]
    if subject in _SHARING_ALONE and not options.networks:
        return [case for case in cases if case.form]
    return cases


def command(options: argparse.Namespace) -> str:
    """Returns the command that repeats these measurements."""
    words = ["python", "-m", "benchmarks.speed"]
    if options.subjects != tuple(SUBJECTS):
        words.append(f"--subjects={','.join(options.subjects)}")
    if options.networks:
        words.append(f"--networks={','.join(options.networks)}")
    if options.batch:
        words.append(f"--batch={options.batch}")
    if options.dtype != "float32":
        words.append(f"--dtype={options.dtype}")
    if options.modes:
        words.append(f"--modes={','.join(options.modes)}")
    words.append(f"--rounds={options.rounds}")
    if options.seconds != SECONDS:
        words.append(f"--seconds={options.seconds:g}")
    return shlex.join(words)


def measure(subject: str, session: Session, cases: Sequence[Case], picture: Path | None) -> str:
    """Measures a subject; returns its section in Markdown. `picture` is the path of the growth plot, or None."""
    title, function, _ = SUBJECTS[subject]
    if function is None:
        part = growth.growth(session, cases, picture)
    else:
        part = function(session, cases)
    return f"### {title}\n\n`{session.command}`, {session.device}, {machine(PACKAGES)}:\n\n{part.render()}\n"


def write(page: Path, sections: dict[str, str]) -> None:
    """Updates the sections of these subjects between the marks of the page; keeps the others."""
    pieces = re.split(r"<!-- speed: (\w+) -->\n", section_of(page, "speed"))
    all_of_them = {**dict(zip(pieces[1::2], pieces[2::2], strict=True)), **sections}
    text = "".join(f"<!-- speed: {name} -->\n{all_of_them[name]}" for name in SUBJECTS if name in all_of_them)
    replace_section(page, "speed", text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Measures and prints; stores each subject below `root` immediately, if requested.

    Raises:
      UserError: the options are inconsistent, or a subprocess failed.
      SystemExit: an option is invalid.
    """
    options = parse(arguments)
    if options.append:
        records.check_file(root / FILE, SpeedRow)
    for network in options.networks:
        create_model(network)  # raises for unknown names before starting anything
    found = processes.ask("device")
    cases = {subject: cases_of(subject, options, found["platform"]) for subject in options.subjects}
    session = Session(found["device"], found["platform"], command(options), options.rounds,
                      options.seconds, options.modes)
    for subject in options.subjects:
        text = measure(subject, session, cases[subject], root / PICTURE if options.append or options.write else None)
        print(text, flush=True)
        if options.append:
            records.append(root / FILE, session.rows)
        if options.write:
            write(root / PAGE, {subject: text})
        session.rows.clear()


if __name__ == "__main__":
    run_and_exit(main)
