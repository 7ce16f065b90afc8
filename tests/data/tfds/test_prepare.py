"""Preparing TFDS data sets: missing, wrong and cut sources, downloads, and preparations that meet or are killed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import tensorflow_datasets as tfds
import tfds_fakes
from data_helpers import load, load_split
from PIL import Image
from tensorflow_datasets.core.download import checksums, downloader, resource
from tensorflow_datasets.core.utils import tqdm_utils
from tensorflow_datasets.image_classification import cifar
from tfds_fakes import FEATURES, FILES, cifar10_files, fashion_files, pets, python, run_python

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data.tfds import builders, prepare, reader, sources
from shared_basis.errors import UserError
from shared_basis.runtime.reporter import Reporter

ARCHIVE = "cifar-10-binary.tar.gz"


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def tree(directory: Path | str) -> dict[str, tuple[int, int, str]]:
    """Returns time, size and hash of every file below."""
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.stat().st_size, sha256(path.read_bytes()))
            for path in Path(directory).rglob("*") if path.is_file()}


def assert_nothing_prepared(config: DataConfig) -> None:
    assert reader.find_builder(config) is None
    assert not list(Path(config.directory).glob(f"{config.name}/[0-9]*"))


def test_preparing_tells_where_and_how_much_and_a_second_time_changes_nothing(put, capsys):
    config = put("cifar10", cifar10_files())
    report = data.prepare(config)
    place = Path(config.directory) / "cifar10" / "3.0.2"
    assert report == f"cifar10 is prepared in {place}: 25 train, 7 test"
    captured = capsys.readouterr()
    assert captured.out == ""  # a script may read what --json prints
    assert f"Preparing cifar10 in {place}" in captured.err
    before = tree(config.directory)
    assert data.prepare(config) == report
    assert capsys.readouterr().err == ""
    shutil.rmtree(config.manual_directory)
    assert data.prepare(DataConfig(name="cifar10", directory=config.directory)) == report
    assert tree(config.directory) == before
    assert all(name.startswith(("cifar10/3.0.2/", ".cifar10.lock")) for name in before)


def test_progress_counts_examples_that_are_read(put, monkeypatch):
    monkeypatch.setattr(prepare, "SHOWN_EVERY", 10)
    monkeypatch.setattr(builders.Cifar10, "EXAMPLES", 32)
    shown = []

    class Watching(Reporter):
        def show_progress(self, done: int, total: int, text: str) -> None:
            shown.append((done, total))
    config = put("cifar10", cifar10_files())
    data.open_source(config, reporter=Watching(io.StringIO()))  # first use prepares
    assert shown == [(0, 32), (10, 32), (20, 32), (30, 32), (32, 32)]
    shown.clear()
    data.open_source(config, reporter=Watching(io.StringIO()))
    assert shown == []


def test_the_settings_of_tfds_are_as_they_were(put):
    def settings() -> tuple[Any, ...]:
        return downloader.MAX_RETRIES, tqdm_utils._active
    for setting in (True, False):
        tfds.display_progress_bar(setting)
        before = settings()
        config = put("cifar10", cifar10_files())
        data.prepare(config)
        shutil.rmtree(Path(config.directory) / "cifar10")
        assert settings() == before
    tfds.enable_progress_bar()


def test_preparing_twice_writes_the_same(put, tmp_path):
    config = put("cifar10", cifar10_files())
    data.prepare(config)
    first = tree(Path(config.directory) / "cifar10")
    shutil.rmtree(Path(config.directory) / "cifar10")
    data.prepare(config)
    second = tree(Path(config.directory) / "cifar10")
    assert {name: facts[2] for name, facts in first.items()} == {name: facts[2] for name, facts in second.items()}


def test_neither_preparing_nor_reading_imports_tensorflow(put):
    config = put("imagenet2012", FILES["imagenet2012"]())
    code = f"""
