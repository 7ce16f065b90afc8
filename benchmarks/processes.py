"""The subjects that need separate processes: compile time, latency of the first step, peak memory."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.cases import Case, beside_plain, by_form
from benchmarks.common import NOT_MEASURED, Measure, Table, in_turns
from benchmarks.comparison import MISSING, torch_frameworks
from benchmarks.records import ROOT
from benchmarks.session import OURS, Part, Session, spread
from shared_basis.errors import UserError

ROUNDS = 3
"""Maximum number of rounds of subjects that need a process per measurement."""

WITHOUT_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_COMPILATION_CACHE_DIR": ""}

_USERS_SHELL = dict.fromkeys(("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "GLIBC_TUNABLES",
                              "OMP_WAIT_POLICY", "XLA_PYTHON_CLIENT_PREALLOCATE"), "")
"""Removes the settings of `speed.py`, and those that would change the compilation cache."""

MIB = 2**20


def ask(task: str, case: Case | None = None, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns the answer of `benchmarks.worker`; an empty variable in `environment` is unset.

    Raises:
      UserError: the worker failed; the message includes its last line of output.
    """
    request = json.dumps({"task": task, "case": dataclasses.asdict(case) if case else None})
    command = [sys.executable, "-m", "benchmarks.worker", request]
    done = subprocess.run(command, cwd=ROOT, env=_changed(environment or {}), capture_output=True, text=True,
                          check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{task}{f' of {case.network}' if case else ''} failed: {last[:300]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _changed(changes: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in {**os.environ, **changes}.items() if name not in changes or value}


def compiling(session: Session, cases: Sequence[Case]) -> Part:
    """Measures the time to compile the training step without a cache."""
    rounds = min(ROUNDS, session.rounds)
    answers: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}

    def measure(case: Case) -> float:
        session.print_progress(f"compile: {case.network}")
        answers[case].append(ask("compiling", case, WITHOUT_CACHE))
        return answers[case][-1]["step"]
    seconds = in_turns({case: functools.partial(measure, case) for case in cases}, rounds)
    table = [["compile", "over the least deep one's", "over the plain network's", "the step, s",
              "all that precedes the first step, s"]]
    first = {form: networks[0] for form, networks in by_form(cases).items()}
    for case in cases:
        row = [case.network]
        plain = dataclasses.replace(case, network=case.plain)
        for quantity, other in ((f"ratio: compile time over {first[case.form].network}", first[case.form]),
                                ("ratio: compile time over plain", plain)):
            ratio = [a / b for a, b in zip(seconds[case], seconds.get(other, ()), strict=False)]
            row.append(session.add("compile", case, quantity, ratio) if ratio and other != case else NOT_MEASURED)
        row += [session.add("compile", case, "seconds to compile the step", seconds[case]),
                session.add("compile", case, "seconds to build the program", [a["build"] for a in answers[case]])]
        table.append(row)
    return Part([table])


def memory(session: Session, cases: Sequence[Case]) -> Part:
    """Measures the memory of a few training steps in separate processes."""
    torch = bool(torch_frameworks(session, cases[0].dtype)) and importlib.util.find_spec("torch") is not None
    answers: dict[tuple[Case, str], dict[str, Any]] = {}
    notes = [] if torch or session.platform == "tpu" else [f"{MISSING}."]
    theirs = f"pytorch channels_last{' bf16' * (cases[0].dtype == 'bfloat16')}"
    groups = beside_plain(cases)
    for case in (case for group in groups for case in group):
        for framework, task in ((OURS, "memory"), (theirs, "pytorch memory"))[:2 if torch else 1]:
            session.print_progress(f"memory: {case.network}, {framework}")
            try:
                answers[case, framework] = ask(task, case, WITHOUT_CACHE)
            except UserError as error:
                notes.append(str(error))
    for (case, framework), answer in answers.items():
        for key, quantity in _QUANTITIES.items():
            if _bytes(answer, key):
                session.add("memory", case, quantity, [_bytes(answer, key)], framework=framework)
    return Part(_memory_tables(session, groups, answers, theirs), notes)


_QUANTITIES = {
    "program": "bytes of the program by XLA, without images",
    "peak": "bytes of the process at its peak",
    "more": "bytes of the process at its peak, beyond its imports",
    "device": "bytes of the device at its peak",
}
"""The quantities measured in a process, in column order."""


def _bytes(answer: Mapping[str, Any], key: str) -> float:
    if key == "more":
        return float(answer["peak"] - answer["imported"])
    return float(answer[key] or 0)


def _memory_tables(session: Session, groups: Sequence[Sequence[Case]],
                   answers: Mapping[tuple[Case, str], Mapping[str, Any]], theirs: str) -> list[Table]:
    ratios: Table = [["memory", "over plain: the program", "over plain: the process", f"over {theirs}: the process",
                      f"over {theirs}: the device"]]
    absolute: Table = [["MiB", *_SHORT.values()]]

    def ratio(case: Case, key: str, other: tuple[Case, str], quantity: str) -> str:
        above, below = answers.get((case, OURS)), answers.get(other)
        if above is None or below is None or not _bytes(above, key) or not _bytes(below, key):
            return NOT_MEASURED
        return session.add("memory", case, f"ratio: {_QUANTITIES[key]}, over {quantity}",
                           [_bytes(above, key) / _bytes(below, key)])
    for group in groups:
        for case in group:
            name = f"{case.network}, batch {case.batch}"
            plain = [ratio(case, key, (group[0], OURS), "plain") if case.form else NOT_MEASURED
                     for key in ("program", "peak")]
            ratios.append([name, *plain, *(ratio(case, key, (case, theirs), theirs) for key in ("peak", "device"))])
            for framework in (OURS, theirs):
                if answer := answers.get((case, framework)):
                    mebibytes = {key: _bytes(answer, key) / MIB for key in _SHORT}
                    absolute.append([f"{name}{'' if framework == OURS else f', {framework}'}", *(
                        spread([value]) if value else NOT_MEASURED for value in mebibytes.values())])
    return [ratios, absolute]


_SHORT = {"program": "the program, by XLA", "peak": "the process", "more": "the process beyond its imports",
          "device": "the device"}


def latency(session: Session, cases: Sequence[Case]) -> Part:
    """Measures the time from the command to the first finished step, with cold and warm compilation cache."""
    table = [["first step", "warm over cold", "cold cache, s", "warm cache, s", "whole command, cold, s",
              "whole command, warm, s"]]
    for case in cases:
        case = dataclasses.replace(case, batch=min(case.batch, 128))
        with tempfile.TemporaryDirectory() as root:
            write_images(Path(root, "images"))
            found = _latencies(session, case, Path(root))
        ratio = [warm / cold for warm, cold in zip(found["warm"], found["cold"], strict=True)]
        table.append([f"{case.network}, batch {case.batch}",
                      session.add("latency", case, "ratio: first step, warm over cold cache", ratio),
                      *(session.add("latency", case, f"seconds to the first step, {state} cache", found[state])
                        for state in ("cold", "warm")),
                      *(session.add("latency", case, f"seconds of the whole command, {state} cache",
                                    found[f"{state} whole"]) for state in ("cold", "warm"))])
    return Part([table])


def _latencies(session: Session, case: Case, root: Path) -> dict[str, list[float]]:
    """Returns the seconds to the first step and of the whole command, 'cold' and 'warm'."""
    wholes: dict[str, list[float]] = {"cold whole": [], "warm whole": []}
    runs = iter(range(10**6))
    cache = root / "cache"

    def measure(state: str) -> float:
        nonlocal cache
        run = next(runs)
        if state == "cold":
            cache = root / f"cache{run}"
        session.print_progress(f"latency: {case.network}, {state} cache")
        first, whole = first_step(_command(case, root / "images", root / f"run{run}"), {
            **_USERS_SHELL, "XDG_CACHE_HOME": str(cache)})
        wholes[f"{state} whole"].append(whole)
        return first
    subjects: dict[str, Measure] = {state: functools.partial(measure, state) for state in ("cold", "warm")}
    return {**in_turns(subjects, min(ROUNDS, session.rounds)), **wholes}


def _command(case: Case, images: Path, workdir: Path) -> list[str]:
    """Returns a user's command with a single epoch of one step."""
    return [sys.executable, str(ROOT / "main.py"), f"--config={ROOT / 'configs' / case.recipe}.py:{case.network}",
            "--config.data.name=folder", f"--config.data.directory={images}", f"--workdir={workdir}",
            f"--config.model.dtype={case.dtype}", "--config.train.epochs=1", "--config.optimizer.boundaries=()",
            "--config.optimizer.factors=()", f"--config.train.batch_size={case.batch}",
            f"--config.data.train_examples={case.batch}"]


def write_images(root: Path, count: int = 300, classes: int = 10) -> None:
    """Writes `count` random 32×32 images in class directories."""
    random = np.random.default_rng(0)
    for index in range(count):
        path = root / f"class{index % classes}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def first_step(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Runs a training command on a pseudo-terminal; returns the seconds to its first step and to its end.

    The first step counts as finished when the progress line, which is drawn ten times per second, shows it for the
    first time.

    Raises:
      UserError: the command failed or showed no step.
    """
    import pty  # not on Windows

    terminal, other = pty.openpty()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=other, stderr=other, close_fds=True,
                               env=_changed({"TERM": "xterm", "COLUMNS": "200", **environment}))
    os.close(other)
    first, output = 0.0, b""
    while True:
        try:
            part = os.read(terminal, 2**16)
        except OSError:  # raised by Linux when the other end is closed
            break
        if not part:
            break
        output += part
        if not first and re.search(rb"ready in.*images/s", output, re.DOTALL):
            first = time.perf_counter() - began
    os.close(terminal)
    code = process.wait()
    whole = time.perf_counter() - began
    if code or not first:
        lines = output.decode(errors="replace").strip().splitlines() or ["nothing was printed"]
        raise UserError(f"the training command ended with exit code {code}: {lines[-1][:300]}")
    return first, whole
