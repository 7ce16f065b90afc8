"""Exports the weights of a trained network as a PyTorch state dict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from shared_basis.errors import UserError
from shared_basis.export.export import resizing, write_files
from shared_basis.interop.pytorch import convert_official, to_published
from shared_basis.models.parameters import count_parameters
from shared_basis.nn.types import Tree
from shared_basis.runs.trained import Trained
from shared_basis.runtime.files import Place
from shared_basis.runtime.reporter import size_text


def export_weights(workdir: Place, which: str = "latest", overrides: Mapping[str, Any] | None = None,
                   output: str = "") -> dict[str, Any]:
    """Writes a checkpoint of `workdir` as a safetensors file with the state dict of the same network in PyTorch.

    Plain networks that torchvision provides use its layout, all others that of the official implementation. Before the
    file is renamed into place, it is read back and every array is compared with the run's.

    Args:
      which, overrides: see `Trained.open`.
      output: the file; by default WORKDIR/export/model.safetensors.

    Returns:
      `workdir`, `step`, `model`, `classes`, `image_shape`, `format`, `file`, its `bytes`, the number of its `tensors`,
      whether shared arrays are `repeated` for each block, and the number of the network's `parameters`.

    Raises:
      UserError: see `Trained.open`; or there is no such network in PyTorch, or the file cannot be written.
    """
    trained = Trained.open(workdir, which, overrides)
    trained.require_finite()
    variables = jax.device_get(dict(trained.variables))
    try:
        tensors = to_published(variables, trained.model, trained.step)
    except UserError as error:
        raise UserError(f"{trained.config.model.name} cannot be written for PyTorch: {error} Use --format=onnx or "
                        "stablehlo.") from error
    content = safetensors.numpy.save(tensors, metadata={"format": "pt", **{
        name: json.dumps(value) for name, value in (
            ("model", trained.config.model.name), ("stem", trained.config.model.stem), ("step", trained.step),
            ("classes", trained.spec.classes), ("image_shape", trained.spec.image_shape),
            ("mean", trained.config.data.mean), ("std", trained.config.data.std),
            ("resize", resizing(trained.config.data, trained.spec.image_shape)))}})
    _verify(safetensors.numpy.load(content), trained, variables)
    path = write_files(output, trained.run.path / "export" / "model.safetensors", {"": content})
    return {"workdir": str(trained.run.path), "step": trained.step, "model": trained.config.model.name,
            "classes": list(trained.spec.classes), "image_shape": list(trained.spec.image_shape), "format": "pytorch",
            "file": str(path), "bytes": len(content), "tensors": len(tensors),
            "repeated": any(".shared_basis" in name for name in tensors),
            "parameters": sum(count_parameters(variables["params"]).values())}


def _verify(tensors: Mapping[str, np.ndarray], trained: Trained, variables: Tree) -> None:
    """Raises `UserError` unless importing `tensors` reproduces the exported variables bit for bit."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    again = convert_official(tensors, trained.model, shapes)
    if not all(jax.tree.leaves(jax.tree.map(lambda one, other: np.array_equal(one, other, equal_nan=True), again,
                                            variables))):
        raise UserError("no file was written: the weights differ when read back. This is a bug in the export; "
                        "please report it.")


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `export_weights` as human-readable lines."""
    repeated = " (the layout repeats shared arrays for each block)" if result["repeated"] else ""
    return (f"{result['model']} at step {result['step']:,} of {result['workdir']}: {result['file']} "
            f"({size_text(result['bytes'])}), {result['tensors']} tensors, {result['parameters']:,} parameters"
            f"{repeated}; the file was read back, and its arrays are identical to those of the run")