import sys
import tfds_fakes
from data_helpers import load_split
from shared_basis import data
from shared_basis.config import DataConfig
tfds_fakes.publish_all_in("imagenet2012", {config.manual_directory!r})
config = DataConfig(name="imagenet2012", directory={config.directory!r}, manual_directory={config.manual_directory!r},
                    image_size=8)
print(len(load_split(config, "train").labels), "tensorflow" in sys.modules)
"""
    assert run_python(code) == "8 False"


# Missing sources.

def test_missing_sources_are_all_named_within_seconds(tmp_path, mistake):
    start = time.monotonic()
    message = mistake(DataConfig(name="fashion_mnist", directory=str(tmp_path / "tfds")))
    assert time.monotonic() - start < 5
    for part in ("train-images-idx3-ubyte.gz (26421880 bytes, sha256 3aede38d61863908ad78613f6a32ed271626dd12800ba2636",
                 "train-labels-idx1-ubyte.gz (29515 bytes, sha256 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3a",
                 "t10k-images-idx3-ubyte.gz (4422102 bytes, sha256 346e55b948d973a97e58d2351dde16a484bd415d4595297633",
                 "t10k-labels-idx1-ubyte.gz (5148 bytes, sha256 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb18",
                 "from http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/.",
                 "--config.data.manual_directory=DIR", "--config.data.name=folder --config.data.directory=DIR",
                 "ConnectionError", str(tmp_path / "tfds")):
        assert part in message
    assert not (tmp_path / "tfds").exists()


def test_only_the_missing_sources_are_named(put, mistake):
    config = put("fashion_mnist", fashion_files())
    (Path(config.manual_directory) / "t10k-images-idx3-ubyte.gz").unlink()
    message = mistake(config)
    assert "t10k-images" in message
    assert "t10k-labels" not in message
    assert "train-" not in message


@pytest.mark.parametrize("read", [load, data.prepare, data.open_source])
def test_both_archives_of_imagenet_are_to_be_downloaded_by_hand(tmp_path, mistake, monkeypatch, read):
    monkeypatch.setattr(requests, "get", lambda url, **_: pytest.fail(f"asked for {url}"))
    message = mistake(DataConfig(name="imagenet2012", directory=str(tmp_path / "tfds"), image_size=224), read)
    for part in ("ILSVRC2012_img_train.tar (147897477120 bytes, sha256 "
                 "b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb)",
                 "ILSVRC2012_img_val.tar (6744924160 bytes, sha256 "
                 "c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0)",
                 "manually", "registration", "image-net.org", "--config.data.manual_directory=DIR"):
        assert part in message
    assert not (tmp_path / "tfds").exists()


def test_only_the_missing_archive_of_imagenet_is_named(put, mistake):
    config = put("imagenet2012", FILES["imagenet2012"]())
    (Path(config.manual_directory) / "ILSVRC2012_img_val.tar").unlink()
    message = mistake(config, data.prepare)
    assert "ILSVRC2012_img_val.tar" in message
    assert "ILSVRC2012_img_train.tar" not in message


def test_an_unknown_manual_directory_is_named(tmp_path, mistake):
    message = mistake(DataConfig(name="cifar10", directory=str(tmp_path), manual_directory=str(tmp_path / "nowhere")))
    assert f"data.manual_directory='{tmp_path / 'nowhere'}': no such directory" in message


def test_directories_may_begin_with_that_of_the_user(put, monkeypatch, tmp_path):
    put("cifar10", cifar10_files())
    monkeypatch.setenv("HOME", str(tmp_path))
    data.prepare(DataConfig(name="cifar10", directory="~/tfds", manual_directory="~/manual"))
    assert (tmp_path / "tfds" / "cifar10" / "3.0.2" / "dataset_info.json").exists()


def test_directories_may_be_relative(put, monkeypatch, tmp_path):
    put("cifar10", cifar10_files())
    monkeypatch.chdir(tmp_path)
    config = DataConfig(name="cifar10", directory="tfds", manual_directory="manual")
    assert len(load(config).train.labels) == 25


# Wrong sources.

@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_a_file_that_is_not_complete_is_refused_with_both_sizes(name, put, mistake):
    config = put(name, FILES[name]())
    file, body = next(iter(FILES[name]().items()))
    path = Path(config.manual_directory) / file
    body = path.read_bytes()
    path.write_bytes(body[:-100])
    message = mistake(config, data.prepare)
    for part in (str(path), f"{len(body) - 100} bytes", f"published file has {len(body)}", "incomplete"):
        assert part in message
    assert_nothing_prepared(config)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_a_wrong_checksum_is_refused_with_both_and_leaves_nothing_prepared(name, put, mistake):
    config = put(name, FILES[name]())
    path = Path(config.manual_directory) / next(iter(FILES[name]()))
    good = path.read_bytes()
    wrong = good[:-1] + b"x"
    path.write_bytes(wrong)
    message = mistake(config, data.prepare)
    for part in (str(path), "wrong checksum", f"sha256 {sha256(wrong)}", sha256(good)):
        assert part in message
    assert_nothing_prepared(config)
    path.write_bytes(good)
    assert name in data.prepare(config)


def test_of_very_large_files_the_size_alone_is_compared(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**30)  # takes no room on the disk
    sources.check_file(path, checksums.UrlInfo(tfds.core.utils.Size(2**30), "0" * 64, "large"))
    with pytest.raises(UserError, match="has 1073741824 bytes, but the published file has 1073741825"):
        sources.check_file(path, checksums.UrlInfo(tfds.core.utils.Size(2**30 + 1), "0" * 64, "large"))


@pytest.mark.parametrize("train", [
    b"no archive" * 100,
    tfds_fakes.tar({"n01440764.tar": b"no archive" * 100}, "w"),
    tfds_fakes.tar({"n99999999.tar": tfds_fakes.tar({"n99999999_1.JPEG": b"image"}, "w")}, "w"),
], ids=["no archive", "no archive within", "unknown class"])
def test_an_archive_of_the_right_size_that_holds_something_else_is_refused(put, mistake, train):
    """The checksums of files as large as ImageNet's are not compared."""
    config = put("imagenet2012", FILES["imagenet2012"]() | {"ILSVRC2012_img_train.tar": train})
    assert "imagenet2012" in mistake(config, data.prepare)
    assert_nothing_prepared(config)


