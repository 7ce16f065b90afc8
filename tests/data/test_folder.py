"""Directories of images: their layouts, classes, splits and order, and the messages for what can be wrong with them."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import load, load_split
from helpers import refusal, user_error
from PIL import Image

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import folder as folder_module
from shared_basis.data import images, listing
from shared_basis.data.examples import select
from shared_basis.errors import UserError
from shared_basis.evaluation.predict import list_images

CIFAR10_JPEG = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def pixels(seed: int, height: int = 4, width: int = 5) -> np.ndarray:
    """Returns a random RGB image uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(root: Path, *files: str) -> Path:
    """Writes images of 4×5 pixels, `pixels(0)`, `pixels(1)`, ... to `files` below `root`, and returns `root`."""
    for seed, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed)).save(root / file)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, in both of three training images and one test image of 4×5 pixels, `pixels(0)` to `pixels(7)`."""
    return write(tmp_path / "images", *(f"train/{name}/{index}.png" for name in ("cat", "dog") for index in range(3)),
                 "test/cat/0.png", "test/dog/0.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One tree: 10 ants, 20 cats and 5 dogs."""
    return write(tmp_path / "tree", *(f"{name}/{index:02}.png" for name, count in (("ant", 10), ("cat", 20), ("dog", 5))
                                      for index in range(count)))


