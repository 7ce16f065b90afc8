"""Whether a network computes what it declares: it uses its shared arrays, and its layers are where it says."""

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
"""The collections of variables that training carries from step to step, and checkpoints hold."""


def check_network(model: Network, image_shape: tuple[int, int, int]) -> None:
    """Checks, by abstract evaluation for images `[H, W, C]`, that `model` computes what its methods declare.

    Otherwise it would train without sharing, or without penalty, and nobody would notice. The command line checks each
    network that it trains or counts.

    Raises:
      UserError: an array that is declared as shared is not a parameter, or the logits do not depend on it; a layer or
        basis is not at the path that the network says; a layer's coefficients are too few for its basis; or the
        network has variables beside parameters and batch statistics.
    """
    check_declarations(model)
    variables = abstract_variables(model, image_shape)
    check_program(model, variables, trace(model, variables, image_shape))


def check_declarations(model: Network) -> None:
    """Checks, as the first part of `check_network`, that the answers of the network's methods fit one another.

    Raises:
      UserError: they do not.
    """
    sharing = model.sharing
    declared = {group: set(named) for group, named in model.shared_shapes().items() if named}
    wanted = {name for _, name in sharing.layers}
    if (sharing.shared_rank or sharing.templates) and not sharing.layers:
        raise _error(model, "is to share, and basis_layers() names no layer: name those that are to have a basis.")
    if wanted and not declared:
        raise _error(model, f"is to share {_listed(wanted)}, and shared_shapes() declares no array: give the shape of "
                     "each by group and name, for the names in self.sharing.layers.")
    for group, names in declared.items():
        if names - wanted:
            raise _error(model, f"declares {_listed(f'{group}/{name}' for name in names - wanted)} in shared_shapes(), "
                         f"where layers share {_listed(wanted)}: take the names from self.sharing.layers.")
        if group not in model.sharing_blocks():
            raise _error(model, f"declares shared arrays of group {group!r}, and sharing_blocks() names "
                         f"{_listed(model.sharing_blocks())}: name the blocks of {group!r} there.")


def check_program(model: Network, variables: Mapping[str, Tree], program: Any) -> None:
    """Checks the rest of `check_network` where `abstract_variables` and `trace` have been called already.

    Raises:
      UserError: as `check_network`.
    """
    if others := set(variables) - set(CARRIED):
        raise _error(model, f"has variables of {_listed(others)}; training keeps {' and '.join(CARRIED)} alone: keep "
                     "running averages in batch_stats.")
    params = leaves_by_path(variables["params"])
    for path, shape in _shared_arrays(model):
        if path not in params or params[path].shape != shape:
            raise _error(model, f"declares {'/'.join(path)} {list(shape)} in shared_shapes() and has no such "
                         "parameter: call self.shared_arrays() once in its compact method, hand them to the layers.")
    # The first inputs of the program are the variables.
    _, used = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    is_used = dict(zip(leaves_by_path(variables), used, strict=False))
    for path, _ in _shared_arrays(model):
        if not is_used["params", *path]:
            raise _error(model, f"declares {'/'.join(path)} and its logits do not depend on it: hand it to the layers "
                         "that share it, e.g. layer(x, self.shared_by_layer(bases, group)[name], train=train).")
    _check_layers(model, params)
    try:
        groups = model.basis_groups("shared+unique")
    except UserError:  # some networks do not admit it
        groups = model.basis_groups("shared")
    for named in (selector for group in groups for selector in (*group.shared, *group.unique)):
        if isinstance(named, tuple) and named not in params:
            raise _absent(model, named, params)


def _shared_arrays(model: Network) -> Iterator[tuple[Path, tuple[int, ...]]]:
    for group, named in model.shared_shapes().items():
        for name, shape in named.items():
            yield ("bases", group, name), tuple(shape)


def _check_layers(model: Network, params: Mapping[Path, Any]) -> None:
    """Raises `UserError` unless each layer is where it is said to be, with coefficients for all of its basis."""
    if model.sharing.whole_filters:  # whose layers own nothing
        return
    uses = dict(model.sharing.layers)
    parts = {path[:length] for path in params for length in range(len(path))}
    for group, layers in model.basis_layer_paths().items():
        for path, layer in layers.items():
            if path not in parts:
                raise _absent(model, path, params)
            if model.sharing.unique_rank and (*path, "unique") not in params:
                raise _error(model, f"is to have unique elements, and {'/'.join(path)} has none: hand it "
                             "unique_rank=self.sharing.unique_rank.")
            arrays = [params.get((*path, "unique")), params.get(("bases", group, uses.get(layer, "")))]
            rank = sum(array.shape[-1] for array in arrays if array is not None)
            coefficients = params.get((*path, "coefficients"))
            if coefficients is not None and coefficients.shape[0] != rank:
                raise _error(model, f"says that {'/'.join(path)} has a basis of {rank} elements, and it has "
                             f"coefficients for {coefficients.shape[0]}: hand it the shared array of its group.")


def _absent(model: Network, path: Path, params: Mapping[Path, Any]) -> UserError:
    near = sorted({"/".join(known[:-1]) for known in params if known[-1] in ("coefficients", "kernel")})
    return _error(model, f"says that it has {'/'.join(path)}, by sharing_blocks() and basis_layers(), and its "
                  "parameters have no such path: call its modules so, or return their paths from "
                  f"layer_path(group, block, layer). Layers: {_listed(near[:5])}{', …' * (len(near) > 5)}.")


def _error(model: Network, what: str) -> UserError:
    return UserError(f"network {type(model).__name__} {what}")


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