# Fashion-MNIST as Debian packs it.

def published_gzip(name: str, body: bytes) -> bytes:
    """Returns a gzip file with the name and time of the published one in its header."""
    plain = gzip.compress(body, mtime=0)
    time_in_header = builders.PUBLISHED_TIMES[name].to_bytes(4, "little")
    return plain[:3] + b"\x08" + time_in_header + plain[8:10] + Path(name).stem.encode() + b"\0" + plain[10:]


def test_files_that_differ_in_their_gzip_header_alone_are_taken(put, monkeypatch):
    debian = {name: gzip.compress(body, mtime=0) for name, body in tfds_fakes.fashion_idx().items()}
    config = put("fashion_mnist", debian)
    published = {name: published_gzip(name, body) for name, body in tfds_fakes.fashion_idx().items()}
    assert all(len(published[name]) > len(debian[name]) for name in debian)
    tfds_fakes.publish("fashion_mnist", published, monkeypatch.setattr)
    before = tree(config.manual_directory)
    assert len(load(config).train.labels) == tfds_fakes.COUNTS["train"]
    assert tree(config.manual_directory) == before


@pytest.mark.parametrize("body", [gzip.compress(b"something else", mtime=0), b"short", b""],
                         ids=["other contents", "short", "empty"])
def test_files_that_differ_in_more_than_their_header_are_refused(put, monkeypatch, mistake, body):
    published = {name: published_gzip(name, raw) for name, raw in tfds_fakes.fashion_idx().items()}
    config = put("fashion_mnist", published)
    path = Path(config.manual_directory) / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(body)
    message = mistake(config, data.prepare)
    assert f"{path} has {len(body)} bytes, but the published file has {len(published[path.name])}" in message


# Downloads.

