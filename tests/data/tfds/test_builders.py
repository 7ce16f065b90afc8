"""What our own builders write is what the published files hold, and what the stock builders of TFDS write."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_fakes
from data_helpers import load
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as imagenet
from tensorflow_datasets.image_classification import mnist
from tfds_fakes import CMYK, COUNTS, FILES, NAMES, PNG, VERSIONS, content, records

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import images, in_memory, streaming
from shared_basis.data.batches import EvalBatches, TrainingBatches
from shared_basis.data.examples import crop_generator
from shared_basis.data.tfds import builders

STOCK_ORDER = {
    "train": ("n01440764_7", "n01440764_10", "n02105855_2933", "n02105855_9", "n01739381_1309", "n01440764_2",
              "n01440764_4", "n01739381_7"),
    "validation": tuple(f"ILSVRC2012_val_0000000{number}" for number in (2, 4, 1, 3, 5, 6)),
}
"""The order that the stock builder gives the files of the fake ImageNet (by hashes of their names)."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def ordered(pictures: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((image.tobytes(), int(label)) for image, label in zip(pictures, labels, strict=True))


def place(config: DataConfig) -> Path:
    return Path(config.directory) / config.name / VERSIONS[config.name]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_prepared_is_the_sources_and_stock_tfds_reads_the_same(name, put, capsys):
    config = put(name, FILES[name]())
    dataset = load(config)
    assert f"Preparing {name} in {config.directory}" in capsys.readouterr().err
    assert dataset.spec == data.describe(config)
    for split in data.SPLITS:
        pictures, labels = content(name, split)
        got = getattr(dataset, split)
        assert got.images.shape == (COUNTS[split], *dataset.spec.image_shape)
        assert got.images.dtype == np.uint8
        assert got.labels.dtype == np.int32
        assert ordered(got.images, got.labels) == ordered(pictures, labels)

        stock = tfds.data_source(name, split=split, data_dir=config.directory)
        by_directory = tfds.builder_from_directory(place(config)).as_data_source(split)
        for row, (example, other) in enumerate(zip(stock, by_directory, strict=True)):
            np.testing.assert_array_equal(example["image"], got.images[row])
            np.testing.assert_array_equal(other["image"], got.images[row])
            assert example["label"] == other["label"] == got.labels[row]
            if name.startswith("cifar"):
                index = int(example["id"].decode().removeprefix(f"{split}_"))
                np.testing.assert_array_equal(example["image"], pictures[index])
            if name == "cifar100":
                assert example["coarse_label"] == labels[index] // 5
    features = tfds.builder(name, data_dir=config.directory).info.features
    assert tuple(features["label"].names) == dataset.spec.classes
    if name == "cifar100":
        assert tuple(features["coarse_label"].names) == tfds_fakes.COARSE


@pytest.mark.parametrize("name", FILES)
def test_the_builders_ask_for_the_published_files(name, tmp_path):
    builder = builders.BUILDERS[name](data_dir=tmp_path)
    sources, stock = builder.sources(), tfds.builder_cls(name).url_infos
    assert sources == {url: stock[url] for url in sources}
    assert {info.filename for info in sources.values()} == set(FILES[name]())
    assert len(sources) == len(stock)
    assert (builder.name, builder.version) == (name, tfds.builder_cls(name).VERSION) == (name, VERSIONS[name])


# ImageNet.

def test_imagenet_is_prepared_and_read_without_tensorflow(put, capsys):
    config = dataclasses.replace(put("imagenet2012", FILES["imagenet2012"]()), image_size=16)
    source = data.open_source(config)
    assert f"Preparing imagenet2012 in {config.directory}" in capsys.readouterr().err
    assert source.spec == data.describe(config)
    assert {name: len(part) for name, part in source.splits.items()} == {"train": 8, "test": 6}

    classes = source.spec.classes
    validation = dict(zip(sorted(tfds_fakes.imagenet_validation()), tfds_fakes.VALIDATION_CLASSES, strict=True))
    expected = {"train": {file: (body, name) for name, files in tfds_fakes.imagenet_train().items()
                          for file, body in files.items()},
                "test": {file: (body, validation[file]) for file, body in tfds_fakes.imagenet_validation().items()}}
    for split, stored in (("train", "train"), ("test", "validation")):
        files = [record["file_name"].decode() for record in records(place(config), stored)]
        assert files == [f"{name}.JPEG" for name in STOCK_ORDER[stored]]
        assert sorted(files) == sorted(expected[split])
        for file, (body, label) in zip(files, source.splits[split].read(range(len(files))), strict=True):
            assert classes[label] == expected[split][file][1]
            if file in (CMYK, PNG):
                image = Image.open(io.BytesIO(body))
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert image.quantization[0] == [1] * 64  # quality 100
                original = Image.open(io.BytesIO(expected[split][file][0])).convert("RGB")
                assert np.abs(np.asarray(image, np.int32) - np.asarray(original)).mean() < 3
            else:
                assert body == expected[split][file][0]


