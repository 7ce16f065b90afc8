"""Checks that a network computes what it declares: that shared arrays are used, and layers are at their paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jax.interpreters.partial_eval import dce_jaxpr

from shared_basis.errors import UserError
from shared_basis.models.base import Network
from shared_basis.models.parameters import abstract_variables, trace
from shared_basis.nn.types import Path, Tree
from shared_basis.optim.paths import leaves_by_path

CARRIED = ("params", "batch_stats")
"""The variable collections that training updates and checkpoints store."""


def check_network(model: Network, image_shape: tuple[int, int, int]) -> None:
    """Checks, by abstract evaluation for images `[H, W, C]`, that `model` computes what its methods declare.

    Otherwise it might silently train without sharing or without penalty. The command line checks every network that it
    trains or counts.

    Raises:
      UserError: a declared shared array is not a parameter, or the logits do not depend on it; a layer or basis is not
        at its declared path; a layer has too few coefficients for its basis; or the network has variables other than
        parameters and batch statistics.
    """
    check_declarations(model)
    variables = abstract_variables(model, image_shape)
    check_program(model, variables, trace(model, variables, image_shape))


def check_declarations(model: Network) -> None:
    """Checks that the declarations of the network's methods are consistent; the first part of `check_network`.

    Raises:
      UserError: they are inconsistent.
    """
    sharing = model.sharing
    declared = {group: set(named) for group, named in model.shared_shapes().items() if named}
    wanted = {name for _, name in sharing.layers}
    if (sharing.shared_rank or sharing.templates) and not sharing.layers:
        raise _error(model, "should share, but basis_layers() returns no layers: return those that use a basis.")
    if wanted and not declared:
        raise _error(model, f"should share {_listed(wanted)}, but shared_shapes() is empty: return the shape of "
                     "each by group and name, with the names in self.sharing.layers.")
    for group, names in declared.items():
        if names - wanted:
            raise _error(model, f"declares {_listed(f'{group}/{name}' for name in names - wanted)} in shared_shapes(), "
                         f"but layers share {_listed(wanted)}: use the names in self.sharing.layers.")
        if group not in model.sharing_blocks():
            raise _error(model, f"declares shared arrays of group {group!r}, but sharing_blocks() returns "
                         f"{_listed(model.sharing_blocks())}: add the blocks of {group!r}.")


def check_program(model: Network, variables: Mapping[str, Tree], program: Any) -> None:
    """Performs the rest of `check_network`, with given results of `abstract_variables` and `trace`.

    Raises:
      UserError: see `check_network`.
    """
    if others := set(variables) - set(CARRIED):
        raise _error(model, f"has variables of {_listed(others)}; training only updates {' and '.join(CARRIED)}: store "
                     "running averages in batch_stats.")
    params = leaves_by_path(variables["params"])
    for path, shape in _shared_arrays(model):
        if path not in params or params[path].shape != shape:
            raise _error(model, f"declares {'/'.join(path)} {list(shape)} in shared_shapes() but has no such "
                         "parameter: call self.shared_arrays() once in its compact method, pass them to the layers.")
    # The first inputs of the program are the variables.
    _, used = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    is_used = dict(zip(leaves_by_path(variables), used, strict=False))
    for path, _ in _shared_arrays(model):
        if not is_used["params", *path]:
            raise _error(model, f"declares {'/'.join(path)} but its logits do not depend on it: pass it to the layers "
                         "that share it, e.g. layer(x, self.shared_by_layer(bases, group)[name], train=train).")
    _check_layers(model, params)
    try:
        groups = model.basis_groups("shared+unique")
    except UserError:  # not supported by some networks
        groups = model.basis_groups("shared")
    for named in (selector for group in groups for selector in (*group.shared, *group.unique)):
        if isinstance(named, tuple) and named not in params:
            raise _absent(model, named, params)


def _shared_arrays(model: Network) -> Iterator[tuple[Path, tuple[int, ...]]]:
    for group, named in model.shared_shapes().items():
        for name, shape in named.items():
            yield ("bases", group, name), tuple(shape)


def _check_layers(model: Network, params: Mapping[Path, Any]) -> None:
    """Raises `UserError` unless each layer is at its declared path, with coefficients for all elements of its basis."""
    if model.sharing.whole_filters:  # layers have no parameters
        return
    uses = dict(model.sharing.layers)
    parts = {path[:length] for path in params for length in range(len(path))}
    for group, layers in model.basis_layer_paths().items():
        for path, layer in layers.items():
            if path not in parts:
                raise _absent(model, path, params)
            if model.sharing.unique_rank and (*path, "unique") not in params:
                raise _error(model, f"should have unique elements, but {'/'.join(path)} has none: set "
                             "unique_rank=self.sharing.unique_rank.")
            arrays = [params.get((*path, "unique")), params.get(("bases", group, uses.get(layer, "")))]
            rank = sum(array.shape[-1] for array in arrays if array is not None)
            coefficients = params.get((*path, "coefficients"))
            if coefficients is not None and coefficients.shape[0] != rank:
                raise _error(model, f"declares a basis of {rank} elements for {'/'.join(path)}, which has "
                             f"coefficients for {coefficients.shape[0]}: pass it the shared array of its group.")


def _absent(model: Network, path: Path, params: Mapping[Path, Any]) -> UserError:
    near = sorted({"/".join(known[:-1]) for known in params if known[-1] in ("coefficients", "kernel")})
    return _error(model, f"declares {'/'.join(path)} in sharing_blocks() and basis_layers(), but its "
                  "parameters have no such path: rename its modules, or return their paths from "
                  f"layer_path(group, block, layer). Layers: {_listed(near[:5])}{', …' * (len(near) > 5)}.")


def _error(model: Network, what: str) -> UserError:
    return UserError(f"network {type(model).__name__} {what}")


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
