"""Google Cloud Storage as its own packages reach it (the extra `gcs`): patiently, and with errors in one line."""

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
"""Seconds for which a request is repeated while the network is gone, or the storage wants to be spared (429, 503)."""

TIMEOUT = (10.0, 30.0)
"""Seconds to wait for a connection, and for an answer."""


class ChangedByAnother(FilesError):
    """Another process has written the file meanwhile."""


class _PatientFileSystem(gcsfs.GCSFileSystem):
    """What Orbax reaches buckets by: it sees what other processes have made, and outlasts a network that is gone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # A cached listing never expires, not even where another process has added files.
        super().__init__(*args, **{**options, "use_listings_cache": False})

    async def _request(self, *args: Any, **options: Any) -> Any:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return await super()._request(*args, **options)  # repeats it for about half a minute
            except Exception as error:
                if not is_retriable(error) or time.monotonic() > end:
                    raise


@functools.cache
def client() -> Any:
    """Returns Google's client, the same for all files; from then on Orbax is patient too."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _PatientFileSystem, clobber=True)
    return storage.Client(project=None)  # which is needed for making buckets alone


def retry(patience: float | None = None) -> Any:
    """Returns how requests are repeated: for `patience` seconds, `PATIENCE` with None."""
    return DEFAULT_RETRY.with_timeout(PATIENCE if patience is None else patience)


@contextlib.contextmanager
def explained(path: PurePath, bucket: str) -> Iterator[None]:
    """Turns what Google's packages raise about the file `path` in `bucket` into a `FilesError`."""
    try:
        yield
    except (auth.DefaultCredentialsError, auth.RefreshError) as error:
        raise FilesError(path, f"no credentials for Google Cloud ({_short(error)}): run gcloud auth application-"
                               "default login, or set GOOGLE_APPLICATION_CREDENTIALS") from error
    except exceptions.NotFound as error:
        raise FilesError(path, f"there is no bucket {bucket}") from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise FilesError(path, f"no permission ({_short(error)}): it takes the role Storage Object User of the bucket "
                               f"{bucket}") from error
    except exceptions.RetryError as error:
        raise FilesError(path, f"Cloud Storage cannot be reached ({_short(error.cause or error)})") from error
    except (exceptions.GoogleAPIError, auth.GoogleAuthError, requests.RequestException) as error:
        raise FilesError(path, f"Cloud Storage fails ({_short(error)})") from error


def _short(error: Exception) -> str:
    """Returns the first sentence of an error's message, without the address that was asked."""
    return re.sub(r"(GET|POST|PUT|DELETE) https?://\S+ ?", "", " ".join(str(error).split())).partition(". ")[0][:150]
