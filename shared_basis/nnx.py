"""The public API for Flax NNX: the layer and the shared basis. Everything else works with any tree of arrays."""

from shared_basis.nn.nnx import BasisConv, shared_basis

__all__ = ["BasisConv", "shared_basis"]