class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a directory in silence; where a file `<name>.cut` lies too, it promises all of <name> and sends half."""

    def log_message(self, *_: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        body = source.read()
        with contextlib.suppress(ConnectionError):  # whoever only asks whether there is an answer hangs up
            outputfile.write(body[:len(body) // 2] if os.path.exists(f"{source.name}.cut") else body)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], DataConfig]]:
    """Returns a function that lets a server on this machine be the origin of CIFAR-10; its directory is `served`."""
    with contextlib.ExitStack() as stack:
        def start() -> DataConfig:
            served = tmp_path / "served"
            served.mkdir()
            server = stack.enter_context(http.server.ThreadingHTTPServer(
                ("127.0.0.1", 0), functools.partial(Handler, directory=str(served))))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            origin = f"http://127.0.0.1:{server.server_port}/"
            files = cifar10_files()
            for name, body in files.items():
                (served / name).write_bytes(body)
            tfds_fakes.publish("cifar10", files, monkeypatch.setattr, origin)
            known = cifar.Cifar10._cifar_info
            monkeypatch.setattr(cifar.Cifar10, "_cifar_info", property(
                lambda self: known.fget(self)._replace(url=origin + ARCHIVE)))
            return DataConfig(name="cifar10", directory=str(tmp_path / "tfds"))
        yield start


def test_what_is_missing_is_downloaded_and_kept(serve, tmp_path):
    config = serve()
    assert len(load(config).train.labels) == 25
    kept, = (path for path in (tmp_path / "tfds" / "downloads" / "cifar10").iterdir() if path.suffix == ".gz")
    assert kept.read_bytes() == (tmp_path / "served" / ARCHIVE).read_bytes()
    shutil.rmtree(tmp_path / "served")
    shutil.rmtree(tmp_path / "tfds" / "cifar10")
    assert len(load(config).train.labels) == 25


def test_a_download_that_is_not_the_published_file_is_refused(serve, tmp_path, mistake):
    config = serve()
    (tmp_path / "served" / ARCHIVE).write_bytes(b"a page that asks to sign in")
    message = mistake(config, data.prepare)
    for part in (ARCHIVE, "wrong checksum", "not the published file"):
        assert part in message
    assert_nothing_prepared(config)


def test_a_server_without_the_file_is_told_of(serve, tmp_path, mistake):
    config = serve()
    (tmp_path / "served" / ARCHIVE).unlink()
    message = mistake(config, data.prepare)
    assert "a download fails (404 File not found). Missing: cifar-10-binary.tar.gz" in message
    assert not (tmp_path / "tfds").exists()


def test_a_download_that_breaks_off_is_told_of_and_can_be_repeated(serve, tmp_path, mistake):
    config = serve()
    cut = tmp_path / "served" / f"{ARCHIVE}.cut"
    cut.touch()
    message = mistake(config, data.prepare)
    assert "cannot prepare cifar10" in message
    assert "Connection broken" in message
    assert_nothing_prepared(config)
    left = list((tmp_path / "tfds" / "downloads" / "cifar10").glob("*.tmp.*"))
    assert left
    cut.unlink()
    assert len(load(config).train.labels) == 25
    assert not any(path.exists() for path in left)


def test_a_source_that_tfds_downloaded_before_is_not_missing(put):
    config = put("cifar10", cifar10_files())
    archive = Path(config.manual_directory) / ARCHIVE
    (url, info), = checksums.get_all_url_infos().items()
    cached = Path(config.directory) / "downloads" / "cifar10" / resource.get_dl_fname(url, info.checksum)
    cached.parent.mkdir(parents=True)
    archive.rename(cached)
    Path(f"{cached}.INFO").write_text(json.dumps({"urls": [url], "original_fname": info.filename}))
    assert len(load_split(config, "test").labels) == 7


def test_a_server_that_keeps_silent_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert sources.probe(f"http://127.0.0.1:{server.getsockname()[1]}/", 0.1) == "ReadTimeout"


# Interruptions, and preparations that meet.

@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_preparation_leaves_nothing_prepared(error, put, monkeypatch):
    config = put("cifar10", cifar10_files())
    calls, convert = iter(range(100)), Image.fromarray

    def interrupted(array):
        if next(calls) == 9:
            raise error
        return convert(array)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", interrupted)
        with pytest.raises(error):
            load(config)
    assert not list(Path(config.directory).glob("cifar10/*"))
    assert len(load(config).train.labels) == 25


def preparing(config: DataConfig, gate: Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Starts a process that prepares the fake CIFAR-10, and stops at its tenth image until the file `gate` exists."""
    return python(f"""
import itertools, time
from pathlib import Path
import tfds_fakes
from shared_basis import data
from shared_basis.config import DataConfig
from PIL import Image

manual = {config.manual_directory!r}
tfds_fakes.publish_all_in("cifar10", manual)
convert, calls = Image.fromarray, itertools.count()
def stopping(array):
    while next(calls) >= 9 and not Path({str(gate)!r}).exists():
        time.sleep(0.05)
    return convert(array)
Image.fromarray = stopping
print(data.prepare(DataConfig(name="cifar10", directory={config.directory!r}, manual_directory=manual)))
""", TMPDIR=str(gate.parent))  # what a killed one leaves among temporary files goes with the test's


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_waiting(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert any("waiting for another process that is preparing cifar10" in line for line in process.stderr)


def incomplete(config: DataConfig) -> list[Path]:
    return list((Path(config.directory) / "cifar10").glob("incomplete.*"))


def test_two_preparations_at_once_end_with_one_data_set(put, tmp_path):
    config, gate = put("cifar10", cifar10_files()), tmp_path / "gate"
    with preparing(config, gate) as first:
        wait_until(lambda: incomplete(config), first)
        with preparing(config, gate) as second:
            wait_for_waiting(second)
            assert len(incomplete(config)) == 1
            gate.touch()
            reports = [process.communicate(timeout=60) for process in (first, second)]
            assert (first.returncode, second.returncode) == (0, 0), reports
    report = f"cifar10 is prepared in {config.directory}/cifar10/3.0.2: 25 train, 7 test\n"
    assert reports[0][0] == reports[1][0] == report
    assert "Preparing cifar10" in reports[0][1]
    assert "Preparing cifar10" not in reports[1][1]
    assert [path.name for path in (Path(config.directory) / "cifar10").iterdir()] == ["3.0.2"]
    assert len(load(config).train.labels) == 25


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_prepared(put, tmp_path):
    config, gate = put("cifar10", cifar10_files()), tmp_path / "gate"
    with preparing(config, gate) as process:
        wait_until(lambda: incomplete(config), process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert incomplete(config)
    assert_nothing_prepared(config)
    other = Path(config.directory) / "cifar10" / "incomplete.ABCDEF_9.9.9"  # of another version
    other.mkdir()
    half = Path(config.directory) / "downloads" / "cifar10" / f"{ARCHIVE}.tmp.0123"
    half.mkdir(parents=True)
    assert data.prepare(config).endswith("25 train, 7 test")
    assert incomplete(config) == [other]
    assert not half.exists()
    assert len(load(config).train.labels) == 25


@pytest.mark.slow
def test_a_preparation_that_is_waited_for_and_killed_is_taken_over(put, tmp_path):
    config, gate = put("cifar10", cifar10_files()), tmp_path / "gate"
    with preparing(config, tmp_path / "never") as first:
        wait_until(lambda: incomplete(config), first)
        with preparing(config, gate) as second:
            wait_for_waiting(second)
            gate.touch()
            first.kill()
            output, errors = second.communicate(timeout=60)
            assert second.returncode == 0, errors
        first.communicate()
    assert output.endswith("25 train, 7 test\n")
    assert not incomplete(config)
    assert len(load(config).train.labels) == 25


def test_a_lock_file_that_was_left_is_no_hindrance(put):
    config = put("cifar10", cifar10_files())
    Path(config.directory).mkdir()
    (Path(config.directory) / ".cifar10.lock").touch()
    assert len(load(config).train.labels) == 25


def test_without_locks_preparing_goes_on(put, monkeypatch):
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", refuse)
    config = put("cifar10", cifar10_files())
    assert len(load(config).train.labels) == 25


def test_a_directory_that_cannot_be_written_is_named(put, mistake, tmp_path):
    config = put("cifar10", cifar10_files())
    (tmp_path / "tfds").write_text("a file")
    message = mistake(config)
    assert str(tmp_path / "tfds") in message
    assert "--config.data.directory=DIR" in message


def test_a_full_disk_is_told_of(put, mistake, monkeypatch):
    config = put("cifar10", cifar10_files())

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image, "fromarray", full)
    message = mistake(config)
    assert "cannot prepare cifar10" in message
    assert "No space left on device" in message
    assert_nothing_prepared(config)


# Sets without a builder of our own.

class RegisteredPets(tfds.core.GeneratorBasedBuilder):
    """A data set that TFDS knows, and that needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        splits = {"train": pets(5), "test": pets(2, seed=50)}
        return {name: self._generate_examples(rows) for name, rows in splits.items()}

    def _generate_examples(self, rows: Any) -> Any:
        for index, (body, label) in enumerate(rows):
            yield index, {"image": io.BytesIO(body), "label": label}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Returns a function that says whether TensorFlow is installed."""
    find = importlib.util.find_spec

    def set_to(value: bool) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: (
            (object() if value else None) if name == "tensorflow" else find(name, *args)))
    return set_to


