"""Where the runs of `torture.py` lie, a disk or an emulated bucket, and how they are killed there."""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gcs_emulator import Emulator

AIMS = ("any moment", "a save", "metrics", "any moment", "a save", "SIGTERM")
DELAYS = {"any moment": 0.0, "a save": 0.3, "metrics": 0.0, "SIGTERM": 1.0}  # seconds until the kill, at most
EVALUATIONS = 3  # a round is killed after so many at the latest, so that all kills come before the end
REQUESTS = 600  # of a round that is not killed by then: some three evaluated intervals
SURVIVES = 3.0  # seconds that a process may outlive the other one


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


Kill = Callable[[Sequence["subprocess.Popen[bytes]"]], None]


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


def kill_by_sight(aim: str, workdir: Path, seconds: float, number: int, delay: float) -> Kill:
    """Kills the only process where `aim` says."""
    def kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
        wait_for(aim, processes[0], workdir, seconds, number)
        time.sleep(delay)
        processes[0].send_signal(signal.SIGTERM if aim == "SIGTERM" else signal.SIGKILL)
    return kill


def kill_at_request(emulator: Emulator, number: int, victim: int, carried_out: bool, outlived: float) -> Kill:
    """Kills a process at the `number`th request from now, and the others `outlived` seconds later."""
    def kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
        emulator.kill_at(number, processes[victim].pid, carried_out=carried_out)
        processes[victim].wait(600)
        time.sleep(outlived if len(processes) > 1 else 0)
        for process in processes:
            process.kill()
    return kill


class Disk:
    """Runs in a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def place(self, name: str) -> str:
        """Returns the workdir of a run."""
        return str(self._root / name)

    def look(self, name: str) -> Path:
        """Returns a directory that holds what the run has written."""
        return self._root / name

    def environment(self) -> dict[str, str]:
        """Returns the variables by which processes reach it."""
        return {}

    def choose(self, rng: random.Random, number: int, rounds: Sequence[Round], processes: int) -> tuple[str, Kill]:
        """Returns the aim of the kill of that number, and how it is done."""
        aim, span = AIMS[number % len(AIMS)], max((one.seconds for one in rounds), default=10.0)
        return aim, kill_by_sight(aim, self.look("killed"), rng.uniform(0, span), rng.randint(1, EVALUATIONS - 1),
                                  rng.uniform(0, DELAYS[aim]))


class Bucket(Disk):
    """Runs in an emulated bucket; what they have written is copied to look at it."""

    def __init__(self, root: Path, emulator: Emulator) -> None:
        super().__init__(root)
        self.emulator = emulator

    def place(self, name: str) -> str:
        return f"gs://bucket/{name}"

    def look(self, name: str) -> Path:
        time.sleep(0.3)  # for what a killed process had asked already
        workdir = super().look(name)
        shutil.rmtree(workdir, ignore_errors=True)
        found = {key.removeprefix(f"{name}/"): self.emulator.read(key)
                 for key in self.emulator.names(prefix=f"{name}/")}
        for key, data in found.items():
            parts = key.split("/")
            if parts[0] == "checkpoints" and f"checkpoints/{parts[1]}/commit_success.txt" not in found:
                parts[1] += ".orbax-checkpoint-tmp"  # as it were called on a disk
            path = workdir.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return workdir

    def environment(self) -> dict[str, str]:
        return self.emulator.environment()

    def choose(self, rng: random.Random, number: int, rounds: Sequence[Round], processes: int) -> tuple[str, Kill]:
        return "request", kill_at_request(self.emulator, rng.randint(1, REQUESTS), rng.randrange(processes),
                                          rng.random() < 0.5, rng.uniform(0, SURVIVES))
