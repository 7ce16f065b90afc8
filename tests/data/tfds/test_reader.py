"""Reading what TFDS holds prepared: the sets with builders of our own, and any other by its metadata alone."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_fakes
from data_helpers import load, load_split
from PIL import Image
from tfds_fakes import CLASSES, FEATURES, NAMES, encoded, pets, picture, run_python, write

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import Spec, in_memory
from shared_basis.data.batches import EvalBatches, Shard, TrainingBatches
from shared_basis.data.examples import Examples
from shared_basis.data.tfds import builders
from shared_basis.errors import UserError

LABEL = FEATURES["label"]


def pets_config(directory: Path | str, name: str = "pets_fake", **fields: Any) -> DataConfig:
    return DataConfig(name=f"tfds:{name}", directory=str(directory), **{"image_size": 8, **fields})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data directory with `pets_fake`: 20 training images in three files, four to test on. To be read alone."""
    directory = tmp_path_factory.mktemp("stored")
    write(directory, {"train": pets(20), "test": pets(4, seed=100)}, shards=3)
    return str(directory)


def bodies(examples: Examples) -> list[bytes]:
    return [body for body, _ in examples.read(range(len(examples)))]


# The sets with builders of our own.

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


def test_imagenet_is_described_by_the_size_asked_for_and_the_classes_of_tfds(tmp_path, mistake):
    features = tfds.builder("imagenet2012", data_dir=tmp_path).info.features
    spec = data.describe(DataConfig(name="imagenet2012", image_size=224))
    assert spec == Spec((224, 224, 3), tuple(features["label"].names))
    assert len(spec.classes) == 1000
    message = mistake(DataConfig(name="imagenet2012"), data.describe)
    for part in ("data.image_size=0", "'imagenet2012' differ in size", "224", "--config.data.crop=random_resized"):
        assert part in message


def test_prepared_data_needs_no_sources_and_subsets_are_chosen(prepared):
    config, _ = prepared
    whole = load(config)
    subset = load(DataConfig(name="cifar10", directory=config.directory, train_examples=6, test_examples=2))
    rows = np.sort(np.random.default_rng(0).permutation(25)[:6])
    np.testing.assert_array_equal(subset.train.images, whole.train.images[rows])
    np.testing.assert_array_equal(subset.train.labels, whole.train.labels[rows])
    assert len(subset.test.labels) == 2


def test_reading_in_several_blocks_changes_nothing(prepared, monkeypatch):
    config, _ = prepared
    whole = load(config).train
    monkeypatch.setattr(in_memory, "BLOCK", 4)
    again = load(config).train
    np.testing.assert_array_equal(again.images, whole.images)
    np.testing.assert_array_equal(again.labels, whole.labels)


def test_more_images_than_exist(prepared, mistake):
    message = mistake(DataConfig(name="cifar10", directory=prepared[0].directory, train_examples=26))
    assert "only 25 train images exist" in message


def test_validation_images_are_held_out(prepared):
    config, _ = prepared
    whole = load(config)
    parts = load(dataclasses.replace(config, validation=0.2))
    assert parts.validation is not None
    assert (len(parts.train.labels), len(parts.validation.labels), len(parts.test.labels)) == (20, 5, 7)
    seen = [image.tobytes() for part in (parts.train, parts.validation) for image in part.images]
    assert sorted(seen) == sorted(image.tobytes() for image in whole.train.images)


def test_a_set_with_a_builder_of_our_own_can_also_be_named_with_a_prefix(prepared):
    config, _ = prepared
    plain = load(config)
    for name in ("tfds:cifar10", "tfds:cifar10:3.0.2"):
        prefixed = dataclasses.replace(config, name=name)
        assert data.describe(prefixed) == plain.spec
        other = load(prefixed)
        assert other.spec == plain.spec
        for split in data.SPLITS:
            np.testing.assert_array_equal(getattr(other, split).images, getattr(plain, split).images)
            np.testing.assert_array_equal(getattr(other, split).labels, getattr(plain, split).labels)


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


