"""The directory of a run: who may use it, and what survives in it."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, user_error

from shared_basis.config import Config, DataConfig, TrainConfig, replace
from shared_basis.runs.workdir import PACKAGES, Workdir, make_record, versions

CONFIG = Config(data=DataConfig(name="folder", directory="/images"), train=TrainConfig(epochs=3))
FACTS = {"classes": ["cat", "dog"], "image_shape": [8, 8, 3], "train_examples": 10, "test_examples": 4}


def record(config: Config = CONFIG, **facts: Any) -> dict[str, Any]:
    return make_record(config, {**FACTS, **facts})


@pytest.fixture
def run(tmp_path: Path) -> Workdir:
    """Returns a workdir, below directories that are yet to be made, that holds the run of `CONFIG`, which has begun."""
    workdir = Workdir(tmp_path / "runs" / "deep")
    workdir.claim(record())
    (workdir.checkpoints / "0").mkdir(parents=True)
    return workdir


def test_a_claimed_workdir_gives_back_its_record(run: Workdir) -> None:
    config, saved = Workdir(str(run.path)).load()
    assert config == CONFIG
    assert saved == record()
    assert saved["versions"] == versions()
    assert set(saved["versions"]) == {"python", *PACKAGES}


def test_naming_a_workdir_makes_nothing(tmp_path: Path) -> None:
    assert Workdir(tmp_path / "run").read_record() is None
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_claims_again_and_keeps_the_first_record(run: Workdir) -> None:
    before = (run.path / "run.json").read_bytes()
    run.claim({**record(), "versions": {"jax": "another"}})
    assert (run.path / "run.json").read_bytes() == before


def test_another_configuration_is_refused_and_its_fields_are_named(run: Workdir) -> None:
    other = replace(CONFIG, {"train.epochs": 4, "optimizer.momentum": 0.5})
    with user_error("another configuration", "train.epochs: 4 now, 3 there", "optimizer.momentum: 0.5 now, 0.9 there",
                    "--workdir", str(run.path)):
        run.claim(record(other))
    assert run.load()[0] == CONFIG


def test_the_images_may_lie_elsewhere(run: Workdir) -> None:
    moved = replace(CONFIG, {"data.directory": "/moved", "data.placement": "stream", "data.workers": 3})
    before = run.load()[1]
    run.claim(record(moved))
    assert run.load() == (moved, {**before, "config": record(moved)["config"]})  # later commands find them there


@pytest.mark.parametrize(("facts", "parts"), [
    ({"classes": ["cat", "cow"]}, ("classes", "cow", "dog")),
    ({"train_examples": 11}, ("train_examples: 11 now, 10 there",)),
    ({"classes": [f"class{i}" for i in range(1000)]}, ("class0", "… 1000 in all"))])
def test_other_data_is_refused_in_a_short_line(run: Workdir, facts: dict[str, Any], parts: tuple[str, ...]) -> None:
    with user_error("other data", *parts) as caught:
        run.claim(record(**facts))
    assert len(str(caught.value)) < 500


def test_a_workdir_without_a_run_cannot_be_loaded(tmp_path: Path) -> None:
    with user_error(str(tmp_path), "holds no run", "--workdir"):
        Workdir(tmp_path).load()


def test_runs_near_a_directory_without_one_are_named(run: Workdir, tmp_path: Path) -> None:
    run.claim(record())
    with user_error(f"It is part of the run in {run.path}; use that directory."):
        Workdir(run.checkpoints / "10").load()
    above = run.path.parent
    with user_error(f"{above} holds no run", f"It contains {run.path}; use one of them."):
        Workdir(above).load()
    for name in ("z1", "z2", "z3"):
        Workdir(above / name).claim(record())
    with user_error(f"{above} contains other runs (", "and 1 more", f"{above / 'new'}"):
        Workdir(above).claim(record())
    assert not (above / "run.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"config": {}}', '"text"', "{\"config\": \udcff}"])
def test_a_damaged_record_is_told_with_where_its_copies_lie(run: Workdir, text: str) -> None:
    (run.path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    for use in (run.read_record, run.load, lambda: run.claim(record())):
        with user_error("run.json is damaged", str(run.checkpoints)):
            use()


@pytest.mark.parametrize(("key", "value", "part"), [
    ("config", {"train": {"batches": 3}}, "train.batches"), ("config", [], "Config"),
    ("config", {"seed": -1}, "seed=-1")])
def test_a_record_of_another_version_is_told(run: Workdir, key: str, value: Any, part: str) -> None:
    (run.path / "run.json").write_text(json.dumps({**record(), key: value}))
    with user_error("run.json", part):
        run.load()


def test_a_file_in_the_place_of_the_workdir_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with user_error(str(path), "cannot be read"):
            Workdir(path).claim(record())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").mkdir()
    with user_error("cannot be read"):
        Workdir(tmp_path / "run").load()


def test_a_workdir_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with user_error(str(tmp_path / "run"), "cannot be written: No space left on device", "--workdir"):
        Workdir(tmp_path / "run").claim(record())
    assert Workdir(tmp_path / "run").read_record() is None  # nothing half-written is taken for a run


def test_metrics_come_back_in_order(run: Workdir) -> None:
    assert run.metrics() == []
    lines = [{"step": step, "loss": 1 / 3} for step in (5, 10)]
    for line in lines:
        run.append_metrics(line)
    assert run.metrics() == lines


def test_rewinding_drops_what_comes_after_the_step(run: Workdir) -> None:
    run.rewind_metrics(0)  # there is no file yet
    assert run.metrics() == []
    for step in (5, 10, 15):
        run.append_metrics({"step": step})
    run.rewind_metrics(10)
    run.append_metrics({"step": 20})
    assert [line["step"] for line in run.metrics()] == [5, 10, 20]
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "metrics.csv", "metrics.jsonl",
                                                                "run.json"]


def table(run: Workdir) -> list[dict[str, str]]:
    """Returns metrics.csv."""
    with (run.path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_there_as_a_table_too(run: Workdir) -> None:
    run.rewind_metrics(0)
    assert table(run) == []
    for step in (5, 10):
        run.append_metrics({"step": step, "train_loss": 1 / step})
    run.append_metrics({"step": 15, "train_loss": 0.25, "penalty": 1e-9})
    assert table(run) == [{"step": "5", "train_loss": "0.2", "penalty": ""},
                          {"step": "10", "train_loss": "0.1", "penalty": ""},
                          {"step": "15", "train_loss": "0.25", "penalty": "1e-09"}]
    run.rewind_metrics(5)
    assert table(run) == [{"step": "5", "train_loss": "0.2"}]


def test_a_last_line_that_was_cut_off_is_dropped(run: Workdir) -> None:
    for step in (5, 10):
        run.append_metrics({"step": step})
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert run.metrics() == [{"step": 5}]
    run.rewind_metrics(10)
    run.append_metrics({"step": 10})
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'


def test_checkpoints_without_a_record_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    record = make_record(Config(), {"classes": ["a", "b"], "image_shape": [8, 8, 1]})
    with user_error("holds checkpoints and no run.json", "/run/metadata"):
        Workdir(tmp_path).claim(record)
    assert not (tmp_path / "run.json").exists()


# The lock

HOLDER = ("import sys; sys.path.insert(0, sys.argv[1]); from shared_basis.runs.workdir import Workdir\n"
          "with Workdir(sys.argv[2]).locked(): print('locked', flush=True); sys.stdin.read()")


def test_one_process_holds_a_workdir_and_is_named_until_it_dies(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "runs" / "run")
    with subprocess.Popen([sys.executable, "-c", HOLDER, ROOT, workdir.path], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with user_error(f"workdir {workdir.path} is in use by another run (process {holder.pid} on ", "--workdir"), \
                workdir.locked(patience=0):
            pass
        holder.send_signal(signal.SIGKILL)
    with workdir.locked():  # at once
        assert (workdir.path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_workdir_is_free_after_its_context_however_that_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Workdir(tmp_path).locked():
        raise KeyboardInterrupt
    with Workdir(tmp_path).locked(), user_error("in use"), Workdir(tmp_path).locked(patience=0):
        pass
    with Workdir(tmp_path).locked():
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_is_waited_for_a_moment(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(Workdir(tmp_path).locked())
        began = time.monotonic()
        with user_error("in use"), Workdir(tmp_path).locked(patience=0.5):
            pass
        assert 0.5 <= time.monotonic() - began < 1.5
        threading.Timer(0.3, stack.close).start()
        with Workdir(tmp_path).locked(patience=60):
            assert time.monotonic() - began < 30


def test_a_file_system_without_locks_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    held = 0
    with Workdir(tmp_path).locked(), Workdir(tmp_path).locked(patience=0):
        held += 1
    assert held, "neither waits for the other"


def test_a_workdir_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "run"):
        with user_error(f"workdir {path} cannot be written: ", "--workdir"), Workdir(path).locked():
            pass


# What all processes must agree on

def test_the_run_that_is_required_must_be_there_and_the_same(run: Workdir, tmp_path: Path) -> None:
    before = (run.path / "run.json").read_bytes()
    run.require(record())
    with user_error("optimizer.momentum: 0.5 now, 0.9 there"):
        run.require(record(replace(CONFIG, {"optimizer.momentum": 0.5})))
    with user_error("other data", "classes"):
        run.require(record(classes=["cat", "cow"]))
    assert (run.path / "run.json").read_bytes() == before
    with user_error(f"workdir {tmp_path / 'absent'} holds no run.json here", "a file system that all machines share"):
        Workdir(tmp_path / "absent").require(record())
    assert not (tmp_path / "absent").exists()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a file that is written at once end in its middle, for want of space."""
    write_bytes = Path.write_bytes

    def write_half(self: Path, content: bytes) -> None:
        write_bytes(self, content[:len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", write_half)


@pytest.mark.usefixtures("full")
def test_half_a_record_is_not_taken_for_one(tmp_path: Path) -> None:
    with user_error("cannot be written: No space left on device"):
        Workdir(tmp_path).claim(record())
    assert Workdir(tmp_path).read_record() is None


def test_metrics_that_cannot_be_rewound_stay(run: Workdir, request: pytest.FixtureRequest) -> None:
    for step in (5, 10):
        run.append_metrics({"step": step})
    request.getfixturevalue("full")
    with user_error("metrics.jsonl cannot be written: No space left on device", f"are in {run.checkpoints}"):
        run.rewind_metrics(5)
    assert [line["step"] for line in run.metrics()] == [5, 10]


@pytest.mark.parametrize("damage", ["{]", "[1]", '{"step": "5"}', "[" * 100_000])
def test_a_damaged_line_of_metrics_costs_no_other(run: Workdir, damage: str) -> None:
    (run.path / "metrics.jsonl").write_text(f'{{"step": 5}}\n{damage}\n{{"step": 15}}\n')
    assert run.metrics() == [{"step": 5}, {"step": 15}]
