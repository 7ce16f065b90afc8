"""Describes the contents of a run without loading its arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared_basis.config import Config, differences, from_config_dict, to_dict
from shared_basis.errors import UserError
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.workdir import Workdir, abbreviate
from shared_basis.runtime.files import Place, align, open_files
from shared_basis.runtime.reporter import size_text

SHOWN = ("test_accuracy", "test_loss", "validation_accuracy", "train_loss", "penalty", "coherence")
"""The metrics of a checkpoint to show in the listing, if present; the result contains all metrics."""


def inspect(workdir: Place, which: str = "latest", against: str = "") -> dict[str, Any]:
    """Describes a run and the arrays of one of its checkpoints, reading only metadata.

    Args:
      which: the checkpoint: 'latest', 'best' or a step number.
      against: a checkpoint to compare with: a step of this run, a workdir, or WORKDIR:STEP; empty for none.

    Returns:
      `workdir`, `model`, `config` (all fields), `changed` (fields that are not the defaults), `data`, `versions` and
      `init` (the origin of the initial weights, or None) of the run; `checkpoints`: `step`, `bytes` on disk and
      `metrics` of each; `step`, the described one, and `arrays`: `path`, `shape`, `dtype` and `bytes` of each of
      its arrays, with the totals `bytes` by top-level name; with `against`, the `differences` from it: see `compare`.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged.
    """
    one = _read(workdir, which)
    if against:
        one["differences"] = {"against": against, **compare(one, _read(*other_checkpoint(workdir, against)))}
    return one


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the differences between two results of `inspect`.

    Returns:
      Pairs of the values in `one` and `other` (None if absent), keyed by path, for each of `config`, `data`, `init`,
      `versions`, `metrics` and `arrays` (as 'dtype[shape]').
    """
    config = differences(from_config_dict(one["config"]), from_config_dict(other["config"]), locations=True)
    return {"config": {path: list(pair) for path, pair in config.items()},
            "data": _pairs(one["data"], other["data"]), "init": _pairs(one["init"] or {}, other["init"] or {}),
            "versions": _pairs(one["versions"], other["versions"]),
            "metrics": _pairs(_metrics(one), _metrics(other)),
            "arrays": _pairs(*({array["path"]: _kind(array) for array in found["arrays"]} for found in (one, other)))}


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [one.get(key), other.get(key)] for key in dict.fromkeys((*one, *other))
            if one.get(key) != other.get(key)}


def _metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    return next(entry["metrics"] for entry in found["checkpoints"] if entry["step"] == found["step"]) or {}


def _kind(array: Mapping[str, Any]) -> str:
    return f"{array['dtype']}[{'×'.join(map(str, array['shape']))}]"


def other_checkpoint(workdir: Place, against: str) -> tuple[Place, str]:
    """Returns the workdir and the checkpoint that `against` refers to, for the run in `workdir`."""
    if against in ("best", "latest") or against.isdecimal():
        return workdir, against
    return named_checkpoint(against)


def named_checkpoint(text: str) -> tuple[str, str]:
    """Splits WORKDIR or WORKDIR:CHECKPOINT into workdir and checkpoint, by default 'latest'."""
    path, colon, which = text.rpartition(":")
    names_one = colon and "/" not in which and not open_files(text).names()
    return (path, which) if names_one else (text, "latest")


def _read(workdir: Place, which: str) -> dict[str, Any]:
    run = Workdir(workdir)
    config, record = run.load()
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    step = checkpoints.find(which)
    arrays = [{"path": "/".join(path), "shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype)),
               "bytes": math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize}
              for path, leaf in checkpoints.arrays(step).items()]
    totals: dict[str, int] = {}
    for array in arrays:
        name = array["path"].partition("/")[0]
        totals[name] = totals.get(name, 0) + array["bytes"]
    return {
        "workdir": str(run.path), "model": config.model.name, "config": to_dict(config),
        "changed": {path: now for path, (now, _) in differences(config, Config(), locations=True).items()},
        "data": record["data"], "versions": record["versions"], "init": record["init"],
        "checkpoints": [{"step": each, "bytes": _size(run, each),
                         "metrics": checkpoints.metrics(each)} for each in checkpoints.steps],
        "step": step, "arrays": arrays, "bytes": totals}


def _size(run: Workdir, step: int) -> int:
    try:
        return run.files.size(f"checkpoints/{step}")
    except OSError as error:
        raise UserError(f"{run.checkpoints / str(step)} cannot be read: {error.strerror}.") from error


def render(found: Mapping[str, Any]) -> str:
    """Returns the result of `inspect` as human-readable lines."""
    data, total = found["data"], sum(found["bytes"].values())
    lines = [f"{found['workdir']}: {found['model']}, {'×'.join(map(str, data['image_shape']))} images of "
             f"{len(data['classes'])} classes",
             f"with {', '.join(f'{name} {version}' for name, version in found['versions'].items())}"]
    if init := found["init"]:
        step = "" if init["step"] is None else f"step {init['step']:,} of "
        lines.append(f"started from {step}{init['source']}; the classifier was {init['head']}")
    lines.append("")
    lines += _table([(f"  {path}", repr(value)) for path, value in found["changed"].items()],
                      "configuration, non-default fields:")
    lines += _table([(f"  {entry['step']:,}", size_text(entry["bytes"]), _scores(entry["metrics"]))
                       for entry in found["checkpoints"]], "checkpoints: step, size on disk, scores")
    lines += _table([(f"  {array['path']}", array["dtype"], "×".join(map(str, array["shape"])) or "scalar",
                        size_text(array["bytes"])) for array in found["arrays"]],
                      f"arrays of checkpoint {found['step']:,}: {size_text(total)}, of which "
                      + ", ".join(f"{name} {size_text(size)}" for name, size in found["bytes"].items()))
    return "\n".join([*lines, *_render_differences(found)]).rstrip()


def _render_differences(found: Mapping[str, Any]) -> list[str]:
    if "differences" not in found:
        return []
    title = f"differences from {found['differences']['against']}"
    rows = [(f"  {kind} {path}", _shown(one), _shown(other))
            for kind in ("config", "data", "init", "versions", "metrics", "arrays")
            for path, (one, other) in found["differences"][kind].items()]
    return _table(rows, f"{title} (right column):") if rows else [f"{title}: none"]


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(abbreviate(value))


def _scores(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "not evaluated"
    return ", ".join(f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in SHOWN if name in metrics)


def _table(rows: Sequence[tuple[str, ...]], title: str) -> list[str]:
    """Returns the rows as aligned columns below `title`, followed by an empty line."""
    return [title, *align(rows), ""]
