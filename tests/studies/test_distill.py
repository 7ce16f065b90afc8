"""The study of distillation: its rows, its table, and what it refuses; it trains nothing here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from study_rows import DISTILLATION

from studies.distill import parse, recipes, table


def test_the_table_pairs_seeds_and_keeps_settings_apart() -> None:
    rows = [DISTILLATION, dataclasses.replace(DISTILLATION, seed=1, labels_accuracy=0.95, taught_accuracy=0.98),
            dataclasses.replace(DISTILLATION, seed=2, labels_accuracy=0.96, taught_accuracy=0.98),
            dataclasses.replace(DISTILLATION, train_examples=1000)]
    text = table(rows)
    # gains of 1, 3 and 2 points: 2 ± 4.303 · 1 / √3
    assert ("| digits, resnet20 | 0.35 | all | 4 | 99.00 ± 0.00 (3) | 80.00 ± 0.00 (3) | 95.67 ± 0.58 (3) | "
            "97.67 ± 0.58 (3) | +2.00 [-0.48, +4.48] |") in text
    assert "| digits, resnet20 | 0.35 | 1,000 | 4 | 99.00 (1) | 80.00 (1) | 96.00 (1) | 97.00 (1) | +1.00 |" in text


def test_both_ways_differ_in_the_teacher_alone() -> None:
    labels, taught = (recipes(parse_with_seed(), "resnet20", Path("runs/plain"))[way] for way in ("labels", "taught"))
    assert dataclasses.replace(taught, distillation=labels.distillation) == labels
    assert (taught.distillation.teacher, taught.distillation.weight) == ("runs/plain", 0.5)


def parse_with_seed() -> argparse.Namespace:
    return argparse.Namespace(**{**vars(parse(["--weight=0.5"])), "seed": 0})
