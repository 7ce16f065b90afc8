"""Requests that the emulator of Cloud Storage gets, and its answers."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

REASONS = {304: "notModified", 400: "invalid", 401: "authError", 403: "forbidden", 404: "notFound", 409: "conflict",
           412: "conditionNotMet", 416: "requestedRangeNotSatisfiable", 429: "rateLimitExceeded", 501: "notImplemented",
           503: "backendError"}


class Refused(Exception):
    """A request that is answered by an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


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


def make_request(method: str, target: str, headers: Mapping[str, str], body: bytes) -> Request:
    """Returns the request for `target`, a path with its query or a whole address."""
    parts = urllib.parse.urlsplit(target)
    path = re.sub("^/(upload|download|resumable/upload)(?=/storage/)", "", parts.path)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    return Request(method, path, query, headers, body)
