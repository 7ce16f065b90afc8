"""Prepares TFDS data sets: converts source files to ArrayRecord.

The builders of this package (`shared_basis.data.tfds.builders`) need no TensorFlow; other data sets are prepared by
TFDS's own builder if TensorFlow is installed (the extra `prepare`). Source files come from `data.manual_directory` or
are downloaded; their sizes and checksums must match those published by TFDS. TFDS writes to a temporary directory and
renames it at the end; a lock excludes concurrent preparations, and leftovers of a killed one are removed by the next.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from shared_basis.config import DataConfig
from shared_basis.data.tfds.names import data_directory, own_builder, tfds_name
from shared_basis.data.tfds.reader import find_builder
from shared_basis.data.tfds.sources import check_sources, checked_sources
from shared_basis.errors import UserError
from shared_basis.runtime.files import one_line
from shared_basis.runtime.reporter import Reporter

SHOWN_EVERY = 100
"""Number of examples between progress updates."""

RETRIES = 3
"""Number of download attempts; TFDS's default of ten takes minutes."""


def prepare(config: DataConfig, reporter: Reporter) -> str:
    """Prepares the data set unless it already is, and returns its location and size as text.

    Args:
      reporter: shows messages and progress; downloads show the progress bars of TFDS.

    Raises:
      UserError: source files are missing or are not the published ones, or the data cannot be written.
    """
    builder = find_builder(config)
    if builder is None:
        builder = own_builder(config)
        sources: Mapping[str, Any] = {}
        if builder is None:
            builder = _stock_builder(config)
        else:
            sources = builder.sources()
            check_sources(builder, config, sources)
        with _locked(Path(builder.data_dir_root), builder.name, reporter):
            if not builder.data_path.exists():  # another process may have prepared it
                _remove_leftovers(builder)
                _write(builder, config, sources, reporter)
        builder = find_builder(config)
        if builder is None:
            raise UserError(f"{config.name} was prepared but cannot be found in {data_directory(config)}.")
    counts = ", ".join(f"{info.num_examples:,} {name}" for name, info in builder.info.splits.items())
    return f"{config.name} is prepared in {builder.data_dir}: {counts}"


def _stock_builder(config: DataConfig) -> Any:
    """Returns TFDS's own builder, which requires TensorFlow."""
    import tensorflow_datasets as tfds

    name, directory = tfds_name(config), data_directory(config)
    advice = (f"data.name={config.name!r} is not prepared in {directory}; set its directory with "
              "--config.data.directory=DIR")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"{advice}, or install TensorFlow, which preparing this set needs (pip install "
                        "'shared-basis[prepare]'), and run --mode=prepare.")
    try:
        return tfds.builder(name, data_dir=directory)
    except Exception as error:  # unknown name, configuration or version
        raise UserError(f"{advice}; TFDS cannot find it either: {one_line(error)}.") from error


@contextlib.contextmanager
def _locked(directory: Path, name: str, reporter: Reporter) -> Iterator[None]:
    """Waits until no other process is preparing the data set `name` in `directory`, and holds a lock."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, name, error) from error
    lock = FileLock(directory / f".{name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.acquire(timeout=0))
        except Timeout:
            reporter.info(f"waiting for another process that is preparing {name} in {directory}")
            held.enter_context(lock.acquire())
        except OSError as error:
            if not os.access(directory, os.W_OK):
                raise _unwritable(directory, name, error) from error
            # Otherwise the file system has no locks, and the user must avoid concurrent preparations.
        yield


def _unwritable(directory: Path, name: str, error: OSError) -> UserError:
    return UserError(f"cannot prepare {name} in {directory}: {error.strerror}; choose another directory with "
                     "--config.data.directory=DIR.")


def _remove_leftovers(builder: Any) -> None:
    """Removes files left by preparations and downloads that were killed."""
    for path in builder.data_path.parent.glob(f"incomplete.*_{builder.data_path.name}"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in (f".{builder.name}-sources-*", f"downloads/{builder.name}/*.tmp.*"):
        for path in Path(builder.data_dir_root).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _tfds_settings() -> Iterator[None]:
    """Makes TFDS retry less and show progress bars on terminals only; restores its settings at the end."""
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.utils import tqdm_utils

    before = downloader.MAX_RETRIES, tqdm_utils._active
    downloader.MAX_RETRIES = RETRIES
    if not sys.stderr.isatty():
        tqdm_utils.disable_progress_bar()
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before[0]
        tqdm_utils.display_progress_bar(before[1])


def _write(builder: Any, config: DataConfig, sources: Mapping[str, Any], reporter: Reporter) -> None:
    """Writes the data set as ArrayRecord into the TFDS data directory; on failure, that directory is not created."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    reporter.info(f"Preparing {config.name} in {builder.data_dir}")
    try:
        # TFDS prints to standard output, which is reserved for results.
        with (_tfds_settings(), checked_sources(builder, config, sources) as manual,
              _counted(builder, reporter) if sources else contextlib.nullcontext(),
              contextlib.redirect_stdout(io.StringIO())):
            builder.download_and_prepare(file_format="array_record", download_config=tfds.download.DownloadConfig(
                manual_dir=manual, try_download_gcs=False))
    except NonMatchingChecksumError as error:
        raise UserError(f"{str(error).splitlines()[0].rstrip(':')}; it is not the published file: delete it and "
                        "download it again.") from error
    except UserError:
        raise
    except (OSError, DownloadError, requests.RequestException) as error:
        raise UserError(f"cannot prepare {config.name} in {builder.data_dir}: {one_line(error)}.") from error
    except MemoryError:
        raise
    except Exception as error:  # tarfile, Pillow or TFDS may raise anything
        if not sources:  # a stock builder, whose message names missing files
            raise UserError(f"TFDS cannot prepare {config.name}: {one_line(error)}") from error
        raise UserError(f"cannot prepare {config.name} in {builder.data_dir}; its source files may not be what they "
                        f"should be: {one_line(error)}") from error


@contextlib.contextmanager
def _counted(builder: Any, reporter: Reporter) -> Iterator[None]:
    """Reports the examples that `builder` reads, instead of TFDS's progress bars, which lack a total."""
    import tensorflow_datasets as tfds

    progress, split_generators, numbers = (
        reporter.progress("preparing images"), builder._split_generators, itertools.count(1))

    def count(examples: Iterable[Any]) -> Iterator[Any]:
        for example, number in zip(examples, numbers, strict=False):
            if number % SHOWN_EVERY == 0:
                progress(min(number, builder.EXAMPLES - 1), builder.EXAMPLES)
            yield example

    def counted(manager: Any) -> dict[str, Iterator[Any]]:
        generators = split_generators(manager)  # downloads, with TFDS's own progress bars
        tfds.disable_progress_bar()
        progress(0, builder.EXAMPLES)
        return {name: count(examples) for name, examples in generators.items()}

    builder._split_generators = counted  # for this instance only
    try:
        yield
    finally:
        del builder._split_generators
        progress(builder.EXAMPLES, builder.EXAMPLES)  # removes the bar, also after a failure
