"""Evaluation of a checkpoint on all test images, each scored exactly once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared_basis.data import feeds
from shared_basis.evaluation.evaluator import make_evaluator
from shared_basis.runs.metrics import chosen_on
from shared_basis.runs.trained import Trained
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import raise_on_all_processes
from shared_basis.runtime.files import Place
from shared_basis.runtime.reporter import Reporter


def evaluate(workdir: Place, which: str = "latest", overrides: Mapping[str, Any] | None = None,
             reporter: Reporter | None = None) -> dict[str, Any]:
    """Scores a checkpoint of `workdir` on the test images.

    Args:
      which, overrides: see `Trained.open`.
      reporter: shows the source of the images and progress; None shows nothing.

    Returns:
      `workdir`, `step`, `model`, `test_loss`, `test_accuracy`, `test_accuracy_top5`, `test_examples`, `num_classes`,
      and `chosen_on`: for 'best' the images it was chosen on, 'validation' or 'test' (the published protocol);
      otherwise None.

    Raises:
      UserError: see `Trained.open`; or the data does not match the run.
    """
    reporter = reporter or Reporter(verbosity="quiet")
    with raise_on_all_processes():
        trained = Trained.open(workdir, which, overrides)
    config, mesh = trained.config, trained.mesh
    with memory.oom_as_user_error(config, "train.eval_batch_size"):
        with raise_on_all_processes():
            source = trained.open_source(reporter)
        with raise_on_all_processes():  # separate, as processes communicate in it
            images = feeds.load(source, trained.images, mesh, reporter)
        evaluator = make_evaluator(trained.model, config.data,
                                   images.batches("test", config.train.eval_batch_size, mesh), mesh)
        show = reporter.progress("scoring test images")
        scores = evaluator(trained.variables, lambda scored: show(scored, images.count("test")))
        reporter.end_progress()  # not ended yet if broken images were skipped
    return {"workdir": str(trained.run.path), "step": trained.step, "model": config.model.name,
            "test_loss": scores["loss"], "test_accuracy": scores["accuracy"],
            "test_accuracy_top5": scores["accuracy_top5"], "test_examples": int(scores["count"]),
            "num_classes": len(trained.spec.classes),
            "chosen_on": chosen_on(trained.checkpoints.metrics(trained.step) or {}) if which == "best" else None}


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `evaluate` as a human-readable line."""
    chosen = {None: "", "validation": " (best validation epoch)",
              "test": " (best test epoch, chosen on these images as in the paper)"}[
                  result["chosen_on"]]
    top5 = f", top-5 {100 * result['test_accuracy_top5']:.2f} %" if result["num_classes"] > 5 else ""  # otherwise 100 %
    return (f"{result['model']} at step {result['step']:,} of {result['workdir']}{chosen}: test accuracy "
            f"{100 * result['test_accuracy']:.2f} %{top5}, loss {result['test_loss']:.4f}, on "
            f"{result['test_examples']:,} images")
