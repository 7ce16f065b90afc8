"""Deeply shared filter bases (Kang & Kim) in JAX and Flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared_basis.analysis.basis_figures import draw_basis
    from shared_basis.errors import UserError
    from shared_basis.interop.pytorch import load_official
    from shared_basis.models.parameters import count_by_kind
    from shared_basis.models.registry import create_model
    from shared_basis.nn.basis_conv import BasisConv, init_shared_bases
    from shared_basis.optim.basis_group import BasisGroup
    from shared_basis.optim.labels import mask_by_kind, parameter_kinds
    from shared_basis.optim.orthonormal import keep_orthonormal
    from shared_basis.optim.penalty import (
        add_orthogonality_penalty,
        orthogonality_diagnostics,
        orthogonality_penalty,
    )

__all__ = [
    "BasisConv",
    "BasisGroup",
    "UserError",
    "add_orthogonality_penalty",
    "count_by_kind",
    "create_model",
    "draw_basis",
    "init_shared_bases",
    "keep_orthonormal",
    "load_official",
    "mask_by_kind",
    "orthogonality_diagnostics",
    "orthogonality_penalty",
    "parameter_kinds",
]

_MODULES = {
    "BasisConv": "nn.basis_conv", "BasisGroup": "optim.basis_group", "init_shared_bases": "nn.basis_conv",
    "UserError": "errors", "create_model": "models.registry", "keep_orthonormal": "optim.orthonormal",
    "load_official": "interop.pytorch", "add_orthogonality_penalty": "optim.penalty",
    "orthogonality_diagnostics": "optim.penalty", "orthogonality_penalty": "optim.penalty",
    "count_by_kind": "models.parameters", "draw_basis": "analysis.basis_figures", "mask_by_kind": "optim.labels",
    "parameter_kinds": "optim.labels",
}
"""Where each name lives: it is imported on first use, so that errors in a command line do not wait for JAX."""


def __getattr__(name: str) -> Any:
    if name == "ElementSet":
        from shared_basis.errors import note_renamed

        note_renamed("shared_basis.ElementSet, and its family,", "shared_basis.BasisGroup, and its reduction_group")
        return _element_set
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"shared_basis.{_MODULES[name]}"), name)


def _element_set(shared: Any, unique: Any = (), family: str = "") -> BasisGroup:
    """Returns a `BasisGroup`, by the arguments of version 0.1."""
    from shared_basis.optim.basis_group import BasisGroup

    return BasisGroup(shared, unique, family)
