"""Gradient magnitudes by depth, computed at a checkpoint on a batch of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from shared_basis.models import Network
from shared_basis.models.parameters import abstract_variables
from shared_basis.nn import ops
from shared_basis.nn.basis_conv import BasisConv
from shared_basis.nn.types import Array, Path, Tree
from shared_basis.optim.gradient_norms import gradient_norms, recorded_paths


def layer_paths(network: Network, image_shape: tuple[int, int, int]) -> list[Path]:
    """Returns the paths of all convolution-like layers and of the classifier, in order of computation."""
    return [module.path for module in _called(network, image_shape) if isinstance(module, (BasisConv, nn.Dense))]


@functools.cache
def block_paths(network: Network, image_shape: tuple[int, int, int]) -> list[Path]:
    """Returns the paths of all blocks, in order of computation."""
    sharing = _sharing_blocks(network)
    return [module.path for module in _called(network, image_shape) if _is_block(module.path, sharing)]


def _called(network: Network, image_shape: tuple[int, int, int]) -> list[nn.Module]:
    """Returns the modules that `network` calls, in order."""
    called: list[nn.Module] = []

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            called.append(context.module)
        return call(*args, **kwargs)

    unrolled = network.clone(scan_blocks=False)  # in a loop, blocks have no names
    variables = abstract_variables(network, image_shape)
    with nn.intercept_methods(note):
        jax.eval_shape(functools.partial(unrolled.apply, train=False), variables, jnp.zeros((1, *image_shape)))
    return called


def by_depth(layers: Sequence[str], paths: Mapping[str, Any]) -> list[str]:
    """Returns the paths of parameters, ordered by their layers' depth; shared bases come last."""
    depth = {layer: index for index, layer in enumerate(layers)}
    return sorted(paths, key=lambda path: (depth.get(path.rpartition("/")[0], len(layers)), path))


def _sharing_blocks(network: Network) -> set[Path]:
    """Returns the paths of the modules that the network declares as blocks or, without one, those around its layers."""
    paths = {(block, network.layer_path(group, block, layer)) for group, blocks in network.sharing_blocks().items()
             for block in blocks for layer in network.basis_layers()}
    return {path[:path.index(block) + 1] if block in path else path[:-1] for block, path in paths}


def _is_block(path: Path, sharing: Collection[Path]) -> bool:
    """Returns whether `path` is that of a block: one of `sharing`, except the network itself, or named like one."""
    return bool(path) and (path in sharing or (len(path) == 2 and path[1].startswith("block")))


@functools.cache
def gradient_flow(network: Network) -> Callable[..., tuple[dict[str, float], dict[str, float]]]:
    """Returns a compiled function that computes the cross entropy's gradient norms by depth, with batch statistics.

    It maps `params`, `batch_stats`, normalised images `[N, H, W, C]` and labels `[N]` to two dicts of norms by path:

    - the gradient with respect to the output of each block (if an array), ordered by depth: the root mean square over
      the images of the norm of the gradient of the batch's summed cross entropy with respect to one image's
      `[H, W, C]`. These are the gradients that may vanish or explode during backpropagation;
    - the gradient of the mean cross entropy with respect to each parameter that is recorded during training.
    """
    unrolled = network.clone(scan_blocks=False)  # in a loop, blocks have no names
    sharing = _sharing_blocks(network)

    def run(params: Tree, stats: Tree, images: Array, change: Callable[[Path, Array], Array]) -> Array:
        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            result = call(*args, **kwargs)
            ours = (context.method_name == "__call__" and _is_block(context.module.path, sharing)
                    and isinstance(result, jax.Array))
            return change(context.module.path, result) if ours else result

        with nn.intercept_methods(intercept):
            logits, _ = unrolled.apply({"params": params, "batch_stats": stats}, images, train=True,
                                       mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        return logits

    @ops.jit_for(jax.default_backend(), quick=True)
    def norms(params: Tree, stats: Tree, images: Array, labels: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        shapes: dict[Path, Any] = {}

        def note(path: Path, output: Array) -> Array:
            shapes[path] = jax.ShapeDtypeStruct(output.shape, output.dtype)
            return output
        jax.eval_shape(lambda: run(params, stats, images, note))

        def loss(params: Tree, probes: dict[str, Array]) -> Array:
            logits = run(params, stats, images, lambda path, output: output + probes["/".join(path)])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        probes = {"/".join(path): jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}
        gradient, by_block = jax.grad(loss, (0, 1))(params, probes)
        names = map("/".join, recorded_paths(params))
        return ({name: optax.tree.norm(by_block[name].astype(jnp.float32)) * len(labels) ** 0.5 for name in probes},
                dict(zip(names, gradient_norms(gradient), strict=True)))

    def flow(params: Tree, stats: Tree, images: Array, labels: Array) -> tuple[dict[str, float], dict[str, float]]:
        blocks, parameters = jax.device_get(norms(params, stats, images, labels))
        # JAX sorts dict keys alphabetically, which puts block10 before block2.
        paths = map("/".join, block_paths(unrolled, images.shape[1:]))
        return ({path: float(blocks[path]) for path in paths if path in blocks},
                {path: float(norm) for path, norm in parameters.items()})

    return flow