def test_prepared_imagenet_is_what_the_stock_builder_takes_for_its_own(put):
    config = put("imagenet2012", FILES["imagenet2012"]())
    data.prepare(config)
    stock = tfds.builder("imagenet2012", data_dir=config.directory)
    assert stock.is_prepared()
    assert {name: info.num_examples for name, info in stock.info.splits.items()} == {"train": 8, "validation": 6}
    assert "ImageNet" in json.loads((place(config) / "dataset_info.json").read_text())["description"]


def test_imagenet_in_memory_and_streamed_is_the_decoded_files(put):
    config = dataclasses.replace(put("imagenet2012", FILES["imagenet2012"]()), image_size=16)
    source = data.open_source(config)
    train, test = source.splits["train"], source.splits["test"]
    region = in_memory.eval_crop(config, (16, 16, 3))
    decoded = [images.decode(body, 3, (16, 16), region) for body, _ in train.read(range(8))]
    dataset = load(config)
    np.testing.assert_array_equal(dataset.train.images, decoded)

    random = dataclasses.replace(config, crop="random_resized")
    batches = TrainingBatches(train, source.spec, random, seed=3, batch_size=4, epochs=2)
    first, *rest = streaming.read(batches, 0, pytest.fail)
    assert len(rest) == 3
    assert first.images.shape == (4, 16, 16, 3)
    rows = data.epoch_order(3, 0, 8)[:4]
    np.testing.assert_array_equal(first.labels, dataset.train.labels[rows])
    boxes = [images.random_resized(crop_generator(3, position)) for position in range(4)]
    bodies = [body for body, _ in train.read([int(row) for row in rows])]
    np.testing.assert_array_equal(first.images, [images.decode(body, 3, (16, 16), box)
                                                 for body, box in zip(bodies, boxes, strict=True)])

    plain = EvalBatches(test, source.spec, config, batch_size=4)
    streamed = list(streaming.read(plain, 0, pytest.fail))
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in streamed])[:6], dataset.test.images)
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in streamed]),
                                  [*dataset.test.labels, -1, -1])


def test_the_images_to_encode_anew_are_those_of_tfds():
    assert CMYK in imagenet.CMYK_IMAGES
    assert [PNG] == imagenet.PNG_IMAGES
    assert len(imagenet.CMYK_IMAGES) + len(imagenet.PNG_IMAGES) == 23


# The stock builders, which need TensorFlow.

@pytest.fixture
def tensorflow() -> Any:
    return pytest.importorskip("tensorflow", reason="the stock builders of TFDS prepare with TensorFlow, an extra")


def stock_records(config: DataConfig, directory: Path, split: str) -> list[dict[str, Any]]:
    """Returns the records of a split as the stock builder of TFDS prepares it in `directory`."""
    builder = tfds.builder(config.name, data_dir=directory)
    builder.download_and_prepare(file_format="array_record", download_config=tfds.download.DownloadConfig(
        manual_dir=config.manual_directory, try_download_gcs=False))
    return records(builder.data_dir, split)


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)), np.int32)


