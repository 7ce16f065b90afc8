"""The modes of the command line, as functions of plain arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from shared_basis import data, evaluate, importing, inspection, prediction, summary, train
from shared_basis.config import Config
from shared_basis.devices import leads
from shared_basis.errors import UserError
from shared_basis.screen import Screen
from shared_basis.workdir import Workdir


def run(mode: str, config: Config, workdir: str, *, workdir_given: bool, checkpoint: str, against: str,
        images: Sequence[str], output: str, overrides: Mapping[str, Any], screen: Screen) -> tuple[dict[str, Any], str]:
    """Runs a mode; returns its result, and the same for a person.

    Args:
      mode: train, evaluate, predict, inspect, summary, prepare or import.
      config: the recipe. A run in `workdir` has its own: `evaluate`, `predict` and `inspect` take that, and `summary`
        if `workdir_given`.
      checkpoint: which one to evaluate, predict by or inspect, or the file to import.
      against: another checkpoint to compare the inspected one with.
      images, output: files and directories to predict, and the file for the result.
      overrides: the fields that the user set, by dotted path.

    Raises:
      UserError, KeyboardInterrupt: as the mode.
    """
    if jax.process_count() > 1 and mode not in ("train", "evaluate"):
        raise UserError(f"--distributed: --mode={mode} is for one process; only train and evaluate are shared.")
    if mode == "evaluate":
        result = evaluate.evaluate(workdir, checkpoint, overrides, screen.line)
        return result, evaluate.render(result)
    if mode == "predict":
        result = prediction.predict(workdir, images, checkpoint, overrides, output)
        return result, prediction.render(result)
    if mode == "inspect":
        result = inspection.inspect(workdir, checkpoint, against)
        return result, inspection.render(result)
    if mode == "summary":
        if workdir_given:
            config = Workdir(workdir).load()[0]
        spec = data.describe(config.data)
        result = summary.compare_with_plain(config.model, len(spec.classes), spec.image_shape)
        return result, summary.render(result)
    if mode == "prepare":
        text = data.prepare(config.data)
        return {"name": config.data.name, "prepared": text}, text
    if mode == "import":
        result = importing.import_weights(config, workdir, checkpoint)
        return result, importing.render(result)
    with screen:
        result = train.train(config, workdir, screen)
    return result, train.render(result) if leads() else ""
