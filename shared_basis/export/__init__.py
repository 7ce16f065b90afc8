"""Inference functions as files."""
