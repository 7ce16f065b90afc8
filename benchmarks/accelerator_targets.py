"""Compiles the trainer's own step for accelerators that are not present; their compilers run on any machine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks import hlo
from benchmarks.cases import Case
from benchmarks.common import versions
from benchmarks.stock_networks import make_stock
from shared_basis.data.examples import Spec
from shared_basis.data.feeds import Images, scored_at_once
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluator import define_step
from shared_basis.runs.trained import build_model
from shared_basis.runtime.distributed import batch_sharding
from shared_basis.training.program import define

MOST_IMAGES = 4096
"""Maximum number of images in a batch, over all devices."""
STOCK = "stock"
"""The value by which rows mark networks in stock Flax modules."""
STEP, EVALUATION = "step", "evaluation"
"""The values by which rows mark the two programs of a run: the training step, and scoring a batch."""

UNCHANGED = {"data__pad": 0, "data__flip": False}
"""Configuration changes under which a step uses images as they are: see `Case.config`."""

_H100 = Path(__file__).with_name("h100.txtpb")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    title: str
    platform: str
    """The platform name of JAX's plugin: 'cuda' or 'tpu'."""
    topology: str
    devices: int
    compiler: str
    """The package that contains the compiler."""

    def mesh(self) -> Mesh:
        """Returns a mesh of these devices, constructed as in `runtime.distributed.make_mesh`.

        Raises:
          UserError: the compiler is not installed.
        """
        if not versions([self.compiler]):
            raise UserError(f"{self.title}: its compiler, the package {self.compiler}, is not installed; "
                            "pip install -e '.[accelerators]' brings it.")
        if self.platform == "cuda":
            found = topologies.get_topology_desc(platform="cuda", topology=self.topology,
                                                 target_config=_H100.read_text(encoding="utf-8"))
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.topology)
        devices: list[Any] = sorted(found.devices, key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

    def batch(self, image_size: int) -> int:
        """Returns the images per step: 256 per device, 64 for large images, at most `MOST_IMAGES`."""
        return min((256 if image_size <= 64 else 64) * self.devices, MOST_IMAGES)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA options: disables autotuning, which needs the device."""
        return {"xla_gpu_autotune_level": 0} if self.platform == "cuda" else {}


TARGETS = {
    "h100x1": Target("one NVIDIA H100", "cuda", "1x1x1", 1, "jax-cuda12-pjrt"),
    "h100x8": Target("eight NVIDIA H100 of one machine", "cuda", "1x1x8", 8, "jax-cuda12-pjrt"),
    **{f"v5e:{rows}x{rows}": Target(f"{rows * rows} TPU v5e", "tpu", f"v5e:{rows}x{rows}", rows * rows, "libtpu")
       for rows in (2, 4, 16)},
}
"""The targets by name; on TPU, the name of the topology."""


class _Unread:
    """Placeholder for images that are never read."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


@dataclasses.dataclass(frozen=True)
class Figures:
    """The compiler's analysis of a program, per device."""

    kernels: int
    bytes: float
    """Bytes read and written: from XLA's analysis, or if unavailable summed over kernels."""
    main_memory_bytes: float
    """Bytes over all kernels, excluding data that a TPU keeps in on-core memory."""
    flops: float
    """From XLA's analysis, or if unavailable an even share of those of convolutions and matrix products."""
    all_reduces: int
    other_collectives: int
    temporary_bytes: float
    argument_bytes: float
    """Bytes of the state and the batch; the new state reuses the memory of the old one."""
    exchanged_bytes: float
    """Bytes that collectives receive as input."""
    hidden_collectives: float
    """Number of collectives between whose start and end other kernels run."""
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    batch: int
    """Images over all devices: as requested or, for an evaluation, rounded to a multiple of the devices."""
    figures: Figures
    text: str
    """The text of the optimised program."""


def compile_program(program: str, case: Case, target: Target, modules: str, norm_images: int = 0) -> Program:
    """Compiles one of the two programs of a run of `case`, as the trainer defines them.

    Images are streamed, so that a step reads only its batch, and neither cropped nor mirrored, which is the same for
    all networks.

    Args:
      program: `STEP`, or `EVALUATION` of a batch of the usual size.
      modules: `STOCK`, or any other value for this package's own.
      norm_images: the number of images that batch statistics cover; 0 for the whole batch.

    Raises:
      UserError: `norm_images` does not divide the batch, the compiler is not installed, or it rejects the program.
    """
    traced, batch = trace(program, case, target.mesh(), modules, norm_images)
    lowered = traced.lower()
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{case.network} for {target.title}: {str(error).splitlines()[0]}") from error
    seconds, text, cost = time.perf_counter() - began, compiled.as_text(), compiled.cost_analysis()
    found, collectives = hlo.kernels(text), hlo.collectives(text)
    moved, reduces = float(sum(kernel.bytes for kernel in found)), [one for one in collectives if one.is_reduce]
    taken = compiled.memory_analysis()
    return Program(batch, Figures(
        kernels=sum(kernel.times for kernel in found),
        bytes=float(cost["bytes accessed"]) if cost else moved, main_memory_bytes=moved,
        flops=float(cost["flops"] if cost else count_flops(traced.jaxpr) / target.devices),
        all_reduces=len(reduces), other_collectives=len(collectives) - len(reduces),
        temporary_bytes=float(taken.temp_size_in_bytes), argument_bytes=float(taken.argument_size_in_bytes),
        exchanged_bytes=float(sum(one.bytes for one in collectives)),
        hidden_collectives=float(sum(one.beside > 0 for one in collectives)), compile_seconds=seconds), text)


def trace(program: str, case: Case, mesh: Mesh, modules: str = "", norm_images: int = 0) -> tuple[Any, int]:
    """Traces a program as in `compile_program` for the devices of `mesh`; returns it and its number of images."""
    config = case.config(**UNCHANGED, model__norm_images=norm_images)
    spec = Spec((case.image_size, case.image_size, 3), tuple(map(str, range(case.classes))))
    unread: Any = _Unread(50_000)
    images = Images(spec, {"train": unread}, config.data)
    model = build_model(config, spec)
    model = make_stock(model) if modules == STOCK else model
    defined = define(config, images, model, mesh)
    if program == STEP:
        return defined.trace(), case.batch
    size = scored_at_once(config.train.eval_batch_size, len(unread), mesh.size)
    batch = (jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for shape, dtype in (
        ((size, *spec.image_shape), np.uint8), ((size,), np.int32)))
    return define_step(model, config.data, mesh).trace(defined.state.scored, *batch), size


def count_flops(jaxpr: Any) -> int:
    """Returns two per multiply-accumulate in the convolutions and matrix products of a jaxpr, including padding."""
    return sum(_flops(equation) for equation in jaxpr.eqns)


def _flops(equation: Any) -> int:
    inner = sum(map(count_flops, _jaxprs(equation.params.values())))
    if inner:
        return inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return 0
    left, right = (variable.aval.shape for variable in equation.invars)
    products = 2 * math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return products * math.prod(left[axis] for axis in contracted)
    filters = right[equation.params["dimension_numbers"].rhs_spec[0]]
    # In the gradient of a strided convolution, zeros between the input's pixels are not multiplied.
    return products * math.prod(right) // filters // math.prod(equation.params["lhs_dilation"])


def _jaxprs(values: Any) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _jaxprs(value)
        elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)
