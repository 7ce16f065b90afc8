"""Kills a training run over and over, and compares its end with that of a run that was left alone.

    python tests/torture.py --kills 50 --seed 0 --write results/reliability.md

Every round is `python main.py` in a process of its own, on the embedded digits, with a checkpoint after each epoch. The
kills aim, in turn, at any moment since the start, at a save in progress, and at the moment after a line of metrics;
some are SIGTERM, which is to save. After each the same command must resume at the last complete checkpoint. At the end
arrays, metrics and kept checkpoints must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 20  # steps from one checkpoint to the next
RECIPE = (f"--config={ROOT / 'configs' / 'digits_resnet.py'}:resnet14-s4u1-double", "--config.train.batch_size=20",
          f"--config.data.train_examples={20 * INTERVAL}", "--config.data.test_examples=100",
          "--config.train.evaluate_every=1")
AIMS = ("any moment", "a save", "metrics", "any moment", "a save", "SIGTERM")
DELAYS = {"any moment": 0.0, "a save": 0.3, "metrics": 0.0, "SIGTERM": 1.0}  # seconds until the kill, at most
PHASES = ("start-up", "steps", "after metrics", "save")
EVALUATIONS = 3  # a round is killed after so many at the latest, so that all kills come before the end


@dataclasses.dataclass(frozen=True)
class Round:
    """How a round ended, and what was on disk then."""
    aim: str
    phase: str
    resumed: int | None  # the step at which it went on; None if it was killed before that
    saved: int  # the step of the last complete checkpoint, or 0
    evaluated: int  # the step of the last line of metrics, or 0
    seconds: float

    @property
    def lost(self) -> int:
        """Steps that were evaluated and must be made again."""
        return max(self.evaluated - self.saved, 0)


def saves_in_progress(workdir: Path) -> set[str]:
    """Returns the names of Orbax's temporary directories."""
    return {path.name for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")}


def kept(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, rising."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of metrics.jsonl, without what time it took."""
    path = workdir / "metrics.jsonl"
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [{**json.loads(line), "images_per_second": None} for line in lines]


def arrays(workdir: Path, step: int) -> dict[str, tuple[Any, ...]]:
    """Returns all arrays of a checkpoint by name, as plain Orbax reads them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import orbax.checkpoint as ocp
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(workdir.absolute() / "checkpoints" / str(step) / "state")
    leaves = ((path, np.asarray(leaf)) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0])
    return {jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, leaf.tobytes()) for path, leaf in leaves}


def differences(workdir: Path, reference: Path) -> list[str]:
    """Returns in what two finished runs differ, but for the time they took."""
    found = [f"{name} is left" for name in sorted(saves_in_progress(workdir))]
    if kept(workdir) != kept(reference):  # the latest two and the best
        found.append(f"checkpoints {kept(workdir)} instead of {kept(reference)}")
    if metrics(workdir) != metrics(reference):
        found.append("metrics.jsonl")
    for step in sorted({*kept(workdir)} & {*kept(reference)}):
        here, there = arrays(workdir, step), arrays(reference, step)
        found += [f"{name} of checkpoint {step}" for name in sorted({*here, *there})
                  if here.get(name) != there.get(name)]
    return found


def wait_for(aim: str, process: subprocess.Popen[bytes], workdir: Path, seconds: float, number: int) -> None:
    """Returns after `seconds`, or at the `number`th save or evaluation, as the aim is."""
    end, path = time.monotonic() + seconds, workdir / "metrics.jsonl"
    saves, evaluations, size = saves_in_progress(workdir), 0, path.stat().st_size if path.exists() else 0
    while process.poll() is None and evaluations < EVALUATIONS:
        time.sleep(0.001)
        before, size = size, path.stat().st_size if path.exists() else 0
        evaluations += size > before  # when a run resumes it gets smaller
        new = saves_in_progress(workdir) - saves
        saves |= new
        number -= bool(new) if aim == "a save" else size > before
        if time.monotonic() >= end if aim == "any moment" else number == 0:
            return


def play(workdir: Path, epochs: int, aim: str | None = None, seconds: float = 0.0, number: int = 0,
         delay: float = 0.0) -> Round:
    """Starts the run, kills it where `aim` says, or lets it end, and asserts what must hold of every round."""
    saved = max(kept(workdir), default=0)
    command = [sys.executable, ROOT / "main.py", "--noreport", *RECIPE, f"--config.train.epochs={epochs}",
               f"--workdir={workdir}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    began, output = time.monotonic(), workdir.with_suffix(".txt")
    with output.open("w") as file:
        process = subprocess.Popen(command, env={**cache, **os.environ}, stdout=file, stderr=file)
    if aim:
        wait_for(aim, process, workdir, seconds, number)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM if aim == "SIGTERM" else signal.SIGKILL)
    code, text = process.wait(3600), output.read_text()
    ready, resumes = "\nready in " in text, re.search(r"resumes at step ([\d,]+) of", text)
    now, evaluated = max(kept(workdir), default=0), max((line["step"] for line in metrics(workdir)), default=0)
    phase = ("start-up" if not ready else "save" if saves_in_progress(workdir) else "after metrics" if evaluated > now
             else "steps")
    resumed = int(resumes[1].replace(",", "")) if resumes else 0 if ready and not saved else None
    result = Round(aim or "none", phase, resumed, now, evaluated, time.monotonic() - began)
    told = f"{result}, {saved} before, exit code {code}\n{text}"
    # SIGTERM before the first step ends the process at once.
    assert code in {None: (0,), "SIGTERM": (143, -signal.SIGTERM)}.get(aim, (-signal.SIGKILL,)), told
    assert not any(word in text for word in ("Traceback", "warning: ", "error: ")), told
    assert not (workdir / "damaged").exists(), told
    assert resumed == saved or (resumed is None and now == saved and code not in (0, 143)), told
    if code == 143:
        assert f"saved at step {now:,} of" in text, told
    # While one save is in progress, the next epoch is trained and evaluated, and no more.
    assert result.lost <= (0 if code in (0, 143) else 2 * INTERVAL), told
    return result


def report(rounds: list[Round], command: str, found: list[str]) -> str:
    """Returns what happened as Markdown."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True,
                            check=False).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint"))
    counts = collections.Counter((phase, one.aim == "SIGTERM") for one in rounds for phase in (one.phase, "**all**"))
    resumed = [one for one in rounds if one.resumed is not None]
    return "\n".join([
        "# A run that is killed over and over", "",
        f"`{command}`, {datetime.datetime.now(datetime.UTC).date()}, commit {commit}, Python "
        f"{platform.python_version()}, {versions}, {os.cpu_count()} CPU cores; a checkpoint each {INTERVAL} steps.", "",
        "| stopped during | SIGKILL | SIGTERM |", "| --- | ---: | ---: |",
        *(f"| {phase} | {counts[phase, False]} | {counts[phase, True]} |" for phase in (*PHASES, "**all**")), "",
        f"- {sum(one.phase == 'save' for one in rounds)} rounds were stopped while a save was in progress.",
        f"- {len(resumed)} rounds lived long enough to resume, each at the last complete checkpoint; "
        f"{sum(one.saved > one.resumed for one in resumed)} completed another one.",
        f"- At most {max(one.lost for one in rounds)} evaluated steps had to be made again.",
        f"- Against the undisturbed run: {'; '.join(found) or 'equal bit for bit'} (arrays, metrics, kept steps).", ""])


def main() -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="file for the report")
    options = parser.parse_args()
    rng, epochs, rounds = random.Random(options.seed), 2 * options.kills + 4, []
    with tempfile.TemporaryDirectory() as directory:
        reference, workdir = Path(directory) / "reference", Path(directory) / "killed"
        print(f"{epochs} epochs undisturbed: {play(reference, epochs).seconds:.0f} s", flush=True)
        for aim in (AIMS[number % len(AIMS)] for number in range(options.kills)):
            span = max((one.seconds for one in rounds), default=10.0)
            rounds.append(play(workdir, epochs, aim, rng.uniform(0, span), rng.randint(1, EVALUATIONS - 1),
                               rng.uniform(0, DELAYS[aim])))
            print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(rounds[-1]).items()), flush=True)
        play(workdir, epochs)
        found = differences(workdir, reference)
    text = report(rounds, shlex.join(["python", "tests/torture.py", *sys.argv[1:]]), found)
    print(f"\n{text}", end="")
    if options.write:
        options.write.write_text(text)
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AssertionError as failure:
        sys.exit(f"FAILED: {failure}")
