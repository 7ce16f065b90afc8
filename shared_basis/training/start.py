"""How a run begins from given weights: those of a published file, or of a trained plain network, compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shared_basis import data
from shared_basis.compression.compress import compress
from shared_basis.config import Config
from shared_basis.errors import UserError
from shared_basis.interop.pytorch import load_pytorch_weights
from shared_basis.models import Network
from shared_basis.models.parameters import count_parameters
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.trained import Variables, build_model
from shared_basis.runs.workdir import Workdir, make_record
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.program import first_state


def import_weights(config: Config, workdir: str | Path, file: str) -> dict[str, Any]:
    """Writes the published weights in `file` as step 0 of a run of `config` in `workdir`.

    The run is like any other: it can be evaluated, and trained on.

    Returns:
      `workdir`, `model`, `file` and the number of `parameters`.

    Raises:
      UserError: the file does not hold this network (see `load_pytorch_weights`), or the workdir holds checkpoints
        already.
    """
    if not file:
        raise UserError("--mode=import needs --weights=FILE, a .pth or .safetensors file.")
    spec = data.describe(config.data)
    model = build_model(config, spec)
    variables = load_pytorch_weights(file, model)
    require_new(workdir)
    parameters = start_run(config, workdir, model, spec, variables)
    return {"workdir": str(workdir), "model": config.model.name, "file": str(file), "parameters": parameters}


def compress_run(config: Config, workdir: str | Path, source: str, reporter: Reporter, *, which: str = "latest",
                 calibration: int | None = None, budget: float | None = None,
                 measure: str = "parameters") -> dict[str, Any]:
    """Writes the network of `config`, in closed form from the plain one in `source`, as step 0 of a run in `workdir`.

    Args:
      which, calibration, budget, measure: as in `shared_basis.compression.compress.compress`.

    Returns:
      `workdir` and the report of `Compressed`.

    Raises:
      UserError: as `shared_basis.compression.compress.compress`, or `workdir` holds checkpoints already.
    """
    require_new(workdir)
    compressed = compress(config, source, reporter, which=which, calibration=calibration, budget=budget,
                          measure=measure)
    start_run(compressed.config, workdir, compressed.network, compressed.spec, compressed.variables)
    return {"workdir": str(workdir), **compressed.report}


def require_new(workdir: str | Path) -> None:
    """Raises `UserError` if `workdir` holds checkpoints."""
    run = Workdir(workdir)
    if Checkpoints(run.checkpoints, read_only=True).steps:
        raise UserError(f"workdir {run.path} holds checkpoints already; choose a new --workdir.")


def start_run(config: Config, workdir: str | Path, model: Network, spec: data.Spec, variables: Variables) -> int:
    """Writes `variables` (`params`, `batch_stats`) of `model` as step 0 of a run of `config`.

    Returns:
      The number of parameters.

    Raises:
      UserError: the workdir holds another run, or cannot be written.
    """
    state = first_state(config, model, jax.tree.map(jnp.asarray, variables))
    record = make_record(config, {"classes": list(spec.classes), "image_shape": list(spec.image_shape)})
    run = Workdir(workdir)
    with run.locked():
        run.claim(record)
        checkpoints = Checkpoints(run.checkpoints)
        checkpoints.save(0, state, record, None)
        checkpoints.close()
    return sum(count_parameters(state.params).values())


def render(result: dict[str, Any]) -> str:
    """Returns `import_weights`' result as a human-readable line."""
    return (f"{result['file']}: {result['model']}, {result['parameters']:,} parameters, now step 0 of "
            f"{result['workdir']}; evaluate it with --mode=evaluate --workdir={result['workdir']}")
