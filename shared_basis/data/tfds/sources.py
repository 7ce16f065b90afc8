"""The source files of TFDS data sets: finds missing ones, and verifies the checksums of existing ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared_basis.config import DataConfig
from shared_basis.errors import UserError

PROBE_SECONDS = 5
"""Timeout after which a server counts as unreachable."""


def manual_directory(config: DataConfig) -> str | None:
    """Returns the directory with manually downloaded files, or None if none is configured."""
    manual = os.path.expanduser(config.manual_directory) or None
    if manual and not os.path.isdir(manual):
        raise UserError(f"data.manual_directory={config.manual_directory!r}: no such directory; it must hold the "
                        f"source files of {config.name}.")
    if manual and not os.access(manual, os.R_OK | os.X_OK):
        raise UserError(f"data.manual_directory={config.manual_directory!r}: cannot be read; fix its permissions.")
    return manual


def check_sources(builder: Any, config: DataConfig, sources: Mapping[str, Any]) -> None:
    """Raises `UserError` if a source file is neither available locally nor downloadable."""
    from tensorflow_datasets.core.download import resource

    manual = manual_directory(config)
    downloads = Path(builder.data_dir_root) / "downloads" / builder.name
    missing = {url: info for url, info in sources.items()
               if not (manual and os.path.exists(os.path.join(manual, info.filename)))
               and not os.path.exists(downloads / resource.get_dl_fname(url, info.checksum))}
    problem = "it must be downloaded manually after registration" if builder.BY_HAND else (
        next((f"a download fails ({why})" for why in map(probe, missing) if why), None))
    if missing and problem:
        files = ", ".join(f"{info.filename} ({int(info.size)} bytes, sha256 {info.checksum})"
                          for info in missing.values())
        origin = os.path.dirname(next(iter(missing)))
        raise UserError(
            f"{config.name} is not prepared in {builder.data_dir_root}, and {problem}. Missing: {files} from "
            f"{origin}/. Put them into a directory and set --config.data.manual_directory=DIR, or train on a directory "
            "of image files: --config.data.name=folder --config.data.directory=DIR.")


def probe(url: str, timeout: float = PROBE_SECONDS) -> str:
    """Returns why `url` cannot be downloaded, or an empty string if the server starts to send it."""
    import requests

    try:
        with requests.get(url, stream=True, timeout=timeout) as response:
            return "" if response.ok else f"{response.status_code} {response.reason}"
    except requests.RequestException as error:
        return type(error).__name__


@contextlib.contextmanager
def checked_sources(builder: Any, config: DataConfig, sources: Mapping[str, Any]) -> Iterator[str | None]:
    """Yields a directory with the verified local source files; None if all of them are to be downloaded.

    Debian's gzip files differ from the published ones only in their headers, which lack file name and timestamp; copies
    with the published headers are used instead.
    """
    from shared_basis.data.tfds.builders import PUBLISHED_TIMES, with_published_header

    manual = manual_directory(config)
    present = {} if manual is None else {
        path: info for info in sources.values() if (path := Path(manual) / info.filename).exists()}
    with tempfile.TemporaryDirectory(prefix=f".{builder.name}-sources-", dir=builder.data_dir_root) as mended:
        for path, info in present.items():
            link = Path(mended) / path.name
            if path.name in PUBLISHED_TIMES and path.stat().st_size != int(info.size):
                link.write_bytes(with_published_header(path))
                if _sha256(link) == info.checksum:
                    continue
                link.unlink()
            check_file(path, info)
            link.symlink_to(path.absolute())
        yield mended if present else manual


def check_file(path: Path, info: Any) -> None:
    """Raises `UserError` unless the file is the published one; for very large files only the size is compared."""
    size = path.stat().st_size
    if size != int(info.size):
        raise UserError(f"{path} has {size} bytes, but the published file has {int(info.size)}: it is incomplete or "
                        "not the published file; download it again.")
    if size < 2**30 and (found := _sha256(path)) != info.checksum:
        raise UserError(f"{path} has a wrong checksum, sha256 {found}, but the published file has {info.checksum}; "
                        "download it again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
