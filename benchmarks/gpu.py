"""Times the kernels of a training step on the GPU of this machine, by purpose, with JAX's profiler.

    python -m benchmarks.gpu --networks=resnet32-s16u1-double --append --write

The plain network is measured too. --append adds the rows to results/gpu_kernels.csv; --write updates the tables in
benchmarks/README.md: these, and those of the steps that `benchmarks.speed` has timed on GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import records, speed
from benchmarks.cases import Case, beside_plain, make_case, random_images
from benchmarks.common import NOT_MEASURED, PAGE, Parser, Table, markdown, names, positive, replace_section
from benchmarks.comparison import TIMES_AS_FAST
from benchmarks.gpu_kernels import Step, TimedRow, rows_of, tables
from benchmarks.records import ROOT
from benchmarks.session import OURS, SpeedRow
from shared_basis.cli.app import run_and_exit
from shared_basis.errors import UserError
from shared_basis.runs.trained import build_model
from shared_basis.runtime.distributed import make_mesh
from shared_basis.training.program import define

FILE = Path("results") / "gpu_kernels.csv"
"""Relative to the repository's root."""
PYTORCH = ("pytorch channels_last bf16", "pytorch compiled bf16")
"""The modes of PyTorch to compare with."""
WARM_UP = 10
"""Steps before those that are profiled."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", type=names, default=(),
                        help="networks to measure, e.g. resnet32-s16u1-double,resnet34-s32u1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="compute dtype")
    parser.add_argument("--batch", type=positive, help="images per step; default: the usual number")
    parser.add_argument("--steps", type=positive, default=4, help="number of steps to profile")
    parser.add_argument("--append", action="store_true", help="add the rows to results/gpu_kernels.csv")
    parser.add_argument("--write", action="store_true", help="update the tables in benchmarks/README.md")
    options = parser.parse_args(arguments)
    if not options.networks and not options.write:
        parser.error("give --networks, or --write to update the tables")
    return options


def profile(case: Case, steps: int) -> tuple[list[tuple[str, float]], str]:
    """Returns names and nanoseconds of the kernels of `steps` steps, and the text of the program."""
    config, mesh = case.config(), make_mesh()
    images = random_images(case, 2 * case.batch, 1, config)
    defined = define(config, images, build_model(config, images.spec), mesh)
    compiled = defined.trace().lower().compile()
    inputs = next(defined.feed.batches(0))

    def train(state: Any, times: int) -> Any:
        for _ in range(times):
            state, _ = compiled(state, defined.seed, defined.teacher, *inputs)
        return jax.block_until_ready(state)
    state = train(defined.create(defined.seed), WARM_UP)
    with tempfile.TemporaryDirectory() as root:
        with jax.profiler.trace(root):
            train(state, steps)
        return events(next(Path(root).rglob("*.xplane.pb"))), compiled.as_text()


def events(path: Path) -> list[tuple[str, float]]:
    """Returns names and nanoseconds of everything that ran on GPUs, from a file of JAX's profiler."""
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return [(event.name, event.duration_ns) for plane in planes if plane.name.startswith("/device:GPU")
            for line in plane.lines for event in line.events]


def measure(case: Case, steps: int) -> list[TimedRow]:
    """Returns the rows for a step of `case`."""
    found, text = profile(case, steps)
    step = Step(datetime.date.today().isoformat(), records.commit(), jax.devices()[0].device_kind, jax.__version__,
                case.network, case.plain, case.batch, case.image_size, case.dtype)
    return rows_of(step, found, text, steps)


def timed(rows: Sequence[SpeedRow]) -> str:
    """Returns a Markdown table of the steps that were timed on GPUs."""
    on_gpus = {_key(row): row for row in rows if row.subject == "step" and not row.device.startswith(("cpu", "TPU"))}
    table: Table = [["network, images per step", "ms per step", "images/s", "time over plain", "MACs over plain",
                     *(f"times as fast as {name}" for name in PYTORCH)]]
    for row in on_gpus.values():
        if (row.framework, row.quantity) == (OURS, "seconds per step"):
            speeds = [on_gpus.get(_key(row, quantity=TIMES_AS_FAST, framework=name, dtype="bfloat16"))
                      for name in PYTORCH]
            case = Case(row.network, row.batch, row.image_size, row.dtype)
            table.append([f"{row.network}, {row.dtype}, {row.batch} of {row.image_size}²", _spread(row, 1e3),
                          f"{row.batch / row.median:,.0f}",
                          _spread(on_gpus.get(_key(row, quantity="ratio: time over plain"))),
                          f"{case.counts()['macs over plain']:.2f}" if case.form else NOT_MEASURED,
                          *map(_spread, speeds)])
    made = dict.fromkeys(f"{row.device}, {row.date}, Python {row.python}, JAX {row.jax}, PyTorch {row.torch}, commit "
                         f"{row.commit}: `{row.command}`" for row in on_gpus.values())
    return markdown(table) + "\n" + "".join(f"- {text}\n" for text in made)


def _key(row: SpeedRow, **changes: str) -> tuple[object, ...]:
    one = dataclasses.replace(row, **changes)  # type: ignore[arg-type]
    # With the command, as the ratio to a mode of PyTorch is stored with PyTorch's dtype, whatever ours was.
    return one.command, one.device, one.network, one.batch, one.image_size, one.dtype, one.framework, one.quantity


def _spread(row: SpeedRow | None, scale: float = 1.0) -> str:
    return NOT_MEASURED if row is None else (
        f"{row.median * scale:.2f} ({row.minimum * scale:.2f} – {row.maximum * scale:.2f})")


def sections(root: Path = ROOT) -> dict[str, str]:
    """Returns the generated sections of the page, by mark.

    Raises:
      UserError: the rows cannot be read.
    """
    return {"gpu steps": timed(records.read(root / speed.FILE, SpeedRow)),
            "gpu kernels": tables(records.read(root / FILE, TimedRow))}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Measures and prints; stores the rows below `root`, if requested.

    Raises:
      UserError: a network is unknown, or there is no GPU or more than one.
      SystemExit: an option is invalid.
    """
    options = parse(arguments)
    cases = [make_case(name, "gpu", options.batch, options.dtype) for name in options.networks]
    if cases and jax.default_backend() != "gpu":
        raise UserError(f"JAX finds no GPU here, only {jax.devices()[0].device_kind}; without one, python -m "
                        "benchmarks.accelerators shows what the compilers count.")
    if cases and jax.device_count() > 1:
        raise UserError(f"JAX finds {jax.device_count()} GPUs, whose times would be added; set CUDA_VISIBLE_DEVICES=0.")
    for case in (case for group in beside_plain(cases) for case in group):
        rows = measure(case, options.steps)
        print(f"{case.network}: {sum(row.kernels for row in rows):,.0f} kernels and "
              f"{sum(row.microseconds for row in rows):,.0f} µs per step", flush=True)
        if options.append:
            records.append(root / FILE, rows)
    if options.write:
        for name, text in sections(root).items():
            replace_section(root / PAGE, name, text)


if __name__ == "__main__":
    run_and_exit(main)
