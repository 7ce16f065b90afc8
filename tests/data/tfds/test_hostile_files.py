"""Prepared data and archives from strangers: names in them are not imported or followed, nothing outside is written."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
import tfds_fakes as fakes
from data_helpers import load
from helpers import user_error
from hostile import MIB, spoil, tree

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.errors import UserError


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the data directory of a small TFDS data set; for reading only."""
    directory = tmp_path_factory.mktemp("tfds")
    fakes.write(directory, {"train": fakes.pets(4), "test": fakes.pets(2)})
    return directory


FEATURES: dict[str, Callable[[Any], Any]] = {
    "all features": lambda features: features.update(pythonClassName="trap_module.X"),
    "one feature": lambda features: features["featuresDict"]["features"]["label"].update(
        pythonClassName="trap_module.X"),
    "a further feature": lambda features: features["featuresDict"]["features"].update(
        more={"pythonClassName": "trap_module.X", "jsonFeature": {"json": "{}"}}),
    "a feature of a sequence": lambda features: features["featuresDict"]["features"].update(
        more={"pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
              "sequence": {"feature": {"pythonClassName": "trap_module.X", "jsonFeature": {"json": "{}"}}}}),
    "the older form": lambda features: {"type": "trap_module.X", "content": {}},
    "the older form within": lambda features: {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "content": {"image": {"type": "trap_module.X", "content": "{}"}}},
}


@pytest.mark.parametrize("change", FEATURES)
def test_modules_named_in_prepared_data_are_not_imported(pets: Path, tmp_path: Path, trap: Path, change: str) -> None:
    directory = shutil.copytree(pets, tmp_path / "tfds")
    spoil(directory / "pets_fake" / "1.0.0" / "features.json", FEATURES[change])
    config = DataConfig(name="tfds:pets_fake", directory=str(directory), image_size=8)
    for read in (data.describe, data.open_source):
        with user_error(str(directory)):
            read(config)
        assert not trap.exists()


def test_modules_named_behind_a_link_are_not_imported(pets: Path, tmp_path: Path, trap: Path) -> None:
    directory = Path(shutil.copytree(pets, tmp_path / "tfds"))
    version = directory / "pets_fake" / "1.0.0"
    spoil(version / "features.json", FEATURES["all features"])
    version.rename(tmp_path / "elsewhere")
    version.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(version)  # a circle
    with user_error(str(directory)):
        data.open_source(DataConfig(name="tfds:pets_fake", directory=str(directory), image_size=8))
    assert not trap.exists()


@pytest.mark.parametrize("fields", [
    {"moduleName": "trap_module"}, {"name": "../outside"}, {"version": "../outside"}, {"fileFormat": "trap_module"},
    {"configName": "../../outside"}, {"splits": [{"name": "train", "shardLengths": ["4"], "filepathTemplate":
                                                  "../../outside/{SPLIT}.{SHARD_X_OF_Y}"}]}], ids=str)
def test_names_in_the_description_of_prepared_data_are_not_followed(pets: Path, tmp_path: Path, trap: Path,
                                                                    fields: dict[str, Any]) -> None:
    directory = shutil.copytree(pets, tmp_path / "tfds")
    spoil(directory / "pets_fake" / "1.0.0" / "dataset_info.json", lambda info: info.update(fields))
    before = tree(tmp_path)
    with contextlib.suppress(UserError):
        data.open_source(DataConfig(name="tfds:pets_fake", directory=str(directory), image_size=8))
    assert not trap.exists()
    assert tree(tmp_path) == before


def test_images_beside_the_one_that_is_trained_on_are_not_decoded(tmp_path: Path,
                                                                  ghostscript: list[Any]) -> None:
    features = {**fakes.FEATURES, "other": tfds.features.Image()}
    png, eps = (fakes.encoded(fakes.picture(0, 8, 8), kind) for kind in ("PNG", "EPS"))
    rows = [{"image": png, "label": index, "other": eps} for index in range(3)]
    fakes.write(tmp_path, {"train": rows, "test": rows}, features)
    load(DataConfig(name="tfds:pets_fake", directory=str(tmp_path), image_size=8))
    assert not ghostscript


