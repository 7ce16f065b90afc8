"""How fast training is, and what it takes: prints tables, ratios first. See benchmarks/README.md for what they say.

    python -m benchmarks.speed --append --write

Subjects are measured in turns within one session, several rounds; a cell holds the median, and in brackets the least
and the greatest. --append adds the rows to results/speed.csv; --write puts the tables into benchmarks/README.md.
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

if not __package__:  # python benchmarks/speed.py, as an earlier version had it
    from moved import run_as_module
    run_as_module("benchmarks.speed")
# As in main.py; PyTorch is measured in the same process and has huge pages too.
if __name__ == "__main__" and sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
# Threads of PyTorch that wait spin, and where a core is taken by other work a step then lasts ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the device too

from benchmarks import growth, processes, records, subjects
from benchmarks.cases import SECONDS, Case, default_networks, make_case
from benchmarks.common import PAGE, Parser, machine, names, positive, replace_section, section_of
from benchmarks.records import ROOT
from benchmarks.session import Part, Session, SpeedRow
from shared_basis.cli.app import run_and_exit
from shared_basis.models import create_model

RESULTS = Path("results")
FILE, PICTURE = RESULTS / "speed.csv", RESULTS / "speed_growth.png"
"""Below the repository's root."""
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
"""By name: the title, what measures it, and its networks if they are not those of `cases.NETWORKS`."""

_SHARING_ALONE = ("trainer", "penalty")
"""Subjects that leave out the plain ones among the default networks."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--subjects", type=functools.partial(names, choices=tuple(SUBJECTS)),
                        default=tuple(SUBJECTS), help=f"some of {','.join(SUBJECTS)}; default: all")
    parser.add_argument("--networks", type=names, default=(),
                        help="networks to measure in place of each subject's usual ones, e.g. resnet56,resnet56-s16u1")
    parser.add_argument("--batch", type=positive,
                        help="images a step, and a batch of an evaluation; default: what is usual")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what to compute in")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of each; the median counts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what a measurement of steps lasts, at least")
    parser.add_argument("--append", action="store_true", help="add the rows to results/speed.csv")
    parser.add_argument("--write", action="store_true", help="replace the figures in benchmarks/README.md")
    return parser.parse_args(arguments)


def cases_of(subject: str, options: argparse.Namespace, platform: str) -> list[Case]:
    """Returns what is measured for a subject.

    Raises:
      UserError: a network is unknown.
    """
    networks = options.networks or SUBJECTS[subject][2] or default_networks(platform)
    cases = [make_case(network, platform, options.batch, options.dtype) for network in networks]
    if subject in _SHARING_ALONE and not options.networks:
        return [case for case in cases if case.form]
    return cases


def command(options: argparse.Namespace) -> str:
    """Returns the command that measures this again."""
    words = ["python", "-m", "benchmarks.speed"]
    if options.subjects != tuple(SUBJECTS):
        words.append(f"--subjects={','.join(options.subjects)}")
    if options.networks:
        words.append(f"--networks={','.join(options.networks)}")
    if options.batch:
        words.append(f"--batch={options.batch}")
    if options.dtype != "float32":
        words.append(f"--dtype={options.dtype}")
    words.append(f"--rounds={options.rounds}")
    if options.seconds != SECONDS:
        words.append(f"--seconds={options.seconds:g}")
    return shlex.join(words)


def measure(subject: str, session: Session, cases: Sequence[Case], picture: Path | None) -> str:
    """Returns a subject's section in Markdown; `picture` is where that of growth goes, None leaves it out."""
    title, function, _ = SUBJECTS[subject]
    if function is None:
        part = growth.growth(session, cases, picture)
    else:
        part = function(session, cases)
    return f"### {title}\n\n`{session.command}`, {session.device}, {machine(PACKAGES)}:\n\n{part.render()}\n"


def write(page: Path, sections: dict[str, str]) -> None:
    """Replaces the sections of these subjects between the marks of the page, and leaves the others."""
    pieces = re.split(r"<!-- speed: (\w+) -->\n", section_of(page, "speed"))
    all_of_them = {**dict(zip(pieces[1::2], pieces[2::2], strict=True)), **sections}
    text = "".join(f"<!-- speed: {name} -->\n{all_of_them[name]}" for name in SUBJECTS if name in all_of_them)
    replace_section(page, "speed", text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Measures and prints, and keeps each subject below `root` as soon as it is measured, where the options say so.

    Raises:
      UserError: the options do not fit, or something that was started fails.
      SystemExit: an option is invalid.
    """
    options = parse(arguments)
    if options.append:
        records.check_file(root / FILE, SpeedRow)
    for network in options.networks:
        create_model(network)  # refuses an unknown one before anything is started
    found = processes.ask("device")
    cases = {subject: cases_of(subject, options, found["platform"]) for subject in options.subjects}
    session = Session(found["device"], found["platform"], command(options), options.rounds,
                      options.seconds)
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