def assert_equal_files(ours: Path, stock: Path) -> None:
    """Asserts that both directories hold the same files, and tell the same of features, splits and shards."""
    names = sorted(path.name for path in stock.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        if name.endswith(".txt"):
            assert (ours / name).read_text() == (stock / name).read_text()
    features, other = (json.loads((path / "features.json").read_text()) for path in (ours, stock))
    assert features == other
    info, other = (json.loads((path / "dataset_info.json").read_text()) for path in (ours, stock))
    for described in (info, other):
        for key in ("moduleName", "description", "citation"):
            described.pop(key, None)
        for split in described["splits"]:
            split.pop("numBytes", None)  # TensorFlow compresses PNG files in another way
    assert info == other


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize("name", NAMES)
def test_records_equal_those_of_the_stock_builder(name, put, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", COUNTS["train"])
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", COUNTS["test"])
    config = put(name, FILES[name]())
    data.prepare(config)
    for split in data.SPLITS:
        stock, ours = stock_records(config, tmp_path / "stock", split), records(place(config), split)
        assert len(ours) == len(stock) == COUNTS[split]
        for mine, other in zip(ours, stock, strict=True):
            np.testing.assert_array_equal(pixels(mine.pop("image")), pixels(other.pop("image")))
            assert mine == other
    assert_equal_files(place(config), tmp_path / "stock" / name / VERSIONS[name])


@pytest.mark.usefixtures("tensorflow")
def test_records_of_imagenet_equal_those_of_the_stock_builder_but_for_images_encoded_anew(put, tmp_path):
    config = put("imagenet2012", FILES["imagenet2012"]())
    data.prepare(config)
    tolerances = {PNG: 0, CMYK: 8}  # Pillow and TensorFlow round in different ways when they leave CMYK
    for split in ("train", "validation"):
        stock, ours = stock_records(config, tmp_path / "stock", split), records(place(config), split)
        assert len(ours) == len(stock) == {"train": 8, "validation": 6}[split]
        for mine, other in zip(ours, stock, strict=True):
            body, stock_body = mine.pop("image"), other.pop("image")
            assert mine == other
            if body != stock_body:
                difference = np.abs(pixels(body) - pixels(stock_body))
                assert difference.max() <= tolerances[mine["file_name"].decode()]
    assert_equal_files(place(config), tmp_path / "stock" / "imagenet2012" / VERSIONS["imagenet2012"])


# Fashion-MNIST as Debian packs it.

def unnamed_gzip(body: bytes) -> bytes:
    """Returns a gzip file whose header holds neither a name nor a time."""
    return gzip.compress(body, mtime=0)


@pytest.mark.parametrize(("file", "time"), builders.PUBLISHED_TIMES.items())
def test_a_gzip_header_is_given_name_and_time(tmp_path, file, time):
    path = tmp_path / file
    path.write_bytes(unnamed_gzip(b"contents" * 100))
    mended = builders.with_published_header(path)
    assert mended[:4] == b"\x1f\x8b\x08\x08"  # gzip, deflate, named
    assert int.from_bytes(mended[4:8], "little") == time
    assert mended[10:].split(b"\0")[0].decode() + ".gz" == file
    with gzip.GzipFile(fileobj=io.BytesIO(mended)) as opened:
        assert opened.read() == b"contents" * 100
        assert opened.mtime == time
    buffer = io.BytesIO()
    with gzip.GzipFile(file, "wb", fileobj=buffer, mtime=time) as named:  # as gzip itself would write it
        named.write(b"contents" * 100)
    assert mended[:8] + mended[10:] == buffer.getvalue()[:8] + buffer.getvalue()[10:]  # but for effort and system


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file by its format."""
    body = gzip.decompress(path.read_bytes())
    assert body[:3] == b"\0\0\x08"
    shape = [int.from_bytes(body[4 + 4 * axis:8 + 4 * axis], "big") for axis in range(body[3])]
    return np.frombuffer(body[4 + 4 * len(shape):], np.uint8).reshape(shape)


@pytest.mark.slow
def test_fashion_mnist_of_debian_is_the_published_one(tmp_path):
    if not DEBIAN.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    config = DataConfig(name="fashion_mnist", directory=str(tmp_path), manual_directory=str(DEBIAN))
    report = data.prepare(config)
    assert "60,000 train" in report
    assert "10,000 test" in report
    dataset = load(config)
    assert dataset.spec == data.describe(config)
    stock = tfds.builder("fashion_mnist", data_dir=tmp_path)
    for split, prefix, count in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        got = getattr(dataset, split)
        pictures = read_idx(DEBIAN / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(DEBIAN / f"{prefix}-labels-idx1-ubyte.gz")
        assert got.images.shape == (count, 28, 28, 1)
        np.testing.assert_array_equal(np.bincount(got.labels), np.full(10, count // 10))
        assert int(got.images.sum(dtype=np.int64)) == int(pictures.sum(dtype=np.int64))
        assert hashes(got.images[..., 0], got.labels) == hashes(pictures, labels)
        assert not np.array_equal(got.labels, labels)  # TFDS shuffles, once and for all
        opened = stock.as_data_source(split)
        assert len(opened) == count
        for row in (0, 1, count - 1):
            np.testing.assert_array_equal(opened[row]["image"], got.images[row])
            assert opened[row]["label"] == got.labels[row]
    # The published means and deviations of the training pixels, as widely cited.
    assert dataset.train.images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert dataset.train.images.std() / 255 == pytest.approx(0.3530, abs=5e-5)


def hashes(pictures: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Returns sorted hashes of the pairs of image and label."""
    return sorted(hashlib.sha256(image.tobytes() + bytes([label])).digest()
                  for image, label in zip(pictures, labels.tolist(), strict=True))