def test_with_tensorflow_any_set_is_prepared_by_its_own_builder(tmp_path, installed, capsys):
    installed(True)
    config = DataConfig(name="tfds:registered_pets", directory=str(tmp_path), image_size=8)
    assert data.prepare(config) == (
        f"tfds:registered_pets is prepared in {tmp_path}/registered_pets/1.0.0: 5 train, 2 test")
    assert capsys.readouterr().out == ""
    dataset = load(config)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (5, 2)


class PetsByHand(RegisteredPets):
    """A data set that TFDS knows, of a file that it cannot download."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Ask the author."

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        count = int((dl_manager.manual_dir / "count.txt").read_text())
        return {name: self._generate_examples(pets(count)) for name in ("train", "test")}


def test_files_by_hand_reach_the_builder_of_tfds_and_are_asked_for_in_its_words(tmp_path, installed, mistake):
    installed(True)
    config = DataConfig(name="tfds:pets_by_hand", directory=str(tmp_path / "tfds"), image_size=8)
    message = mistake(config, data.prepare)
    for part in ("TFDS cannot prepare tfds:pets_by_hand", "Ask the author."):
        assert part in message
    (tmp_path / "count.txt").write_text("3")
    assert "3 train, 3 test" in data.prepare(dataclasses.replace(config, manual_directory=str(tmp_path)))


@pytest.mark.parametrize("read", [load, data.prepare, data.open_source])
def test_without_tensorflow_it_is_asked_for(tmp_path, installed, mistake, read):
    installed(False)
    config = DataConfig(name="tfds:registered_pets", directory=str(tmp_path / "tfds"), image_size=8)
    message = mistake(config, read)
    for part in (f"data.name='tfds:registered_pets' is not prepared in {tmp_path / 'tfds'}", "install TensorFlow",
                 "pip install 'shared-basis[prepare]'", "--mode=prepare", "--config.data.directory=DIR"):
        assert part in message
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("name", ["no_such_pets", "registered_pets/large", "registered_pets:7.0.0"])
def test_a_set_that_tfds_does_not_know_either_is_told_of(tmp_path, installed, mistake, name):
    installed(True)
    message = mistake(DataConfig(name=f"tfds:{name}", directory=str(tmp_path), image_size=8), data.prepare)
    assert f"data.name='tfds:{name}' is not prepared in {tmp_path}" in message
    assert "TFDS cannot find it either" in message
