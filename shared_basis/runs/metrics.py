"""What a line of metrics.jsonl is, and what several of them say of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def chosen_on(metrics: Mapping[str, Any]) -> str | None:
    """Returns the images whose accuracy chooses the best checkpoint.

    'validation' if there are such images in `metrics`; otherwise 'test', the published protocol, whose figure is too
    good, as the test images have a say in it; None if `metrics` holds neither.
    """
    return next((name for name in ("validation", "test") if f"{name}_accuracy" in metrics), None)


def last_and_best(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns likewise what `lines` of metrics.jsonl, one at least, say."""
    chosen = chosen_on(lines[-1])
    best = max(reversed(lines), key=lambda line: line[f"{chosen}_accuracy"])  # of equal ones the last, as Orbax
    return {**lines[-1], "chosen_on": chosen, "best_epoch": best["epoch"], "best_test_accuracy": best["test_accuracy"]}


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Returns whether a line of metrics.jsonl, which anyone may have edited, holds what makes it an evaluation."""
    counted = all(type(line.get(name)) is int and line[name] > 0 for name in ("step", "epoch"))
    return counted and line["step"] >= line["epoch"] and all(
        math.isfinite(number(line.get(name))) for name in ("test_accuracy", "test_loss", "images_per_second"))


def number(value: Any) -> float:
    """Returns a value of a line as a finite float; NaN if it is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan
