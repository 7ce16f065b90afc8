"""Changes the package in many small ways and tells which of these mutations the tests catch.

By hand, as it takes long; pytest does not collect this file:

    python tests/mutations.py --check                          only looks whether the table fits the package
    python tests/mutations.py --out=after.csv                  judges every mutation that the file has not got yet
    python tests/mutations.py --out=after.csv --only=ops-momentum,steps-top5 --jobs=2
    python tests/mutations.py --out=after.csv --first-only     without going on to the whole suite
    python tests/mutations.py --out=after.csv --control        the tests that caught something, on the package as it is
    python tests/mutations.py --table before.csv after.csv     what was caught before and after, in Markdown

A mutation replaces a piece of source text that occurs exactly once in the package, wherever the file lies that has it.
The tree (what git knows or would add, as it lies on disk) is copied to a temporary directory and mutated there. First
the test files run whose path below tests/ contains one of the mutation's words, in their order, and only if these pass
all others. Each result is a row of the file as soon as it is known, so that a run can be stopped and called again.

Compiled programs are kept in .pytest_cache/jax of this tree, unless JAX_COMPILATION_CACHE_DIR says otherwise. With
JAX_DISABLE_MOST_OPTIMIZATIONS=1 in the environment programs compile sooner.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mutation_rows import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "shared_basis"
COLUMNS = ("name", "file", "caught", "test", "seconds", "commit")
FAILED = re.compile(r"\[gw\d+\] .*?\b(?:FAILED|ERROR) (tests/\S+?\.py::.+?)\s*$"
                    r"|(tests/\S+?\.py::.+) (?:FAILED|ERROR)\b"
                    r"|(?:FAILED|ERROR) (tests/\S+?\.py(?:::.+?)?)(?: - .*)?$")
"""A line of pytest's that tells of a failure: as it happens, with and without workers, and in the summary."""


class Found(NamedTuple):
    """A mutation and the file that it changes."""

    mutation: Mutation
    file: str
    text: str
    """The file's mutated contents."""


def find(mutations: Iterable[Mutation]) -> list[Found]:
    """Returns the mutations with their files; ends with a list of all that do not fit the package as they should."""
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
               for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    tests = test_files(ROOT)
    found, problems = [], [f"{name}: the name is given {count} times" for name, count in
                           Counter(each.name for each in MUTATIONS).items() if count > 1]
    for mutation in mutations:
        places = {file: text.count(mutation.old) for file, text in sources.items() if mutation.old in text}
        if sum(places.values()) != 1:
            where = ", ".join(f"{count} in {file}" for file, count in places.items()) or "nowhere"
            problems.append(f"{mutation.name}: must occur exactly once, and occurs {where}: {mutation.old!r}")
            continue
        file = next(iter(places))
        text = sources[file].replace(mutation.old, mutation.new)
        try:
            compile(text, file, "exec")
        except SyntaxError as error:
            problems.append(f"{mutation.name}: what it makes of {file} is not Python: {error}")
        if not chosen(mutation, tests):
            problems.append(f"{mutation.name}: no test file has one of its words {', '.join(mutation.words)}")
        found.append(Found(mutation, file, text))
    if problems:
        sys.exit("\n".join([f"{len(problems)} problems:", *problems]))
    return found


def test_files(root: Path) -> list[str]:
    """Returns the test files of the tree in `root`."""
    return sorted(path.relative_to(root).as_posix() for path in (root / "tests").rglob("test_*.py"))


def chosen(mutation: Mutation, tests: Sequence[str]) -> list[str]:
    """Returns those of the test files that have one of the mutation's words, in the order of the words."""
    return list(dict.fromkeys(file for word in mutation.words for file in tests
                              if word in file.removeprefix("tests/")))


def copy_tree(target: Path) -> None:
    """Copies what git knows of this tree, or would add, as it lies on disk."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout.decode()
    for name in dict.fromkeys(filter(None, listed.split("\0"))):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def pytest(root: Path, tests: Sequence[str], options: argparse.Namespace, *, first: bool) -> tuple[str, str]:
    """Runs pytest on `tests` of the tree in `root`, with `first` until one fails.

    Returns:
      Whether one has failed: 'yes', 'no', or 'timeout' where it took too long; and the first one that has.

    Raises:
      SystemExit: it could not run the tests.
    """
    jobs = ["-n", str(options.jobs)] if options.jobs is not None else []
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--color=no", *jobs, *tests]
    late = threading.Event()
    lines: list[str] = []
    failed = ""
    with subprocess.Popen(command, cwd=root, env=environment(root), text=True, errors="replace", start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(options.timeout or threading.TIMEOUT_MAX, lambda: (late.set(), end()))
        timer.start()
        try:
            for line in process.stdout or ():
                lines.append(line)
                if not failed and (found := FAILED.match(line)):
                    failed = next(filter(None, found.groups()))
                    if first:  # pytest's -x would wait for what other workers are at
                        break
        finally:
            timer.cancel()
            end()  # workers, after a stop by Ctrl-C too
    if not first:
        print(*lines[-30:], sep="", end="")
    if not failed and not late.is_set() and process.returncode not in (0, 5):
        sys.exit(f"{''.join(lines[-60:])}\npytest could not run the tests in {root} (exit code {process.returncode})")
    return ("yes" if failed else "timeout" if late.is_set() else "no"), failed


def environment(root: Path) -> dict[str, str]:
    """Returns the environment in which Python imports the package of the tree in `root`."""
    return {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
            "SHARED_BASIS_REFERENCE": str(ROOT.parent / "shared" / "reference"), **os.environ,
            "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def judge(found: Found, options: argparse.Namespace) -> tuple[str, str]:
    """Judges a mutation.

    Returns:
      Whether it is caught: 'yes', 'no', 'timeout', or 'broken' where the mutated file cannot be imported; and the first
      test that failed, or the test file that could not be imported though the mutated file could.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        root = Path(directory).resolve()
        copy_tree(root)
        (root / found.file).write_text(found.text, encoding="utf-8")
        tests = test_files(root)
        first = chosen(found.mutation, tests)
        rest = [] if options.first_only else [file for file in tests if file not in first]
        for part in filter(None, (first, rest)):
            caught, test = pytest(root, part, options, first=True)
            if caught == "yes" and "::" not in test and not imports(root, found.file):
                caught = "broken"
            if caught != "no":
                return caught, test
    return "no", ""


