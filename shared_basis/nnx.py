"""The public face in Flax NNX: the layer, and the basis that layers share. All else works on any tree of arrays."""

from shared_basis.nn.nnx import BasisConv, shared_basis

__all__ = ["BasisConv", "shared_basis"]
