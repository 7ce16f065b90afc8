"""A small ConvNet in Flax NNX, whose six 3×3 layers hold one filter basis by reference, on handwritten digits.

    python examples/nnx_convnet.py [--tiny] [--picture=FILE.png]

The basis is an `nnx.Param`: it is in the model's state once, however many layers hold it. `keep_orthonormal` makes an
optimizer of any optimizer that leaves it orthonormal after each step.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from shared_basis import BasisGroup, count_by_kind, draw_basis, keep_orthonormal, orthogonality_diagnostics
from shared_basis.nnx import BasisConv, shared_basis

WIDTH, SHARED, UNIQUE = 32, 16, 1

GROUPS = [BasisGroup("basis", "layers/*/unique")]
"""By path in `nnx.state(model, nnx.Param)`, where an array that several modules hold has the path that comes first in
alphabetical order: here `basis`, which comes before `layers`."""


class ConvNet(nnx.Module):
    """A stem, residual layers through one basis, and a linear head."""

    def __init__(self, shared: bool, depth: int, rngs: nnx.Rngs) -> None:
        """Shares a basis, or has a kernel of its own in each layer."""
        self.basis = shared_basis(rngs.params(), (3, 3, WIDTH, SHARED)) if shared else None
        self.stem = nnx.Conv(1, WIDTH, (3, 3), rngs=rngs)
        self.layers = nnx.List([
            BasisConv(WIDTH, WIDTH, self.basis, unique_rank=UNIQUE if shared else 0, rngs=rngs,
                      unique_init=nnx.initializers.orthogonal())
            for _ in range(depth)])
        self.norms = nnx.List([nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `[N, 8, 8, 1]` to logits `[N, 10]`; `model.train()` and `model.eval()` say which statistics are used."""
        x = nnx.relu(self.stem(images))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + nnx.relu(layer(x, then=norm))  # the normalisation is computed in one step with the layer
        return self.head(x.mean((1, 2)))


@nnx.jit
def train_step(model: ConvNet, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Updates the model in place and returns the loss."""
    def loss(model: ConvNet) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


@nnx.jit
def predict(model: ConvNet, images: jax.Array) -> jax.Array:
    """Returns the class of each image."""
    return model(images).argmax(-1)


def train(model: ConvNet, images: np.ndarray, labels: np.ndarray, steps: int, batch: int = 64) -> list[float]:
    """Trains the model in place, and returns the losses."""
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    links = adam if model.basis is None else keep_orthonormal(GROUPS, adam)
    optimizer = nnx.Optimizer(model, links, wrt=nnx.Param)
    rng, losses = np.random.default_rng(0), []
    model.train()
    for _ in range(steps):
        chosen = rng.integers(len(images), size=batch)
        losses.append(float(train_step(model, optimizer, jnp.asarray(images[chosen]), jnp.asarray(labels[chosen]))))
    model.eval()
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with a shared basis and without, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a small one, to see that it runs")
    parser.add_argument("--picture", type=pathlib.Path, help="where to write a picture of the basis")
    options = parser.parse_args(arguments)
    steps, depth = (3, 2) if options.tiny else (300, 6)
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype(np.float32), digits.target
    test = slice(0, 360)
    accuracy = {}
    for name, shared in (("plain", False), ("shared", True)):
        model = ConvNet(shared, depth, nnx.Rngs(0))
        losses = train(model, images[360:], labels[360:], steps)
        accuracy[name] = float(np.mean(predict(model, jnp.asarray(images[test])) == labels[test]))
        params = nnx.state(model, nnx.Param)
        kinds = count_by_kind(params, GROUPS if shared else ())
        print(f"{name}: {sum(kinds.values()):,} parameters (kernels {kinds['kernel']:,}, bases {kinds['basis']:,}, "
              f"coefficients {kinds['coefficients']:,}); loss {losses[0]:.2f} to {losses[-1]:.3f}, test accuracy "
              f"{100 * accuracy[name]:.1f} %")
    bases = jax.jit(lambda params: orthogonality_diagnostics(params, GROUPS))(params)
    print("basis and unique elements:", {name: round(float(value), 5) for name, value in bases.items()})
    if options.picture and model.basis is not None:
        options.picture.write_bytes(draw_basis(model.basis[...]))
    if bases["coherence"] > 1e-4 or abs(bases["norm_max"] - 1) > 1e-4:
        sys.exit("the basis is not orthonormal")
    if steps > 100 and (accuracy["shared"] < 0.95 or accuracy["shared"] < accuracy["plain"] - 0.02):
        sys.exit("sharing has cost more than two points of accuracy")


if __name__ == "__main__":
    main()