@pytest.mark.parametrize("prefix", ["", "tfds:"])
def test_prepared_data_of_other_classes_is_refused(put, mistake, prefix):
    config = put("cifar10", tfds_fakes.cifar10_files(tuple("abcdefghij")))
    assert "its classes are a, b, c" in mistake(dataclasses.replace(config, name=f"{prefix}cifar10"))


def test_data_that_only_tensorflow_reads_is_not_to_be_deleted(prepared, mistake):
    config, directory = prepared
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for file in directory.glob("*array_record*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    message = mistake(config)
    assert "only TensorFlow reads" in message
    assert "delete" not in message


def test_tfds_data_dir_of_the_environment_is_the_default(prepared):
    config, _ = prepared
    code = ("from shared_basis import data; from shared_basis.config import DataConfig; "
            "from data_helpers import load_split; print(len(load_split(DataConfig(name='cifar10'), 'test').labels))")
    assert run_python(code, TFDS_DATA_DIR=config.directory) == "7"


def test_tensorflow_datasets_is_imported_only_to_load():
    code = ("import sys; from shared_basis import data; from shared_basis.config import DataConfig as C; "
            "data.open_source(C()); [data.describe(C(name=n, image_size=32)) for n in "
            "('cifar10', 'cifar100', 'fashion_mnist', 'imagenet2012')]; "
            "print('tensorflow_datasets' in sys.modules)")
    assert run_python(code) == "False"


# Any other set: what it is.

def test_a_set_of_ones_own_is_described_from_its_metadata_alone(tmp_path):
    directory = write(tmp_path, {"train": pets(4), "test": pets(2)})
    for shard in directory.glob("*array_record*"):
        shard.unlink()
    assert data.describe(pets_config(tmp_path, image_size=16)) == Spec((16, 16, 3), CLASSES)


def test_images_of_different_sizes_need_a_size(stored, mistake):
    for read in (data.describe, load):
        message = mistake(pets_config(stored, image_size=0), read)
        for part in ("data.image_size=0", "'tfds:pets_fake' differ in size", "224"):
            assert part in message


def test_a_set_of_ones_own_is_read_as_it_was_written(stored):
    source = data.open_source(pets_config(stored))
    assert source.spec == Spec((8, 8, 3), CLASSES)
    for split, expected in (("train", pets(20)), ("test", pets(4, seed=100))):
        examples = source.splits[split]
        assert sorted(examples.read(range(len(examples)))) == sorted(expected)
    loaded = load(pets_config(stored))
    for row, (body, label) in enumerate(source.splits["train"].read(range(20))):
        image = Image.open(io.BytesIO(body))
        side = min(image.size)
        left, upper = (image.width - side) / 2, (image.height - side) / 2
        box = (left, upper, left + side, upper + side)
        np.testing.assert_array_equal(loaded.train.images[row],
                                      np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR, box=box)))
        assert loaded.train.labels[row] == label


def test_images_of_one_size_need_no_size(tmp_path):
    rows = [(encoded(picture(seed, 5, 7), "PNG"), seed % 3) for seed in range(6)]
    write(tmp_path, {"train": rows, "test": rows[:1]}, {"image": tfds.features.Image(shape=(5, 7, 3)), "label": LABEL})
    config = pets_config(tmp_path, image_size=0)
    dataset = load(config)
    assert dataset.spec == data.describe(config) == Spec((5, 7, 3), CLASSES)
    np.testing.assert_array_equal(dataset.test.images, [picture(0, 5, 7)])


def test_classes_without_names_are_numbered(tmp_path):
    features = {"image": FEATURES["image"], "label": tfds.features.ClassLabel(num_classes=3)}
    write(tmp_path, {"train": pets(3), "test": pets(3)}, features)
    assert data.describe(pets_config(tmp_path)).classes == ("0", "1", "2")


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 4), np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    rows = [(encoded(Image.fromarray(pixels), "PNG"), 1)]
    write(tmp_path, {"train": rows, "test": rows}, {"image": tfds.features.Image(shape=(4, 5, 4)), "label": LABEL})
    config = pets_config(tmp_path, image_size=0)
    image = load_split(config, "train").images[0]
    assert data.describe(config).image_shape == image.shape == (4, 5, 3)
    np.testing.assert_array_equal(image[0], np.full((5, 3), 255))
    np.testing.assert_array_equal(image[1], pixels[1, :, :3])
    alpha = pixels[2:, :, 3:] / 255
    np.testing.assert_allclose(image[2:], pixels[2:, :, :3] * alpha + 255 * (1 - alpha), atol=1)


