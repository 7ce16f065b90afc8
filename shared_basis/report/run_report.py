"""The mode `report`: one run as a page with pictures and tables."""

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
"""What may lie in the folder beside the page."""


def report(workdir: Place, which: str = "latest", overrides: Mapping[str, Any] | None = None,
           reporter: Reporter | None = None, output: str = "", scoring: bool = True) -> dict[str, Any]:
    """Writes `report.html` and `report/` of a run.

    Where the test images or the checkpoint no longer exist, the page says so in place of the sections that need them,
    unless the caller named them.

    Args:
      which, overrides: as in `Trained.open`: the checkpoint that scores the test images one by one.
      reporter: shows the images and the progress; None for nothing.
      output: the directory to write to; empty is `workdir`.
      scoring: whether to score the test images. It takes one process that sees all devices.

    Returns:
      `workdir`, `model`, `report` (the page's path), `files` (the others' paths), `step` and `test_accuracy` of the
      checkpoint, and `missing`: why they are None, or None; `removed`: files of an earlier report that are not in
      this one; `warning`: of damaged metrics, or None.

    Raises:
      UserError: there is no such run or checkpoint, the images named by `overrides` cannot be read, or the report
        cannot be written.
    """
    run = load_run_summary(workdir)
    scores: Scores | None = None
    missing: str | None = None
    try:
        if scoring:
            scores = score(Trained.open(workdir, which, overrides), reporter or Reporter(verbosity="quiet"))
        else:
            missing = "the training had several processes, and this takes one alone."
    except UserError as error:
        if overrides or which != "latest":  # the user asks for these very images, or this checkpoint
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
    """Returns `report`'s result as human-readable lines."""
    missing = f"\nwithout confusion matrix and images: {result['missing']}" if result["missing"] else ""
    removed = f"\nremoved files of an earlier report: {', '.join(result['removed'])}" if result["removed"] else ""
    warning = f"\nwarning: {result['warning']}" if result["warning"] else ""
    return f"{result['report']}, and {len(result['files'])} pictures and tables beside it{missing}{removed}{warning}"


def after_training(workdir: Place, reporter: Reporter, scoring: bool) -> str | None:
    """Writes the report of a run that has just ended; a failure is a warning, as the run is saved.

    Returns:
      The page's path, or None.
    """
    try:
        reporter.info("writing the report …")
        result = report(workdir, reporter=reporter, scoring=scoring)
    except Exception as error:  # whatever it is, the training has not failed
        reporter.end_progress()
        reporter.warn(f"the run is saved, but not its report ({first_line(error)}); make it with --mode=report "
                      f"--workdir={workdir}")
        return None
    missing = (f" (without confusion matrix and images: {result['missing']}; complete it with --mode=report "
               f"--workdir={workdir})" if result["missing"] else "")
    reporter.info(f"report: {result['report']}{missing}")
    return str(result["report"])


def _data_name(config: DataConfig) -> str:
    """Returns the data set as a title names it: of images in a folder, the folder."""
    return PurePath(config.directory).name if config.name == "folder" else config.name


def compose(run: RunSummary, scores: Scores | None, which: str, missing: str | None) -> tuple[bytes, dict[str, bytes]]:
    """Returns the page, and the files beside it by name.

    Args:
      which: the user's name of the checkpoint of `scores`.
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
