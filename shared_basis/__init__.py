"""Deeply shared filter bases (Kang & Kim) in JAX and Flax."""

from shared_basis.basis import BasisConv, ElementSet, init_shared_bases
from shared_basis.errors import UserError
from shared_basis.models import create_model
from shared_basis.official import load_official
from shared_basis.orthogonality import add_orthogonality_penalty, orthogonality_diagnostics, orthogonality_penalty
from shared_basis.orthonormality import keep_orthonormal

__all__ = [
    "BasisConv",
    "ElementSet",
    "UserError",
    "add_orthogonality_penalty",
    "create_model",
    "init_shared_bases",
    "keep_orthonormal",
    "load_official",
    "orthogonality_diagnostics",
    "orthogonality_penalty",
]
