"""Writes a graph as StableHLO, serialised by `jax.export`, for JAX on any platform without this package."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from shared_basis.errors import UserError
from shared_basis.export.graph import Node, compute, ordered

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""The platforms that the program is lowered for, independent of the current one."""


def require_packages() -> None:
    """Raises `UserError` unless StableHLO can be serialised."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError("--format=stablehlo needs the package flatbuffers, which is not installed: "
                        "pip install 'shared-basis[export]'.") from error


def serialise(output: Node, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the program from images uint8 `[N, H, W, C]` to logits, and `metadata` as JSON, keyed by file suffix."""
    batch, = jax.export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, *ordered(output)[0].shape), jnp.uint8)
    with _without_paths():
        program = jax.export.export(jax.jit(lambda images: compute(output, images)), platforms=PLATFORMS)(images)
    return {"": bytes(program.serialize()), ".json": json.dumps(metadata, indent=2).encode()}


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Omits source file paths from programs within this context, as exported files are published."""
    name = "jax_traceback_in_locations_limit"
    limit = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def run(program: bytes, images: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns the logits of uint8 `images`, computed on CPU, and the runtime's name."""
    call = jax.export.deserialize(bytearray(program)).call
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(jax.jit(call)(images)), f"jax {jax.__version__}"
