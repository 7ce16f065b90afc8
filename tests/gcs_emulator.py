"""A small emulator of Google Cloud Storage on 127.0.0.1: what gcsfs, etils and tensorstore ask of its JSON interface.

    with Emulator(buckets=["bucket"]) as storage:
        subprocess.run([...], env={**os.environ, **storage.environment()})  # a process's own gs://bucket/…

    python tests/gcs_emulator.py --port 4443 --bucket bucket   # prints the variables to set, and serves until Ctrl-C

Objects live in memory and are strongly consistent, as Google's are; there are no directories. Preconditions on
generations hold for every read, upload, copy, move and deletion. What it does not know it refuses (400, 501), so that
no client relies on what was never checked. It delays, fails, loses answers and kills processes when told so.

Source: https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.server
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gcs_messages import Answer, Request, answer_error, make_request
from gcs_storage import Storage


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests whose text matches `where`, `count` times or until `end`."""
    status: int | None  # None: the connection is dropped
    where: str
    count: float
    end: float
    carried_out: bool  # the request is, and only its answer is lost


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads requests and writes answers; with buffers, as each call takes 44 ms without."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Server

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def do(self) -> None:
        answer = self.server.emulator.receive(make_request(
            self.command, self.path, {key.lower(): value for key, value in self.headers.items()}, self._body()))
        if answer is None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves until it is closed; clients that are killed are no news."""

    daemon_threads = True
    request_queue_size = 128
    emulator: Emulator

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)


def environment_of(address: str) -> dict[str, str]:
    """Returns the variables that lead gcsfs and tensorstore to an emulator, without asking for credentials."""
    return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


class Emulator:
    """The storage behind an address of this machine, and what goes wrong with it.

    `requests` lists what was asked since the start, with the status of each answer (None: none was given).
    """

    def __init__(self, buckets: Sequence[str] = ("bucket",), *, port: int = 0,
                 one_write_a_second: bool = False) -> None:
        """Listens on `port`, or on one that is free.

        Args:
          one_write_a_second: refuse more writes to the same object, by 429, as Google's may.
        """
        self.storage = Storage(buckets, one_write_a_second=one_write_a_second)
        self.delay = 0.0  # seconds before each request is carried out
        self.requests: list[tuple[Request, int | None]] = []
        self._faults: list[Fault] = []
        self._actions: dict[int, tuple[bool, Callable[[Request], None]]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._server = Server(("127.0.0.1", port), Handler)
        self._server.emulator = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Emulator:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Returns the variables that lead gcsfs and tensorstore here."""
        return environment_of(self.address)

    def names(self, bucket: str = "bucket", prefix: str = "") -> list[str]:
        """Returns the names of the objects in `bucket` that begin with `prefix`, sorted."""
        return sorted(name for name in list(self.storage.buckets[bucket]) if name.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        return self.storage.buckets[bucket][name].data

    def write(self, name: str, data: bytes, bucket: str = "bucket") -> None:
        path = f"/storage/v1/b/{bucket}/o"
        self.storage.answer(Request("POST", path, {"uploadType": "media", "name": name}, {}, data))

    def fail(self, status: int | None, *, count: float = float("inf"), seconds: float = float("inf"), where: str = "",
             carried_out: bool = False) -> Fault:
        """Answers coming requests by `status`, or drops their connections (None), `count` times or for `seconds`.

        Args:
          where: a regular expression; only requests whose text (`POST /storage/v1/b/bucket/o?name=…`) it finds.
          carried_out: the request is, and only its answer is replaced or lost.
        """
        fault = Fault(status, where, count, time.monotonic() + seconds, carried_out)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Ends all faults and delays."""
        with self._lock:
            self._faults.clear()
        self.delay = 0.0

    def at(self, number: int, action: Callable[[Request], None], *, carried_out: bool = False) -> None:
        """Calls `action` when the `number`th request from now arrives (1: the next), or after it is carried out."""
        with self._lock:
            self._actions[self._count + number] = (carried_out, action)

    def kill_at(self, number: int, process: int, *, carried_out: bool = False) -> None:
        """Sends SIGKILL to `process` at the `number`th request from now; its answer never arrives."""
        def kill(request: Request) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.at(number, kill, carried_out=carried_out)

    def receive(self, request: Request) -> Answer | None:
        """Carries out `request`, or what is to go wrong with it; None drops the connection."""
        with self._lock:
            self._count += 1
            carried_out, action = self._actions.pop(self._count, (False, None))
            fault = self._next_fault(str(request))
        if action is not None and not carried_out:
            action(request)
        time.sleep(self.delay)
        answer: Answer | None = None
        if fault is None or fault.carried_out:
            answer = self.storage.answer(request)
        if fault is not None:
            answer = None if fault.status is None else answer_error(fault.status, "this emulator was told to fail")
        if action is not None and carried_out:
            action(request)
        with self._lock:
            self.requests.append((request, None if answer is None else answer.status))
        return answer

    def _next_fault(self, text: str) -> Fault | None:
        self._faults = [fault for fault in self._faults if fault.count > 0 and time.monotonic() < fault.end]
        for fault in self._faults:
            if re.search(fault.where, text):
                fault.count -= 1
                return fault
        return None


@contextlib.contextmanager
def environment_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, and what they were afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 takes one that is free")
    parser.add_argument("--bucket", action="append", help="may be given several times; default: bucket")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each request is carried out")
    parser.add_argument("--one-write-a-second", action="store_true", help="refuse more to the same object, by 429")
    options = parser.parse_args()
    with Emulator(options.bucket or ["bucket"], port=options.port,
                  one_write_a_second=options.one_write_a_second) as emulator:
        emulator.delay = options.delay
        for name, value in emulator.environment().items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