def test_grey_images_stay_grey(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    rows = [(encoded(Image.fromarray(image), "PNG"), label) for label, image in enumerate(images)]
    write(tmp_path, {"train": rows, "test": rows}, {"image": tfds.features.Image(shape=(4, 5, 1)), "label": LABEL})
    config = pets_config(tmp_path, image_size=0)
    split = load_split(config, "train")
    assert data.describe(config) == Spec((4, 5, 1), CLASSES)
    np.testing.assert_array_equal(split.images[np.argsort(split.labels), ..., 0], images)


def test_sixteen_bits_become_eight(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 5), np.uint8)
    rows = [(encoded(Image.fromarray(image.astype(np.uint16) * 257), "PNG"), 0)]
    write(tmp_path, {"train": rows, "test": rows},
          {"image": tfds.features.Image(shape=(4, 5, 1), dtype=np.uint16), "label": LABEL})
    split = load_split(pets_config(tmp_path, image_size=0), "train")
    np.testing.assert_array_equal(split.images[0, ..., 0], image)


def test_images_of_real_numbers_are_refused(tmp_path, mistake):
    """TFDS stores them as PNG files whose four channels are the bytes of the numbers."""
    rows = [(encoded(picture(0, 4, 5, "RGBA"), "PNG"), 0)]
    directory = write(tmp_path, {"train": rows, "test": rows},
                      {"image": tfds.features.Image(shape=(4, 5, 4)), "label": LABEL})
    features = directory / "features.json"  # writing them in earnest takes TensorFlow
    text = features.read_text().replace('"uint8"', '"float32"')
    features.write_text(re.sub(r'"5",\s+"4"', '"5", "1"', text))
    assert "float32" in mistake(pets_config(tmp_path, image_size=0))


def test_a_broken_image_is_named_by_its_place_and_may_be_skipped(tmp_path, mistake, capsys):
    rows = [*pets(3), (b"no image", 1), *pets(2, seed=30)]
    directory = write(tmp_path, {"train": rows, "test": pets(2)})
    config = pets_config(tmp_path)
    place = bodies(data.open_source(config).splits["train"]).index(b"no image")
    name = f"example {place} of 'train' in {directory}"
    assert f"{name} is not an image" in mistake(config)
    split = load_split(dataclasses.replace(config, on_broken="skip"), "train")
    assert len(split.labels) == 5
    assert f"skipped: {name} is not an image" in capsys.readouterr().err


# Any other set: which features are the image and the label.

def test_without_supervised_keys_the_only_image_and_the_only_label_are_taken(tmp_path):
    features = {"name": tfds.features.Text(), "kind": LABEL, "photo": tfds.features.Image(),
                "size": tfds.features.Tensor(shape=(2,), dtype=np.int32)}
    rows = [{"name": "x", "kind": label, "photo": body, "size": np.zeros(2, np.int32)} for body, label in pets(4)]
    write(tmp_path, {"train": rows, "test": rows[:1]}, features, keys=None)
    examples = data.open_source(pets_config(tmp_path)).splits["train"]
    assert sorted(examples.read(range(4))) == sorted(pets(4))


def two_labels() -> dict[str, Any]:
    return {"image": tfds.features.Image(), "breed": tfds.features.ClassLabel(num_classes=5), "species": LABEL}


def test_of_two_labels_the_supervised_one_is_taken(tmp_path):
    rows = [(body, 4, label) for body, label in pets(4)]
    write(tmp_path, {"train": rows, "test": rows[:1]}, two_labels(), keys=("image", "species"))
    assert data.describe(pets_config(tmp_path)).classes == CLASSES
    examples = data.open_source(pets_config(tmp_path)).splits["train"]
    assert sorted(examples.read(range(4))) == sorted(pets(4))


