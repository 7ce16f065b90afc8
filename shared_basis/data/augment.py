"""Preprocessing of a batch on the devices: normalisation, random crops and mirroring."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from shared_basis.config import DataConfig
from shared_basis.nn.types import Array


def normalize(images: Array, config: DataConfig) -> Array:
    """Normalises uint8 images `[N, H, W, C]` to float32: scales to [0, 1], subtracts `mean`, divides by `std`."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def augment(images: Array, key: Array, config: DataConfig) -> Array:
    """Pads each of the images `[N, H, W, C]` with zeros, then crops and mirrors it at random."""
    count, height, width, _ = images.shape
    if config.pad:
        pad = config.pad
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corners = jax.random.randint(jax.random.fold_in(key, 0), (count, 2), 0, 2 * pad + 1)
        rows = corners[:, :1] + jnp.arange(height)
        columns = corners[:, 1:] + jnp.arange(width)
        images = padded[jnp.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if config.flip:
        mirrored = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images
