"""Builders for TensorFlow Datasets that prepare without TensorFlow what the stock builders need TensorFlow for.

Each subclasses the stock builder and keeps its name, version, features and order, so what it writes is ordinary
ArrayRecord data that the stock builder reads. Only the steps that call TensorFlow are replaced: unpacking, and
encoding, which TFDS leaves to Pillow when it is given Pillow images.

Importing this module imports `tensorflow_datasets`.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar, mnist

Example = tuple[int, dict[str, Any]]


class Cifar10(cifar.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-10 from its binary archive."""

    def source_urls(self) -> tuple[str, ...]:
        """Returns the addresses of the source files."""
        return (self._cifar_info.url,)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Example]]:
        info = self._cifar_info
        archive = dl_manager.download(info.url)
        for key, file in zip(info.label_keys, info.label_files, strict=True):
            self.info.features[key].names = _read_members(archive, [info.prefix + file]).decode().split()
        files = {"train": info.train_files, "test": info.test_files}
        return {name: self._generate_examples(f"{name}_", _read_members(archive, [info.prefix + file for file in part]))
                for name, part in files.items()}

    def _generate_examples(self, prefix: str, data: bytes) -> Iterator[Example]:
        """Yields the examples of `data`: per image its labels, one byte each, then three planes of 32×32 bytes."""
        keys = self._cifar_info.label_keys
        rows = np.frombuffer(data, np.uint8).reshape(-1, len(keys) + 3 * 32 * 32)
        for index, row in enumerate(rows):
            pixels = row[len(keys):].reshape(3, 32, 32).transpose(1, 2, 0)
            labels = dict(zip(keys, row[:len(keys)].tolist(), strict=True))
            image = Image.fromarray(np.ascontiguousarray(pixels))
            yield index, {**labels, "id": f"{prefix}{index:05d}", "image": image}


class Cifar100(cifar.Cifar100, Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-100 from its binary archive; `label` is the fine label."""


class FashionMNIST(mnist.FashionMNIST, skip_registration=True):  # type: ignore[call-arg]
    """Fashion-MNIST from its four gzipped IDX files."""

    FILES = (("train", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
             ("test", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"))

    def source_urls(self) -> tuple[str, ...]:
        """Returns the addresses of the source files."""
        return tuple(self.URL + file for _, *files in self.FILES for file in files)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Example]]:
        paths = dl_manager.download({url: url for url in self.source_urls()})
        return {name: self._generate_examples(paths[self.URL + images], paths[self.URL + labels])
                for name, images, labels in self.FILES}

    def _generate_examples(self, images: os.PathLike[str], labels: os.PathLike[str]) -> Iterator[Example]:
        pairs = zip(_read_idx(images), _read_idx(labels).tolist(), strict=True)
        for index, (pixels, label) in enumerate(pairs):
            yield index, {"image": Image.fromarray(pixels), "label": label}


BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100, "fashion_mnist": FashionMNIST}


def _read_members(archive: os.PathLike[str], members: list[str]) -> bytes:
    """Returns the contents of files in a tar archive, one after another."""
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member) for member in members]
        return b"".join(file.read() for file in files if file)


def _read_idx(path: os.PathLike[str]) -> np.ndarray:
    """Returns the uint8 array of a gzipped IDX file: 0, 0, 8 (uint8), the rank, each dimension in 4 bytes, the data."""
    with gzip.open(path) as file:
        data = file.read()
    rank = data[3]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(np.frombuffer(data, ">i4", rank, offset=4))
