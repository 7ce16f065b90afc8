"""The report of one run: gathers, paints, lays out the page and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_basis.errors import UserError
from shared_basis.evaluation.per_example import Scores, confusion_csv, errors_csv, score
from shared_basis.report import files, plots, sections
from shared_basis.report.html import element, page, section
from shared_basis.report.run_summary import RunSummary, load_run_summary
from shared_basis.runs.trained import Trained
from shared_basis.runtime.reporter import Reporter

FILES = (*(f"{name}.png" for name in ("loss", "accuracy", "learning_rate", "penalty", "norms", "coherence",
                                      "parameters", "macs", "confusion", "errors")), "confusion.csv", "errors.csv")
"""What may lie in the folder beside the page."""


def report(workdir: str | Path, which: str = "latest", overrides: Mapping[str, Any] | None = None,
           reporter: Reporter | None = None, output: str = "", scoring: bool = True) -> dict[str, Any]:
    """Writes `report.html` and `report/` of a run.

    Where the test images or the checkpoint are not there any more the page says so in the place of what needs them,
    unless the caller named them.

    Args:
      which, overrides: as in `Trained.open`: the checkpoint that scores the test images one by one.
      reporter: is told of the images and of the progress; None for none.
      output: the directory to write to; empty is `workdir`.
      scoring: whether to score the test images. It takes one process that sees all devices.

    Returns:
      `workdir`, `model`, `report` (the page's path), `files` (the others' paths), `step` and `test_accuracy` of the
      checkpoint, and `missing`: why they are None, or None; `removed`: files of an earlier report that this one has no
      counterpart of; `warning`: of damaged metrics, or None.

    Raises:
      UserError: there is no such run or checkpoint, the images named by `overrides` cannot be read, or the report
        cannot be written.
    """
    facts = load_run_summary(workdir)
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
    directory = Path(output or workdir)
    content, beside = compose(facts, scores, which, missing)
    removed = files.write(directory, content, beside, FILES)
    return {"workdir": str(facts.path), "model": facts.config.model.name, "report": str(directory / files.PAGE),
            "files": [str(directory / files.FOLDER / name) for name in beside],
            "step": scores.step if scores else None, "test_accuracy": scores.accuracy if scores else None,
            "missing": missing, "removed": removed, "warning": facts.warning or None}


def render(result: Mapping[str, Any]) -> str:
    """Returns `report`'s result as lines for a person."""
    missing = f"\nwithout what needs the test images: {result['missing']}" if result["missing"] else ""
    removed = f"\nremoved, of an earlier report: {', '.join(result['removed'])}" if result["removed"] else ""
    warning = f"\nwarning: {result['warning']}" if result["warning"] else ""
    return f"{result['report']}, and {len(result['files'])} pictures and tables beside it{missing}{removed}{warning}"


def after_training(workdir: str | Path, reporter: Reporter, scoring: bool) -> str | None:
    """Writes the report of a run that has just ended; what prevents it is a warning, as the run is saved.

    Returns:
      The page's path, or None.
    """
    try:
        reporter.info("writing the report …")
        result = report(workdir, reporter=reporter, scoring=scoring)
    except Exception as error:  # whatever it is, the training has not failed
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reporter.end_progress()
        reporter.warn(f"the run is saved, but not its report ({reason}); make it with --mode=report --workdir={workdir}")
        return None
    missing = (f" (without what needs the test images: {result['missing']}; make it whole with --mode=report "
               f"--workdir={workdir})" if result["missing"] else "")
    reporter.info(f"report: {result['report']}{missing}")
    return str(result["report"])


def compose(facts: RunSummary, scores: Scores | None, which: str, missing: str | None) -> tuple[bytes, dict[str, bytes]]:
    """Returns the page, and the files beside it by name.

    Args:
      which: what the user calls the checkpoint of `scores`.
      missing: why there are no `scores`.
    """
    learning, bases, counts = plots.learning_curves(facts), plots.basis_curves(facts), plots.count_bars(facts)
    pictures = [*learning, *bases, *counts]
    tables: dict[str, bytes] = {}
    if scores:
        confusion = plots.confusion(scores, facts.classes)
        pictures.append(confusion)
        tables = {"confusion.csv": confusion_csv(scores, facts.classes),
                  "errors.csv": errors_csv(scores, facts.classes), "errors.png": plots.errors(scores, facts.classes)}
        judged = [sections.confusion_matrix(confusion, scores, facts, which),
                  sections.worst_images(scores, facts.classes)]
    else:
        judged = [section("Test images", element("p", "There is no confusion matrix, and there are no single images "
                                                      f"here: {missing}"))]
    beside = files.pictures_as_files(pictures) | tables
    content = page(
        f"{facts.config.model.name} on {facts.config.data.name}",
        element("p", sections.headline(facts)), sections.cards(facts), sections.learning_curves(facts, learning),
        sections.filter_bases(facts, bases), *judged, sections.counts(facts, counts), sections.run_facts(facts),
        sections.file_list(sorted(beside)))
    return content, beside
