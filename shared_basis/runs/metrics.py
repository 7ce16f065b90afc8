"""The metrics files of a run: reading, writing, validating and summarising their lines.

    metrics.jsonl    one JSON object per evaluation
    metrics.csv      the same as a table
    gradients.jsonl  gradient norms, one JSON object per evaluation, if recorded
    tensorboard/     the metrics as event files, if enabled
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared_basis.errors import UserError
from shared_basis.runs.tensorboard import Events
from shared_basis.runtime.files import Files, Place, csv_text, open_files
from shared_basis.runtime.reporter import count

Line = Mapping[str, Any]


class MetricsFiles:
    """The metrics files in the directory of a run.

    Damaged lines of the JSON files, which a killed run may leave, are ignored. Valid lines are ordered by `step`.
    """

    def __init__(self, path: Place, tensorboard: bool = False) -> None:
        """Sets the directory; does not access it.

        Args:
          tensorboard: whether to write metrics as event files too.

        Raises:
          UserError: see `open_files`.
        """
        self.files = open_files(path)
        self.path = self.files.path
        self._tensorboard = tensorboard
        self._events: Events | None = None

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl.

        Raises:
          UserError: the file cannot be read.
        """
        return self.read_metrics()[0]

    def read_metrics(self) -> tuple[list[dict[str, Any]], int]:
        """Returns the lines of metrics.jsonl and the number of all lines, including damaged ones."""
        return _read(self.files, "metrics.jsonl")

    def gradients(self) -> list[dict[str, Any]]:
        """Returns the lines of gradients.jsonl: `step`, `epoch`, and `norms` by parameter path."""
        return _read(self.files, "gradients.jsonl")[0]

    def rewind_metrics(self, step: int) -> None:
        """Drops metrics and gradient norms after `step`, which a run that resumes there computes again.

        Raises:
          UserError: a file cannot be read or written; either nothing was changed, or everything but the event files.
        """
        kept = _until(step, self.metrics())
        contents: dict[str, str | bytes] = {"metrics.jsonl": _text(kept), "metrics.csv": _table(kept)}
        with self._writing("metrics.jsonl"):
            if self.files.exists("gradients.jsonl"):
                contents["gradients.jsonl"] = _text(_until(step, self.gradients()))
            self.files.write(contents)
        if self._tensorboard:
            with self._writing("tensorboard"):
                self._events = Events(self.files, "tensorboard", kept, step)

    def append_metrics(self, line: Line) -> None:
        """Appends one JSON object to metrics.jsonl and rewrites metrics.csv, so that the two stay consistent.

        Raises:
          UserError: a file cannot be written.
        """
        self._append("metrics.jsonl", line)
        with self._writing("metrics.csv"):
            self.files.write({"metrics.csv": _table(self.metrics())})
        if self._events is not None:
            with self._writing("tensorboard"):
                self._events.add(line)

    def append_gradients(self, line: Line) -> None:
        """Appends one JSON object to gradients.jsonl."""
        self._append("gradients.jsonl", line)

    def _append(self, name: str, line: Line) -> None:
        with self._writing(name):
            self.files.append(name, _text([line]))

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Converts a write error to a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be written: {error.strerror}; the checkpoints are in "
                            f"{self.path / 'checkpoints'}.") from error


def _read(files: Files, name: str) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines of a file that are JSON objects with a `step`, and the total number of lines."""
    try:
        text = files.read(name).decode(errors="replace")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{files.path / name} cannot be read: {error.strerror}; repair or remove it.") from error
    written = [line for line in text.splitlines() if line.strip()]
    lines = []
    for line in written:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                lines.append(entry)
    return lines, len(written)


def _until(step: int, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["step"] <= step]


def _text(lines: Sequence[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _table(lines: Sequence[Line]) -> str:
    """Returns the lines as CSV; empty if there are none."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    return csv_text(names, ([line.get(name, "") for name in names] for line in lines)) if lines else ""


def evaluations(lines: Sequence[Line]) -> list[Line]:
    """Returns the valid evaluations among `lines` of metrics.jsonl, which users may have edited.

    A valid evaluation has whole numbers `step` ≥ `epoch` ≥ 1, and finite `test_accuracy`, `test_loss`,
    `images_per_second` and the accuracy by which the last line chooses the best epoch.
    """
    valid = [line for line in lines if _is_evaluation(line)]
    chooses = f"{chosen_on(valid[-1])}_accuracy" if valid else ""
    return [line for line in valid if math.isfinite(number(line.get(chooses)))]


def _is_evaluation(line: Line) -> bool:
    counted = all(type(line.get(name)) is int and line[name] > 0 for name in ("step", "epoch"))
    return counted and line["step"] >= line["epoch"] and all(
        math.isfinite(number(line.get(name))) for name in ("test_accuracy", "test_loss", "images_per_second"))


def number(value: Any) -> float:
    """Returns a value of a line as a float; NaN if it is not a finite number."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


def chosen_on(metrics: Line) -> str | None:
    """Returns the split whose accuracy determines the best checkpoint.

    'validation' if `metrics` contains it; otherwise 'test', the published protocol, whose result is optimistically
    biased, as it selects the model on the test images; None if `metrics` contains neither.
    """
    return next((name for name in ("validation", "test") if f"{name}_accuracy" in metrics), None)


def last_and_best(lines: Sequence[Line]) -> dict[str, Any]:
    """Returns the last of `lines` (at least one), with `chosen_on` and the best line's epoch and test accuracy.

    The latter are `best_epoch` and `best_test_accuracy`.
    """
    chosen = chosen_on(lines[-1])
    best = max(reversed(lines), key=lambda line: line[f"{chosen}_accuracy"])  # the last one on ties, like Orbax
    return {**lines[-1], "chosen_on": chosen, "best_epoch": best["epoch"], "best_test_accuracy": best["test_accuracy"]}


def render_line(line: Mapping[str, Any], epochs: int) -> str:
    """Returns a line of metrics.jsonl as human-readable text, for a run of `epochs` epochs."""
    penalty = f"  penalty {line['penalty']:.1e}" if "penalty" in line else ""
    validation = (f"  validation accuracy {100 * line['validation_accuracy']:.2f} %" if "validation_accuracy" in line
                  else "")
    speed = line["images_per_second"]
    pace = f"  {count(speed)} images/s" if speed else ""  # 0 if no training was timed
    return (f"epoch {line['epoch']}/{epochs}  loss {line['train_loss']:.4f}  accuracy "
            f"{100 * line['train_accuracy']:.2f} %{validation}  test loss {line['test_loss']:.4f}  test accuracy "
            f"{100 * line['test_accuracy']:.2f} %{penalty}{pace}")


def render_outcome(outcome: Mapping[str, Any]) -> str:
    """Returns the result of `last_and_best`, with the `model` name added, as human-readable text."""
    protocol = ("best validation epoch" if outcome["chosen_on"] == "validation" else
                "best test epoch, chosen on the test images as in the paper")
    last = f"{outcome['model']}: {100 * outcome['test_accuracy']:.2f} % test accuracy after {outcome['epoch']} epochs"
    if outcome["best_epoch"] == outcome["epoch"]:
        return f"{last} ({protocol})"
    return (f"{last}, {100 * outcome['best_test_accuracy']:.2f} % after {outcome['best_epoch']} ({protocol}; use it "
            "with --checkpoint=best)")
