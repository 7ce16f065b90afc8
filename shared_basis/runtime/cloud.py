"""Files and locks of a directory in a Google Cloud Storage bucket.

This package uses Google's client, which supports preconditions; Orbax uses etils, gcsfs and tensorstore.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mimetypes
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from google.api_core import exceptions

from shared_basis.runtime.cloud_client import TIMEOUT, ChangedByAnother, client, explained, retry
from shared_basis.runtime.filesystem import Files, FilesError, in_use, this_process

LEASE = 40.0
"""Seconds without a renewal after which a lock may be taken over."""

BEAT = 10.0
"""Seconds between renewals of a lock."""

POLL = 1.0
"""Seconds between checks of a lock held by another process."""

WRITE_INTERVAL = 1.0
"""Minimum seconds between writes of the same file, a limit of Cloud Storage."""

LOG_INTERVAL = 10.0
"""Seconds between writes of a log, which is rewritten as a whole."""

LOCK = ".lock"


def open_directory(path: PurePath) -> Files:
    """Returns the files of the directory `path`, gs://BUCKET/DIRECTORY; sends no request."""
    return _CloudFiles(path)


class _CloudFiles(Files):
    """The files of a directory in a bucket: objects whose names start with its path."""

    def __init__(self, path: PurePath) -> None:
        self.path = path
        self._bucket, _, self._directory = str(path).removeprefix("gs://").partition("/")
        self._written: dict[str, float] = {}
        self._grown: dict[str, tuple[bytes, int]] = {}
        self._lease: _Lease | None = None

    def read(self, name: str) -> bytes:
        return self.get(name)[0]

    def write(self, contents: Mapping[str, str | bytes]) -> None:
        for name, content in contents.items():
            self._grown.pop(name, None)
            self.put(name, content)

    def append(self, name: str, content: str | bytes) -> None:
        # Requires the generation last seen here, so that a process presumed dead stops writing.
        before, generation = self._grown.get(name) or self.get_if_there(name)
        whole = before + (content.encode() if isinstance(content, str) else content)
        self._grown[name] = whole, self.put(name, whole, generation)

    def open_log(self, name: str) -> io.StringIO:
        return _Log(self, name)

    def names(self, directory: str = "") -> list[str]:
        prefix = self._object(f"{directory}/" if directory else "")
        with self._explained(directory):
            found = self._list(prefix=prefix, delimiter="/", fields="items(name),prefixes,nextPageToken")
            names = [*(each.name for each in found), *found.prefixes]
        return sorted({name.removeprefix(prefix).rstrip("/") for name in names} - {""})

    def exists(self, name: str) -> bool:
        with self._explained(name):
            there: bool = self._blob(name).exists(timeout=TIMEOUT, retry=retry())
            if not there:
                list(self._list(max_results=1))  # raises if the bucket does not exist
            return there

    def size(self, directory: str) -> int:
        with self._explained(directory):
            return sum(each.size for each in self._list(prefix=self._object(f"{directory}/")))

    def is_directory(self) -> bool:
        return True

    def make(self, directory: str = "") -> None:
        pass  # buckets have no directories

    def remove(self, name: str) -> None:
        self.delete(name)

    def move(self, directory: str, new: str) -> None:
        # A top-level file marks a checkpoint as complete: it is copied last and deleted first.
        source, target = self._object(f"{directory}/"), self._object(f"{new}/")
        with self._explained(directory):
            bucket = client().bucket(self._bucket)
            top_first = sorted((each.name for each in self._list(prefix=source)), key=lambda name: name.count("/"))
            for name in reversed(top_first):
                copy, token = bucket.blob(target + name.removeprefix(source)), None
                while True:  # large files are copied in parts
                    token, _, _ = copy.rewrite(bucket.blob(name), token=token, timeout=TIMEOUT, retry=retry())
                    if token is None:
                        break
            for name in top_first:
                with contextlib.suppress(exceptions.NotFound):
                    bucket.blob(name).delete(timeout=TIMEOUT, retry=retry())

    @contextlib.contextmanager
    def locked(self, patience: float, tell: Callable[[str], None]) -> Iterator[None]:
        self._lease = _Lease(self)
        self._lease.take(tell)
        try:
            yield
        finally:
            self._lease.release()
            self._lease = None

    def require_lock(self) -> None:
        if self._lease is not None:
            self._lease.require()

    def get(self, name: str) -> tuple[bytes, int]:
        """Returns the contents of a file and its generation.

        Raises:
          FileNotFoundError: the file does not exist.
        """
        with self._explained(name):
            file = self._blob(name)
            try:
                return file.download_as_bytes(timeout=TIMEOUT, retry=retry()), file.generation
            except exceptions.NotFound:
                list(self._list(max_results=1))  # raises if the bucket does not exist
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self.path / name))

    def put(self, name: str, content: str | bytes, generation: int | None = None, patience: float | None = None) -> int:
        """Writes a whole file and returns its generation.

        Args:
          generation: the generation of the file to replace; 0 if it must not exist, None for any.

        Raises:
          FilesError: the file has another generation.
        """
        data = content.encode() if isinstance(content, str) else content
        time.sleep(max(0.0, self._written.get(name, -WRITE_INTERVAL) + WRITE_INTERVAL - time.monotonic()))
        with self._explained(name):
            file = self._blob(name)
            try:
                file.upload_from_string(data, mimetypes.guess_type(name)[0] or "application/octet-stream",
                                        if_generation_match=generation, timeout=TIMEOUT, retry=retry(patience))
                made: int = file.generation
            except exceptions.PreconditionFailed as error:
                there, made = self.get_if_there(name)
                if not made or there != data:  # otherwise the write succeeded and the response was lost
                    raise ChangedByAnother(self.path / name, "another process has modified it") from error
        self._written[name] = time.monotonic()
        return made

    def get_if_there(self, name: str) -> tuple[bytes, int]:
        """Returns the contents and the generation of a file; empty and 0 if it does not exist."""
        try:
            return self.get(name)
        except FileNotFoundError:
            return b"", 0

    def delete(self, name: str, generation: int | None = None, patience: float | None = None) -> None:
        """Removes a file if it exists; with `generation`, only that generation."""
        with self._explained(name), contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
            self._blob(name).delete(if_generation_match=generation, timeout=TIMEOUT, retry=retry(patience))

    def _object(self, name: str) -> str:
        return f"{self._directory}/{name}" if self._directory else name

    def _blob(self, name: str) -> Any:
        return client().bucket(self._bucket).blob(self._object(name))

    def _explained(self, name: str) -> contextlib.AbstractContextManager[None]:
        return explained(self.path / name, self._bucket)

    def _list(self, **options: Any) -> Any:
        return client().list_blobs(self._bucket, timeout=TIMEOUT, retry=retry(), **options)


