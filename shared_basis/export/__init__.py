"""Exports trained networks to files for inference."""
