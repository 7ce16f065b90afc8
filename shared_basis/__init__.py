"""Deeply shared filter bases (Kang & Kim) in JAX and Flax."""

from shared_basis.errors import UserError
from shared_basis.interop.pytorch import load_official
from shared_basis.models import create_model
from shared_basis.nn.basis_conv import BasisConv, BasisGroup, init_shared_bases
from shared_basis.optim.orthonormal import keep_orthonormal
from shared_basis.optim.penalty import add_orthogonality_penalty, orthogonality_diagnostics, orthogonality_penalty

__all__ = [
    "BasisConv",
    "BasisGroup",
    "UserError",
    "add_orthogonality_penalty",
    "create_model",
    "init_shared_bases",
    "keep_orthonormal",
    "load_official",
    "orthogonality_diagnostics",
    "orthogonality_penalty",
]