@pytest.mark.parametrize(("features", "keys"), [
    (two_labels(), None),
    (two_labels(), ("breed", "species")),
    ({"left": tfds.features.Image(), "right": tfds.features.Image(), "label": LABEL}, None),
    ({"image": tfds.features.Image(), "age": tfds.features.Scalar(np.int64)}, ("image", "age")),
], ids=["two labels", "label to label", "two images", "no label"])
def test_a_set_without_one_image_and_one_label_is_refused_with_what_it_has(tmp_path, mistake, features, keys):
    body = pets(1)[0][0]
    rows = [{key: body if isinstance(feature, tfds.features.Image) else 1 for key, feature in features.items()}]
    write(tmp_path, {"train": rows, "test": rows}, features, keys)
    for read in (data.describe, load):
        message = mistake(pets_config(tmp_path), read)
        assert "data.name='tfds:pets_fake': it does not have one image and one class label" in message
        for key, feature in features.items():
            assert f"{key} ({type(feature).__name__})" in message


# Any other set: where it lies.

def test_a_configuration_is_named_behind_a_slash(tmp_path):
    write(tmp_path, {"train": pets(4), "test": pets(2)})
    write(tmp_path, {"train": pets(5), "test": pets(3)}, config="small")
    for name, counts in (("pets_fake", (4, 2)), ("pets_fake:1.0.0", (4, 2)),
                         ("pets_fake/small", (5, 3)), ("pets_fake/small:1.0.0", (5, 3))):
        splits = data.open_source(pets_config(tmp_path, name)).splits
        assert (len(splits["train"]), len(splits["test"])) == counts


@pytest.mark.parametrize("name", ["dogs", "pets_fake/large", "pets_fake:2.0.0"])
def test_what_is_not_prepared_is_not_described(stored, mistake, name):
    message = mistake(pets_config(stored, name), data.describe)
    for part in (f"data.name='tfds:{name}': not prepared in {stored}", "--mode=prepare",
                 "--config.data.directory=DIR"):
        assert part in message


@pytest.mark.parametrize("name", ["Two Words", "../pets_fake", "/"])
def test_of_a_name_that_cannot_be_one_nothing_is_to_be_deleted(stored, mistake, name):
    message = mistake(pets_config(stored, name), data.describe)
    assert f"tfds:{name}" in message
    assert "delete" not in message


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda directory: (directory / "dataset_info.json").write_text("{"), "JSON"),
    (lambda directory: (directory / "dataset_info.json").unlink(), "dataset_info.json"),
    (lambda directory: (directory / "features.json").write_text("{"), "JSON"),
    (lambda directory: next(directory.glob("*train*-00000-of-*")).write_bytes(b"short"), "ArrayRecord"),
    (lambda directory: next(directory.glob("*train*-00000-of-*")).unlink(), "No such file"),
    (lambda directory: next(directory.glob("*train*-00001-of-*")).unlink(), "of-00002"),
], ids=["broken metadata", "no metadata", "broken features", "short shard", "missing shard", "missing second shard"])
def test_damaged_data_of_ones_own_is_refused_when_it_is_opened(tmp_path, mistake, damage, reason):
    directory = write(tmp_path, {"train": pets(6), "test": pets(2)}, shards=2)
    damage(directory)
    message = mistake(pets_config(tmp_path), data.open_source)
    assert f"cannot read the prepared data in {tmp_path}/pets_fake" in message
    assert reason in message


def test_data_in_more_files_than_a_process_may_open_is_read_where_the_system_allows_it(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    before = _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write(tmp_path, {"train": pets(40), "test": pets(40)}, shards=40)
    train = data.open_source(pets_config(tmp_path)).splits["train"]
    whole = bodies(train)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 10, hard))
    try:
        assert bodies(pickle.loads(pickle.dumps(train))) == whole
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (80 + 256, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 128))
    with pytest.raises(UserError, match=r"80 files, .* 128 open \(ulimit -Hn\); raise that limit to 336"):
        pickle.loads(pickle.dumps(train)).read([0])


