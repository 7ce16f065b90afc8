"""Scores and predictions of trained networks."""
