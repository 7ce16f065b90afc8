"""Deeply shared filter bases (Kang & Kim) in JAX and Flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from shared_basis import nnx  # noqa: F401  an attribute, and not among the names that a star imports
    from shared_basis.analysis.basis_figures import draw_basis
    from shared_basis.compression.compress import compress
    from shared_basis.compression.kernels import LayerFactors, SharedFactors, factorize_kernels
    from shared_basis.compression.patches import patch_moments
    from shared_basis.config import Config
    from shared_basis.errors import UserError
    from shared_basis.interop.pytorch import load_official, load_pytorch_weights  # noqa: F401  the first is deprecated
    from shared_basis.models.base import Network, Sharing
    from shared_basis.models.check import check_network
    from shared_basis.models.parameters import count_by_kind
    from shared_basis.models.registry import create_model, register_network
    from shared_basis.models.stages import StagedNetwork
    from shared_basis.nn.basis_conv import BasisConv
    from shared_basis.nn.batch_norm import BatchNorm
    from shared_basis.nn.initializers import init_shared_bases
    from shared_basis.nn.ops import compiler_options, forms_for
    from shared_basis.optim.basis_group import BasisGroup
    from shared_basis.optim.labels import mask_by_kind, parameter_kinds
    from shared_basis.optim.orthonormal import keep_orthonormal
    from shared_basis.optim.penalty import (
        add_orthogonality_penalty,
        orthogonality_diagnostics,
        orthogonality_penalty,
    )
    from shared_basis.runs.trained import load_run
    from shared_basis.runtime.reporter import Reporter
    from shared_basis.training.train import train

    __version__: str

__all__ = [
    "BasisConv",
    "BasisGroup",
    "BatchNorm",
    "Config",
    "LayerFactors",
    "Network",
    "Reporter",
    "SharedFactors",
    "Sharing",
    "StagedNetwork",
    "UserError",
    "__version__",
    "add_orthogonality_penalty",
    "check_network",
    "compiler_options",
    "compress",
    "count_by_kind",
    "create_model",
    "draw_basis",
    "factorize_kernels",
    "forms_for",
    "init_shared_bases",
    "keep_orthonormal",
    "load_pytorch_weights",
    "load_run",
    "mask_by_kind",
    "orthogonality_diagnostics",
    "orthogonality_penalty",
    "parameter_kinds",
    "patch_moments",
    "register_network",
    "train",
]

_MODULES = {
    "analysis.basis_figures": ("draw_basis",),
    "compression.compress": ("compress",),
    "compression.kernels": ("LayerFactors", "SharedFactors", "factorize_kernels"),
    "compression.patches": ("patch_moments",),
    "config": ("Config",),
    "errors": ("UserError",),
    "interop.pytorch": ("load_official", "load_pytorch_weights"),
    "models.base": ("Network", "Sharing"),
    "models.check": ("check_network",),
    "models.parameters": ("count_by_kind",),
    "models.registry": ("create_model", "register_network"),
    "models.stages": ("StagedNetwork",),
    "nn.basis_conv": ("BasisConv",),
    "nn.batch_norm": ("BatchNorm",),
    "nn.initializers": ("init_shared_bases",),
    "nn.ops": ("compiler_options", "forms_for"),
    "optim.basis_group": ("BasisGroup",),
    "optim.labels": ("mask_by_kind", "parameter_kinds"),
    "optim.orthonormal": ("keep_orthonormal",),
    "optim.penalty": ("add_orthogonality_penalty", "orthogonality_diagnostics", "orthogonality_penalty"),
    "runs.trained": ("load_run",),
    "runtime.reporter": ("Reporter",),
    "training.train": ("train",),
}
"""The module of each public name; modules are imported on first use, so that command-line errors appear quickly."""

if not TYPE_CHECKING:  # type checkers should only see the names above

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(f"shared_basis.{module}"), name)
        if name == "nnx":
            return importlib.import_module("shared_basis.nnx")
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("shared-basis")
        if name == "ElementSet":
            from shared_basis.errors import note_renamed

            note_renamed("shared_basis.ElementSet, and its family,", "shared_basis.BasisGroup, and its reduction_group")
            return _element_set
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def _element_set(shared: Any, unique: Any = (), family: str = "") -> BasisGroup:
    """Returns a `BasisGroup` for the arguments of version 0.1."""
    from shared_basis.optim.basis_group import BasisGroup

    return BasisGroup(shared, unique, family)
