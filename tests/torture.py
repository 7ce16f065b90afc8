"""Kills a training run over and over, and compares its end with that of a run that was left alone.

    python tests/torture.py --kills 50 --seed 0 --write results/reliability.md
    python tests/torture.py --bucket --processes 2 --kills 50 --write results/reliability-bucket-2.md

Every round is `python main.py` in a process of its own, on the embedded digits, with a checkpoint after each epoch. The
kills aim, in turn, at any moment since the start, at a save in progress, and at the moment after a line of metrics;
some are SIGTERM, which is to save. After each the same command must resume at the last complete checkpoint. At the end
arrays, metrics and kept checkpoints must be those of the undisturbed run, bit for bit.

With --bucket the run lies in an emulated bucket of Cloud Storage, and the undisturbed one on the disk. SIGKILL comes at
a random one of the requests that the bucket gets, before or after it is carried out. With --processes 2 it hits one of
the two at random; the other one, which JAX would end after a while, is killed up to `SURVIVES` seconds later.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
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
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from gcs_emulator import Emulator
from torture_places import Bucket, Disk, Kill, Round, kept, saves_in_progress

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 20  # steps from one checkpoint to the next
RECIPE = (f"--config={ROOT / 'configs' / 'digits_resnet.py'}:resnet14-s4u1-double", "--config.train.batch_size=20",
          f"--config.data.train_examples={20 * INTERVAL}", "--config.data.test_examples=100",
          "--config.train.evaluate_every=1")
PHASES = ("start-up", "steps", "after metrics", "save")
LEASE = 4.0  # seconds instead of the usual ones for which a lock in a bucket outlives its owner
START = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
if {LEASE} and any(argument.startswith("--workdir=gs://") for argument in sys.argv):
    from shared_basis.runtime import cloud
    cloud.LEASE, cloud.BEAT = {LEASE}, {LEASE / 4}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not those of the two processes that saved it
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(workdir.absolute() / "checkpoints" / str(step) / "state",
                                    args=ocp.args.StandardRestore(fallback_sharding=here))
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


"""Waits for its moment, and kills processes."""


def start(where: Disk, name: str, epochs: int, processes: int, output: Path) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of a run; the first one writes to `output`, and the others beside it."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(output.parent / "compiled"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = []
    for process in range(processes):
        several = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={process}"]
        command = [sys.executable, "-c", START, ROOT / "main.py", "--noreport", *RECIPE,
                   f"--workdir={where.place(name)}", f"--config.train.epochs={epochs}",
                   *(several if processes > 1 else [])]
        with (output.with_name(f"{output.name}.{process}") if process else output).open("w") as file:
            found.append(subprocess.Popen(command, env={**cache, **os.environ, **where.environment()},
                                          stdin=subprocess.DEVNULL, stdout=file, stderr=file))
    return found


def play(where: Disk, name: str, epochs: int, aim: str | None = None, kill: Kill | None = None,
         processes: int = 1) -> Round:
    """Starts the run, has it killed, or lets it end, and asserts what must hold of every round."""
    saved, output = max(kept(where.look(name)), default=0), where.look(name).with_suffix(".txt")
    began, started = time.monotonic(), start(where, name, epochs, processes, output)
    try:
        if kill:
            kill(started)
        code, *others = [process.wait(3600) for process in started]
    finally:
        for process in started:
            process.kill()
    text, workdir = output.read_text(), where.look(name)
    ready, resumes = "\nready in " in text, re.search(r"resumes at step ([\d,]+) of", text)
    now, evaluated = max(kept(workdir), default=0), max((line["step"] for line in metrics(workdir)), default=0)
    phase = ("start-up" if not ready else "save" if saves_in_progress(workdir) else "after metrics" if evaluated > now
             else "steps")
    resumed = int(resumes[1].replace(",", "")) if resumes else 0 if ready and not saved else None
    result = Round(aim or "none", phase, resumed, now, evaluated, time.monotonic() - began)
    told = f"{result}, {saved} before, exit codes {code, *others}\n{text}"
    # SIGTERM before the first step ends the process at once; what another process leaves, JAX ends.
    expected = {None: (0,), "SIGTERM": (143, -signal.SIGTERM)}.get(aim, (-signal.SIGKILL,))
    assert code in expected if processes == 1 else aim or not any((code, *others)), told
    unwanted = ["Traceback", "warning: ", *(["error: "] if processes == 1 or not aim else [])]
    assert not any(word in text for word in unwanted), told
    assert not (workdir / "damaged").exists(), told
    assert resumed == saved or (resumed is None and now == saved and code not in (0, 143)), told
    if code == 143:
        assert f"saved at step {now:,} of" in text, told
    # While one save is in progress, the next epoch is trained and evaluated, and no more.
    assert result.lost <= (0 if code in (0, 143) else 2 * INTERVAL), told
    return result


def report(rounds: list[Round], command: str, found: list[str], where: str) -> str:
    """Returns what happened as Markdown."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True,
                            check=False).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint"))
    counts = collections.Counter((phase, one.aim == "SIGTERM") for one in rounds for phase in (one.phase, "**all**"))
    resumed = [one for one in rounds if one.resumed is not None]
    return "\n".join([
        "# A run that is killed repeatedly", "",
        f"`{command}`, {datetime.datetime.now(datetime.UTC).date()}, commit {commit}, Python "
        f"{platform.python_version()}, {versions}, {os.cpu_count()} CPU cores; a checkpoint each {INTERVAL} steps; "
        f"{where}.", "",
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
    parser.add_argument("--bucket", action="store_true", help="the killed run lies in an emulated bucket")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="of the run; 2 with --bucket alone")
    parser.add_argument("--write", type=Path, help="file for the report")
    options = parser.parse_args()
    if options.processes > 1 and not options.bucket:
        parser.error("--processes 2 is for --bucket")
    epochs = 2 * options.kills + 4
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as open_ones:
        disk = Disk(Path(root))
        if options.bucket:
            where: Disk = Bucket(Path(root), open_ones.enter_context(Emulator()))
        else:
            where = disk
        undisturbed = play(disk, "reference", epochs, processes=options.processes)
        print(f"{epochs} epochs undisturbed: {undisturbed.seconds:.0f} s", flush=True)
        rng, rounds = random.Random(options.seed), []
        for number in range(options.kills):
            aim, kill = where.choose(rng, number, rounds, options.processes)
            rounds.append(play(where, "killed", epochs, aim, kill, options.processes))
            print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(rounds[-1]).items()), flush=True)
        play(where, "killed", epochs, processes=options.processes)
        found = differences(where.look("killed"), disk.look("reference"))
    places = ["on a disk", f"in an emulated bucket (locks of {LEASE:g} s)"][options.bucket]
    who = ["one process", "one of two processes, the other one soon after"][options.processes - 1]
    text = report(rounds, shlex.join(["python", "tests/torture.py", *sys.argv[1:]]), found, f"{who}, {places}")
    print(f"\n{text}", end="")
    if options.write:
        options.write.write_text(text)
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AssertionError as failure:
        sys.exit(f"FAILED: {failure}")
