"""Evaluation and prediction with trained networks."""
