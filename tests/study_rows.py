"""A row of each study that keeps rows, as the tests have them."""

from __future__ import annotations

from studies.compress import CompressionRow
from studies.distill import DistillationRow
from studies.transfer import TransferRow

COMPRESSION = CompressionRow(
    "2026-11-24", "abc1234", "python -m studies.compress", "digits", "resnet20", 0, 0.5, "resnet20-s13u0", 133410,
    2344576, 269434, 2516608, 0.991549, 0.957746, 4, 0.99, "24", "0.9887", 355, 539060, 1083854, 0.99, 0.0001756, 1.08,
    9)
DISTILLATION = DistillationRow(
    "2026-11-26", "abc1234", "python -m studies.distill", "digits", "resnet20", 0.35, 4, 0.9, 4.0, 0, 0,
    "resnet20-s13u0", 0.99, 0.8, 0.96, 0.97, 355)
TRANSFER = TransferRow(
    "2026-11-26", "abc1234", "python -m studies.transfer", "cifar", "resnet20", 5, 10000, 12, 5, 500, 20, 0, 0.8, 0.5,
    0.6)
