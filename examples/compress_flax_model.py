"""Compresses somebody else's trained Flax model, layer by layer and in closed form, and fine-tunes it.

    python examples/compress_flax_model.py [--tiny]

`Net` knows nothing of shared bases: it is `nn.Conv` and `nn.BatchNorm`, trained on handwritten digits. Its layers of
one shape become a shared basis, unique elements and coefficients by `factorize_kernels`, from their kernels and from
what comes into them on training images. `SharedNet` is the same network with `BasisConv` in their place.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

from shared_basis import BasisConv, BasisGroup, add_orthogonality_penalty, count_by_kind, factorize_kernels

WIDTH, SHARED, UNIQUE = 32, 24, 4

GROUPS = [BasisGroup("bases/body", "conv*/unique")]


class Net(nn.Module):
    """Somebody else's: 3×3 layers in a row, each with a shortcut around it."""

    layers: Sequence[str]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images `[N, 8, 8, 1]` to logits `[N, 10]`."""
        x = nn.relu(nn.Conv(WIDTH, (3, 3), name="stem")(x))
        for name in self.layers:
            y = nn.Conv(WIDTH, (3, 3), use_bias=False, name=name)(x)
            x = x + nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"{name}_norm")(y))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class SharedNet(nn.Module):
    """The same with a shared basis."""

    layers: Sequence[str]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images `[N, 8, 8, 1]` to logits `[N, 10]`."""
        bases = self.param("bases", lambda key: {"body": nn.initializers.orthogonal()(key, (3, 3, WIDTH, SHARED))})
        x = nn.relu(nn.Conv(WIDTH, (3, 3), name="stem")(x))
        for name in self.layers:
            y = BasisConv(WIDTH, unique_rank=UNIQUE, name=name)(x, bases["body"], train=train)
            x = x + nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"{name}_norm")(y))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def train(model: nn.Module, variables: Any, links: optax.GradientTransformation, images: np.ndarray,
          labels: np.ndarray, steps: int, batch: int = 64) -> Any:
    """Returns the variables after so many steps."""
    @jax.jit
    def step(variables: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, moved = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved
        gradient, moved = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = links.update(gradient, state, variables["params"])
        return {**moved, "params": optax.apply_updates(variables["params"], updates)}, state
    state, rng = links.init(variables["params"]), np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.integers(len(images), size=batch)
        variables, state = step(variables, state, images[chosen], labels[chosen])
    return variables


def inputs_of(model: nn.Module, variables: Any, names: Sequence[str], images: np.ndarray) -> dict[str, Any]:
    """Returns what comes into the named layers of any Linen model at evaluation."""
    found: dict[str, Any] = {}

    def record(call: Any, arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        name = context.module.name
        if name in names and context.method_name == "__call__":
            found[str(name)] = arguments[0]
        return call(*arguments, **options)

    with nn.intercept_methods(record):
        model.apply(variables, images, train=False)
    return found


def compress(variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
    """Returns the variables of `SharedNet` from those of `Net` and what comes into its layers, by name."""
    params, stats = copy.deepcopy(variables["params"]), copy.deepcopy(variables["batch_stats"])
    found = factorize_kernels([params[name]["kernel"] for name in inputs], SHARED, UNIQUE,
                              activations=list(inputs.values()), centered=True)
    params["bases"] = {"body": found.basis}
    for name, layer in zip(inputs, found.layers, strict=True):
        params[name], stats[name] = layer.variables()["params"], layer.variables()["batch_stats"]
        norm = stats[f"{name}_norm"]
        norm["mean"], norm["var"] = norm["mean"] + layer.mean_shift, norm["var"] * layer.var_ratio
        print(f"{name}: explained energy of its outputs {100 * layer.captured:.1f} %")
    return {"params": params, "batch_stats": stats}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, compresses and fine-tunes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a small one, to see that it runs")
    depth, steps, tuning = (3, 3, 1) if parser.parse_args(arguments).tiny else (6, 250, 60)
    layers = [f"conv{number}" for number in range(depth)]
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype(np.float32), digits.target
    results = {}

    def report(what: str, model: nn.Module, variables: Any) -> None:
        logits = jax.jit(model.apply, static_argnames="train")(variables, images[:360], train=False)
        results[what] = float(np.mean(np.argmax(logits, -1) == labels[:360])), sum(
            count_by_kind(variables["params"]).values())
        print(f"{what}: test accuracy {100 * results[what][0]:.1f} %, {results[what][1]:,} parameters")

    net, shared = Net(layers), SharedNet(layers)
    variables = jax.jit(net.init, static_argnames="train")(jax.random.key(0), images[:1], train=False)
    variables = train(net, variables, optax.adam(2e-3), images[360:], labels[360:], steps)
    report("trained", net, variables)
    variables = compress(variables, inputs_of(net, variables, layers, images[360:860]))
    report("compressed", shared, variables)
    links = optax.chain(add_orthogonality_penalty(10.0, GROUPS), optax.adam(5e-4))
    variables = train(shared, variables, links, images[360:], labels[360:], tuning)
    report("fine-tuned", shared, variables)
    (before, size), (after, smaller) = results["trained"], results["fine-tuned"]
    if smaller > size / 2 or after < before - 0.02:
        sys.exit("the model is not half as large, or has lost more than two points of accuracy")


if __name__ == "__main__":
    main()
