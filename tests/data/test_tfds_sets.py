"""CIFAR and Fashion-MNIST by TFDS: tiny sources in the published formats, prepared by the real builders."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import tfds_builders, tfds_sets

NAMES = ("cifar10", "cifar100", "fashion_mnist")
COUNTS = {"train": 25, "test": 7}
COARSE = tuple(f"group{index}" for index in range(20))


def content(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of a fake split."""
    spec = tfds_sets.SPECS[name]
    random = np.random.default_rng(NAMES.index(name) * 2 + (split == "test"))
    shape = (COUNTS[split], *spec.image_shape)
    return random.integers(0, 256, shape, np.uint8), random.integers(0, len(spec.classes), COUNTS[split], np.uint8)


def cifar_rows(name: str, split: str) -> bytes:
    """Returns a split in CIFAR's binary format; the coarse label of CIFAR-100 is a fifth of the fine one."""
    images, labels = content(name, split)
    columns = [labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)]
    return np.hstack(columns if name == "cifar10" else [labels[:, None] // 5, *columns]).tobytes()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def cifar10_files(classes: tuple[str, ...] = tfds_sets.SPECS["cifar10"].classes) -> dict[str, bytes]:
    rows = cifar_rows("cifar10", "train")
    fifth = len(rows) // 5
    parts = {f"data_batch_{index + 1}.bin": rows[index * fifth:(index + 1) * fifth] for index in range(5)}
    files = {"batches.meta.txt": "\n".join(classes).encode() + b"\n\n", **parts,
             "test_batch.bin": cifar_rows("cifar10", "test")}
    return {"cifar-10-binary.tar.gz": tar({f"cifar-10-batches-bin/{name}": body for name, body in files.items()})}


def cifar100_files() -> dict[str, bytes]:
    files = {"coarse_label_names.txt": "\n".join(COARSE).encode() + b"\n",
             "fine_label_names.txt": "\n".join(tfds_sets.SPECS["cifar100"].classes).encode() + b"\n",
             "train.bin": cifar_rows("cifar100", "train"), "test.bin": cifar_rows("cifar100", "test")}
    return {"cifar-100-binary.tar.gz": tar({f"cifar-100-binary/{name}": body for name, body in files.items()})}


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes())


def fashion_files() -> dict[str, bytes]:
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = content("fashion_mnist", split)
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(images[..., 0])
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
    return files


FILES = {"cifar10": cifar10_files, "cifar100": cifar100_files, "fashion_mnist": fashion_files}


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Returns a function that writes source files, makes their checksums the expected ones, and returns a config."""
    def write(name: str, files: dict[str, bytes]) -> DataConfig:
        manual = tmp_path / "manual"
        manual.mkdir(exist_ok=True)
        origin = {"cifar10": "https://www.cs.toronto.edu/~kriz/", "cifar100": "https://www.cs.toronto.edu/~kriz/",
                  "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"}[name]
        known = {}
        for file, body in files.items():
            (manual / file).write_bytes(body)
            known[origin + file] = checksums.UrlInfo(tfds.core.utils.Size(len(body)), hashlib.sha256(body).hexdigest(),
                                                     file)
        monkeypatch.setattr(checksums, "get_all_url_infos", lambda: dict(known))  # the real one is memoised: no update
        return DataConfig(name=name, directory=str(tmp_path / "tfds"), manual_directory=str(manual))
    return write


@pytest.fixture
def prepared(put) -> tuple[DataConfig, Path]:
    """A prepared fake cifar10: its config, without the sources, and the directory of its files."""
    config = put("cifar10", cifar10_files())
    data.load_split(config, "test")
    shutil.rmtree(config.manual_directory)
    return DataConfig(name="cifar10", directory=config.directory), Path(config.directory) / "cifar10" / "3.0.2"


def ordered(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_prepared_is_the_sources_and_stock_tfds_reads_the_same(name, put, capsys):
    config = put(name, FILES[name]())
    dataset = data.load(config)
    assert f"Preparing {name} in {config.directory}" in capsys.readouterr().err
    assert dataset.spec == data.describe(config)
    for split in data.SPLITS:
        images, labels = content(name, split)
        got = getattr(dataset, split)
        assert got.images.shape == (COUNTS[split], *dataset.spec.image_shape)
        assert got.images.dtype == np.uint8
        assert got.labels.dtype == np.int32
        assert ordered(got.images, got.labels) == ordered(images, labels)

        stock = tfds.data_source(name, split=split, data_dir=config.directory)
        version = Path(config.directory) / name / ("3.0.1" if name == "fashion_mnist" else "3.0.2")
        by_directory = tfds.builder_from_directory(version).as_data_source(split)
        for row, (example, other) in enumerate(zip(stock, by_directory, strict=True)):
            np.testing.assert_array_equal(example["image"], got.images[row])
            np.testing.assert_array_equal(other["image"], got.images[row])
            assert example["label"] == other["label"] == got.labels[row]
            if name.startswith("cifar"):
                index = int(example["id"].decode().removeprefix(f"{split}_"))
                np.testing.assert_array_equal(example["image"], images[index])
            if name == "cifar100":
                assert example["coarse_label"] == labels[index] // 5
    features = tfds.builder(name, data_dir=config.directory).info.features
    assert tuple(features["label"].names) == dataset.spec.classes
    if name == "cifar100":
        assert tuple(features["coarse_label"].names) == COARSE


@pytest.mark.parametrize("name", NAMES)
def test_the_fixed_specs_are_those_of_tfds(name, tmp_path):
    features = tfds.builder(name, data_dir=tmp_path).info.features
    spec = data.describe(DataConfig(name=name))
    assert features["image"].shape == spec.image_shape
    assert features["label"].num_classes == len(spec.classes) == len(set(spec.classes))
    if name == "fashion_mnist":  # CIFAR's names come with its data
        assert tuple(features["label"].names) == spec.classes
    else:
        assert list(spec.classes) == sorted(spec.classes)


@pytest.mark.parametrize("name", NAMES)
def test_the_builders_ask_for_the_published_files(name, tmp_path):
    builder = tfds_builders.BUILDERS[name](data_dir=tmp_path)
    stock = tfds.builder_cls(name).url_infos
    assert set(builder.source_urls()) == set(stock)
    assert (builder.name, builder.version) == (name, tfds.builder_cls(name).VERSION)


def test_prepared_data_needs_no_sources_and_subsets_are_chosen(prepared):
    config, _ = prepared
    whole = data.load(config)
    subset = data.load(DataConfig(name="cifar10", directory=config.directory, train_examples=6, test_examples=2))
    rows = np.sort(np.random.default_rng(0).permutation(25)[:6])
    np.testing.assert_array_equal(subset.train.images, whole.train.images[rows])
    np.testing.assert_array_equal(subset.train.labels, whole.train.labels[rows])
    assert len(subset.test.labels) == 2


def test_reading_in_several_blocks_changes_nothing(prepared, monkeypatch):
    config, _ = prepared
    whole = data.load(config).train
    monkeypatch.setattr(tfds_sets, "BLOCK", 4)
    again = data.load(config).train
    np.testing.assert_array_equal(again.images, whole.images)
    np.testing.assert_array_equal(again.labels, whole.labels)


def test_more_images_than_exist(prepared, mistake):
    message = mistake(DataConfig(name="cifar10", directory=prepared[0].directory, train_examples=26))
    assert "only 25 train images exist" in message


def test_missing_sources_are_all_named_within_seconds(tmp_path, mistake):
    start = time.monotonic()
    message = mistake(DataConfig(name="fashion_mnist", directory=str(tmp_path / "tfds")))
    assert time.monotonic() - start < 5
    for part in ("train-images-idx3-ubyte.gz (26421880 bytes)", "train-labels-idx1-ubyte.gz (29515 bytes)",
                 "t10k-images-idx3-ubyte.gz (4422102 bytes)", "t10k-labels-idx1-ubyte.gz (5148 bytes)",
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


def test_a_source_that_tfds_downloaded_before_is_not_missing(put):
    config = put("cifar10", cifar10_files())
    archive = Path(config.manual_directory) / "cifar-10-binary.tar.gz"
    (url, info), = checksums.get_all_url_infos().items()
    cached = (Path(config.directory) / "downloads" / "cifar10"
              / tfds.core.download.resource.get_dl_fname(url, info.checksum))
    cached.parent.mkdir(parents=True)
    archive.rename(cached)
    Path(f"{cached}.INFO").write_text(json.dumps({"urls": [url], "original_fname": info.filename}))
    assert len(data.load_split(config, "test").labels) == 7


def test_an_unknown_manual_directory_is_named(tmp_path, mistake):
    message = mistake(DataConfig(name="cifar10", directory=str(tmp_path), manual_directory=str(tmp_path / "nowhere")))
    assert f"data.manual_directory='{tmp_path / 'nowhere'}': no such directory" in message


def test_a_server_that_keeps_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(tfds_sets, "PROBE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert tfds_sets._probe(f"http://127.0.0.1:{server.getsockname()[1]}/") == "ReadTimeout"


def test_a_wrong_checksum_is_refused_and_leaves_nothing_prepared(put, mistake):
    config = put("cifar10", cifar10_files())
    archive = Path(config.manual_directory) / "cifar-10-binary.tar.gz"
    good = archive.read_bytes()
    archive.write_bytes(good[:-1] + b"x")
    message = mistake(config)
    assert str(archive) in message
    assert "wrong checksum" in message
    assert not list(Path(config.directory).glob("cifar10/*"))
    archive.write_bytes(good)
    assert len(data.load(config).train.labels) == 25


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_preparation_leaves_nothing_prepared(error, put, monkeypatch):
    config = put("cifar10", cifar10_files())
    calls, convert = iter(range(100)), tfds_builders.Image.fromarray

    def interrupted(array):
        if next(calls) == 9:
            raise error
        return convert(array)
    with monkeypatch.context() as patch:
        patch.setattr(tfds_builders.Image, "fromarray", interrupted)
        with pytest.raises(error):
            data.load(config)
    assert not list(Path(config.directory).glob("cifar10/*"))
    assert len(data.load(config).train.labels) == 25


def test_a_directory_that_cannot_be_written_is_named(put, mistake, tmp_path):
    config = put("cifar10", cifar10_files())
    (tmp_path / "tfds").write_text("a file")
    assert str(tmp_path / "tfds") in mistake(config)


def _truncate(directory: Path) -> None:
    shard, = directory.glob("*test.array_record*")
    shard.write_bytes(shard.read_bytes()[:40])


def _flip(directory: Path) -> None:
    shard, = directory.glob("*test.array_record*")
    body = bytearray(shard.read_bytes())
    first = next(index for index in range(100, len(body)) if body[index])
    body[first:first + 3000] = b"x" * 3000
    shard.write_bytes(body)


@pytest.mark.parametrize(("damage", "reason"), [
    (_truncate, "ArrayRecord"),
    (_flip, "Corrupted"),
    (lambda directory: next(directory.glob("*test.array_record*")).unlink(), "No such file"),
    (lambda directory: [file.unlink() for file in directory.iterdir()], "holds no metadata"),
    (lambda directory: (directory / "dataset_info.json").unlink(), "holds no metadata"),
    (lambda directory: (directory / "dataset_info.json").write_text("{"), "JSON"),
], ids=["truncated", "flipped", "shard missing", "empty", "no metadata", "broken metadata"])
def test_damaged_prepared_data_is_refused(prepared, mistake, damage, reason):
    config, directory = prepared
    damage(directory)
    message = mistake(config)
    assert config.directory in message
    assert reason in message
    assert "delete" in message


def test_prepared_data_of_other_classes_is_refused(put, mistake):
    config = put("cifar10", cifar10_files(tuple("abcdefghij")))
    assert "its classes are a, b, c" in mistake(config)


def test_data_that_only_tensorflow_reads_is_not_to_be_deleted(prepared, mistake):
    config, directory = prepared
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for file in directory.glob("*array_record*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    message = mistake(config)
    assert "only TensorFlow reads" in message
    assert "delete" not in message


def test_tfds_data_dir_of_the_environment_is_the_default(put, tmp_path):
    config = put("cifar10", cifar10_files())
    code = ("from shared_basis import data; from shared_basis.config import DataConfig; "
            "print(len(data.load_split(DataConfig(name='cifar10'), 'test').labels))")
    data.load_split(config, "test")
    result = _python(code, TFDS_DATA_DIR=config.directory)
    assert result == "7"


def test_tensorflow_datasets_is_imported_only_to_load():
    code = ("import sys; from shared_basis import data; from shared_basis.config import DataConfig as C; "
            "data.load(C()); [data.describe(C(name=n)) for n in ('cifar10', 'cifar100', 'fashion_mnist')]; "
            "print('tensorflow_datasets' in sys.modules)")
    assert _python(code) == "False"


def _python(code: str, **environment: str) -> str:
    root = str(Path(__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root, **environment},
                            capture_output=True, text=True, timeout=60, check=True)
    return result.stdout.strip()
