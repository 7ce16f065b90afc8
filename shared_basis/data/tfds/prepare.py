"""Preparation of TFDS data sets: source files in, ArrayRecord out.

Own builders (`shared_basis.data.tfds.builders`) need no TensorFlow; any other set is prepared by TFDS's own builder
where TensorFlow is installed (the extra `prepare`). Source files come from `data.manual_directory` or by download;
their sizes and checksums are those that TFDS publishes. TFDS writes into a directory of another name and renames it at
the end; a lock keeps two preparations apart, and what a killed one left is removed by the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared_basis.config import DataConfig
from shared_basis.data.examples import Progress
from shared_basis.data.tfds.reader import damaged, data_directory, one_line, tfds_name
from shared_basis.errors import UserError

PROBE_SECONDS = 5
"""How long a server may take to answer before a download counts as impossible."""

SHOWN_EVERY = 100
"""Examples between two reports of progress."""

RETRIES = 3
"""TFDS itself tries ten times, for minutes."""


def find_builder(config: DataConfig) -> Any | None:
    """Returns the TFDS builder of the data set as it lies prepared, or None where it is not prepared.

    Raises:
      UserError: what lies there is damaged.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, read_only_builder

    name, directory = tfds_name(config), data_directory(config)
    try:
        naming.parse_builder_name_kwargs(name)
    except Exception as error:
        raise UserError(f"data.name={config.name!r}: TFDS takes names such as tfds:cifar10, tfds:name/config and "
                        f"tfds:name:1.0.0 ({one_line(error)}).") from error
    _check_metadata(Path(directory) / naming.parse_builder_name_kwargs(name)[0].name)
    own = _own_builder(config)
    try:
        if own is not None and own.data_path.exists():
            if not own.is_prepared():
                raise damaged(own, "it holds no metadata")
            return own
        return read_only_builder.builder_from_files(name, data_dir=directory)  # also our own ones in older versions
    except tfds.core.DatasetNotFoundError:
        return None
    except UserError:
        raise
    except Exception as error:  # whatever damage does to the metadata
        raise damaged(os.path.join(directory, name), one_line(error)) from error


def _check_metadata(directory: Path) -> None:
    """Raises `UserError` if prepared data names classes other than TFDS's: reading it would import their modules."""
    for path in directory.glob("**/features.json"):
        def check(found: dict[str, Any], path: Path = path) -> dict[str, Any]:
            for key in ("pythonClassName", "python_class_name", "type"):
                name = found.get(key)
                if isinstance(name, str) and not name.startswith("tensorflow_datasets.core.features."):
                    raise damaged(path.parent, f"it names the class {name!r}, which is none of TFDS")
            return found
        try:
            json.loads(path.read_text(), object_hook=check)
        except UserError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise damaged(path.parent, one_line(error)) from error


def prepare(config: DataConfig, progress: Progress) -> str:
    """Prepares the data set unless it is, and returns where it lies; `progress` is told of images that are read.

    Raises:
      UserError: source files are missing or are not the published ones, or the data cannot be written.
    """
    builder = find_builder(config)
    if builder is None:
        builder = _own_builder(config)
        sources: Mapping[str, Any] = {}
        if builder is None:
            builder = _stock_builder(config)
        else:
            sources = builder.sources()
            _check_sources(builder, config, sources)
        with _locked(Path(builder.data_dir_root), builder.name):
            if not builder.data_path.exists():  # another process may have been at it
                _remove_leftovers(builder)
                _write(builder, config, sources, progress)
        builder = find_builder(config)
        if builder is None:
            raise UserError(f"{config.name} was prepared and cannot be found in {data_directory(config)}.")
    counts = ", ".join(f"{info.num_examples:,} {name}" for name, info in builder.info.splits.items())
    return f"{config.name} is prepared in {builder.data_dir}: {counts}"


def _own_builder(config: DataConfig) -> Any | None:
    """Returns our builder of the data set, if there is one."""
    from shared_basis.data.tfds.builders import BUILDERS

    if tfds_name(config) not in BUILDERS:
        return None
    directory = data_directory(config)
    try:
        return BUILDERS[tfds_name(config)](data_dir=directory)
    except Exception as error:  # it reads the metadata of prepared data, which may be damaged
        raise UserError(f"cannot read the {config.name} that is prepared in {directory}: {one_line(error)}; delete it "
                        "there to have it prepared again.") from error


def _stock_builder(config: DataConfig) -> Any:
    """Returns TFDS's own builder, which needs TensorFlow."""
    import tensorflow_datasets as tfds

    name, directory = tfds_name(config), data_directory(config)
    advice = (f"data.name={config.name!r} is not prepared in {directory}; name the directory where it is with "
              "--config.data.directory=DIR")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"{advice}, or install TensorFlow, which preparing this set needs (pip install -e "
                        "'.[prepare]'), and run --mode=prepare.")
    try:
        return tfds.builder(name, data_dir=directory)
    except Exception as error:  # an unknown name, configuration or version, each in words of many lines
        raise UserError(f"{advice}; TFDS does not know it either: {one_line(error)}.") from error


def _manual(config: DataConfig) -> str | None:
    """Returns the directory of files downloaded by hand, if one is named."""
    manual = os.path.expanduser(config.manual_directory) or None
    if manual and not os.path.isdir(manual):
        raise UserError(f"data.manual_directory={config.manual_directory!r}: no such directory; it must hold the "
                        f"source files of {config.name}.")
    if manual and not os.access(manual, os.R_OK | os.X_OK):
        raise UserError(f"data.manual_directory={config.manual_directory!r}: cannot be read; mend its permissions.")
    return manual


