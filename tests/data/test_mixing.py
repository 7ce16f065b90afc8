"""mixup, CutMix and label smoothing against NumPy, image by image."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, make_images, mesh_of

from shared_basis.config import TrainConfig
from shared_basis.data.mixing import cutmix, make_mix, mixup
from shared_basis.runtime.distributed import batch_sharding

KEY = jax.random.key(3)


mixed_up, cut = (jax.jit(function, static_argnames="alpha") for function in (mixup, cutmix))


def batch(count: int = 40, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images float32 and their classes as probabilities."""
    images, labels = make_images(count, size=size, channels=3)
    return images.astype(np.float32), np.eye(10, dtype=np.float32)[labels]


@pytest.mark.parametrize("alpha", [pytest.param(0.2, marks=pytest.mark.slow), 1.0])
def test_mixup_blends_each_image_and_its_target_with_the_one_before(alpha: float) -> None:
    images, targets = batch()
    mixed, probabilities = mixed_up(images, targets, KEY, alpha=alpha)
    shares = np.asarray(jax.random.beta(KEY, alpha, alpha, (40,)), np.float64)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert len(set(shares)) == 40
    for index, share in enumerate(shares):
        for actual, arrays in ((mixed, images), (probabilities, targets)):
            expected = share * arrays[index] + (1 - share) * arrays[index - 1]
            np.testing.assert_allclose(actual[index], expected, rtol=1e-4, atol=1e-4)


def test_cutmix_takes_a_rectangle_from_the_image_before_and_its_area_of_the_target() -> None:
    images, targets = batch()
    mixed, probabilities = map(np.asarray, cut(images, targets, KEY, alpha=1.0))
    drawn, placed = jax.random.split(KEY)
    sides = np.sqrt(1 - np.asarray(jax.random.beta(drawn, 1.0, 1.0, (40, 1)), np.float64))[:, 0]
    centres = np.asarray(jax.random.uniform(placed, (40, 2)), np.float64)
    areas = []
    for index, (side, (y, x)) in enumerate(zip(sides, centres, strict=True)):
        expected, replaced = images[index].copy(), 0
        for row in range(8):
            for column in range(8):
                if abs((row + 0.5) / 8 - y) < side / 2 and abs((column + 0.5) / 8 - x) < side / 2:
                    expected[row, column] = images[index - 1][row, column]
                    replaced += 1
        np.testing.assert_array_equal(mixed[index], expected)
        share = 1 - replaced / 64
        np.testing.assert_allclose(probabilities[index], share * targets[index] + (1 - share) * targets[index - 1],
                                   atol=1e-6)
        areas.append(replaced / 64)
    assert min(areas) < 0.2 < 0.6 < max(areas)


def test_label_smoothing_spreads_its_part_over_all_classes() -> None:
    images, labels = make_images(5)
    same, targets = make_mix(TrainConfig(label_smoothing=0.1), 10)(images, labels, KEY)
    np.testing.assert_array_equal(same, images)
    expected = np.full((5, 10), 0.01)
    expected[np.arange(5), labels] = 0.91
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_nothing_is_done_unless_asked() -> None:
    images, labels = make_images(5)
    assert make_mix(TrainConfig(), 10)(images, labels, KEY) == (images, labels)
    _, targets = make_mix(TrainConfig(), 10, probabilities=True)(images, labels, KEY)
    np.testing.assert_array_equal(targets, np.eye(10)[labels])


def test_where_both_are_asked_for_each_image_is_drawn_one_of_them() -> None:
    images, labels = make_images(40, channels=3)  # as above, so that each of the two is compiled once
    mix = jax.jit(make_mix(TrainConfig(mixup=1.0, cutmix=1.0), 10))
    mixed, targets = mix(images, labels, KEY)
    chosen = np.asarray(jax.random.randint(jax.random.fold_in(KEY, 0), (40,), 0, 2))
    assert 10 < chosen.sum() < 30
    probabilities = np.eye(10, dtype=np.float32)[labels]
    both = [function(images.astype(np.float32), probabilities, jax.random.fold_in(KEY, 1 + index), alpha=1.0)
            for index, function in enumerate((mixed_up, cut))]
    for index, one in enumerate(chosen):
        np.testing.assert_allclose(mixed[index], both[one][0][index], rtol=1e-5)
        np.testing.assert_allclose(targets[index], both[one][1][index], atol=1e-6)
    np.testing.assert_allclose(np.sum(targets, -1), 1, atol=1e-5)


@pytest.mark.slow
def test_what_is_mixed_follows_its_key_and_not_the_number_of_devices() -> None:
    images, labels = make_images(16, size=4)
    mix = jax.jit(make_mix(TrainConfig(mixup=0.2, cutmix=1.0, label_smoothing=0.1), 10))
    alone, other = mix(images, labels, KEY), mix(images, labels, jax.random.key(4))
    shared = mix(*jax.device_put((images, labels), batch_sharding(mesh_of(4))), KEY)
    assert_trees_equal(jax.device_get(shared), jax.device_get(alone))
    assert not np.array_equal(alone[0], other[0])
