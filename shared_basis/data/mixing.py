"""Soft targets: mixup, CutMix, label smoothing. Pure functions of images, targets and a key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from shared_basis.config import TrainConfig
from shared_basis.nn.types import Array

Mix = Callable[[Array, Array, Array], tuple[Array, Array]]
"""Maps images `[N, H, W, C]`, targets and a key to images and targets."""


def mixup(images: Array, targets: Array, key: Array, alpha: float) -> tuple[Array, Array]:
    """Blends each image with the previous one of the batch (mixup, Zhang et al. 2018).

    λ ~ Beta(α, α) is drawn per image: λ · image + (1 − λ) · other; targets are blended with the same λ.

    Args:
      images: float32 `[N, H, W, C]`.
      targets: probabilities float32 `[N, classes]`.
    """
    share = jax.random.beta(key, alpha, alpha, (len(images),))
    blended = _blend(share[:, None, None, None], images)
    return blended, _blend(share[:, None], targets)


def cutmix(images: Array, targets: Array, key: Array, alpha: float) -> tuple[Array, Array]:
    """Replaces a rectangle of each image by that of the previous one of the batch (CutMix, Yun et al. 2019).

    The sides are √(1 − λ) times those of the image, λ ~ Beta(α, α); the centre is uniform, and the rectangle is clipped
    to the image. Targets are blended by the remaining area.

    Args:
      images: float32 `[N, H, W, C]`.
      targets: probabilities float32 `[N, classes]`.
    """
    count, height, width, _ = images.shape
    drawn, placed = jax.random.split(key)
    side = jnp.sqrt(1 - jax.random.beta(drawn, alpha, alpha, (count, 1)))
    centre = jax.random.uniform(placed, (count, 2))
    rows = _within(height, centre[:, :1], side)
    columns = _within(width, centre[:, 1:], side)
    replaced = rows[:, :, None] & columns[:, None, :]
    share = 1 - replaced.mean((1, 2), dtype=jnp.float32)
    return (jnp.where(replaced[..., None], jnp.roll(images, 1, axis=0), images),
            _blend(share[:, None], targets))


def either(mixes: Sequence[Mix], images: Array, targets: Array, key: Array) -> tuple[Array, Array]:
    """Applies to each image one of `mixes`, chosen uniformly at random."""
    chosen = jax.random.randint(jax.random.fold_in(key, 0), (len(images),), 0, len(mixes))
    result = images, targets
    for index, mix in enumerate(mixes):
        mixed = mix(images, targets, jax.random.fold_in(key, 1 + index))
        result = (jnp.where((chosen == index)[:, None, None, None], mixed[0], result[0]),
                  jnp.where((chosen == index)[:, None], mixed[1], result[1]))
    return result


def make_mix(config: TrainConfig, num_classes: int, probabilities: bool = False) -> Mix:
    """Returns the function that `config` selects, from images, classes int32 `[N]` and a key to images and targets.

    Targets remain classes if they are neither mixed nor smoothed and `probabilities` is false; otherwise they are
    probabilities float32 `[N, classes]`.
    """
    mixes = [functools.partial(mix, alpha=alpha)
             for mix, alpha in ((mixup, config.mixup), (cutmix, config.cutmix)) if alpha]
    if not (mixes or config.label_smoothing or probabilities):
        return lambda images, classes, key: (images, classes)

    def mix(images: Array, classes: Array, key: Array) -> tuple[Array, Array]:
        targets = jax.nn.one_hot(classes, num_classes)
        if mixes:
            images, targets = either(mixes, images.astype(jnp.float32), targets, key)
        return images, optax.smooth_labels(targets, config.label_smoothing)

    return mix


def _blend(share: Array, arrays: Array) -> Array:
    return share * arrays + (1 - share) * jnp.roll(arrays, 1, axis=0)


def _within(size: int, centre: Array, side: Array) -> Array:
    """Returns a mask `[N, size]` of pixels within `side` around `centre`, both `[N, 1]` and fractions of `size`."""
    middle = (jnp.arange(size) + 0.5) / size
    return jnp.abs(middle - centre) < side / 2
