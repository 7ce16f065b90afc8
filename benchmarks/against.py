"""Measures the training step against an earlier commit's, alternating steps of both trees in separate processes.

    python -m benchmarks.against bb59da4 --networks=resnet32,resnet32-s16u1-double --rounds=7 --append --write

The earlier tree is checked out into a temporary git worktree, whose `benchmarks.cases` builds its step. A cell shows
the median and, in parentheses, minimum and maximum.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import processes, records
from benchmarks.cases import SECONDS, Case, default_networks, make_case
from benchmarks.common import (
    PAGE,
    Parser,
    Table,
    in_turns,
    machine,
    markdown,
    names,
    positive,
    replace_section,
    section_of,
)
from benchmarks.records import ROOT
from benchmarks.session import OURS, Session, SpeedRow
from benchmarks.speed import FILE, PACKAGES
from shared_basis.cli.app import run_and_exit
from shared_basis.errors import UserError
from shared_basis.models import create_model

_WORKER = """
import sys
from benchmarks.cases import make_case, make_step
step = make_step(make_case(sys.argv[1], sys.argv[2]))
steps = max(2, round(float(sys.argv[3]) / step.run(2)))
print("ready", flush=True)
for _ in sys.stdin:
    print(step.run(steps), flush=True)
"""
"""Builds a step with the package in the working directory, and answers each input line with seconds per step."""


class _Stepper:
    """A process that measures the step of one network in one tree."""

    def __init__(self, root: Path, case: Case, session: Session) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        self._name = f"{case.network} in {root.name}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, case.network, session.platform, str(session.seconds)], cwd=root,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"The step of {self._name} cannot be measured: its process has exited, see above.")
        return line

    def measure(self) -> float:
        """Returns the seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()  # waits and closes its pipes


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Yields a temporary checkout of an earlier commit.

    Raises:
      UserError: the commit is unknown to git.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tree"
        done = subprocess.run(["git", "worktree", "add", "--detach", str(path), commit], cwd=ROOT, capture_output=True,
                              text=True, check=False)
        if done.returncode:
            raise UserError(f"{commit!r} cannot be checked out: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=ROOT, check=False)


def compare(session: Session, cases: Sequence[Case], commit: str, earlier: Path) -> Table:
    """Returns a table of steps in this tree and in `earlier`, checked out at `commit`; adds rows to the session."""
    table = [["step", f"over {commit}'s", "ms", f"{commit}, ms"]]
    for case in cases:
        session.print_progress(f"against {commit}: {case.network}")
        with contextlib.ExitStack() as stack:
            both = {}
            for name, root in ((OURS, ROOT), (commit, earlier)):
                both[name] = _Stepper(root, case, session)
                stack.callback(both[name].close)
            found = in_turns({name: stepper.measure for name, stepper in both.items()}, session.rounds)
        ratio = [new / old for new, old in zip(found[OURS], found[commit], strict=True)]
        add = functools.partial(session.add, "against", case)
        shown = {name: add("milliseconds per step", [1000 * value for value in values], framework=name)
                 for name, values in found.items()}
        table.append([f"{case.network}, batch {case.batch}", add(f"ratio: step over {commit}'s", ratio),
                      shown[OURS], shown[commit]])
    return table


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Measures, prints, and stores rows and tables below `root` if requested.

    Raises:
      UserError: a network or the commit is unknown, a step cannot be measured, or the page lacks the commit's marks.
      SystemExit: an option is invalid.
    """
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="the earlier commit, in any form that git accepts")
    parser.add_argument("--networks", type=names, default=(), help="default: those of the benchmark of speed")
    parser.add_argument("--rounds", type=positive, default=7, help="number of measurements to take the median of")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="minimum duration of a measurement")
    parser.add_argument("--append", action="store_true", help="add the rows to results/speed.csv")
    parser.add_argument("--write", action="store_true",
                        help="update the table between the marks of this commit in benchmarks/README.md")
    options = parser.parse_args(arguments)
    records.check_file(root / FILE, SpeedRow)
    mark = f"against {options.commit}"
    if options.write:
        section_of(root / PAGE, mark)  # raises before the measurement, if a mark is missing
    for network in options.networks:
        create_model(network)
    found = processes.ask("device")
    cases = [make_case(name, found["platform"]) for name in options.networks or default_networks(found["platform"])]
    words = [options.commit, *([f"--networks={','.join(options.networks)}"] if options.networks else []),
             f"--rounds={options.rounds}", *([f"--seconds={options.seconds:g}"] if options.seconds != SECONDS else [])]
    command = shlex.join(["python", "-m", "benchmarks.against", *words])
    session = Session(found["device"], found["platform"], command, options.rounds, options.seconds)
    with worktree(options.commit) as earlier:
        table = compare(session, cases, options.commit, earlier)
    text = f"`{command}`, {session.device}, {machine(PACKAGES)}:\n\n{markdown(table)}\n"
    print(text, flush=True)
    if options.append:
        records.append(root / FILE, session.rows)
    if options.write:
        replace_section(root / PAGE, mark, text)


if __name__ == "__main__":
    run_and_exit(main)
