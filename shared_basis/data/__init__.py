"""Data sets by name, and the input pipelines that bring their images to the devices."""

from shared_basis.data.examples import SPLITS, Progress, Source, Spec, Split, epoch_order, no_progress
from shared_basis.data.folder import fingerprint
from shared_basis.data.registry import describe, open_source, prepare

__all__ = [
    "SPLITS",
    "Progress",
    "Source",
    "Spec",
    "Split",
    "describe",
    "epoch_order",
    "fingerprint",
    "no_progress",
    "open_source",
    "prepare",
]
