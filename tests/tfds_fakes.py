"""Small data sets for the tests of TFDS: sources in the published formats, and a set with a builder of its own."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as imagenet

from shared_basis.data.tfds import builders
from shared_basis.data.tfds.names import SPECS

NAMES = ("cifar10", "cifar100", "fashion_mnist")
"""The sets whose images all have one size."""

VERSIONS = {"cifar10": "3.0.2", "cifar100": "3.0.2", "fashion_mnist": "3.0.1", "imagenet2012": "5.1.0"}

ORIGINS = {"cifar10": "https://www.cs.toronto.edu/~kriz/", "cifar100": "https://www.cs.toronto.edu/~kriz/",
           "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
           "imagenet2012": "http://www.image-net.org/challenges/LSVRC/2012/nnoupb/"}

COUNTS = {"train": 25, "test": 7}
COARSE = tuple(f"group{index}" for index in range(20))


def content(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of a fake split."""
    spec = SPECS[name]
    random = np.random.default_rng(NAMES.index(name) * 2 + (split == "test"))
    shape = (COUNTS[split], *spec.image_shape)
    return random.integers(0, 256, shape, np.uint8), random.integers(0, len(spec.classes), COUNTS[split], np.uint8)


def cifar_rows(name: str, split: str) -> bytes:
    """Returns a split in CIFAR's binary format; the coarse label of CIFAR-100 is a fifth of the fine one."""
    images, labels = content(name, split)
    columns = [labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)]
    return np.hstack(columns if name == "cifar10" else [labels[:, None] // 5, *columns]).tobytes()


def tar(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def cifar10_files(classes: tuple[str, ...] = SPECS["cifar10"].classes) -> dict[str, bytes]:
    rows = cifar_rows("cifar10", "train")
    fifth = len(rows) // 5
    parts = {f"data_batch_{index + 1}.bin": rows[index * fifth:(index + 1) * fifth] for index in range(5)}
    files = {"batches.meta.txt": "\n".join(classes).encode() + b"\n\n", **parts,
             "test_batch.bin": cifar_rows("cifar10", "test")}
    return {"cifar-10-binary.tar.gz": tar({f"cifar-10-batches-bin/{name}": body for name, body in files.items()})}


def cifar100_files() -> dict[str, bytes]:
    files = {"coarse_label_names.txt": "\n".join(COARSE).encode() + b"\n",
             "fine_label_names.txt": "\n".join(SPECS["cifar100"].classes).encode() + b"\n",
             "train.bin": cifar_rows("cifar100", "train"), "test.bin": cifar_rows("cifar100", "test")}
    return {"cifar-100-binary.tar.gz": tar({f"cifar-100-binary/{name}": body for name, body in files.items()})}


def idx(array: np.ndarray) -> bytes:
    """Returns the array in the IDX format, not yet compressed."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def fashion_idx() -> dict[str, bytes]:
    """Returns the contents of the files of Fashion-MNIST by their names, which end in .gz."""
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = content("fashion_mnist", split)
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(images[..., 0])
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
    return files


def fashion_files() -> dict[str, bytes]:
    return {name: gzip.compress(body) for name, body in fashion_idx().items()}


def picture(seed: int, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Returns a random picture without sharp edges, which survives JPEG."""
    rough = np.random.default_rng(seed).integers(0, 256, (3, 3, len(mode) if mode != "L" else 1), np.uint8)
    bands = [Image.fromarray(rough[..., band]).resize((width, height), Image.Resampling.BICUBIC)
             for band in range(rough.shape[2])]
    return Image.merge(mode, bands)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"
"""The two images of the fake ImageNet that are encoded anew: one of the 22 in CMYK, and the one that is a PNG file."""

VALIDATION_CLASSES = ("n01751748", "n09193705", "n02105855", "n04263257", "n03125729", "n01735189")
"""Those of the first six validation images of ImageNet, from its development kit."""


@functools.cache
def imagenet_train() -> dict[str, dict[str, bytes]]:
    """Returns the training images of the fake ImageNet, as JPEG files but for `PNG`, by class and file name."""
    return {
        "n02105855": {PNG: encoded(picture(0, 30, 41), "PNG"), "n02105855_9.JPEG": encoded(picture(1, 25, 25))},
        "n01440764": {f"n01440764_{number}.JPEG": encoded(picture(number, 20 + number, 33))
                      for number in (10, 2, 7, 4)},
        "n01739381": {"n01739381_7.JPEG": encoded(picture(3, 40, 18, "L")),
                      CMYK: encoded(picture(4, 37, 28, "CMYK"), quality=95)},
    }


@functools.cache
def imagenet_validation() -> dict[str, bytes]:
    """Returns the validation images, not in the order of their names."""
    return {f"ILSVRC2012_val_{number:08d}.JPEG": encoded(picture(50 + number, 24, 20 + number))
            for number in (4, 1, 6, 3, 2, 5)}


@functools.cache
def imagenet_files() -> dict[str, bytes]:
    classes = {f"{name}.tar": tar(images, "w") for name, images in imagenet_train().items()}
    return {"ILSVRC2012_img_train.tar": tar(classes, "w"), "ILSVRC2012_img_val.tar": tar(imagenet_validation(), "w")}


FILES: dict[str, Callable[[], dict[str, bytes]]] = {
    "cifar10": cifar10_files, "cifar100": cifar100_files, "fashion_mnist": fashion_files,
    "imagenet2012": imagenet_files}


def publish(name: str, files: Mapping[str, bytes], replace: Callable[[Any, str, Any], None] = setattr,
            origin: str = "") -> None:
    """Makes TFDS expect the sizes and checksums of `files`; `replace` is that of `monkeypatch`, or forever."""
    named = {"imagenet2012": lambda _: None}.get(name, str)  # TFDS knows ImageNet's files by their addresses alone
    known = {(origin or ORIGINS[name]) + file: checksums.UrlInfo(
        tfds.core.utils.Size(len(body)), hashlib.sha256(body).hexdigest(), named(file))
        for file, body in files.items()}
    stock = imagenet.Builder if name == "imagenet2012" else builders.BUILDERS[name].__mro__[1]
    replace(stock, "url_infos", known)
    if name != "imagenet2012":
        replace(checksums, "get_all_url_infos", lambda: dict(known))  # the real one is memoised: no update


def publish_all_in(name: str, directory: str) -> None:
    """Makes TFDS expect the sizes and checksums of the files in `directory`, in this process."""
    publish(name, {path.name: path.read_bytes() for path in Path(directory).iterdir()})


def records(directory: Path | str, split: str) -> list[dict[str, Any]]:
    """Returns what plain TFDS reads of a prepared split, images as they are encoded."""
    builder = tfds.builder_from_directory(directory)
    return list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))


CLASSES = ("cat", "dog", "newt")

Example = tuple[bytes, int] | dict[str, Any]

FEATURES = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=CLASSES)}


