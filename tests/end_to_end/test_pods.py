"""Several hosts, played by processes of this machine: what each one reads, and runs that go on with fewer of them."""

from __future__ import annotations

import collections
import os
import signal
from pathlib import Path

import pytest
from end_to_end import test_processes
from end_to_end.test_processes import CONFIG, FIELDS, STEPS, Job, assert_close, finish, free_port
from helpers import Watcher, read_arrays_anywhere, read_metrics, write_folder

from shared_basis.training import train as train_module

_NOTE_READS = """
import atexit, os, sys
opened = []
sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" and isinstance(
    about[0], (str, os.PathLike)) and str(about[0]).endswith(".png") else None)
atexit.register(lambda: open(f"reads.{sys.argv[-1].partition('=')[2]}", "w").write("\\n".join(opened)))
"""
"""Writes the image files that a process has opened, one a line, into its directory; its last argument is --process."""


def hosts(workdir: Path, count: int, *arguments: str, wait_for: Path | None = None) -> Job:
    """Starts so many processes on the run in `workdir`."""
    where = f"--coordinator=127.0.0.1:{free_port()}"
    return Job(workdir.with_name(f"{workdir.name}.logs"), [
        (*FIELDS, f"--workdir={workdir}", *arguments, where, f"--processes={count}", f"--process={process}")
        for process in range(count)], wait_for)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["stream", "device"])
def test_what_hosts_read_adds_up_to_one_copy_and_resident_images_are_read_once_by_each(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, placement: str) -> None:
    monkeypatch.setattr(test_processes, "_START", _NOTE_READS + test_processes._START)
    images = write_folder(tmp_path / "images", ("cat", "dog"), 32)
    finish(hosts(tmp_path / "run", 4, "--config.data.name=folder", f"--config.data.directory={images}",
                 "--config.data.train_examples=0", "--config.data.test_examples=0", "--config.train.epochs=2",
                 f"--config.data.placement={placement}", "--config.data.workers=0"))
    # Each process opens the first image before, for its shape.
    first = str(min((images / "train").rglob("*.png")))
    reads = []
    for process in range(4):
        found = (tmp_path / "run.logs" / f"reads.{process}").read_text().splitlines()
        assert found[0] == first
        reads.append(collections.Counter(found[1:]))
    copies = {split: collections.Counter(str(path) for path in (images / split).rglob("*.png"))
              for split in ("train", "test")}
    copy = copies["train"] + copies["test"]
    assert len(copy) == 128
    size = {name: os.path.getsize(name) for name in copy}
    read = [sum(size[name] * times for name, times in part.items()) for part in reads]
    if placement == "device":
        assert reads == [copy] * 4
    else:
        assert sum(reads, collections.Counter()) == copies["train"] + copy, "two epochs, scored after the second"
        assert sum(read) == sum(size.values()) + sum(size[name] for name in copies["train"])
        assert [part.total() for part in reads] == [48] * 4


@pytest.mark.slow
def test_a_run_of_four_hosts_goes_on_with_two_and_with_one(tmp_path: Path) -> None:
    workdir, begun = tmp_path / "run", [0]
    for count, process in ((4, 2), (2, 1)):
        signalled = tmp_path / f"signalled{count}"
        with hosts(workdir, count, wait_for=signalled) as job:
            job.until(lambda job=job: "test accuracy" in job.out(0))
            job.processes[process].send_signal(signal.SIGTERM)
            signalled.touch()
            assert job.wait() == [143] * count, job.text()
        assert f"resumes at step {begun[-1]} of" in job.out(0) or not begun[-1]
        assert f"; {2 * count} × cpu in {count} processes; workdir" in job.out(0)
        begun.append(max(int(path.name) for path in (workdir / "checkpoints").iterdir()))
    reporter = Watcher()
    train_module.train(CONFIG, workdir, reporter)
    assert f"resumes at step {begun[-1]} of {STEPS}" in reporter.text.getvalue()
    assert 16 < begun[1] < begun[2] < STEPS
    train_module.train(CONFIG, tmp_path / "one", Watcher())
    assert_close(read_metrics(workdir), read_metrics(tmp_path / "one"))
    assert read_arrays_anywhere(workdir, STEPS).keys() == read_arrays_anywhere(tmp_path / "one", STEPS).keys()
