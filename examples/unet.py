"""A U-Net in Flax Linen that segments digits, with one filter basis for its encoder and another for its decoder.

    python examples/unet.py [--tiny]

Each pixel of a noisy scene of two handwritten digits belongs to the background or to one of ten digits. All levels have
the same width, so that one basis serves layers of every resolution. The bases are parameters of the network, which it
hands to its blocks; the penalty that keeps them orthonormal is a link of an ordinary optax chain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from shared_basis import (
    BasisConv,
    BasisGroup,
    add_orthogonality_penalty,
    count_by_kind,
    init_shared_bases,
    orthogonality_diagnostics,
)

WIDTH, SHARED, UNIQUE, CLASSES = 24, 16, 1, 11

GROUPS = [BasisGroup("bases/encoder", ["down*/*/unique", "bottom/*/unique"]),
          BasisGroup("bases/decoder", "up*/*/unique")]


class UNet(nn.Module):
    """Goes down by as many levels, halving height and width, and up again."""

    shared: bool
    levels: int = 2

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps `[N, H, W, 1]` to logits of pixels `[N, H, W, 11]`."""
        bases = {}
        if self.shared:
            shapes = dict.fromkeys(("encoder", "decoder"), (3, 3, WIDTH, SHARED))
            bases = self.param("bases", lambda key: init_shared_bases(key, shapes))
        x, skips = nn.Conv(WIDTH, (3, 3), name="stem")(images), []
        for level in range(self.levels):
            x = Block(name=f"down{level}")(x, bases.get("encoder"), train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = Block(name="bottom")(x, bases.get("encoder"), train)
        for level in reversed(range(self.levels)):
            x = jnp.concatenate([x.repeat(2, axis=1).repeat(2, axis=2), skips[level]], axis=-1)
            x = nn.Conv(WIDTH, (1, 1), name=f"merge{level}")(x)
            x = Block(name=f"up{level}")(x, bases.get("decoder"), train)
        return nn.Conv(CLASSES, (1, 1), name="head")(x)


class Block(nn.Module):
    """Two 3×3 layers around which the input is added; without a basis each has a kernel of its own."""

    @nn.compact
    def __call__(self, x: jax.Array, basis: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[N, H, W, C]` to the same shape."""
        y, rank = x, 0 if basis is None else UNIQUE
        for name in ("first", "second"):
            conv = BasisConv(WIDTH, unique_rank=rank, unique_init=nn.initializers.orthogonal(), name=name)
            y = conv(y, basis, train=train)
            y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"{name}_norm")(y))
        return x + y


def make_scenes(rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray,
                count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scenes `[N, 16, 16, 1]` of two digits at random heights in noise, and their classes `[N, 16, 16]`."""
    scenes, classes = rng.normal(0, 0.15, (count, 16, 16, 1)), np.zeros((count, 16, 16), np.int32)
    for scene, pixels in zip(scenes, classes, strict=True):
        for column in (0, 8):
            index, row = rng.integers(len(digits)), rng.integers(9)
            place = (slice(row, row + 8), slice(column, column + 8))
            scene[(*place, 0)] += digits[index]
            pixels[place] = (digits[index] > 0.3) * (labels[index] + 1)
    return scenes.astype(np.float32), classes


def mean_iou(found: np.ndarray, classes: np.ndarray) -> float:
    """Returns the intersection over union of pixels of each class, their mean."""
    return float(np.mean([np.sum((found == c) & (classes == c)) / np.sum((found == c) | (classes == c))
                          for c in np.unique(classes)]))


def train(model: UNet, links: optax.GradientTransformation, scenes: np.ndarray, classes: np.ndarray, steps: int,
          batch: int = 32) -> tuple[Any, list[float]]:
    """Returns trained variables, and the losses."""
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), scenes[:1], train=False)
    state = links.init(variables["params"])

    @jax.jit
    def step(variables: Any, state: Any, images: jax.Array, pixels: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, moved = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, pixels).mean(), moved
        (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = links.update(gradient, state, variables["params"])
        return {**moved, "params": optax.apply_updates(variables["params"], updates)}, state, value
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        chosen = rng.integers(len(scenes), size=batch)
        variables, state, value = step(variables, state, scenes[chosen], classes[chosen])
        losses.append(float(value))
    return variables, losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with shared bases and without, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a small one, to see that it runs")
    levels, steps = (1, 3) if parser.parse_args(arguments).tiny else (2, 250)
    digits, rng = load_digits(), np.random.default_rng(0)
    images = digits.images / 16
    test_scenes, test_classes = make_scenes(rng, images[:360], digits.target[:360], 200)
    scenes, classes = make_scenes(rng, images[360:], digits.target[360:], 2000)
    score, size = {}, {}
    for name in ("plain", "shared"):
        model, adam = UNet(name == "shared", levels), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
        links = optax.chain(add_orthogonality_penalty(10.0, GROUPS), adam) if model.shared else adam
        variables, losses = train(model, links, scenes, classes, steps)
        logits = jax.jit(model.apply, static_argnames="train")(variables, test_scenes, train=False)
        score[name] = mean_iou(np.asarray(logits).argmax(-1), test_classes)
        kinds = count_by_kind(variables["params"])
        size[name] = sum(kinds.values())
        print(f"{name}: {size[name]:,} parameters (kernels {kinds['kernel']:,}, bases {kinds['basis']:,}, coefficients "
              f"{kinds['coefficients']:,}); loss {losses[0]:.2f} to {losses[-1]:.3f}, mean IoU {score[name]:.3f}")
    bases = jax.jit(lambda params: orthogonality_diagnostics(params, GROUPS))(variables["params"])
    print("bases:", {name: round(float(value), 4) for name, value in bases.items()})
    if size["shared"] > size["plain"] / 2 or bases["coherence"] > 0.2:
        sys.exit("the network is not half as large as the plain one, or its bases are not nearly orthonormal")
    if steps > 100 and score["shared"] < max(0.5, score["plain"] - 0.1):
        sys.exit("sharing has cost more than 0.1 of mean IoU")


if __name__ == "__main__":
    main()
