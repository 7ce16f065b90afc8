"""The embedded digits, and which images of a data set a run uses: subsets and held-out validation images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_helpers import load, load_split
from PIL import Image
from sklearn.datasets import load_digits

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.errors import UserError


def test_shapes_and_types_are_those_described():
    dataset = load(DataConfig())
    assert dataset.spec == data.describe(DataConfig()) == data.Spec((8, 8, 1), tuple("0123456789"))
    for split, count in ((dataset.train, 1442), (dataset.test, 355)):
        assert split.images.shape == (count, 8, 8, 1)
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.labels.shape == (count,)
        assert split.labels.dtype == np.int32
    assert dataset.validation is None


def test_grey_values_are_scaled_and_rounded():
    values = np.unique(load(DataConfig()).train.images)
    # v * 255 / 16 for v = 0, ..., 16; only v = 8 is halfway (127.5), and goes to the even number
    np.testing.assert_array_equal(
        values, [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255])


def test_every_fifth_image_of_a_class_is_a_test_image():
    dataset, original = load(DataConfig()), load_digits()
    for label in range(10):
        images = original.images[original.target == label]
        for split, expected in ((dataset.test, images[4::5]),
                                (dataset.train, np.delete(images, np.s_[4::5], axis=0))):
            got = split.images[split.labels == label, ..., 0]
            np.testing.assert_array_equal(np.round(got * (16 / 255)), expected)


@pytest.mark.parametrize("size", [4, 20])
def test_images_are_brought_to_the_configured_size(size):
    config = DataConfig(image_size=size, test_examples=7)
    original = load_split(DataConfig(test_examples=7), "test")
    scaled = load_split(config, "test")
    assert data.describe(config).image_shape == scaled.images.shape[1:] == (size, size, 1)
    np.testing.assert_array_equal(scaled.labels, original.labels)
    for image, pixels in zip(original.images, scaled.images, strict=True):
        expected = Image.fromarray(image[..., 0]).resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(pixels[..., 0], expected)


def test_there_is_nothing_to_prepare():
    assert "nothing to prepare" in data.prepare(DataConfig())


def test_one_split_alone_equals_the_whole():
    whole = load(DataConfig())
    for name in data.SPLITS:
        assert data.open_source(DataConfig(), (name,)).splits.keys() == {name}
        alone, expected = load_split(DataConfig(), name), getattr(whole, name)
        np.testing.assert_array_equal(alone.images, expected.images)
        np.testing.assert_array_equal(alone.labels, expected.labels)
    with pytest.raises(ValueError, match=r"'validation'.*must be of train, test"):
        load_split(DataConfig(), "validation")


def test_a_subset_is_fixed_keeps_the_order_and_grows_with_its_size():
    whole = load(DataConfig()).train
    rows = {}
    for count in (30, 100):
        rows[count] = np.sort(np.random.default_rng(0).permutation(1442)[:count])
        subset = load_split(DataConfig(train_examples=count, test_examples=3), "train")
        np.testing.assert_array_equal(subset.images, whole.images[rows[count]])
        np.testing.assert_array_equal(subset.labels, whole.labels[rows[count]])
    assert set(rows[30]) < set(rows[100])
    assert len(load(DataConfig(test_examples=3)).test.labels) == 3


def test_a_subset_has_to_exist(mistake):
    assert len(load_split(DataConfig(train_examples=1442), "train").labels) == 1442
    for field, count in (("train_examples", 1442), ("test_examples", 355)):
        message = mistake(dataclasses.replace(DataConfig(), **{field: count + 1}))
        assert f"data.{field}={count + 1}" in message
        assert f"only {count} " in message


def test_validation_images_are_a_random_part_of_the_training_images():
    whole, held = load(DataConfig()), load(DataConfig(validation=0.1))
    members = np.zeros(1442, bool)
    members[np.random.default_rng(0).permutation(1442)[:144]] = True
    assert held.validation is not None
    for split, rows in ((held.validation, members), (held.train, ~members)):
        np.testing.assert_array_equal(split.images, whole.train.images[rows])
        np.testing.assert_array_equal(split.labels, whole.train.labels[rows])
    np.testing.assert_array_equal(held.test.images, whole.test.images)


def test_the_training_subset_is_chosen_of_what_the_validation_images_leave(mistake):
    held = load(DataConfig(validation=0.5))
    limited = load(DataConfig(validation=0.5, train_examples=721))
    np.testing.assert_array_equal(limited.train.images, held.train.images)
    np.testing.assert_array_equal(limited.validation.images, held.validation.images)
    assert "only 721 train images exist" in mistake(DataConfig(validation=0.5, train_examples=722))


@pytest.mark.parametrize("change", [{"classes": tuple("012345678X")}, {"image_shape": (9, 9, 1)}])
def test_the_images_must_be_those_of_the_run_that_is_evaluated(change):
    known = data.describe(DataConfig())
    assert data.open_source(DataConfig(), ("test",), known).spec == known
    with pytest.raises(UserError, match=f"other {next(iter(change)).replace('_', ' ')} than those that the run"):
        data.open_source(DataConfig(), ("test",), dataclasses.replace(known, **change))
