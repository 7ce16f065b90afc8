"""The mode `report`: a page with plots and tables on a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from shared_basis.config import DataConfig
from shared_basis.errors import UserError
from shared_basis.evaluation.per_example import Scores, confusion_csv, errors_csv, score
from shared_basis.report import plots, sections
from shared_basis.report.html import element, page, section
from shared_basis.report.output import FOLDER, PAGE, picture_files, write_report
from shared_basis.report.run_summary import RunSummary, load_run_summary
from shared_basis.runs.trained import Trained
from shared_basis.runtime.files import Place, as_path, first_line
from shared_basis.runtime.reporter import Reporter

FILES = (*(f"{name}.png" for name in ("loss", "accuracy", "learning_rate", "penalty", "norms", "coherence",
                                      "parameters", "macs", "confusion", "errors")), "confusion.csv", "errors.csv")
"""All files that may be in the folder next to the page."""


def report(workdir: Place, which: str = "latest", overrides: Mapping[str, Any] | None = None,
           reporter: Reporter | None = None, output: str = "", scoring: bool = True) -> dict[str, Any]:
    """Writes `report.html` and `report/` of a run.

    If the test images or the checkpoint no longer exist, the page says so instead of the sections that need them,
    unless the caller selected them explicitly.

    Args:
      which, overrides: see `Trained.open`; the checkpoint with which the test images are scored.
      reporter: shows the images and progress; None shows nothing.
      output: the directory to write to; by default `workdir`.
      scoring: whether to score the test images, which requires a single process.

    Returns:
      `workdir`, `model`, `report` (the page's path), `files` (the paths of other files), `step` and `test_accuracy` of
      the checkpoint, `missing`: why these are None, or None; `removed`: removed files of an earlier report; and
      `warning`: about damaged metrics, or None.

    Raises:
      UserError: there is no such run or checkpoint, images selected by `overrides` cannot be read, or the report cannot
        be written.
    """
    run = load_run_summary(workdir)
    scores: Scores | None = None
    missing: str | None = None
    try:
        if scoring:
            scores = score(Trained.open(workdir, which, overrides), reporter or Reporter(verbosity="quiet"))
        else:
            missing = "training used several processes, and scoring requires a single one."
    except UserError as error:
        if overrides or which != "latest":  # selected explicitly by the user
            raise
        missing = str(error)
    directory = as_path(output) if output else run.path
    content, beside = compose(run, scores, which, missing)
    removed = write_report(directory, content, beside, FILES)
    return {"workdir": str(run.path), "model": run.config.model.name, "report": str(directory / PAGE),
            "files": [str(directory / FOLDER / name) for name in beside],
            "step": scores.step if scores else None, "test_accuracy": scores.accuracy if scores else None,
            "missing": missing, "removed": removed, "warning": run.warning or None}


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `report` as human-readable lines."""
    missing = f"\nwithout confusion matrix and images: {result['missing']}" if result["missing"] else ""
    removed = f"\nremoved files of an earlier report: {', '.join(result['removed'])}" if result["removed"] else ""
    warning = f"\nwarning: {result['warning']}" if result["warning"] else ""
    return f"{result['report']}, and {len(result['files'])} plots and tables next to it{missing}{removed}{warning}"


def after_training(workdir: Place, reporter: Reporter, scoring: bool) -> str | None:
    """Writes the report of a run that has just ended; a failure is only a warning, as the run is saved.

    Returns:
      The page's path, or None on failure.
    """
    try:
        reporter.info("writing the report …")
        result = report(workdir, reporter=reporter, scoring=scoring)
    except Exception as error:  # a failed report must not fail the training
        reporter.end_progress()
        reporter.warn(f"the run was saved, but the report failed ({first_line(error)}); make it with --mode=report "
                      f"--workdir={workdir}")
        return None
    missing = (f" (without confusion matrix and images: {result['missing']}; complete it with --mode=report "
               f"--workdir={workdir})" if result["missing"] else "")
    reporter.info(f"report: {result['report']}{missing}")
    return str(result["report"])


def _data_name(config: DataConfig) -> str:
    """Returns the data set's name for titles; for a folder of images, the folder's name."""
    return PurePath(config.directory).name if config.name == "folder" else config.name


def compose(run: RunSummary, scores: Scores | None, which: str, missing: str | None) -> tuple[bytes, dict[str, bytes]]:
    """Returns the page and the files next to it by name.

    Args:
      which: the checkpoint of `scores`, as given by the user.
      missing: why there are no `scores`.
    """
    learning, bases, counts = plots.learning_curves(run), plots.basis_curves(run), plots.count_bars(run)
    pictures = [*learning, *bases, *counts]
    tables: dict[str, bytes] = {}
    if scores:
        confusion = plots.confusion(scores, run.classes)
        pictures.append(confusion)
        tables = {"confusion.csv": confusion_csv(scores, run.classes),
                  "errors.csv": errors_csv(scores, run.classes), "errors.png": plots.worst_images(scores, run.classes)}
        judged = [sections.confusion_matrix(confusion, scores, run, which),
                  sections.worst_images(scores, run.classes)]
    else:
        judged = [section("Test images", element("p", "The confusion matrix and single images are not available: "
                                                      f"{missing}"))]
    beside = picture_files(pictures) | tables
    content = page(
        f"{run.config.model.name} on {_data_name(run.config.data)}",
        element("p", sections.headline(run)), sections.cards(run), sections.learning_curves(run, learning),
        sections.filter_bases(run, bases), *judged, sections.counts(run, counts), sections.run_facts(run),
        sections.file_list(sorted(beside)))
    return content, beside
