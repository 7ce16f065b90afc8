"""What the emulator of Cloud Storage stores, and how it answers: the JSON interface.

Source: https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from gcs_messages import Answer, Refused, Request, answer_error, answer_json, make_request, split_headers, split_parts

NAME = "([^/]+)"
OBJECTS = f"/storage/v1/b/{NAME}/o"
PRECONDITIONS = ("ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch", "ifMetagenerationNotMatch")
KNOWN = {*PRECONDITIONS, *(name.replace("if", "ifSource") for name in PRECONDITIONS), "alt", "contentEncoding",
         "delimiter", "endOffset", "fields", "generation", "includeFoldersAsPrefixes", "includeTrailingDelimiter",
         "maxResults", "name", "pageToken", "prefix", "prettyPrint", "projection", "quotaUser", "startOffset",
         "tensorstore", "uploadType", "upload_id", "userProject", "versions"}
CHUNK = 256 * 1024  # parts of resumable uploads are multiples of it


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object as it is stored; a new one replaces it as a whole."""
    data: bytes
    generation: int
    metageneration: int
    created: str
    updated: str
    settings: Mapping[str, Any]  # contentType, metadata, cacheControl …


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
