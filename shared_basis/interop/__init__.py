"""Weights of PyTorch, in and out."""
