"""The device mesh: parameters on every device, batches divided among them."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shared_basis.errors import UserError


def make_mesh() -> Mesh:
    """Returns a mesh of one axis, 'data', over all devices."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def divided(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch whose first axis is divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises `UserError`, with the nearest sizes, unless `batch_size` divides evenly among the devices."""
    if batch_size % mesh.size:
        below = batch_size // mesh.size * mesh.size
        sizes = " or ".join(str(size) for size in (below, below + mesh.size) if size)
        raise UserError(f"train.batch_size={batch_size}: must be a multiple of the {mesh.size} devices; the nearest: "
                        f"{sizes}.")
