"""TFDS builders that prepare data sets without TensorFlow, for data sets whose stock builders require it.

Each subclasses the stock builder and keeps its name, version, features and order, so what it writes is ordinary
ArrayRecord data that the stock builder reads. Only the steps that call TensorFlow are replaced: unpacking, and
encoding, for which TFDS uses Pillow when it gets Pillow images. Records equal those of the stock builders, except for
the 23 images of ImageNet that both re-encode as RGB JPEG (22 are CMYK, one is PNG).

Importing this module imports `tensorflow_datasets`.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as imagenet
from tensorflow_datasets.image_classification import cifar, mnist

Example = tuple[int | str, dict[str, Any]]


class Cifar10(cifar.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-10 from its binary archive."""

    BY_HAND = False
    EXAMPLES = 60_000
    """Number of examples in all splits."""

    def sources(self) -> dict[str, Any]:
        """Returns TFDS's metadata of the source files (file name, size, checksum), by URL."""
        return {self._cifar_info.url: checksums.get_all_url_infos()[self._cifar_info.url]}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Example]]:
        info = self._cifar_info
        archive = dl_manager.download(info.url)
        for key, file in zip(info.label_keys, info.label_files, strict=True):
            self.info.features[key].names = _read_members(archive, [info.prefix + file]).decode().split()
        files = {"train": info.train_files, "test": info.test_files}
        return {name: self._generate_examples(f"{name}_", _read_members(archive, [info.prefix + file for file in part]))
                for name, part in files.items()}

    def _generate_examples(self, prefix: str, data: bytes) -> Iterator[Example]:
        """Yields the examples of `data`: per image its labels of one byte each, then three planes of 32×32 bytes."""
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

    BY_HAND = False
    EXAMPLES = 70_000
    FILES = (("train", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
             ("test", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"))

    def sources(self) -> dict[str, Any]:
        """Returns TFDS's metadata of the source files (file name, size, checksum), by URL."""
        known = checksums.get_all_url_infos()
        return {self.URL + file: known[self.URL + file] for _, *files in self.FILES for file in files}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Example]]:
        paths = dl_manager.download({url: url for url in self.sources()})
        return {name: self._generate_examples(paths[self.URL + images], paths[self.URL + labels])
                for name, images, labels in self.FILES}

    def _generate_examples(self, images: os.PathLike[str], labels: os.PathLike[str]) -> Iterator[Example]:
        pairs = zip(_read_idx(images), _read_idx(labels).tolist(), strict=True)
        for index, (pixels, label) in enumerate(pairs):
            yield index, {"image": Image.fromarray(pixels), "label": label}


class Imagenet2012(imagenet.Builder, skip_registration=True):  # type: ignore[call-arg]
    """ImageNet (ILSVRC 2012) from its two archives, which must be downloaded manually after registration."""

    name = "imagenet2012"
    pkg_dir_path = imagenet.Builder._get_pkg_dir_path()  # contains the description and the class names
    BY_HAND = True
    EXAMPLES = 1_281_167 + 50_000
    ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")

    def sources(self) -> dict[str, Any]:
        """Returns TFDS's metadata of the source files (file name, size, checksum), by URL."""
        known = {os.path.basename(url): (url, info) for url, info in imagenet.Builder.url_infos.items()}
        return {url: checksums.UrlInfo(info.size, info.checksum, name)
                for name, (url, info) in known.items() if name in self.ARCHIVES}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Example]]:
        train, validation = (Path(dl_manager.manual_dir) / name for name in self.ARCHIVES)
        return {"train": self._generate_train(train), "validation": self._generate_validation(validation)}

    def _generate_train(self, path: Path) -> Iterator[Example]:
        """Yields the examples of an archive that holds one archive for each class, named <class>.tar."""
        with tarfile.open(path) as classes:
            for member in classes:
                with tarfile.open(fileobj=_file(classes, member)) as archive:
                    for image in archive:
                        yield self._example(archive, image, member.name.removesuffix(".tar"))

    def _generate_validation(self, path: Path) -> Iterator[Example]:
        """Yields the examples of an archive of images; TFDS provides the labels, ordered by file name."""
        listed = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
        with tarfile.open(path) as archive:
            labels = dict(zip(sorted(archive.getnames()), listed, strict=False))
            for image in archive:
                yield self._example(archive, image, labels[image.name])

    def _example(self, archive: tarfile.TarFile, member: tarfile.TarInfo, label: str) -> Example:
        body = _file(archive, member).read()
        if member.name in imagenet.CMYK_IMAGES or member.name in imagenet.PNG_IMAGES:
            encoded = io.BytesIO()
            Image.open(io.BytesIO(body), formats=("JPEG", "PNG")).convert("RGB").save(encoded, "JPEG", quality=100)
            body = encoded.getvalue()
        return member.name, {"file_name": member.name, "image": io.BytesIO(body), "label": label}


BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100, "fashion_mnist": FashionMNIST, "imagenet2012": Imagenet2012}

PUBLISHED_TIMES = {
    "train-images-idx3-ubyte.gz": 1504176606, "train-labels-idx1-ubyte.gz": 1504176606,
    "t10k-images-idx3-ubyte.gz": 1504176627, "t10k-labels-idx1-ubyte.gz": 1504176627,
}
"""Timestamp in the gzip headers of the published Fashion-MNIST, in seconds since 1970."""


def with_published_header(path: Path) -> bytes:
    """Returns a gzip file of Fashion-MNIST with the file name and timestamp of the published header."""
    body = path.read_bytes()
    if len(body) < 10:
        return body
    named = body[:3] + bytes([body[3] | 8]) + PUBLISHED_TIMES[path.name].to_bytes(4, "little") + body[8:10]
    return named + path.stem.encode() + b"\0" + body[10:]


def _file(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    """Returns a file object for the contents of a member, which must be a regular file."""
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name!r} in {archive.name!r} is not a file")
    return file


def _read_members(archive: os.PathLike[str], members: list[str]) -> bytes:
    """Returns the concatenated contents of files in a tar archive."""
    with tarfile.open(archive) as tar:
        return b"".join(_file(tar, tar.getmember(member)).read() for member in members)


def _read_idx(path: os.PathLike[str]) -> np.ndarray:
    """Returns the uint8 array of a gzipped IDX file: 0, 0, 8 (uint8), the rank, each dimension in 4 bytes, the data."""
    with gzip.open(path) as file:
        data = file.read()
    rank = data[3]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(np.frombuffer(data, ">i4", rank, offset=4))