class _Lease:
    """A lock: a file that its holder renews periodically."""

    def __init__(self, files: _CloudFiles) -> None:
        self._files = files
        self._holder = f"{this_process()}, {uuid.uuid4().hex[:8]}"
        self._generation, self._renewed = 0, 0.0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.lost = False
        """Whether another process has taken over the lock."""

    def take(self, tell: Callable[[str], None]) -> None:
        """Acquires the lock, after waiting to see whether another holder still renews it.

        Raises:
          UserError: another holder renews it.
        """
        seen, since = 0, 0.0
        while True:
            holder, generation = self._files.get_if_there(LOCK)
            if not generation or (generation == seen and time.monotonic() - since >= LEASE):
                with contextlib.suppress(ChangedByAnother):  # the process that was faster renews the lock
                    self._generation = self._files.put(LOCK, self._holder, generation)
                    self._renewed = time.monotonic()
                    self._thread.start()
                    return
            elif not seen:
                seen, since = generation, time.monotonic()
                tell(f"{self._files.path} is locked by {_name(holder)}; waiting {LEASE:.0f} seconds for its renewal")
            elif generation != seen:
                raise in_use(self._files.path, _name(holder))
            time.sleep(POLL)

    def require(self) -> None:
        """Raises `FilesError` if another process has taken over; queries the bucket if this process was suspended."""
        if not self.lost and time.monotonic() - self._renewed >= LEASE:
            self._renew()
        if self.lost:
            raise FilesError(self._files.path, f"this process did not reach it for more than {LEASE:.0f} seconds, and "
                                               "another process has taken over")

    def _beat(self) -> None:
        while not self.lost and not self._released.wait(BEAT):
            with contextlib.suppress(FilesError):  # the next attempt may succeed
                self._renew(BEAT)

    def _renew(self, patience: float | None = None) -> None:
        try:
            self._generation = self._files.put(LOCK, self._holder, self._generation, patience)
            self._renewed = time.monotonic()
        except ChangedByAnother:
            self.lost = True

    def release(self) -> None:
        """Removes the lock."""
        self._released.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(FilesError):
                self._files.delete(LOCK, self._generation, BEAT)


def _name(holder: bytes) -> str:
    return holder.decode(errors="replace").partition(",")[0]


class _Log(io.StringIO):
    """A text that is written to the bucket periodically and when it is closed."""

    def __init__(self, files: _CloudFiles, name: str) -> None:
        super().__init__()
        self._files, self._name = files, name
        self._due = time.monotonic() + LOG_INTERVAL
        before, self._generation = files.get_if_there(name)
        self.write(before.decode(errors="replace"))

    def flush(self) -> None:
        if time.monotonic() >= self._due:
            self._put()

    def close(self) -> None:
        if not self.closed:
            try:
                self._put()
            finally:
                super().close()

    def _put(self) -> None:
        text = self.getvalue().encode(errors="backslashreplace")
        try:
            self._generation = self._files.put(self._name, text, self._generation, LOG_INTERVAL)
        except ChangedByAnother:
            there, generation = self._files.get_if_there(self._name)
            if not text.startswith(there):
                raise
            self._generation = generation  # a write whose response was lost; the next one continues from it
        finally:
            self._due = time.monotonic() + LOG_INTERVAL
