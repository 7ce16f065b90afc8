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
import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

NAME = "([^/]+)"
OBJECTS = f"/storage/v1/b/{NAME}/o"
PRECONDITIONS = ("ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch", "ifMetagenerationNotMatch")
KNOWN = {*PRECONDITIONS, *(name.replace("if", "ifSource") for name in PRECONDITIONS), "alt", "contentEncoding",
         "delimiter", "endOffset", "fields", "generation", "includeFoldersAsPrefixes", "includeTrailingDelimiter",
         "maxResults", "name", "pageToken", "prefix", "prettyPrint", "projection", "quotaUser", "startOffset",
         "tensorstore", "uploadType", "upload_id", "userProject", "versions"}
REASONS = {304: "notModified", 400: "invalid", 401: "authError", 403: "forbidden", 404: "notFound", 409: "conflict",
           412: "conditionNotMet", 416: "requestedRangeNotSatisfiable", 429: "rateLimitExceeded", 501: "notImplemented",
           503: "backendError"}
CHUNK = 256 * 1024  # parts of resumable uploads are multiples of it


class Refused(Exception):
    """A request that is answered by an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object as it is stored; a new one replaces it as a whole."""
    data: bytes
    generation: int
    metageneration: int
    created: str
    updated: str
    settings: Mapping[str, Any]  # contentType, metadata, cacheControl …


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as it came, without the address."""
    method: str
    path: str  # still percent-encoded, without /upload and /download
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    at: float = dataclasses.field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.method} {urllib.parse.unquote(self.path)}?{urllib.parse.urlencode(self.query)}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is answered."""
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests whose text matches `where`, `count` times or until `end`."""
    status: int | None  # None: the connection is dropped
    where: str
    count: float
    end: float
    carried_out: bool  # the request is, and only its answer is lost


def answer_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8", **headers})


def answer_error(status: int, message: str) -> Answer:
    if status == 304:
        return Answer(304)
    errors = [{"domain": "global", "reason": REASONS.get(status, "error"), "message": message}]
    return answer_json({"error": {"code": status, "message": message, "errors": errors}}, status)


def split_parts(content_type: str, body: bytes) -> list[bytes]:
    """Returns the parts of a multipart body, each with its headers; lines end as the first one does."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    if boundary is None:
        raise Refused(400, "no boundary in Content-Type")
    mark = b"--" + boundary[1].encode()
    start = body.index(mark) + len(mark)
    end = b"\r\n" if body[start:start + 2] == b"\r\n" else b"\n"
    parts = (end + body[body.index(mark):]).split(end + mark)[1:]
    return [part.removeprefix(end) for part in parts if not part.startswith(b"--")]


def split_headers(part: bytes) -> tuple[bytes, bytes]:
    """Returns the headers of a part and its body."""
    end = re.search(rb"\r?\n\r?\n", part)
    return (part[:end.start()], part[end.end():]) if end else (part, b"")


