"""Access to Google Cloud Storage through Google's packages (the extra `gcs`), with retries and one-line errors."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import fsspec
import gcsfs
import requests
from gcsfs.retry import is_retriable
from google.api_core import exceptions
from google.auth import exceptions as auth
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from shared_basis.runtime.filesystem import FilesError

PATIENCE = 300.0
"""Seconds for which requests are retried if the network is down or the storage asks to slow down (429, 503)."""

TIMEOUT = (10.0, 30.0)
"""Timeouts in seconds for a connection and for a response."""


class ChangedByAnother(FilesError):
    """Another process has modified the file."""


class _PatientFileSystem(gcsfs.GCSFileSystem):
    """gcsfs, used by Orbax, with current listings and retries that outlast network outages."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Cached listings never expire, even if another process has added files.
        super().__init__(*args, **{**options, "use_listings_cache": False})

    async def _request(self, *args: Any, **options: Any) -> Any:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return await super()._request(*args, **options)  # retries for about half a minute
            except Exception as error:
                if not is_retriable(error) or time.monotonic() > end:
                    raise


@functools.cache
def client() -> Any:
    """Returns Google's client, shared by all files; also makes Orbax retry longer."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _PatientFileSystem, clobber=True)
    return storage.Client(project=None)  # only needed to create buckets


def retry(patience: float | None = None) -> Any:
    """Returns the retry policy: for `patience` seconds, or `PATIENCE` if None."""
    return DEFAULT_RETRY.with_timeout(PATIENCE if patience is None else patience)


@contextlib.contextmanager
def explained(path: PurePath, bucket: str) -> Iterator[None]:
    """Converts exceptions of Google's packages about the file `path` in `bucket` to a `FilesError`."""
    try:
        yield
    except (auth.DefaultCredentialsError, auth.RefreshError) as error:
        raise FilesError(path, f"no credentials for Google Cloud ({_short(error)}): run gcloud auth application-"
                               "default login, or set GOOGLE_APPLICATION_CREDENTIALS") from error
    except exceptions.NotFound as error:
        raise FilesError(path, f"there is no bucket {bucket}") from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise FilesError(path, f"no permission ({_short(error)}): requires the role Storage Object User for bucket "
                               f"{bucket}") from error
    except exceptions.RetryError as error:
        raise FilesError(path, f"Cloud Storage cannot be reached ({_short(error.cause or error)})") from error
    except (exceptions.GoogleAPIError, auth.GoogleAuthError, requests.RequestException) as error:
        raise FilesError(path, f"Cloud Storage fails ({_short(error)})") from error


def _short(error: Exception) -> str:
    """Returns the first sentence of an error's message, without the request URL."""
    return re.sub(r"(GET|POST|PUT|DELETE) https?://\S+ ?", "", " ".join(str(error).split())).partition(". ")[0][:150]
