"""What a line of metrics.jsonl is, and what several of them say of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared_basis.runtime.reporter import count


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


def render_line(line: Mapping[str, Any], epochs: int) -> str:
    """Returns a line of metrics.jsonl as a human-readable line, for a run of so many `epochs`."""
    penalty = f"  penalty {line['penalty']:.1e}" if "penalty" in line else ""
    validation = (f"  validation accuracy {100 * line['validation_accuracy']:.2f} %" if "validation_accuracy" in line
                  else "")
    return (f"epoch {line['epoch']}/{epochs}  loss {line['train_loss']:.4f}  accuracy "
            f"{100 * line['train_accuracy']:.2f} %{validation}  test loss {line['test_loss']:.4f}  test accuracy "
            f"{100 * line['test_accuracy']:.2f} %{penalty}  {count(line['images_per_second'])} images/s")


def render_outcome(outcome: Mapping[str, Any]) -> str:
    """Returns `last_and_best` of a run, with the name of its `model`, as a human-readable line."""
    protocol = ("best validation epoch" if outcome["chosen_on"] == "validation" else
                "best test epoch, the published protocol, which is chosen on the test images")
    return (f"{outcome['model']}: {100 * outcome['test_accuracy']:.2f} % test accuracy after {outcome['epoch']} epochs"
            f", {100 * outcome['best_test_accuracy']:.2f} % after {outcome['best_epoch']} ({protocol})")