@pytest.mark.slow
def test_a_thousand_files_are_divided_among_64_hosts(tmp_path):
    """As many files as the prepared ImageNet has; each host opens the whole and reads its part."""
    write(tmp_path, {"train": pets(1024), "test": pets(1024, seed=100)}, shards=1024)
    config = pets_config(tmp_path)
    source = data.open_source(config)
    assert len(list(Path(tmp_path).rglob("*.array_record*"))) == 2048
    labels = {name: [label for _, label in part.read(range(1024))] for name, part in source.splits.items()}
    for name, kind in (("train", TrainingBatches), ("test", EvalBatches)):
        settings = {"seed": 0, "epochs": 1} if name == "train" else {}
        read = []
        for host in range(64):
            examples = pickle.loads(pickle.dumps(source.splits[name]))  # as a process of its own has it
            batches = kind(examples, source.spec, config, batch_size=256, shard=Shard(host, 64), **settings)
            read += [int(label) for number in range(len(batches)) for label in batches[number].labels]
        assert sorted(read) == sorted(labels[name])


# Splits.

def test_parts_of_a_split_are_taken_as_they_are_named(stored):
    whole = bodies(data.open_source(pets_config(stored)).splits["train"])
    source = data.open_source(pets_config(stored, train_split="train[:75%]", test_split="train[75%:]"))
    assert bodies(source.splits["train"]) == whole[:15]
    assert bodies(source.splits["test"]) == whole[15:]
    assert source.splits["train"].name(14).startswith("example 14 of 'train[:75%]' in")
    both = data.open_source(pets_config(stored, train_split="train[:3]+train[18:]")).splits["train"]
    assert bodies(both) == whole[:3] + whole[18:]


def test_a_validation_split_is_used(stored):
    config = pets_config(stored, train_split="train[:80%]", validation_split="train[80%:]")
    whole = load(pets_config(stored))
    parts = load(config)
    assert parts.validation is not None
    np.testing.assert_array_equal(parts.train.images, whole.train.images[:16])
    np.testing.assert_array_equal(parts.validation.images, whole.train.images[16:])
    np.testing.assert_array_equal(parts.validation.labels, whole.train.labels[16:])
    np.testing.assert_array_equal(parts.test.images, whole.test.images)
    assert set(data.open_source(config, ("test",)).splits) == {"test"}


@pytest.mark.parametrize(("splits", "first", "second"), [
    ({"train_split": "train[:75%]", "test_split": "train[50%:]"}, "train", "test"),
    ({"train_split": "train[:11]", "test_split": "train[10:]"}, "train", "test"),
    ({"train_split": "train+test"}, "train", "test"),
    ({"test_split": "train[19:]"}, "train", "test"),
    ({"validation_split": "train[:1]"}, "train", "validation"),
    ({"validation_split": "test"}, "test", "validation"),
])
def test_splits_with_examples_in_common_are_refused(stored, mistake, splits, first, second):
    message = mistake(pets_config(stored, **splits))
    named = {"train_split": "train", "test_split": "test"} | splits
    for part in (first, second):
        assert f"data.{part}_split={named[f'{part}_split']!r}" in message
    assert "examples in common" in message


@pytest.mark.parametrize("field", ["train_split", "test_split", "validation_split"])
@pytest.mark.parametrize("split", ["trian", "train[:50", "train[50%]", "train[:21]", "train,test", " train"])
def test_a_split_that_is_none_is_refused_with_those_that_are(stored, mistake, field, split):
    message = mistake(pets_config(stored, **{field: split}))
    assert f"data.{field}={split!r}: no such split" in message
    assert "it has train (20), test (4)" in message


def test_a_split_without_examples_is_refused(stored, mistake):
    message = mistake(pets_config(stored, train_split="train[:1%]"))
    assert "data.train_split='train[:1%]': holds no examples" in message
    backwards = mistake(dataclasses.replace(pets_config(stored), train_split="train[50%:20%]"))
    assert "data.train_split='train[50%:20%]': holds no examples" in backwards
    assert "train (20), test (4)" in message


def test_without_a_test_split_the_validation_split_is_tested_on(tmp_path):
    write(tmp_path, {"train": pets(4), "validation": pets(2, seed=50)})
    splits = data.open_source(pets_config(tmp_path)).splits
    assert sorted(bodies(splits["test"])) == sorted(body for body, _ in pets(2, seed=50))
    assert "validation" not in splits


def test_training_images_alone_must_be_parted(tmp_path, mistake):
    write(tmp_path, {"train": pets(20)})
    message = mistake(pets_config(tmp_path))
    assert "has no test or validation split; it has train (20)" in message
    proposed = dict(re.findall(r"--config\.data\.(\w+)='([^']+)'", message))
    assert proposed == {"train_split": "train[:90%]", "test_split": "train[90%:]"}
    splits = data.open_source(pets_config(tmp_path, **proposed)).splits
    assert (len(splits["train"]), len(splits["test"])) == (18, 2)
    assert len(data.open_source(pets_config(tmp_path), ("train",)).splits["train"]) == 20


def test_the_unlabelled_test_images_of_imagenet_are_not_tested_on(tmp_path, monkeypatch, mistake):
    """TFDS prepares them where their archive is at hand too."""
    def rows(count: int, label: str | int) -> Any:
        for index in range(count):
            body = io.BytesIO(encoded(picture(index, 20, 20)))
            yield f"{label}{index}", {"file_name": f"{index}.JPEG", "image": body, "label": label}

    monkeypatch.setattr(builders.Imagenet2012, "_split_generators", lambda *_: {
        "train": rows(5, "n01440764"), "test": rows(4, -1), "validation": rows(3, "n01443537")})
    builders.Imagenet2012(data_dir=tmp_path).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(manual_dir=tmp_path))
    for name in ("imagenet2012", "tfds:imagenet2012"):
        config = DataConfig(name=name, directory=str(tmp_path), image_size=8)
        dataset = load(config)
        np.testing.assert_array_equal(dataset.test.labels, [1, 1, 1])
        np.testing.assert_array_equal(dataset.train.labels, [0] * 5)
        message = mistake(dataclasses.replace(config, test_split="test"))
        assert "of 'test' in" in message
        assert "has the label -1" in message
        assert "no valid labels" in message


# Examples.

def test_examples_can_be_pickled_before_and_after_they_are_read(stored):
    examples = data.open_source(pets_config(stored)).splits["train"].take(np.array([7, 0, 19]))
    unread = pickle.dumps(dataclasses.replace(examples, _opened=[]))
    expected = examples.read([0, 1, 2])
    read = pickle.dumps(examples)
    assert len(read) == len(unread)  # without what has been opened
    for pickled in (unread, read):
        copy = pickle.loads(pickled)
        assert len(copy) == 3
        assert copy.name(0) == examples.name(0)
        assert copy.read([0, 1, 2]) == expected


def test_some_of_the_examples_can_be_taken(stored):
    whole = data.open_source(pets_config(stored)).splits["train"]
    everything = whole.read(range(20))
    part = whole.take(np.array([18, 3, 11, 3]))
    assert len(part) == 4
    assert part.read([0, 1, 2, 3]) == [everything[index] for index in (18, 3, 11, 3)]
    assert part.read(np.array([2, 0])) == [everything[11], everything[18]]
    again = part.take(np.array([1]))
    assert again.read([0]) == [everything[3]]
    assert again.name(0) == f"example 3 of 'train' in {stored}/pets_fake/1.0.0"
    assert whole.read([]) == []
    assert len(whole) == 20


def test_examples_whose_files_have_gone_are_told_of(tmp_path):
    directory = write(tmp_path, {"train": pets(2), "test": pets(1)})
    examples = pickle.loads(pickle.dumps(data.open_source(pets_config(tmp_path)).splits["train"]))
    next(directory.glob("*train*")).unlink()
    with pytest.raises(UserError, match=f"cannot read the prepared data in {directory}: .*No such file"):
        examples.read([0])