def _check_sources(builder: Any, config: DataConfig, sources: Mapping[str, Any]) -> None:
    """Raises `UserError` if a source file is neither at hand, nor downloaded before, nor can be downloaded."""
    from tensorflow_datasets.core.download import resource

    manual = _manual(config)
    downloads = Path(builder.data_dir_root) / "downloads" / builder.name
    missing = {url: info for url, info in sources.items()
               if not (manual and os.path.exists(os.path.join(manual, info.filename)))
               and not os.path.exists(downloads / resource.get_dl_fname(url, info.checksum))}
    problem = "it has to be downloaded by hand, after registration" if builder.BY_HAND else (
        next((f"a download fails ({why})" for why in map(_probe, missing) if why), None))
    if missing and problem:
        files = ", ".join(f"{info.filename} ({int(info.size)} bytes, sha256 {info.checksum})"
                          for info in missing.values())
        origin = os.path.dirname(next(iter(missing)))
        raise UserError(
            f"{config.name} is not prepared in {builder.data_dir_root}, and {problem}. Missing: {files} from "
            f"{origin}/. Put them into a directory and set --config.data.manual_directory=DIR, or train on a directory "
            "of image files: --config.data.name=folder --config.data.directory=DIR.")


def _probe(url: str) -> str:
    """Returns why `url` cannot be downloaded, or an empty string if its server begins to send it."""
    import requests

    try:
        with requests.get(url, stream=True, timeout=PROBE_SECONDS) as response:
            return "" if response.ok else f"{response.status_code} {response.reason}"
    except requests.RequestException as error:
        return type(error).__name__


@contextlib.contextmanager
def _locked(directory: Path, name: str) -> Iterator[None]:
    """Waits until no other process prepares the data set `name` in `directory`."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f".{name}.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot prepare {name} in {directory}: {error.strerror}; name another directory with "
                        "--config.data.directory=DIR.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {name} in {directory}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def _remove_leftovers(builder: Any) -> None:
    """Removes what preparations and downloads that were killed have left."""
    for path in builder.data_path.parent.glob(f"incomplete.*_{builder.data_path.name}"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in (f".{builder.name}-sources-*", f"downloads/{builder.name}/*.tmp.*"):
        for path in Path(builder.data_dir_root).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _write(builder: Any, config: DataConfig, sources: Mapping[str, Any], progress: Progress) -> None:
    """Writes the data set as ArrayRecord into the TFDS data directory; a failure leaves no directory of that name."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    print(f"Preparing {config.name} in {builder.data_dir}", file=sys.stderr, flush=True)
    downloader.MAX_RETRIES = RETRIES
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        # TFDS prints what we have said, and standard output is for results.
        with (_checked_sources(builder, config, sources) as manual, contextlib.redirect_stdout(io.StringIO()),
              _counted(builder, progress) if sources else contextlib.nullcontext()):
            builder.download_and_prepare(file_format="array_record", download_config=tfds.download.DownloadConfig(
                manual_dir=manual, try_download_gcs=False))
    except NonMatchingChecksumError as error:
        raise UserError(f"{str(error).splitlines()[0].rstrip(':')}; it is not the published file: delete it and get it "
                        "again.") from error
    except UserError:
        raise
    except (OSError, DownloadError, requests.RequestException) as error:
        raise UserError(f"cannot prepare {config.name} in {builder.data_dir}: {one_line(error)}.") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever the source files make tarfile, Pillow or TFDS raise
        if not sources:  # TFDS's own builder, which asks for files that it cannot download in words of its own
            raise UserError(f"TFDS cannot prepare {config.name}: {one_line(error)}") from error
        raise UserError(f"cannot prepare {config.name} in {builder.data_dir}; its source files may not be what they "
                        f"should be: {one_line(error)}") from error


@contextlib.contextmanager
def _counted(builder: Any, progress: Progress) -> Iterator[None]:
    """Has `progress` told of the examples that our `builder` reads, in place of TFDS's bars, which know no total."""
    import tensorflow_datasets as tfds

    divide, numbers = builder._split_generators, itertools.count(1)

    def count(examples: Iterable[Any]) -> Iterator[Any]:
        for example, number in zip(examples, numbers, strict=False):
            if number % SHOWN_EVERY == 0:
                progress(min(number, builder.EXAMPLES - 1), builder.EXAMPLES)
            yield example

    def counted(manager: Any) -> dict[str, Iterator[Any]]:
        generators = divide(manager)  # downloads, which TFDS shows
        tfds.disable_progress_bar()
        progress(0, builder.EXAMPLES)
        return {name: count(examples) for name, examples in generators.items()}

    builder._split_generators = counted
    try:
        yield
    finally:
        progress(builder.EXAMPLES, builder.EXAMPLES)  # removes the bar, after a failure too


@contextlib.contextmanager
def _checked_sources(builder: Any, config: DataConfig, sources: Mapping[str, Any]) -> Iterator[str | None]:
    """Yields a directory of the source files at hand, after checking them; None where all are to be downloaded.

    Debian's gzip files differ from the published ones in their headers alone, which name neither file nor time: copies
    with the published headers stand in for them.
    """
    from shared_basis.data.tfds.builders import PUBLISHED_TIMES, with_published_header

    manual = _manual(config)
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
            _check_file(path, info)
            link.symlink_to(path.absolute())
        yield mended if present else manual


def _check_file(path: Path, info: Any) -> None:
    """Raises `UserError` unless the file is the published one; of very large ones only the size is compared."""
    size = path.stat().st_size
    if size != int(info.size):
        raise UserError(f"{path} has {size} bytes, and the published file has {int(info.size)}: it is not complete, or "
                        "not the published file; get it again.")
    if size < 2**30 and (found := _sha256(path)) != info.checksum:
        raise UserError(f"{path} has a wrong checksum, sha256 {found}, and the published file has {info.checksum}; get "
                        "it again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
