"""Directories of images: order, decoding, resizing, and the messages for what can be wrong with them."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import folder as folder_module
from shared_basis.data.splits import choose

CIFAR10_JPEG = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def pixels(seed: int, height: int = 4, width: int = 5) -> np.ndarray:
    """Returns a random RGB image uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, in both of three training images and one test image of 4×5 pixels, `pixels(0)` to `pixels(7)`."""
    files = [*(f"train/{name}/{index}.png" for name in ("cat", "dog") for index in range(3)),
             "test/cat/0.png", "test/dog/0.png"]
    for seed, file in enumerate(files):
        path = tmp_path / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed)).save(path)
    return tmp_path / "images"


def config(directory: Path, **fields: int) -> DataConfig:
    return DataConfig(name="folder", directory=str(directory), **fields)


def first_image(directory: Path, **fields: int) -> np.ndarray:
    return data.load_split(config(directory, **fields), "train").images[0]


def test_loads_images_and_labels(folder):
    dataset = data.load(config(folder))
    assert dataset.spec == data.Spec((4, 5, 3), ("cat", "dog")) == data.describe(config(folder))
    np.testing.assert_array_equal(dataset.train.images, [pixels(seed) for seed in range(6)])
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dataset.test.images, [pixels(6), pixels(7)])
    np.testing.assert_array_equal(dataset.test.labels, [0, 1])
    assert dataset.train.images.flags.c_contiguous
    assert dataset.train.labels.dtype == np.int32
    np.testing.assert_array_equal(data.load_split(config(folder), "test").images, dataset.test.images)


def test_a_home_directory_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert data.describe(config(Path("~/images"))).classes == ("cat", "dog")


def test_order_is_by_code_point_whatever_the_file_system_gives(folder, monkeypatch):
    names = ("a.png", "10.png", "B.png", "2.png")
    for seed, name in enumerate(names, 20):
        Image.fromarray(pixels(seed)).save(folder / "train" / "cat" / name)
    scan = os.scandir

    class Reversed:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            return sorted(scan(self.path), key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *_):
            return None
    monkeypatch.setattr(folder_module.os, "scandir", Reversed)
    split = data.load_split(config(folder), "train")
    expected = [pixels(seed) for seed in (0, 1, 21, 23, 22, 20, 3, 4, 5)]  # 0, 1, 10, 2, B, a; then the dogs
    np.testing.assert_array_equal(split.images, expected)
    np.testing.assert_array_equal(split.labels, [0] * 6 + [1] * 3)


def test_hidden_files_and_other_suffixes_are_passed_over_and_suffixes_may_be_upper_case(folder):
    cats = folder / "train" / "cat"
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (cats / name).write_text("not an image")
    (cats / "nested.png").mkdir()
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "README.md").write_text("not a class")
    (cats / "2.png").rename(cats / "2.PNG")
    Image.fromarray(pixels(9)).save(cats / "3.bmp")
    Image.fromarray(pixels(10)).save(cats / "4.webp", lossless=True)
    Image.fromarray(np.full((4, 5, 3), 77, np.uint8)).save(cats / "5.JPeG", format="JPEG")
    images = data.load_split(config(folder), "train").images
    np.testing.assert_array_equal(images[:5], [pixels(seed) for seed in (0, 1, 2, 9, 10)])
    np.testing.assert_array_equal(images[5], np.full((4, 5, 3), 77))
    assert len(images) == 9


GREY = pixels(11)[..., 0]


@pytest.mark.parametrize(("image", "expected"), [
    (Image.fromarray(GREY), GREY[..., None]),
    (Image.fromarray(GREY > 99), np.where(GREY > 99, 255, 0)[..., None]),
    (Image.fromarray(GREY.astype(np.uint16) * 257), GREY[..., None]),
    (Image.fromarray(np.full((4, 5), 257 * 7 + 129, np.uint16)), np.full((4, 5, 1), 8)),
    (Image.fromarray(np.full((4, 5), 257 * 7 + 128, np.uint16)), np.full((4, 5, 1), 7)),
    (Image.fromarray(np.dstack([pixels(12), np.full((4, 5), 255, np.uint8)])), pixels(12)),
    (Image.fromarray(np.dstack([pixels(12), np.zeros((4, 5), np.uint8)])), np.full((4, 5, 1), 255)),
    (Image.fromarray(np.dstack([GREY, np.zeros((4, 5), np.uint8)])), np.full((4, 5, 1), 255)),
    (Image.fromarray(np.full((4, 5, 3), (255, 0, 255), np.uint8)).quantize(4), np.full((4, 5, 3), (255, 0, 255))),
], ids=["grey", "bits", "16 bits", "16 bits up", "16 bits down", "opaque", "transparent", "transparent grey",
        "palette"])
def test_images_become_rgb(folder, image, expected):
    image.save(folder / "train" / "cat" / "0.png")
    np.testing.assert_array_equal(first_image(folder), np.broadcast_to(expected, (4, 5, 3)))


def test_a_transparent_colour_becomes_white(folder):
    palette = Image.new("P", (5, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((0, 0), 0)
    palette.save(folder / "train" / "cat" / "0.png", transparency=0)
    image = first_image(folder)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[1, 1].tolist() == [9, 8, 7]


def test_exif_orientation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    Image.fromarray(np.rot90(pixels(13)).copy()).save(folder / "train" / "cat" / "0.png", exif=exif)
    np.testing.assert_array_equal(first_image(folder), pixels(13))


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (16, 40), (2, 4)])
def test_resizing_scales_the_shorter_side_and_cuts_out_the_centre(folder, height, width):
    image = Image.fromarray(pixels(14, height, width))
    image.save(folder / "train" / "cat" / "0.png")
    short = min(height, width)
    whole = np.asarray(image.resize((4 * width // short, 4 * height // short), Image.Resampling.BILINEAR))
    top, left = (whole.shape[0] - 4) // 2, (whole.shape[1] - 4) // 2
    assert data.describe(config(folder, image_size=4)).image_shape == (4, 4, 3)
    expected = whole[top:top + 4, left:left + 4]
    np.testing.assert_allclose(first_image(folder, image_size=4).astype(int), expected, atol=1)  # rounding


def test_resizing_averages_what_it_drops(folder):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(folder / "train" / "cat" / "0.png")
    inner = first_image(folder, image_size=8)[:, 1:-1].astype(int)
    assert abs(inner - 127).max() <= 2


def test_resizing_brings_small_and_large_jpeg_files_to_one_size(folder):
    large = np.zeros((400, 1200, 3), np.uint8)
    large[:, :600] = 220
    Image.fromarray(large).save(folder / "train" / "cat" / "0.jpg")
    (folder / "train" / "cat" / "0.png").unlink()
    split = data.load_split(config(folder, image_size=16), "train")
    assert split.images.shape == (6, 16, 16, 3)
    assert split.images[0, :, :7].min() > 210
    assert split.images[0, :, 9:].max() < 10


def test_a_large_jpeg_file_keeps_its_detail(folder):
    path = folder / "train" / "cat" / "0.jpg"
    Image.fromarray(pixels(15, 64, 64)).save(path, quality=95)
    (folder / "train" / "cat" / "0.png").unlink()
    expected = Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(first_image(folder, image_size=32).astype(int), np.asarray(expected), atol=1)


def test_only_the_chosen_images_are_opened(folder):
    for name in ("cat", "dog"):
        for index in range(3, 20):
            Image.fromarray(pixels(index)).save(folder / "train" / name / f"{index:02}.png")
    limited = config(folder, train_examples=5)
    whole = data.load_split(config(folder), "train")
    chosen = choose(limited, {"train": 40})["train"]
    assert len(chosen) == 5
    paths = sorted((folder / "train").glob("*/*"))
    for index in set(range(1, 40)) - set(chosen):  # the first image sets the size
        paths[index].write_bytes(b"broken")
    split = data.load_split(limited, "train")
    np.testing.assert_array_equal(split.images, whole.images[chosen])
    np.testing.assert_array_equal(split.labels, whole.labels[chosen])


def test_more_images_than_exist(folder, mistake):
    assert "only 6 train images exist" in mistake(config(folder, train_examples=7))
    assert "only 2 test images exist" in mistake(config(folder, test_examples=3))


@pytest.mark.parametrize("read", [data.describe, data.load])
def test_missing_directories_are_named(folder, mistake, read):
    message = mistake(config(folder / "nowhere"), read)
    assert str(folder / "nowhere") in message
    assert "train/<class>/*" in message
    message = mistake(config(folder / "train" / "cat" / "0.png"), read)
    assert "is not a directory" in message
    for name in ("test", "train"):
        shutil.rmtree(folder / name)
        assert f"{folder / name} cannot be found" in mistake(config(folder), read)


@pytest.mark.parametrize(("changed", "other"), [("train", "test"), ("test", "train")])
def test_a_class_that_is_in_one_split_only_is_named(folder, mistake, changed, other):
    shutil.copytree(folder / changed / "cat", folder / changed / "emu")
    message = mistake(config(folder))
    assert f"class 'emu' is in {folder / changed} and not in {folder / other}" in message


def test_one_class_is_too_few(folder, mistake):
    for name in data.SPLITS:
        shutil.rmtree(folder / name / "dog")
    assert "holds 1 class directories; at least 2" in mistake(config(folder))


@pytest.mark.parametrize("name", data.SPLITS)
def test_a_class_without_images_is_named(folder, mistake, name):
    for file in (folder / name / "dog").iterdir():
        file.rename(file.with_suffix(".gif"))
    message = mistake(config(folder))
    assert f"{folder / name / 'dog'} holds no image" in message
    assert ".jpg" in message


def _truncated(path: Path) -> None:
    Image.fromarray(pixels(0, 40, 40)).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-300])


def _broken_png(path: Path) -> None:
    Image.fromarray(pixels(0)).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda path: path.write_bytes(b""), "is not an image"),
    (lambda path: path.write_text("some text"), "is not an image"),
    (lambda path: Image.fromarray(pixels(0)).save(path, format="GIF"), "is not an image"),
    (_truncated, "truncated"),
    (_broken_png, "cannot decode"),
    (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
], ids=["empty", "text", "other format", "truncated", "damaged", "dangling link"])
@pytest.mark.parametrize("image_size", [0, 8])
def test_a_broken_image_is_named(folder, mistake, spoil, reason, image_size):
    path = folder / "test" / "dog" / "1.jpg"
    spoil(path)
    message = mistake(config(folder, image_size=image_size))
    assert str(path) in message
    assert reason in message


def test_a_broken_first_image_is_named_when_described(folder, mistake):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(b"")
    assert str(path) in mistake(config(folder), data.describe)


@pytest.mark.parametrize("read", [data.describe, data.load])
@pytest.mark.parametrize("limit", [19, 9], ids=["warning", "error"])
def test_an_image_with_too_many_pixels_is_named(folder, mistake, monkeypatch, limit, read):
    assert limit < 4 * 5
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = mistake(config(folder), read)
    assert str(folder / "train" / "cat" / "0.png") in message
    assert f"more than {limit} pixels" in message


def test_too_many_pixels_after_the_first_image(folder, mistake, monkeypatch):
    path = folder / "test" / "dog" / "1.png"
    Image.fromarray(pixels(0, 5, 5)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert str(path) in mistake(config(folder, image_size=4))


def test_different_sizes_are_refused_with_the_way_out(folder, mistake):
    path = folder / "train" / "dog" / "1.png"
    Image.fromarray(pixels(0, 7, 6)).save(path)
    message = mistake(config(folder))
    assert f"{path} has 7×6 pixels" in message
    assert f"{folder / 'train' / 'cat' / '0.png'} has 4×5" in message
    assert "--config.data.image_size" in message


def test_the_size_of_the_training_images_holds_for_the_test_images_too(folder, mistake):
    for file in (folder / "test").glob("*/*"):
        Image.fromarray(pixels(0, 6, 6)).save(file)
    message = mistake(config(folder), lambda value: data.load_split(value, "test"))
    assert f"{folder / 'test' / 'cat' / '0.png'} has 6×6" in message


def test_unreadable_directories_and_files_are_named(folder, mistake, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "scandir", denied)
        message = mistake(config(folder))
    assert str(folder / "train") in message
    assert "Permission denied" in message
    monkeypatch.setattr(Image, "open", denied)
    message = mistake(config(folder))
    assert str(folder / "train" / "cat" / "0.png") in message
    assert "Permission denied" in message


def test_images_beyond_the_memory_are_refused_before_decoding(folder, mistake, monkeypatch):
    monkeypatch.setattr(folder_module, "_available_memory", lambda: 8 * 60)  # 8 images of 4×5×3 bytes
    assert len(data.load(config(folder)).train.labels) == 6
    monkeypatch.setattr(folder_module, "_available_memory", lambda: 8 * 60 - 1)
    (folder / "test" / "dog" / "0.png").write_bytes(b"broken")
    message = mistake(config(folder))
    assert "8 images of 4×5 pixels" in message
    assert "train_examples" in message
    assert "image_size" in message
    assert len(data.load_split(config(folder), "train").labels) == 6


def test_available_memory_is_plausible(monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = folder_module._available_memory()
    assert available is not None
    assert 2**20 < available <= total
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 1 kB\n")
    assert folder_module._available_memory() == total
    monkeypatch.delattr(folder_module.os, "sysconf")
    assert folder_module._available_memory() is None


@pytest.mark.skipif(not CIFAR10_JPEG.exists(), reason=f"no real images: {CIFAR10_JPEG} is absent")
def test_real_jpeg_images(tmp_path):
    with tarfile.open(CIFAR10_JPEG, "r|xz") as archive:
        for member in archive:
            if member.name.endswith(("/0000.jpg", "/0001.jpg")):
                archive.extract(member, tmp_path, filter="data")
    dataset = data.load(config(tmp_path))
    assert dataset.spec == data.Spec((32, 32, 3), ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog",
                                                   "horse", "ship", "truck"))
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.labels, np.repeat(np.arange(10), 2))
        assert split.images.shape == (20, 32, 32, 3)
        assert (split.images.std(axis=(1, 2, 3)) > 10).all()
        across = np.abs(np.diff(split.images.astype(float), axis=1)).mean()
        assert across < 25  # neighbouring pixels of photographs are alike; wrong strides would make noise of them


def test_a_pipe_is_passed_over(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "b.png")
    os.mkfifo(tmp_path / "train" / "cat" / "a.png")  # opening it would wait for a writer
    assert len(data.load(DataConfig(name="folder", directory=str(tmp_path))).train.labels) == 2