class Storage:
    """The buckets and what may be asked of them: `answer` carries out one request."""

    def __init__(self, buckets: Sequence[str], *, one_write_a_second: bool) -> None:
        self.buckets: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
        self._one_write_a_second = one_write_a_second
        self._uploads: dict[str, tuple[Request, dict[str, Any], bytearray]] = {}
        self._written: dict[tuple[str, str], float] = {}
        self._generation = 0
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", f"/storage/v1/b/{NAME}", self._bucket), ("POST", "/storage/v1/b", self._create_bucket),
            ("GET", OBJECTS, self._list), ("POST", OBJECTS, self._upload), ("PUT", OBJECTS, self._upload_part),
            ("DELETE", OBJECTS, self._cancel_upload),
            ("GET", f"{OBJECTS}/{NAME}", self._get), ("DELETE", f"{OBJECTS}/{NAME}", self._delete),
            ("PATCH", f"{OBJECTS}/{NAME}", self._patch),
            ("POST", f"{OBJECTS}/{NAME}/(rewriteTo|copyTo)/b/{NAME}/o/{NAME}", self._copy),
            ("POST", f"{OBJECTS}/{NAME}/moveTo/o/{NAME}", self._move),
            ("POST", f"{OBJECTS}/{NAME}/compose", self._compose), ("POST", "/batch/storage/v1", self._batch)]

    def answer(self, request: Request) -> Answer:
        """Carries out `request`; no two at a time."""
        try:
            unknown = {*request.query} - KNOWN
            if unknown:
                raise Refused(400, f"this emulator does not know the parameter {', '.join(sorted(unknown))}")
            for method, pattern, method_of in self._routes:
                match = re.fullmatch(pattern, request.path)
                if match and method == request.method:
                    with self._lock:
                        return method_of(request, *map(urllib.parse.unquote, match.groups()))
            raise Refused(501, f"this emulator does not know {request}")
        except Refused as refused:
            return answer_error(refused.status, refused.message)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            return answer_error(400, f"this emulator cannot read {request}: {error!r}")

    def _objects(self, bucket: str) -> dict[str, Stored]:
        if bucket not in self.buckets:
            raise Refused(404, f"The specified bucket does not exist: {bucket}")
        return self.buckets[bucket]

    def _find(self, bucket: str, name: str, generation: str | None = None) -> Stored:
        stored = self._objects(bucket).get(name)
        if stored is None or generation not in (None, str(stored.generation)):
            raise Refused(404, f"No such object: {bucket}/{name}")
        return stored

    def _check(self, query: Mapping[str, str], stored: Stored | None, prefix: str = "if", reads: bool = False) -> None:
        """Refuses a request whose preconditions do not hold; generation 0 means that there is no object."""
        generation, metageneration = (stored.generation, stored.metageneration) if stored else (0, 0)
        for name, value in (("Generation", generation), ("Metageneration", metageneration)):
            wanted, unwanted = (query.get(f"{prefix}{name}{end}") for end in ("Match", "NotMatch"))
            if wanted is not None and int(wanted) != value:
                raise Refused(412, f"{prefix}{name}Match={wanted} does not hold: it is {value}")
            if unwanted is not None and int(unwanted) == value:
                raise Refused(304 if reads else 412, f"{prefix}{name}NotMatch={unwanted} does not hold")

    def _put(self, query: Mapping[str, str], bucket: str, name: str, data: bytes, settings: Mapping[str, Any]) -> None:
        """Stores an object, if the preconditions hold."""
        objects = self._objects(bucket)
        self._check(query, objects.get(name))
        now = time.monotonic()
        if self._one_write_a_second and now - self._written.get((bucket, name), -1.0) < 1.0:
            raise Refused(429, f"The object {bucket}/{name} exceeded the rate limit for object mutation operations")
        self._written[bucket, name] = now
        self._generation = max(self._generation + 1, time.time_ns() // 1000)
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        kept = {key: value for key, value in settings.items()
                if key in ("cacheControl", "contentEncoding", "contentType", "metadata")}
        objects[name] = Stored(data, self._generation, 1, stamp, stamp, kept)

    def _describe(self, bucket: str, name: str) -> dict[str, Any]:
        stored = self._find(bucket, name)
        return {"kind": "storage#object", "id": f"{bucket}/{name}/{stored.generation}", "name": name, "bucket": bucket,
                "generation": str(stored.generation), "metageneration": str(stored.metageneration),
                "size": str(len(stored.data)), "timeCreated": stored.created, "updated": stored.updated,
                "storageClass": "STANDARD", "etag": base64.b64encode(str(stored.generation).encode()).decode(),
                "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(), **stored.settings}

    def _bucket(self, request: Request, bucket: str) -> Answer:
        self._objects(bucket)
        return answer_json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US",
                            "locationType": "multi-region", "storageClass": "STANDARD", "metageneration": "1"})

    def _create_bucket(self, request: Request) -> Answer:
        name = json.loads(request.body)["name"]
        if name in self.buckets:
            raise Refused(409, f"The bucket {name} exists")
        self.buckets[name] = {}
        return self._bucket(request, name)

    def _list(self, request: Request, bucket: str) -> Answer:
        """Returns names by `prefix`, those beyond `delimiter` as prefixes; a page has `maxResults` of both together."""
        query, objects = request.query, self._objects(bucket)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end, token = query.get("startOffset", ""), query.get("endOffset", ""), query.get("pageToken", "")
        entries: dict[str, bool] = {}  # name -> it is a prefix
        for name in sorted(objects):
            if name.startswith(prefix) and name >= start and (not end or name < end):
                rest = name[len(prefix):]
                cut = rest.find(delimiter) if delimiter else -1
                entries[name if cut < 0 else prefix + rest[:cut + len(delimiter)]] = cut >= 0
                if query.get("includeTrailingDelimiter") == "true" and cut >= 0 and rest.endswith(delimiter) \
                        and rest.count(delimiter) == 1:
                    entries[name] = False
        left = [name for name in sorted(entries) if name > token]
        page = left[:min(int(query.get("maxResults", 1000)), 1000)]
        result: dict[str, Any] = {"kind": "storage#objects"}
        if items := [self._describe(bucket, name) for name in page if not entries[name]]:
            result["items"] = items
        if prefixes := [name for name in page if entries[name]]:
            result["prefixes"] = prefixes
        if len(page) < len(left):
            result["nextPageToken"] = page[-1]
        return answer_json(result)

    def _get(self, request: Request, bucket: str, name: str) -> Answer:
        stored = self._find(bucket, name, request.query.get("generation"))
        self._check(request.query, stored, reads=True)
        if request.query.get("alt") != "media":
            return answer_json(self._describe(bucket, name))
        headers = {"Content-Type": str(stored.settings.get("contentType", "application/octet-stream")),
                   "x-goog-generation": str(stored.generation), "x-goog-metageneration": str(stored.metageneration),
                   "x-goog-stored-content-length": str(len(stored.data)), "ETag": f'"{stored.generation}"'}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if not wanted or not any(wanted.groups()):
            return Answer(200, stored.data, headers)
        size = len(stored.data)
        first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first >= size or first > last:
            raise Refused(416, f"bytes {first} to {last} of {size}")
        return Answer(206, stored.data[first:last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})

    def _delete(self, request: Request, bucket: str, name: str) -> Answer:
        self._check(request.query, self._find(bucket, name, request.query.get("generation")))
        del self.buckets[bucket][name]
        return Answer(204)

    def _patch(self, request: Request, bucket: str, name: str) -> Answer:
        stored = self._find(bucket, name)
        self._check(request.query, stored)
        self.buckets[bucket][name] = dataclasses.replace(
            stored, metageneration=stored.metageneration + 1, settings={**stored.settings, **json.loads(request.body)})
        return answer_json(self._describe(bucket, name))

    def _upload(self, request: Request, bucket: str) -> Answer:
        """Takes an upload of one request (media, multipart), or begins one of several (resumable)."""
        kind, query = request.query.get("uploadType"), request.query
        if "upload_id" in query:  # gcsfs sends parts by POST
            return self._upload_part(request, bucket)
        settings: dict[str, Any] = {"contentType": request.headers.get("content-type", "application/octet-stream")}
        if kind == "media":
            name, data = query["name"], request.body
        elif kind == "multipart":
            described, content = map(split_headers, split_parts(request.headers["content-type"], request.body))
            content_type = re.search(rb"(?i)content-type: *([^\r\n]+)", content[0])
            settings = {"contentType": content_type[1].decode() if content_type else "application/octet-stream",
                        **json.loads(described[1])}
            name, data = query.get("name") or settings["name"], content[1]
        elif kind == "resumable":
            settings = {"contentType": request.headers.get("x-upload-content-type", "application/octet-stream"),
                        **json.loads(request.body or b"{}")}
            self._check(query, self._objects(bucket).get(query.get("name") or settings["name"]))
            number = f"upload{next(self._numbers)}"
            self._uploads[number] = (request, settings, bytearray())
            where = f"http://{request.headers['host']}/upload{request.path}?uploadType=resumable&upload_id={number}"
            return Answer(200, headers={"Location": where, "X-GUploader-UploadID": number})
        else:
            raise Refused(400, f"uploadType={kind}: must be media, multipart or resumable")
        self._put(query, bucket, name, data, settings)
        return answer_json(self._describe(bucket, name))

    def _upload_part(self, request: Request, bucket: str) -> Answer:
        """Takes the next part of a resumable upload; the object is there as soon as the last one is, and not before."""
        number = request.query.get("upload_id", "")
        if number not in self._uploads:
            raise Refused(404, f"no upload {number}")
        begun, settings, data = self._uploads[number]
        parts = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)",
                             request.headers.get("content-range", f"bytes 0-{len(request.body) - 1}/{len(request.body)}"
                                                 if request.body else "bytes */0"))
        if parts is None:
            raise Refused(400, "Content-Range")
        first, _, total = parts.groups()
        if first is not None:
            if int(first) > len(data):
                raise Refused(400, f"the part begins at {first}, {len(data)} bytes are there")
            if total == "*" and len(request.body) % CHUNK:
                raise Refused(400, f"{len(request.body)} bytes: parts but the last are multiples of {CHUNK}")
            data[int(first):] = request.body
        if total == "*" or len(data) < int(total):
            return Answer(308, headers={"Range": f"bytes=0-{len(data) - 1}"} if data else {})
        name = begun.query.get("name") or settings["name"]
        self._put(begun.query, bucket, name, bytes(data), settings)
        del self._uploads[number]
        return answer_json(self._describe(bucket, name))

    def _cancel_upload(self, request: Request, bucket: str) -> Answer:
        self._uploads.pop(request.query.get("upload_id", ""), None)
        return Answer(499)

    def _source(self, request: Request, bucket: str, name: str) -> Stored:
        stored = self._find(bucket, name)
        self._check(request.query, stored, prefix="ifSource")
        return stored

    def _copy(self, request: Request, bucket: str, name: str, how: str, to_bucket: str, to_name: str) -> Answer:
        source = self._source(request, bucket, name)
        settings = {**source.settings, **json.loads(request.body or "{}")}
        self._put(request.query, to_bucket, to_name, source.data, settings)
        resource, size = self._describe(to_bucket, to_name), str(len(source.data))
        return answer_json(resource if how == "copyTo" else {
            "kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size,
            "resource": resource})

    def _move(self, request: Request, bucket: str, name: str, to_name: str) -> Answer:
        source = self._source(request, bucket, name)
        self._put(request.query, bucket, to_name, source.data, source.settings)
        del self.buckets[bucket][name]
        return answer_json(self._describe(bucket, to_name))

    def _compose(self, request: Request, bucket: str, name: str) -> Answer:
        asked = json.loads(request.body)
        data = b"".join(self._find(bucket, part["name"]).data for part in asked["sourceObjects"])
        self._put(request.query, bucket, name, data, asked.get("destination", {}))
        return answer_json(self._describe(bucket, name))

    def _batch(self, request: Request) -> Answer:
        """Carries out up to 100 requests that stand in one, each for itself."""
        answers = []
        for part in split_parts(request.headers["content-type"], request.body):
            headers, inner = split_headers(part)
            line, body = split_headers(inner)
            method, target, *_ = line.split(b"\n")[0].decode().split()
            number = re.search(rb"(?i)content-id: *<?([^>\r\n]+)", headers)
            one = self.answer(make_request(method, target, request.headers, body))
            answers.append(b"Content-Type: application/http\r\nContent-ID: <response-%s>\r\n\r\nHTTP/1.1 %d %s\r\n"
                           b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s\r\n" % (
                               number[1] if number else b"0", one.status, HTTPStatus(one.status).phrase.encode(),
                               len(one.body), one.body))
        body = b"".join(b"--answers\r\n" + one for one in answers) + b"--answers--\r\n"
        return Answer(200, body, {"Content-Type": "multipart/mixed; boundary=answers"})


def make_request(method: str, target: str, headers: Mapping[str, str], body: bytes) -> Request:
    """Returns the request for `target`, a path with its query or a whole address."""
    parts = urllib.parse.urlsplit(target)
    path = re.sub("^/(upload|download|resumable/upload)(?=/storage/)", "", parts.path)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    return Request(method, path, query, headers, body)


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