def pets(count: int, seed: int = 0) -> list[Example]:
    """Returns JPEG files of different sizes, and labels."""
    return [(encoded(picture(seed + number, 12 + number % 5, 15 + number % 3)), number % 3) for number in range(count)]


class PetsFake(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of the test's own: its splits, features and supervised keys are given to the constructor."""

    VERSION = tfds.core.Version("1.0.0")
    name = "pets_fake"

    def __init__(self, splits: Mapping[str, Sequence[Example]], features: Mapping[str, Any] | None = None,
                 keys: tuple[str, str] | None = ("image", "label"), **kwargs: Any) -> None:
        self._content, self._features, self._keys = splits, features or FEATURES, keys
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=self._keys)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {name: self._generate_examples(examples) for name, examples in self._content.items()}

    def _generate_examples(self, examples: Sequence[Example]) -> Any:
        for index, example in enumerate(examples):
            row = example if isinstance(example, dict) else dict(zip(self._features, example, strict=True))
            yield index, {key: io.BytesIO(value) if isinstance(value, bytes) else value for key, value in row.items()}


def write(directory: Path | str, splits: Mapping[str, Sequence[Example]], features: Mapping[str, Any] | None = None,
          keys: tuple[str, str] | None = ("image", "label"), config: str = "", shards: int = 1) -> Path:
    """Writes the data set `pets_fake` in the TFDS data directory `directory`; returns where its files lie."""
    choice = {"config": tfds.core.BuilderConfig(name=config, version="1.0.0")} if config else {}
    builder = PetsFake(splits, features, keys, data_dir=directory, **choice)
    builder.download_and_prepare(file_format="array_record", download_config=tfds.download.DownloadConfig(
        try_download_gcs=False, num_shards=shards))
    return Path(builder.data_dir)


@contextlib.contextmanager
def python(code: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a Python process that can import this module, and kills it at the end; its output is text."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **environment},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def run_python(code: str, **environment: str) -> str:
    """Returns what a Python process printed that can import this module, and must succeed."""
    with python(code, **environment) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.strip()