@pytest.fixture
def scan_backwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns a function that turns the order around in which the file system lists names."""
    scan = os.scandir

    class Backwards:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            return sorted(scan(self.path), key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *_):
            return None
    return lambda: monkeypatch.setattr(folder_module.os, "scandir", Backwards)


def config(directory: Path, **fields: Any) -> DataConfig:
    return DataConfig(name="folder", directory=str(directory), **fields)


def first_image(directory: Path, **fields: Any) -> np.ndarray:
    return load_split(config(directory, **fields), "train").images[0]


def listed(source: data.Source, directory: Path) -> dict[str, list[str]]:
    """Returns the paths below `directory` of the images of each split."""
    return {split: [os.path.relpath(part.name(index), directory) for index in range(len(part))]
            for split, part in source.splits.items()}


def files_of(directory: Path, **fields: Any) -> dict[str, list[str]]:
    return listed(data.open_source(config(directory, **fields)), directory)


def labelled(split: data.Split) -> dict[bytes, int]:
    """Returns the label of each image, by its pixels."""
    return {image.tobytes(): int(label) for image, label in zip(split.images, split.labels, strict=True)}


# Order and files

def test_loads_images_and_labels(folder):
    dataset = load(config(folder))
    assert dataset.spec == data.Spec((4, 5, 3), ("cat", "dog")) == data.describe(config(folder))
    np.testing.assert_array_equal(dataset.train.images, [pixels(seed) for seed in range(6)])
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dataset.test.images, [pixels(6), pixels(7)])
    np.testing.assert_array_equal(dataset.test.labels, [0, 1])
    assert dataset.validation is None
    assert dataset.train.images.flags.c_contiguous
    assert dataset.train.labels.dtype == np.int32
    np.testing.assert_array_equal(load_split(config(folder), "test").images, dataset.test.images)


def test_a_home_directory_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert data.describe(config(Path("~/images"))).classes == ("cat", "dog")


def test_the_home_directory_of_an_unknown_user_is_told(mistake):
    assert "~nobody-of-this-name/images" in mistake(config(Path("~nobody-of-this-name/images")))


def test_a_directory_may_be_relative(folder, monkeypatch):
    monkeypatch.chdir(folder / "train")
    assert listed(data.open_source(config(Path("../../images"))), folder) == files_of(folder)
    assert len(load(config(Path(".."))).train.labels) == 6


def test_order_is_by_code_point_whatever_the_file_system_gives(folder, scan_backwards):
    names = ("a.png", "10.png", "B.png", "2.png")
    for seed, name in enumerate(names, 20):
        Image.fromarray(pixels(seed)).save(folder / "train" / "cat" / name)
    scan_backwards()
    split = load_split(config(folder), "train")
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
    images = load_split(config(folder), "train").images
    np.testing.assert_array_equal(images[:5], [pixels(seed) for seed in (0, 1, 2, 9, 10)])
    np.testing.assert_array_equal(images[5], np.full((4, 5, 3), 77))
    assert len(images) == 9


def test_a_pipe_is_passed_over(folder):
    os.mkfifo(folder / "train" / "cat" / "a.png")  # opening it would wait for a writer
    assert len(load(config(folder)).train.labels) == 6


def test_a_link_to_a_pipe_is_passed_over(folder):
    os.mkfifo(folder / "pipe")
    (folder / "train" / "cat" / "z.png").symlink_to(folder / "pipe")
    assert files_of(folder)["train"][:3] == [f"train/cat/{index}.png" for index in range(3)]
    assert "train/cat/z.png" not in files_of(folder)["train"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_need_not_be_utf_8(tmp_path, capfd):
    root = os.fsencode(write(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png"))
    os.rename(root + b"/train/cat/0.png", root + b"/train/cat/caf\xe9.png")
    for split in (b"/train", b"/test"):
        os.rename(root + split + b"/dog", root + split + b"/\xff\xfe")
    with open(root + b"/train/cat/\xe8.png", "wb"):
        pass
    skipping = config(tmp_path, on_broken="skip")
    dataset = load(skipping)
    np.testing.assert_array_equal(dataset.train.images, [pixels(0), pixels(1)])
    assert dataset.spec.classes == ("cat", os.fsdecode(b"\xff\xfe"))
    assert "warning: skipped: " in capfd.readouterr().err
    examples = pickle.loads(pickle.dumps(data.open_source(skipping).splits["train"]))  # to a worker and back
    assert os.fsencode(examples.name(0)) == root + b"/train/cat/caf\xe9.png"
    assert "1 of them broken" in data.prepare(skipping)


def test_examples_are_taken_and_sent_to_workers_with_their_paths_and_labels(folder):
    examples = data.open_source(config(folder)).splits["train"]
    taken = pickle.loads(pickle.dumps(examples.take(np.array([4, 0, 5])).take(np.array([2, 0]))))
    assert taken.read([0, 1]) == [(str(folder / "train/dog/2.png"), 1), (str(folder / "train/dog/1.png"), 1)]
    assert [len(examples), len(taken), taken.name(1)] == [6, 2, str(folder / "train/dog/1.png")]


def test_images_may_lie_deeper(tmp_path):
    write(tmp_path, "train/cat/b/2019/x.png", "train/cat/a.png", "train/cat/a/z.png", "train/cat/c.png",
          "train/dog/one/two/three/0.png", "test/cat/deep/0.png", "test/dog/0.png")
    (tmp_path / "train" / "cat" / "empty").mkdir()
    (tmp_path / "train" / "cat" / ".thumbnails").mkdir()
    shutil.copy(tmp_path / "train/cat/a.png", tmp_path / "train/cat/.thumbnails/a.png")
    assert files_of(tmp_path) == {
        "train": ["train/cat/a.png", "train/cat/a/z.png", "train/cat/b/2019/x.png", "train/cat/c.png",
                  "train/dog/one/two/three/0.png"],
        "test": ["test/cat/deep/0.png", "test/dog/0.png"]}
    assert load(config(tmp_path)).train.labels.tolist() == [0, 0, 0, 0, 1]


def test_images_beside_class_directories_are_passed_over(tmp_path):
    write(tmp_path, "cover.png", "1.png", "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    parts = files_of(tmp_path)
    assert sorted(parts["train"] + parts["test"]) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


def test_links_to_class_directories_and_files_are_followed(folder, tmp_path):
    write(tmp_path / "elsewhere", "birds/0.png", "birds/1.png")
    for split in data.SPLITS:
        (folder / split / "emu").symlink_to(tmp_path / "elsewhere" / "birds")
    (folder / "train" / "cat" / "3.png").symlink_to(tmp_path / "elsewhere" / "birds" / "1.png")
    (tmp_path / "link").symlink_to(folder)
    dataset = load(config(tmp_path / "link"))
    assert dataset.spec.classes == ("cat", "dog", "emu")
    assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    np.testing.assert_array_equal(dataset.train.images[3], pixels(1))
    assert dataset.test.labels.tolist() == [0, 1, 2, 2]


def test_links_to_directories_below_are_followed_but_not_around(folder, tmp_path, mistake):
    write(tmp_path / "elsewhere", "0.png")
    cats = folder / "train" / "cat"
    before = len(data.open_source(config(folder)).splits["train"])
    (cats / "below").symlink_to(tmp_path / "elsewhere")
    (cats / "below.png").symlink_to(tmp_path / "elsewhere")  # a directory by an image's name
    found = data.open_source(config(folder)).splits["train"]
    assert len(found) == before + 2
    assert {Path(found.name(index)).parent.name for index in range(len(found))} > {"below", "below.png"}
    assert list_images([str(cats)]) == sorted(
        found.name(index) for index in range(len(found)) if str(cats) in found.name(index))
    (cats / "deep").mkdir()
    (cats / "deep" / "around").symlink_to(cats)
    assert "around is a link to a directory that contains it" in mistake(config(folder))


@pytest.mark.parametrize(("train", "test"), [
    ("training_set", "test_set"), ("seg_train", "seg_test"), ("Train-images", "VAL.images"), ("my train", "my valid")])
@pytest.mark.parametrize("nested", [False, True])
def test_parts_of_a_data_set_are_known_by_words_in_their_names(tmp_path, train, test, nested):
    for part in (train, test):
        for name in ("cat", "train station"):
            write(tmp_path / "d" / part / (part if nested else "") / name, "0.png")
    source = data.open_source(config(tmp_path / "d"))
    assert source.spec.classes == ("cat", "train station")
    assert {name: len(part) for name, part in source.splits.items()} == {"train": 2, "test": 2}


@pytest.mark.parametrize("other", ["seg_pred", "second_train"])
def test_parts_beside_which_something_else_lies_are_refused(tmp_path, mistake, other):
    for part in ("seg_train", "seg_test", other):
        write(tmp_path / "d" / part / "cat", "0.png")
    message = mistake(config(tmp_path / "d"))
    assert "seg_test/" in message
    assert "name the splits train/ and test/" in message


def test_classes_may_have_such_words_in_their_names(tmp_path):
    for name in ("test tube", "cat"):
        write(tmp_path / "d" / name, "0.png", "1.png")
    assert data.describe(config(tmp_path / "d")).classes == ("cat", "test tube")


def test_what_is_no_image_is_counted_in_one_line(folder):
    reporter = Warnings()
    data.open_source(config(folder), reporter=reporter)
    assert reporter.lines == []
    cats = folder / "train" / "cat"
    for name in ("a.avif", "b.AVIF", "c.txt", "README"):
        (cats / name).write_bytes(b"")
    write(folder / "train", "lost.png")  # beside the classes
    for name in ("x.jfif", "y.JPE"):
        (cats / name).write_bytes(next(cats.glob("*.png")).read_bytes())
    (cats / "@eaDir").mkdir()
    write(cats / "@eaDir", "thumbnail.png")
    assert len(data.open_source(config(folder)).splits["train"]) == 8  # without the thumbnail
    data.open_source(config(folder), reporter=reporter)
    assert reporter.lines[0].startswith("5 files are not used (2 .avif, ")
    assert f"e.g. {folder / 'train' / 'lost.png'}" in reporter.lines[0]
    assert len(reporter.lines) == 1


def test_what_lies_beside_the_splits_is_counted_too(folder):
    write(folder, "lost.png")
    (folder / "labels.csv").write_bytes(b"")
    write(folder / "unlabelled" / "deep", "0.png", "1.png")
    (folder / "train" / "train").mkdir()  # as archives have it
    for name in ("cat", "dog"):
        (folder / "train" / name).rename(folder / "train" / "train" / name)
    (folder / "train" / "list.txt").write_bytes(b"")
    for known, names in ((None, ("train", "test")), (data.Spec((4, 6, 3), ("cat", "dog")), ("test",))):
        reporter = Warnings()
        source = data.open_source(config(folder), names, known, reporter=reporter)
        assert set(source.splits) == set(names)
        assert reporter.lines[0].startswith(f"5 files are not used (3 .png, 1 .csv, 1 .txt), e.g. "
                                            f"{folder / 'labels.csv'}; images end in")
        assert "; .png: outside of the splits and classes" in reporter.lines[0]
    (folder / "labels.csv").unlink()
    (folder / "train" / "list.txt").unlink()
    reporter = Warnings()
    data.open_source(config(folder), reporter=reporter)
    assert reporter.lines[0].endswith("lost.png; .png: outside of the splits and classes")  # the suffix is not why


def test_photographs_of_phones_are_counted_with_what_reads_them(folder, monkeypatch, mistake, tmp_path):
    advice = "pip install 'shared-basis[heic]'"
    monkeypatch.setattr(listing, "SUFFIXES", tuple(each for each in listing.SUFFIXES if not each.startswith(".he")))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    cats = folder / "train" / "cat"
    (cats / "a.HEIC").write_bytes(b"")
    reporter = Warnings()
    data.open_source(config(folder), reporter=reporter)
    assert reporter.lines[0].startswith(f"1 file is not used (1 .heic), e.g. {cats / 'a.HEIC'}; images end in ")
    assert reporter.lines[0].endswith(f"; .heic: {advice} reads these, or convert them to JPEG")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_bytes(b"")
    with user_error("no images in this directory", advice):
        list_images([str(tmp_path / "phone")])
    for path in cats.glob("*.png"):
        path.unlink()
    assert advice in mistake(config(folder))
    (cats / "b.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")  # by the name of another kind
    assert advice in mistake(config(folder))


def test_photographs_of_phones_are_read(folder):
    heif = pytest.importorskip("pillow_heif", exc_type=ImportError)
    before = len(data.open_source(config(folder)).splits["train"])
    shown = np.zeros((40, 60, 3), np.uint8)
    shown[:, 30:, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a telephone held upright: stored sideways
    path = folder / "train" / "cat" / "IMG_1.HEIC"
    heif.from_pillow(Image.fromarray(np.rot90(shown).copy())).save(path, quality=-1, exif=exif.tobytes())
    assert len(data.open_source(config(folder)).splits["train"]) == before + 1
    assert images.size_of(str(path)) == (40, 60)
    found = images.decode(str(path), 3).astype(int)
    assert abs(found - shown).max() < 12
    renamed = path.rename(path.with_suffix(".jpg"))
    assert images.size_of(renamed.read_bytes()) == (40, 60)


def test_predict_counts_the_other_files_of_a_directory(folder):
    (folder / "train" / "cat" / "notes.txt").write_bytes(b"")
    told = []
    assert len(list_images([str(folder / "train"), str(folder / "test")], told.append)) == 8
    assert told == [f"1 file is not used (1 .txt), e.g. {folder / 'train' / 'cat' / 'notes.txt'}; images end in "
                    f"{', '.join(listing.SUFFIXES)}"]


class Warnings:
    """Keeps what a reporter is told."""

    def __init__(self):
        self.lines = []

    def warn(self, text):
        """Keeps a line."""
        self.lines.append(text)


def test_names_of_classes_are_compared_in_one_unicode_form(tmp_path):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        for name in ("café", "cat"):
            write(tmp_path / "d" / part / unicodedata.normalize(form, name), "0.png")
    assert data.describe(config(tmp_path / "d")).classes == ("café", "cat")


def test_a_link_to_itself_is_told(folder, mistake):
    path = folder / "train" / "cat" / "loop.png"
    path.symlink_to(path)
    assert f"{path} cannot be decoded" in mistake(config(folder))


def test_directories_that_are_links_to_nowhere_or_themselves_are_passed_over(folder):
    (folder / "train" / "nowhere").symlink_to(folder / "nowhere")
    assert data.describe(config(folder)).classes == ("cat", "dog")
    (folder / "train" / "loop").symlink_to(folder / "train" / "loop")
    assert data.describe(config(folder)).classes == ("cat", "dog")


# Splits

@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_images_are_the_test_images_where_there_are_no_others(folder, name):
    before = load(config(folder))
    (folder / "test").rename(folder / name)
    after = load(config(folder))
    assert after.spec == before.spec
    assert after.validation is None
    np.testing.assert_array_equal(after.test.images, before.test.images)
    np.testing.assert_array_equal(load_split(config(folder), "test").images, before.test.images)


@pytest.mark.parametrize("name", ["valid"])
def test_with_test_images_validation_images_are_a_split_of_their_own(folder, name):
    before = load(config(folder))
    for seed, label in ((30, "cat"), (31, "dog")):
        path = folder / name / label / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels(seed)).save(path)
    dataset = load(config(folder))
    np.testing.assert_array_equal(dataset.validation.images, [pixels(30), pixels(31)])
    np.testing.assert_array_equal(dataset.validation.labels, [0, 1])
    for split in data.SPLITS:
        np.testing.assert_array_equal(getattr(dataset, split).images, getattr(before, split).images)
    assert data.open_source(config(folder), ("test",)).splits.keys() == {"test"}
    assert data.open_source(config(folder), ("train",)).splits.keys() == {"train", "validation"}
    assert "6 train, 2 test, 2 validation images" in data.prepare(config(folder))
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"1 image in .* cannot be decoded"):
        data.prepare(config(folder))


def test_a_single_tree_is_split_class_by_class(tree):
    parts = files_of(tree)
    everything = sorted(os.path.relpath(path, tree) for path in tree.glob("*/*"))
    assert sorted(parts["train"] + parts["test"]) == everything
    assert not set(parts["train"]) & set(parts["test"])
    for split, counts in (("train", [8, 16, 4]), ("test", [2, 4, 1])):
        assert parts[split] == sorted(parts[split])
        assert [sum(path.startswith(name) for path in parts[split]) for name in ("ant", "cat", "dog")] == counts
        labels = load_split(config(tree), split).labels
        np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], counts))
    # Where this changes, runs of older versions are tested on images that they were trained on.
    assert parts["test"] == ["ant/04.png", "ant/06.png", "cat/00.png", "cat/10.png", "cat/13.png", "cat/15.png",
                             "dog/04.png"]


@pytest.mark.parametrize(("test", "counts"), [(0.01, [1, 1, 1]), (0.1, [1, 2, 1]), (0.5, [5, 10, 2]),
                                              (1.0, [10, 20, 5])])
def test_the_test_part_of_a_single_tree_has_the_configured_size(tree, test, counts):
    source = data.open_source(config(tree, test=test))
    labels = [label for _, label in source.splits["test"].read(range(len(source.splits["test"])))]
    assert np.bincount(labels).tolist() == counts  # at least one, and halves rounded to even
    assert len(source.splits["train"]) == 35 - sum(counts)


def test_a_single_tree_is_split_by_the_seed_of_the_split_alone(tree, scan_backwards):
    parts = files_of(tree)
    assert files_of(tree, image_size=9, crop="random_resized") == parts
    assert files_of(tree, split_seed=1)["test"] != parts["test"]
    assert len({tuple(files_of(tree, split_seed=seed)["test"]) for seed in range(10)}) == 10
    scan_backwards()
    assert files_of(tree) == parts


def test_the_splits_of_a_single_tree_are_parts_of_each_other_as_the_test_part_grows(tree):
    smaller, larger = (set(files_of(tree, test=test)["test"]) for test in (0.2, 0.4))
    assert smaller < larger


def test_one_split_of_a_single_tree_is_what_both_together_have(tree):
    parts = files_of(tree)
    for split in data.SPLITS:
        assert listed(data.open_source(config(tree), (split,)), tree) == {split: parts[split]}


def test_every_class_of_a_single_tree_keeps_a_training_image(tmp_path, mistake):
    write(tmp_path, "ant/0.png", "ant/1.png", "cat/0.png", "cat/1.png")
    assert len(files_of(tmp_path, test=0.8)["train"]) == 2
    write(tmp_path, "dog/0.png")
    assert "dog" in mistake(config(tmp_path))


# Flat directories

def test_without_directories_the_class_is_the_file_name_up_to_its_number(tmp_path):
    write(tmp_path, "train/cat.0.jpg", "train/cat.10.jpg", "train/cat.2.jpg", "train/dog.1.jpg", "test/cat.3.jpg",
          "test/dog.0.jpg", "test/dog.4.jpg")
    assert files_of(tmp_path) == {
        "train": ["train/cat.0.jpg", "train/cat.10.jpg", "train/cat.2.jpg", "train/dog.1.jpg"],
        "test": ["test/cat.3.jpg", "test/dog.0.jpg", "test/dog.4.jpg"]}
    dataset = load(config(tmp_path))
    assert dataset.spec.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1]
    assert dataset.test.labels.tolist() == [0, 1, 1]


def test_a_flat_single_tree_is_split_class_by_class(tmp_path):
    write(tmp_path, *(f"{name}_{index}.png" for name in ("dog", "cat") for index in range(10)))
    (tmp_path / "list.txt").write_text("not an image")
    parts = files_of(tmp_path)
    assert [len(parts["train"]), len(parts["test"])] == [16, 4]
    assert [path[:3] for path in parts["test"]] == ["cat", "cat", "dog", "dog"]
    assert len(set(parts["train"] + parts["test"])) == 20
    drawn = [files_of(tmp_path, split_seed=seed)["test"] for seed in range(5)]
    numbers = [[path[4:] for path in paths] for paths in drawn]
    assert [part[:2] for part in numbers] != [part[2:] for part in numbers]  # each class is drawn by itself


def test_classes_of_a_flat_directory_are_sorted_whatever_follows_them(tmp_path):
    write(tmp_path, "train/a_1.png", "train/aB1.png", "test/a_1.png", "test/aB1.png")  # aB1 comes before a_1
    assert files_of(tmp_path)["train"] == ["train/a_1.png", "train/aB1.png"]
    assert data.describe(config(tmp_path)).classes == ("a", "aB")


@pytest.mark.parametrize(("file", "name"), [
    ("cat.0.png", "cat"), ("cat (12).png", "cat"), ("Abyssinian_100.png", "Abyssinian"), ("cat-7.png", "cat"),
    ("cat12.png", "cat"), ("great_pyrenees_3.png", "great_pyrenees"), ("n02085620_7.PNG", "n02085620"),
    ("cat 1.5.png", "cat 1"), ("cat_1_.png", "cat"), ("Großer Hund 3.png", "Großer Hund"), ("猫 3.png", "猫")])
def test_a_class_and_a_number_make_a_file_name(tmp_path, file, name):
    write(tmp_path, file, "zebra.1.png")
    assert set(data.describe(config(tmp_path, test=1.0)).classes) == {name, "zebra"}


@pytest.mark.parametrize("file", ["cat.png", "cat_1_a.png", "0001.png", "(3).png", "_1.png"])
def test_a_file_name_that_is_not_a_class_and_a_number_is_named(tmp_path, mistake, file):
    write(tmp_path, "cat.0.png", "dog.0.png", file)
    message = mistake(config(tmp_path))
    assert repr(file) in message
    assert f"{tmp_path} holds no class directories" in message
    assert "cat.12.jpg" in message


# Classes

KNOWN = data.Spec((4, 5, 3), ("ant", "cat", "dog"))


def evaluated(directory: Path, known: data.Spec = KNOWN, **fields: Any) -> data.Source:
    """Opens `directory` as a run of the classes `known` does that is evaluated there."""
    return data.open_source(config(directory, **fields), ("test",), known)


def test_evaluation_needs_the_test_images_alone_and_labels_them_by_the_classes_of_the_run(folder):
    shutil.rmtree(folder / "train")
    source = evaluated(folder)
    assert source.spec == KNOWN
    assert listed(source, folder) == {"test": ["test/cat/0.png", "test/dog/0.png"]}
    assert [label for _, label in source.splits["test"].read([0, 1])] == [1, 2]
    (folder / "test").rename(folder / "valid")
    assert [label for _, label in evaluated(folder).splits["test"].read([0, 1])] == [1, 2]
    reordered = data.Spec((4, 5, 3), ("dog", "cat"))
    assert [label for _, label in evaluated(folder, reordered).splits["test"].read([0, 1])] == [1, 0]


def test_evaluation_may_lack_all_classes_but_one(folder):
    shutil.rmtree(folder / "test" / "cat")
    assert [label for _, label in evaluated(folder).splits["test"].read([0])] == [2]


def test_evaluation_on_a_single_tree_or_a_flat_one_takes_its_test_part(tree, tmp_path):
    trained = data.open_source(config(tree))
    assert listed(evaluated(tree), tree)["test"] == listed(trained, tree)["test"]
    assert len(evaluated(tree, test=1.0).splits["test"]) == 35
    shutil.rmtree(tree / "ant")  # what is absent does not show in the others
    assert listed(evaluated(tree), tree)["test"] == listed(trained, tree)["test"][2:]
    flat = write(tmp_path / "flat", "dog.0.png", "dog.1.png", "cat.0.png")
    assert [label for _, label in evaluated(flat, test=1.0).splits["test"].read(range(3))] == [1, 2, 2]


def test_evaluation_refuses_classes_that_the_run_does_not_know(folder, mistake):
    shutil.copytree(folder / "test" / "cat", folder / "test" / "emu")
    message = mistake(config(folder), lambda _: evaluated(folder))
    assert "'emu' is not one of ant, cat, dog." in message
    assert str(folder) in message
    many = data.Spec((4, 5, 3), tuple(f"n{index:04}" for index in range(1000)))
    assert mistake(config(folder), lambda _: evaluated(folder, many)).endswith("n0008, n0009, ….")


def test_evaluation_takes_the_size_of_the_run(folder, mistake):
    for file in (folder / "test").glob("*/*"):
        Image.fromarray(pixels(0, 6, 6)).save(file)
    source = evaluated(folder, data.Spec((6, 6, 3), KNOWN.classes))
    assert source.spec.image_shape == (6, 6, 3)
    assert evaluated(folder, data.Spec((9, 9, 3), KNOWN.classes), image_size=9).spec.image_shape == (9, 9, 3)
    message = mistake(config(folder), lambda _: evaluated(folder, image_size=9))
    assert "other image shape than those that the run was trained on" in message


@pytest.mark.parametrize(("changed", "other"), [("train", "test"), ("test", "train"), ("train", "val"),
                                                ("val", "train")])
def test_a_class_that_is_in_one_split_only_is_named(folder, mistake, changed, other):
    if "val" in (changed, other):
        shutil.copytree(folder / "test", folder / "val")
    shutil.copytree(folder / changed / "cat", folder / changed / "emu")
    if "test" not in (changed, other) and changed == "train":
        shutil.copytree(folder / "train" / "emu", folder / "test" / "emu")
    message = mistake(config(folder))
    assert f"class 'emu' is in {folder / changed} but not in {folder / other}" in message


def test_a_class_of_one_image_is_scored_but_not_trained_on(tmp_path, mistake):
    """Only for scoring, all images may be test images."""
    root = write(tmp_path / "images", "cat/0.png", "dog/0.png", "dog/1.png")
    message = mistake(config(root))
    assert "class 'cat' has one image" in message
    assert "data.test=" not in message
    known = data.Spec((4, 5, 3), ("cat", "dog"))
    assert "--config.data.test=1.0" in refusal(data.open_source, config(root), ("test",), known)
    assert len(data.open_source(config(root, test=1.0), ("test",), known).splits["test"]) == 3


@pytest.mark.parametrize("name", ["0.png", "IMG_0.png"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_test_images_without_labels_are_told_with_the_folder_to_divide(tmp_path, mistake, split, name):
    """The usual layout of a competition."""
    root = write(tmp_path / "images", f"{split}/{name}", *(f"train/{label}/{index}.png" for label in ("cat", "dog")
                                                           for index in range(3)))
    message = mistake(config(root))
    assert f"{root / split} holds" in message
    assert "is itself a class" not in message
    assert f"hold out training images for testing, give --images={root / 'train'}." in message
    assert [len(files) for files in files_of(root / "train").values()] == [4, 2]


def test_training_images_without_labels_are_told_without_one(tmp_path, mistake):
    root = write(tmp_path / "images", "train/0.png", "test/cat/0.png", "test/dog/0.png")
    assert "--images" not in mistake(config(root))


def test_one_class_is_too_few(folder, tmp_path, mistake):
    for name in data.SPLITS:
        shutil.rmtree(folder / name / "dog")
    message = mistake(config(folder))
    assert f"{folder / 'train'} holds 1 class, 'cat'; at least 2" in message
    assert "train/<class>/*" in message
    assert "is itself a class" not in message
    photos = write(tmp_path / "photos", "dog/IMG_1.png", "cat/IMG_1.png", "cat/IMG_2.png")
    assert ("holds 1 class, 'IMG'; at least 2 classes are needed. If cat is itself a class, like cat, dog, give "
            f"{photos}. ") in mistake(config(photos / "cat"))
    flat = write(tmp_path / "flat", "cat.0.png", "cat.1.png")
    assert "'cat'; at least 2 classes are needed" in mistake(config(flat))
    (tmp_path / "empty").mkdir()
    assert "at least 2 classes are needed" in mistake(config(tmp_path / "empty"))


@pytest.mark.parametrize("name", data.SPLITS)
def test_a_class_without_images_is_named(folder, mistake, name):
    for file in (folder / name / "dog").iterdir():
        file.rename(file.with_suffix(".svg"))
    message = mistake(config(folder))
    assert f"{folder / name / 'dog'} holds no image" in message
    assert ".jpg" in message


@pytest.mark.parametrize("read", [data.describe, load])
def test_missing_directories_are_named(folder, mistake, read):
    message = mistake(config(folder / "nowhere"), read)
    assert f"{folder / 'nowhere'} cannot be found" in message
    assert "train/<class>/*" in message
    message = mistake(config(folder / "train" / "cat" / "0.png"), read)
    assert "is not a directory" in message


@pytest.mark.parametrize(("missing", "left"), [("test", "train"), ("train", "test")])
def test_one_split_without_the_other_is_not_a_class(folder, mistake, missing, left):
    shutil.rmtree(folder / missing)
    message = mistake(config(folder))
    assert f"{folder} holds {left}/ but no {missing}/" in message
    assert f"or pass {folder / left} itself" in message


def test_a_misspelt_split_is_not_a_class(folder, mistake):
    (folder / "test").rename(folder / "tset")
    assert f"{folder} holds train/ but no test/ or val/" in mistake(config(folder))


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "Val")])
def test_splits_may_have_other_usual_names(folder, train, test):
    before = load(config(folder))
    (folder / "train").rename(folder / train)
    (folder / "test").rename(folder / test)
    after = load(config(folder))
    np.testing.assert_array_equal(after.train.images, before.train.images)
    np.testing.assert_array_equal(after.test.images, before.test.images)


def test_a_class_may_be_named_train(tmp_path):
    write(tmp_path, *(f"{name}/{index}.png" for name in ("bus", "car", "train") for index in range(3)))
    assert data.describe(config(tmp_path)).classes == ("bus", "car", "train")


# From files to pixels

def encode(kind: str, image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_of_all_kinds_become_rgb_side_by_side(folder):  # one by one: test_images.py
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    colour, grey = Image.fromarray(pixels(11)), Image.fromarray(pixels(11)[..., 0])
    clear = Image.fromarray(np.dstack([pixels(12), np.zeros((4, 5), np.uint8)]))
    red = Image.new("RGB", (5, 4), (255, 55, 0))
    cats = {
        "0.png": (encode("PNG", colour), pixels(11)),
        "1.png": (encode("PNG", grey), pixels(11)[..., :1]),
        "2.png": (encode("PNG", clear), 255),
        "3.png": (encode("PNG", Image.fromarray(pixels(11)[..., 0].astype(np.uint16) * 257)), pixels(11)[..., :1]),
        "4.png": (encode("PNG", red.quantize(4)), (255, 55, 0)),
        "5.webp": (encode("WEBP", clear, lossless=True), 255),
        "6.webp": (encode("WEBP", Image.fromarray(np.rot90(pixels(13)).copy()), lossless=True, exif=exif), pixels(13)),
        "7.bmp": (encode("BMP", grey), pixels(11)[..., :1]),
        "8.jpg": (encode("JPEG", Image.new("L", (5, 4), 77)), 77),
        "9.jpg": (encode("JPEG", Image.new("CMYK", (5, 4), (0, 200, 255, 0)), quality=100), (255, 55, 0)),
    }
    for name, (body, _) in cats.items():
        (folder / "train" / "cat" / name).write_bytes(body)
    images = load_split(config(folder), "train").images[:len(cats)]
    for image, (name, (_, expected)) in zip(images, cats.items(), strict=True):
        np.testing.assert_allclose(image.astype(int), np.broadcast_to(expected, (4, 5, 3)), atol=1, err_msg=name)


def test_images_are_scaled_and_their_centre_cut_out(folder):
    image = Image.fromarray(pixels(14, 8, 16))
    image.save(folder / "train" / "cat" / "0.png")
    expected = np.asarray(image.resize((8, 4), Image.Resampling.BILINEAR))[:, 2:6]
    assert data.describe(config(folder, image_size=4)).image_shape == (4, 4, 3)
    np.testing.assert_allclose(first_image(folder, image_size=4).astype(int), expected, atol=1)  # rounding


def test_images_in_memory_that_are_cropped_at_random_in_training_are_cut_as_test_images(folder):
    image = Image.fromarray(pixels(14, 64, 96))
    image.save(folder / "train" / "cat" / "0.png")
    scaled = np.asarray(image.resize((48, 32), Image.Resampling.BILINEAR))
    expected = scaled[2:30, 10:38]  # 28 of 32 pixels
    first = first_image(folder, image_size=28, crop="random_resized")
    np.testing.assert_allclose(first.astype(int), expected, atol=1)


def test_small_and_large_jpeg_files_are_brought_to_one_size(folder):
    large = np.zeros((400, 1200, 3), np.uint8)
    large[:, :600] = 220
    Image.fromarray(large).save(folder / "train" / "cat" / "0.jpg")
    (folder / "train" / "cat" / "0.png").unlink()
    split = load_split(config(folder, image_size=16), "train")
    assert split.images.shape == (6, 16, 16, 3)
    assert split.images[0, :, :7].min() > 210
    assert split.images[0, :, 9:].max() < 10


def test_only_the_chosen_images_are_opened(folder):
    for name in ("cat", "dog"):
        for index in range(3, 20):
            Image.fromarray(pixels(index)).save(folder / "train" / name / f"{index:02}.png")
    limited = config(folder, train_examples=5)
    whole = load_split(config(folder), "train")
    rows = np.sort(np.random.default_rng(0).permutation(40)[:5])
    paths = sorted((folder / "train").glob("*/*"))
    assert len(select(limited, data.open_source(config(folder)).splits)["train"]) == 5
    for index in set(range(1, 40)) - set(rows):  # the first image sets the size
        paths[index].write_bytes(b"broken")
    split = load_split(limited, "train")
    np.testing.assert_array_equal(split.images, whole.images[rows])
    np.testing.assert_array_equal(split.labels, whole.labels[rows])


def test_more_images_than_exist(folder, mistake):
    assert "only 6 train images exist" in mistake(config(folder, train_examples=7))
    assert "only 2 test images exist" in mistake(config(folder, test_examples=3))


def test_different_sizes_are_refused_with_the_way_out(folder, mistake):
    path = folder / "train" / "dog" / "1.png"
    Image.fromarray(pixels(0, 7, 6)).save(path)
    for read in (load, data.prepare):
        message = mistake(config(folder), read)
        assert f"{path} has 7×6 pixels" in message
        assert "the first training image has 4×5" in message
        assert "--config.data.image_size" in message
    assert load(config(folder, image_size=4)).train.images.shape == (6, 4, 4, 3)


def test_the_size_of_the_training_images_holds_for_the_test_images_too(folder, mistake):
    for file in (folder / "test").glob("*/*"):
        Image.fromarray(pixels(0, 6, 6)).save(file)
    message = mistake(config(folder), lambda value: load_split(value, "test"))
    assert f"{folder / 'test' / 'cat' / '0.png'} has 6×6" in message


# Held-out validation images

@pytest.mark.parametrize("layout", ["folder", "tree"])
def test_a_part_of_the_training_images_is_held_out(request, layout):
    root = request.getfixturevalue(layout)
    whole, held = files_of(root), files_of(root, validation=0.25)
    assert len(held["validation"]) == round(len(whole["train"]) * 0.25)
    assert sorted(held["train"] + held["validation"]) == whole["train"]
    assert held["train"] == sorted(held["train"])
    assert held["validation"] == sorted(held["validation"])
    assert held["test"] == whole["test"]
    dataset = load(config(root, validation=0.25))
    everything = labelled(load(config(root)).train)
    assert everything == {**labelled(dataset.validation), **labelled(dataset.train)}


def test_what_is_held_out_depends_on_the_seed_of_the_split_alone(folder):
    write(folder / "train" / "cat", *(f"more{index}.png" for index in range(40)))
    held = files_of(folder, validation=0.2)["validation"]
    for fields in ({"train_examples": 3}, {"test_examples": 1}, {"image_size": 8, "crop": "random_resized"}):
        parts = files_of(folder, validation=0.2, **fields)
        assert parts["validation"] == held
        assert not set(parts["train"]) & set(held)
    assert files_of(folder, validation=0.2, split_seed=1)["validation"] != held
    assert len(files_of(folder, validation=0.2, train_examples=3)["train"]) == 3


def test_nothing_is_held_out_where_there_are_validation_images_already(folder, mistake):
    shutil.copytree(folder / "test", folder / "val")
    message = mistake(config(folder, validation=0.5))
    assert "data.validation=0.5" in message
    assert "validation images of its own" in message
    assert len(load_split(config(folder, validation=0.5), "test").labels) == 2
    shutil.rmtree(folder / "test")
    assert len(load(config(folder, validation=0.5)).validation.labels) == 3  # val/ is the test part now


@pytest.mark.parametrize(("part", "count"), [(0.05, 0), (0.95, 6)])
def test_a_part_that_is_nothing_or_everything_is_refused(folder, mistake, part, count):
    assert f"data.validation={part}: that is {count} of 6 training images" in mistake(config(folder, validation=part))


# Broken images

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
    (lambda path: Image.fromarray(pixels(0)).save(path, format="PPM"), "is not an image"),
    (_truncated, "truncated"),
    (_broken_png, "cannot be decoded"),
    (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
], ids=["empty", "text", "other format", "truncated", "damaged", "dangling link"])
@pytest.mark.parametrize("image_size", [8])
def test_a_broken_image_is_named_or_skipped_with_a_warning(folder, mistake, capsys, spoil, reason, image_size):
    before = load(config(folder, image_size=image_size))
    path = folder / "test" / "dog" / "1.jpg"
    spoil(path)
    message = mistake(config(folder, image_size=image_size))
    assert str(path) in message
    assert reason in message
    assert "--config.data.on_broken=skip" in message
    assert capsys.readouterr().err == ""
    after = load(config(folder, image_size=image_size, on_broken="skip"))
    np.testing.assert_array_equal(after.test.images, before.test.images)
    np.testing.assert_array_equal(after.test.labels, before.test.labels)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: skipped: {path} ")
    assert reason in warning


def test_a_broken_first_image_is_named_or_skipped(folder, mistake, capsys):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(b"")
    for read in (data.describe, load):
        message = mistake(config(folder), read)
        assert str(path) in message
        assert "--config.data.on_broken=skip" in message
    assert data.describe(config(folder, image_size=8)).image_shape == (8, 8, 3)
    skipping = config(folder, on_broken="skip")
    assert data.describe(skipping).image_shape == (4, 5, 3)
    assert capsys.readouterr().err == ""
    dataset = load(skipping)
    np.testing.assert_array_equal(dataset.train.images, [pixels(seed) for seed in range(1, 6)])
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert capsys.readouterr().err.count(str(path)) == 1


def test_images_all_of_which_are_broken_are_told(folder, mistake):
    for path in folder.glob("*/*/*"):
        path.write_bytes(b"")
    assert "no image there can be decoded" in mistake(config(folder, on_broken="skip"), data.describe)


@pytest.mark.parametrize("image_size", [0, 8])
def test_preparing_finds_all_broken_images(folder, mistake, capsys, image_size):
    sound = data.prepare(config(folder, image_size=image_size))
    assert sound == f"{folder}: 6 train, 2 test images of 2 classes, all of which can be decoded"
    broken = [folder / "train" / "cat" / "1.png", folder / "train" / "dog" / "2.png", folder / "test" / "dog" / "0.png"]
    for path in broken:
        path.write_bytes(b"")
    message = mistake(config(folder, image_size=image_size), data.prepare)
    assert f"3 images in {folder} cannot be decoded" in message
    assert "--config.data.on_broken=skip" in message
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(warning.split()[2] for warning in warnings) == sorted(map(str, broken))
    text = data.prepare(config(folder, image_size=image_size, on_broken="skip", crop="center"))
    assert "6 train, 2 test images of 2 classes, 3 of them broken" in text
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_preparing_goes_on_behind_a_broken_first_image(folder, mistake, capsys):
    broken = [folder / "train" / "cat" / "0.png", folder / "test" / "dog" / "0.png"]
    for path in broken:
        path.write_bytes(b"")
    told = mistake(config(folder), data.prepare) + capsys.readouterr().err
    assert all(str(path) in told for path in broken)


def test_preparing_checks_every_image_whatever_subset_is_configured(folder, mistake):
    (folder / "train" / "dog" / "1.png").write_bytes(b"")
    assert "1 image in" in mistake(config(folder, train_examples=1, validation=0.5), data.prepare)


@pytest.mark.parametrize("read", [data.describe, load])
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


def test_unreadable_directories_and_files_are_named(folder, mistake, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "scandir", denied)
        message = mistake(config(folder))
    assert str(folder) in message
    assert "Permission denied" in message
    monkeypatch.setattr(Path, "read_bytes", denied)
    message = mistake(config(folder))
    assert str(folder / "train" / "cat" / "0.png") in message
    assert "Permission denied" in message


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_JPEG.exists(), reason=f"no real images: {CIFAR10_JPEG} is absent")
def test_real_jpeg_images(tmp_path):
    with tarfile.open(CIFAR10_JPEG, "r|xz") as archive:
        for member in archive:
            if member.name.endswith(("/0000.jpg", "/0001.jpg")):
                archive.extract(member, tmp_path, filter="data")
    dataset = load(config(tmp_path))
    assert dataset.spec == data.Spec((32, 32, 3), ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog",
                                                   "horse", "ship", "truck"))
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.labels, np.repeat(np.arange(10), 2))
        assert split.images.shape == (20, 32, 32, 3)
        assert (split.images.std(axis=(1, 2, 3)) > 10).all()
        across = np.abs(np.diff(split.images.astype(float), axis=1)).mean()
        assert across < 25  # neighbouring pixels of photographs are alike; wrong strides would make noise of them


# What tells a folder from another

def test_a_folder_is_known_wherever_it_lies_by_the_names_and_sizes_of_its_files(tree: Path, folder: Path) -> None:
    def known(directory: Path, **fields: Any) -> str | None:
        return data.fingerprint(data.open_source(config(directory, **fields)).splits)
    before = known(tree)
    assert before != known(tree, split_seed=1)
    moved = tree.rename(tree.with_name("moved"))
    assert known(moved) == before
    (moved / "dog" / "02.png").write_bytes(b"another")
    assert known(moved) != before
    (moved / "dog" / "02.png").rename(moved / "dog" / "05.png")
    assert known(moved) != before
    assert data.fingerprint(data.open_source(DataConfig()).splits) is None
    os.symlink("nowhere", folder / "train" / "cat" / "9.png")
    assert known(folder) is not None


# Validation images that a folder holds out by itself

def parts(directory: Path, **fields: Any) -> dict[str, list[str]]:
    """Returns by split the paths of its images."""
    source = data.open_source(config(directory, validation=-1.0, **fields))
    return {name: [os.path.relpath(examples.name(index), directory) for index in range(len(examples))]
            for name, examples in source.splits.items()}


def test_a_folder_holds_out_a_tenth_of_each_class_and_at_least_one_image(tree: Path) -> None:
    found = parts(tree)
    held = [Path(path).parts[0] for path in found["validation"]]
    assert held == ["ant", "cat", "cat", "dog"]  # of 8, 16 and 4 training images
    assert len(found["test"]) == 7
    everything = sorted(path for paths in found.values() for path in paths)
    assert everything == sorted(str(path.relative_to(tree)) for path in tree.rglob("*.png"))
    assert parts(tree) == found
    assert parts(tree, split_seed=1)["validation"] != found["validation"]
    assert "validation" not in data.open_source(config(tree)).splits


def test_a_folder_with_validation_images_of_its_own_holds_out_none(tmp_path: Path) -> None:
    own = write(tmp_path / "own", *(f"{split}/{name}/{index}.png" for split in ("train", "val", "test")
                                    for name in ("a", "b") for index in range(3)))
    found = parts(own)
    assert {name: len(paths) for name, paths in found.items()} == {"train": 6, "validation": 6, "test": 6}
    assert all(path.startswith("val/") for path in found["validation"])


def test_a_class_of_one_image_keeps_it(tmp_path: Path) -> None:
    found = parts(write(tmp_path / "few", "train/a/0.png", "train/b/0.png", "train/b/1.png", "test/a/0.png",
                        "test/b/0.png"))
    assert [len(found[name]) for name in ("train", "validation")] == [2, 1]
    assert Path(found["validation"][0]).parts[1] == "b"
    single = parts(write(tmp_path / "single", "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"))
    assert set(single) == {"train", "test"}


def test_only_folders_decide_on_their_validation_images() -> None:
    with pytest.raises(UserError, match=r"data\.validation=-1\.0: must be .* -1 when data\.name='folder'"):
        DataConfig(validation=-1.0)
    with pytest.raises(UserError, match=r"data\.validation=-0\.5"):
        config(Path("x"), validation=-0.5)


@pytest.mark.parametrize("directory", [".", "./", "..//images", "../images/."])
def test_a_folder_may_be_given_from_within(folder: Path, monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    monkeypatch.chdir(folder)
    train = load(DataConfig(name="folder", directory=directory)).train
    np.testing.assert_array_equal(train.images[0], pixels(0))
