"""The files of a run, on a disk and in a bucket: the same whatever holds them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import stat
import threading
import time
from pathlib import Path

import pytest
from gcs_emulator import Emulator
from helpers import user_error

from shared_basis.errors import UserError
from shared_basis.runtime.files import Files, absolute, as_path, open_files, write_atomic

NUMBERS = itertools.count()


@pytest.fixture
def bucket(storage: Emulator, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Files in a bucket, a directory of their own."""
    from shared_basis.runtime import cloud

    monkeypatch.setattr(cloud, "WRITE_INTERVAL", 0.0)
    return open_files(f"gs://bucket/files{next(NUMBERS)}")


@pytest.fixture(params=["disk", "bucket"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """Files on a disk, and in a bucket."""
    return open_files(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has locks in buckets pass from a dead process to another within a second."""
    from shared_basis.runtime import cloud

    for name, seconds in (("LEASE", 0.6), ("BEAT", 0.1), ("POLL", 0.02)):
        monkeypatch.setattr(cloud, name, seconds)


# Files

def test_files_are_written_read_listed_measured_moved_and_removed(files: Files) -> None:
    assert files.names() == files.names("checkpoints") == []
    with pytest.raises(FileNotFoundError):
        files.read("run.json")
    files.make("checkpoints/10/state")
    files.make("checkpoints/20")
    files.write({"run.json": "λ", "checkpoints/10/state/a": b"12345", "checkpoints/10/b": b"678",
                 "checkpoints/20/b": b""})
    assert files.names() == ["checkpoints", "run.json"]
    assert files.names("checkpoints") == ["10", "20"]
    assert [files.exists(name) for name in ("run.json", "checkpoints/20/b", "absent", "absent/b")] == [
        True, True, False, False]
    assert (files.read("run.json").decode(), files.read("checkpoints/20/b")) == ("λ", b"")
    assert (files.size("checkpoints/10"), files.size("checkpoints/20")) == (8, 0)
    files.write({"run.json": "again"})
    assert files.read("run.json") == b"again"
    files.move("checkpoints/10", "damaged/10.1")
    assert (files.names("checkpoints"), files.names("damaged"), files.size("damaged/10.1")) == (["20"], ["10.1"], 8)
    assert files.read("damaged/10.1/state/a") == b"12345"
    files.remove("run.json")
    files.remove("run.json")
    assert "run.json" not in files.names()
    assert files.is_directory()


def test_what_is_appended_follows_what_is_there(files: Files) -> None:
    files.append("lines", "one\n")
    files.append("lines", b"two\n")
    files.write({"lines": "new\n"})
    files.append("lines", "three\n")
    open_files(files.path).append("lines", "four\n")
    assert files.read("lines") == b"new\nthree\nfour\n"


def test_a_log_grows_over_those_that_write_it_one_after_another(files: Files) -> None:
    for line in ("one λ\n", "two \udcff\n"):
        with files.open_log("log.txt") as log:
            log.write(line)
            log.flush()
    assert files.read("log.txt").decode() == "one λ\ntwo \\udcff\n"


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "there" / "table.csv", tmp_path / "link.csv", tmp_path / "pipe"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["table.csv"]
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_file_is_written_by_its_path(files: Files) -> None:
    write_atomic(files.path / "table.csv", "1")
    assert files.read("table.csv") == b"1"


def test_a_lock_is_held_by_one_and_free_afterwards(files: Files, hurried: None) -> None:
    other = open_files(files.path)
    with files.locked(0, pytest.fail):
        files.require_lock()
        with user_error(f"workdir {files.path} is in use by another run (process ", "--workdir"), \
                other.locked(0, lambda text: None):
            pass
    with other.locked(0, pytest.fail):
        pass


# Buckets

def test_of_many_that_want_a_lock_one_has_it(bucket: Files, hurried: None) -> None:
    outcomes: list[str] = []
    held, done = threading.Barrier(8), threading.Event()

    def take() -> None:
        held.wait()
        try:
            with open_files(bucket.path).locked(0, lambda text: None):
                outcomes.append("taken")
                done.wait(10)
        except UserError:
            outcomes.append("in use")
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8 and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in use"] * 7 + ["taken"]


def test_the_lock_of_a_dead_process_is_taken_over_and_of_a_living_one_never(bucket: Files, hurried: None) -> None:
    bucket.write({".lock": "process 7 on there, 12345678"})  # and nobody writes it again
    told: list[str] = []
    began = time.monotonic()
    with bucket.locked(0, told.append):
        assert time.monotonic() - began > 0.5
        assert told == [f"{bucket.path} is locked by process 7 on there; waiting 1 seconds for its renewal"]
        time.sleep(1)
        with user_error("in use"), open_files(bucket.path).locked(0, lambda text: None):
            pass
    assert bucket.names() == []


def test_a_process_that_was_taken_for_dead_writes_no_more(storage: Emulator, bucket: Files, hurried: None) -> None:
    bucket.append("metrics.jsonl", "one\n")
    with bucket.locked(0, pytest.fail):
        other = open_files(bucket.path)
        other.write({".lock": "another", "metrics.jsonl": "one\nother\n"})
        with user_error("metrics.jsonl: another process has modified it"):
            bucket.append("metrics.jsonl", "two\n")
        time.sleep(1)
        with pytest.raises(OSError, match="another process has taken over"):
            bucket.require_lock()
    assert bucket.read("metrics.jsonl") == b"one\nother\n"
    assert bucket.read(".lock") == b"another", "it is the other one's"


def test_a_process_that_was_suspended_asks_for_its_lock_before_it_writes(
        storage: Emulator, bucket: Files, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_basis.runtime.cloud.BEAT", 30.0)  # no sign of life, as of a process that is stopped
    with bucket.locked(0, pytest.fail):
        time.sleep(0.7)
        bucket.require_lock()  # nobody has taken it over: it is renewed
        open_files(bucket.path).write({".lock": "another"})
        bucket.require_lock()  # renewed just now
        time.sleep(0.7)
        with pytest.raises(OSError, match="another process has taken over"):
            bucket.require_lock()
    assert bucket.read(".lock") == b"another"


def test_the_same_file_is_written_once_a_second(storage: Emulator) -> None:
    files = open_files(f"gs://bucket/files{next(NUMBERS)}")
    began = time.monotonic()
    files.append("a", "1")
    files.append("b", "2")
    assert time.monotonic() - began < 1
    files.append("a", "3")
    assert time.monotonic() - began > 1
    assert files.read("a") == b"13"


@pytest.mark.parametrize(("status", "carried_out"), [(503, False), (429, False), (None, False), (503, True),
                                                     (None, True)])
def test_what_fails_for_a_while_is_repeated_and_done_once(storage: Emulator, bucket: Files, status: int | None,
                                                          carried_out: bool) -> None:
    bucket.append("lines", "one\n")
    for line in ("two\n", "three\n"):
        storage.fail(status, count=3, carried_out=carried_out)
        bucket.append("lines", line)
    storage.fail(status, count=3)
    assert bucket.read("lines") == b"one\ntwo\nthree\n"
    storage.fail(status, count=2, carried_out=carried_out)
    with bucket.locked(0, pytest.fail):
        storage.fail(status, count=2)
        assert bucket.names() == [".lock", "lines"]


@pytest.mark.parametrize(("status", "reason"), [
    (403, "no permission"), (503, "Cloud Storage cannot be reached"),
    (None, "Cloud Storage cannot be reached"), (400, "Cloud Storage fails")])
def test_what_cannot_be_done_is_told_in_one_line(storage: Emulator, bucket: Files, monkeypatch: pytest.MonkeyPatch,
                                                 status: int | None, reason: str) -> None:
    from shared_basis.runtime import cloud_client

    monkeypatch.setattr(cloud_client, "PATIENCE", 0.1)
    storage.fail(status)
    for action in (lambda: bucket.read("a"), lambda: bucket.names(), lambda: bucket.remove("a")):
        with user_error(str(bucket.path), reason) as caught:
            action()
        assert isinstance(caught.value, OSError)
        assert reason in caught.value.strerror
        assert "http" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_told(storage: Emulator) -> None:
    missing = open_files("gs://other/run")
    for action in (lambda: missing.read("run.json"), lambda: missing.names(), lambda: missing.append("a", "b"),
                   lambda: missing.size("a")):
        with user_error("gs://other/run", "there is no bucket other"):
            action()


def test_missing_credentials_are_told(storage: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from shared_basis.runtime import cloud_client

    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    cloud_client.client.cache_clear()
    try:
        with user_error("gs://bucket/run/run.json: no credentials for Google Cloud", "gcloud auth"):
            open_files("gs://bucket/run").read("run.json")
    finally:
        cloud_client.client.cache_clear()


# Paths

def test_places_are_paths_with_parts_and_parents(storage: Emulator) -> None:
    path = as_path("gs://bucket/runs/one")
    assert (str(path / "run.json"), path.name, str(path.parent)) == ("gs://bucket/runs/one/run.json", "one",
                                                                      "gs://bucket/runs")
    assert str(as_path(Path("gs://bucket/run"))) == "gs://bucket/run", "a pathlib.Path has lost a slash"
    assert as_path("runs/one") == Path("runs/one")
    assert (absolute("gs://bucket/run:best"), absolute("/a/../b")) == ("gs://bucket/run:best", "/b")


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_files("~/run").make()
    open_files(Path("~/run")).write({"run.json": "{}"})
    assert (tmp_path / "run" / "run.json").read_text() == "{}"
    assert absolute(str(as_path("~/run"))) == absolute("~/run")


def test_a_directory_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with user_error(str(tmp_path / "loop"), "symbolic links"):
        open_files(tmp_path / "loop").names()
    files = open_files(tmp_path)
    assert not files.exists("loop/run.json")
    assert not open_files(tmp_path / "loop").is_directory()


@pytest.mark.parametrize("address", ["s3://bucket/run", "az://bucket", "file:///tmp/run", "gs://", "hdfs:/one/slash"])
def test_other_addresses_are_refused(address: str) -> None:
    with user_error(f"{address}: must be a directory, or gs://BUCKET/DIRECTORY", "mount"):
        open_files(address)


def test_the_missing_package_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with user_error("gs://bucket/run: the package gcsfs", "'shared-basis[gcs]'"):
        open_files("gs://bucket/run")