def test_images_of_an_archive_that_are_encoded_anew_are_what_they_should_be(
        tmp_path: Path, ghostscript: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum of an archive as large as ImageNet's is not compared."""
    files = dict(fakes.imagenet_files())
    image = fakes.tar({fakes.CMYK: fakes.encoded(fakes.picture(0, 8, 8), "EPS")}, "w")
    files["ILSVRC2012_img_train.tar"] = fakes.tar({"n01739381.tar": image}, "w")
    with user_error("imagenet2012", "cannot prepare"):
        data.prepare(sources(tmp_path, "imagenet2012", files, monkeypatch))
    assert not ghostscript


def sources(root: Path, name: str, files: Mapping[str, bytes],
            monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Writes source files as the published ones, and returns where they and the prepared data lie."""
    (root / "manual").mkdir()
    for file, body in files.items():
        (root / "manual" / file).write_bytes(body)
    fakes.publish(name, files, monkeypatch.setattr)
    return DataConfig(name=name, directory=str(root / "tfds"), manual_directory=str(root / "manual"))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def hostile(outside: Path) -> dict[str, tarfile.TarInfo]:
    return {
        "a climbing name": member("../../../outside/escaped"), "an absolute name": member(str(outside / "escaped")),
        "a link out": member("link", tarfile.SYMTYPE, str(outside / "secret")),
        "a climbing link": member("link", tarfile.SYMTYPE, "../" * 9 + str(outside / "secret")),
        "a hard link": member("link", tarfile.LNKTYPE, str(outside / "secret")),
        "a link to itself": member("link", tarfile.SYMTYPE, "link"),
        "a device": member("device", tarfile.CHRTYPE), "a pipe": member("pipe", tarfile.FIFOTYPE),
        "a directory": member("directory", tarfile.DIRTYPE),
    }


@pytest.mark.parametrize(("name", "kind"), [
    ("cifar10", "a climbing name"), ("cifar10", "a link out"), ("cifar10", "a pipe"),
    ("imagenet2012", "an absolute name"), ("imagenet2012", "a climbing link"), ("imagenet2012", "a hard link"),
    ("imagenet2012", "a link to itself"), ("imagenet2012", "a device"), ("imagenet2012", "a directory")])
def test_archives_write_nothing_outside_and_are_followed_nowhere(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """The hostile member takes the place of each file that the builder reads, and stands beside them."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret" * 1000)
    info = hostile(outside)[kind]
    if name == "cifar10":
        files = {"cifar-10-binary.tar.gz": spiked(fakes.cifar10_files()["cifar-10-binary.tar.gz"], info,
                                                  "cifar-10-batches-bin/data_batch_1.bin")}
    else:
        files = dict(fakes.imagenet_files())
        files["ILSVRC2012_img_train.tar"] = spiked(files["ILSVRC2012_img_train.tar"], info, "n01440764.tar")
    config = sources(tmp_path, name, files, monkeypatch)
    before = tree(outside)
    with contextlib.suppress(UserError):  # a file of a strange name stands beside the others and is not looked at
        data.prepare(config)
    assert tree(outside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manual", "outside", "tfds"]
    assert not any(b"secret" in body for body in tree(tmp_path / "tfds").values())


def spiked(archive: bytes, info: tarfile.TarInfo, replaced: str) -> bytes:
    """Returns the tar archive with the member `info` before all others, and once more in place of `replaced`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        new.addfile(info)
        for found in old:
            if found.name == replaced:
                new.addfile(info.replace(name=replaced))
            else:
                new.addfile(found, old.extractfile(found))
    return buffer.getvalue()


def test_a_file_that_unpacks_to_more_than_the_published_one_is_not_unpacked(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum stands before: it is refused without a look into it."""
    files = fakes.fashion_files()
    config = sources(tmp_path, "fashion_mnist", files, monkeypatch)
    (tmp_path / "manual" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(50 * MIB)))
    monkeypatch.setattr(gzip, "open", lambda *_: pytest.fail("it was unpacked"))
    with user_error("train-images-idx3-ubyte.gz", "the published file has"):
        data.prepare(config)
