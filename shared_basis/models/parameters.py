"""Counts parameters and multiply-accumulates of a network by abstract evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from shared_basis.nn.ops import portable
from shared_basis.nn.types import Array, Tree
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.labels import KINDS, parameter_kinds
from shared_basis.optim.paths import leaves_by_path


def tree_size(tree: Tree) -> int:
    """Returns the number of elements in all arrays of `tree`; unlike `optax.tree.size`, also of abstract ones."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_parameters(params: Tree) -> dict[str, int]:
    """Returns the number of parameters under each top-level name, for arrays or abstract shapes."""
    return {name: tree_size(tree) for name, tree in params.items()}


def count_by_kind(params: Tree, basis_groups: Iterable[BasisGroup] = (), *,
                  labels: Tree | None = None) -> dict[str, int]:
    """Returns the number of parameters of each kind, in any tree of arrays or abstract shapes.

    Args:
      params: the tree; all leaves are counted.
      basis_groups: select its bases, so that arrays with other names count as 'basis'.
      labels: a tree like `params` of user-defined kinds, instead of those of `parameter_kinds`.

    Returns:
      Counts of 'basis', 'coefficients', 'kernel', 'norm', 'bias' and 'other', or of the kinds in `labels`. Shared bases
      are counted once, as they are a single array of the tree.

    Raises:
      KeyError, ValueError, TypeError: `basis_groups` select no bases in `params`; `labels` has another structure.
    """
    leaves = leaves_by_path(params)
    kinds = leaves_by_path(parameter_kinds(params, basis_groups) if labels is None else labels)
    if kinds.keys() != leaves.keys():
        raise ValueError("labels must be a tree like params, with a string in place of each array")
    counts = dict.fromkeys(KINDS, 0) if labels is None else {}
    for path, leaf in leaves.items():
        counts[kinds[path]] = counts.get(kinds[path], 0) + math.prod(leaf.shape)
    return counts


def count_macs(model: nn.Module, variables: Tree, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Returns the multiply-accumulates for one image `[H, W, C]` under each top-level module, in evaluation mode.

    Counts convolutions and matrix products, with all kernel taps, as in published tables (one MAC is two FLOPs). Reads
    the traced program, so it works for any Flax model; nothing is executed. Products in a method of the model itself
    are counted under the name of its class.
    """
    return macs_of(model, trace(model, variables, image_shape))


def macs_of(model: nn.Module, program: Any) -> dict[str, int]:
    """Returns `count_macs` for a `program` from `trace` of `model`."""
    macs: Counter[str] = Counter()
    for scope, count in _macs(program.jaxpr):
        # Scopes are Network/group1/… or, within a method other than __call__, Network.method/group1/…
        parts = [part for part in scope.split("/") if part.partition(".")[0] != type(model).__name__]
        macs[parts[0] if parts else type(model).__name__] += count
    return dict(macs)


def trace(model: nn.Module, variables: Tree, image_shape: tuple[int, int, int]) -> Any:
    """Returns the program (jaxpr) from `variables`, which may be abstract, and one image `[H, W, C]` to logits."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with portable():  # traces each operation separately
        return jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)


def _macs(jaxpr: Any, scope: str = "", repeats: int = 1) -> Iterator[tuple[str, int]]:
    """Yields `(module path, multiply-accumulates)` for each convolution and matrix product of `jaxpr`."""
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}".strip("/")
        if eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval, eqn.params["dimension_numbers"]
            taps = math.prod(kernel.shape) // kernel.shape[numbers.rhs_spec[0]]
            yield here, repeats * math.prod(eqn.outvars[0].aval.shape) * taps
        elif eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            length = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
            yield here, repeats * math.prod(eqn.outvars[0].aval.shape) * length
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                body = getattr(inner, "jaxpr", inner)  # closed or open
                if hasattr(body, "eqns"):
                    yield from _macs(body, here, repeats * eqn.params.get("length", 1))


def init_variables(model: nn.Module, key: Array, image_shape: tuple[int, int, int]) -> Mapping[str, Tree]:
    """Initialises `model` for images `[H, W, C]`; returns `params` and `batch_stats` (empty without statistics)."""
    return {"batch_stats": {}, **model.init(key, jnp.zeros((1, *image_shape)), train=False)}


def abstract_variables(model: nn.Module, image_shape: tuple[int, int, int]) -> Mapping[str, Tree]:
    """Returns shapes and dtypes of the result of `init_variables`, without computing it."""
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))