def imports(root: Path, file: str) -> bool:
    """Returns whether a file of the package can be imported in the tree in `root`."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return subprocess.run([sys.executable, "-c", f"import {module}"], cwd=root, env=environment(root),
                          capture_output=True).returncode == 0


def commit() -> str:
    """Returns the commit that the tree is at, with '-dirty' where it differs from that."""
    return subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout.strip()


def read(file: Path) -> list[dict[str, str]]:
    """Returns the rows of a file of results; none where there is no file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(file: Path, row: dict[str, str]) -> None:
    """Adds a row to a file of results."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def run(found: Sequence[Found], options: argparse.Namespace) -> None:
    """Judges the mutations that the file of results has not got yet."""
    known = {row["name"] for row in read(options.out)} if options.out else set()
    left = [each for each in found if each.mutation.name not in known]
    version = commit()
    for number, each in enumerate(left, start=1):
        began = time.monotonic()
        caught, test = judge(each, options)
        seconds = f"{time.monotonic() - began:.0f}"
        row = dict(zip(COLUMNS, (each.mutation.name, each.file, caught, test, seconds, version), strict=True))
        if options.out:
            append(options.out, row)
        print(f"{number}/{len(left)}  {row['name']}  caught: {caught}  {test}  {seconds} s", flush=True)


def control(file: Path, options: argparse.Namespace) -> None:
    """Runs the tests that caught a mutation by `file` on the package as it is; none of them may fail there."""
    tests = sorted({row["test"] for row in read(file) if row["test"]})
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        root = Path(directory).resolve()
        copy_tree(root)
        caught, test = pytest(root, tests, options, first=False) if tests else ("no", "")
    if caught != "no":
        sys.exit(f"without any mutation: {test or caught}. What such a test has caught means nothing.")


def table(files: Sequence[Path]) -> str:
    """Returns one or two files of results beside each other, in Markdown."""
    results = [{row["name"]: row for row in read(file)} for file in files]
    names = list(dict.fromkeys(name for found in results for name in found))
    heads = ["result"] if len(files) == 1 else ["before", "after"]

    def cell(row: dict[str, str] | None) -> str:
        if row is None:
            return "–"
        if row["caught"] != "yes":
            return "**not caught**" if row["caught"] == "no" else f"**{row['caught']}**"
        return f"`{row['test']}`".replace("|", "\\|")

    lines = [f"| mutation | file | {' | '.join(heads)} |", f"| --- | --- |{' --- |' * len(heads)}"]
    for name in names:
        rows = [found.get(name) for found in results]
        file = next(row["file"] for row in reversed(rows) if row)
        lines.append(f"| {name} | {file} | {' | '.join(map(cell, rows))} |")
    totals = [f"{sum(row['caught'] == 'yes' for row in found.values())} of {len(found)}" for found in results]
    lines.append(f"| caught | | {' | '.join(totals)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only see whether each mutation fits the package")
    parser.add_argument("--only", default="", metavar="NAME,…", help="these mutations alone")
    parser.add_argument("--jobs", metavar="N", help="processes of pytest-xdist; by default as pyproject.toml says")
    parser.add_argument("--first-only", action="store_true", help="only the test files that a mutation's words choose")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for each run of pytest; by default none")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="results; mutations that it holds are passed over")
    parser.add_argument("--control", action="store_true", help="run the tests named in --out on the package as it is")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE.csv", help="print one or two files as a table")
    options = parser.parse_args()
    if options.table and len(options.table) > 2:
        parser.error("--table takes one or two files")
    if options.control and not (options.out and options.out.exists()):
        parser.error("--control needs --out=FILE.csv with results")
    if unknown := set(filter(None, options.only.split(","))) - {each.name for each in MUTATIONS}:
        parser.error(f"--only: no mutations of the names {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Does what the command line asks for."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that nothing is left running, or lying about
    if options.table:
        print(table(options.table))
        return
    if options.control:
        control(options.out, options)
        return
    only = set(filter(None, options.only.split(",")))
    found = find(each for each in MUTATIONS if not only or each.name in only)
    if options.check:
        areas = Counter(each.mutation.name.partition("-")[0] for each in found)
        print(f"{len(found)} mutations of {len({each.file for each in found})} files: "
              + ", ".join(f"{area} {count}" for area, count in areas.items()))
        return
    run(found, options)


if __name__ == "__main__":
    main()
