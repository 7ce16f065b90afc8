"""Estimates for slices of many chips from existing measurements: input throughput and communication.

    python -m benchmarks.pods --write

Reads the compilers' figures in results/accelerators.csv and the decoding speed in benchmarks/README.md; runs nothing.
--write updates the tables in docs/pods.md, which explains them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.accelerator_rows import AcceleratorRow, newest
from benchmarks.accelerator_targets import STEP, TARGETS
from benchmarks.accelerators import FILE
from benchmarks.common import PAGE, Parser, Table, markdown, replace_section, section_of
from benchmarks.records import ROOT
from benchmarks.session import OURS
from shared_basis.cli.app import run_and_exit
from shared_basis.errors import UserError

DOC = Path("docs") / "pods.md"
"""The page with the tables, relative to the repository's root."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published data of an accelerator and its host machines."""

    name: str
    flops: float
    """FLOPs per second in bfloat16, without sparsity."""
    bandwidth: float
    """Main memory bandwidth in bytes per second."""
    memory: float
    """Main memory in bytes."""
    cores: float
    """vCPUs of the host per chip."""


V5E = Chip("TPU v5e", 197e12, 819e9, 16e9, 28)  # cloud.google.com/tpu/docs/v5e; VMs of 4 chips have 112 vCPUs
H100 = Chip("H100", 989e12, 3350e9, 80e9, 26)  # NVIDIA's data sheet (SXM); a3-highgpu-8g has 208 vCPUs
CHIPS = {target: V5E if target.startswith("v5e") else H100 for target in TARGETS}

SLICES = {"v5e:16x16": 256, "h100x1": 8}
"""The number of chips for which input throughput is estimated, by the target whose large-image step is used."""


def fastest(row: AcceleratorRow) -> float:
    """Returns an upper bound of a chip's images per second: all arithmetic at peak, or all memory at full bandwidth."""
    chip = CHIPS[row.target]
    return row.batch / TARGETS[row.target].devices / max(row.flops / chip.flops, row.main_memory_bytes / chip.bandwidth)


def decoded(root: Path = ROOT) -> float:
    """Returns the images per second that a core decodes, from the latest `benchmarks.data`.

    Raises:
      UserError: the page does not contain it.
    """
    found = re.search(r"\| \d+ threads? \| [\d,]+ \| ([\d,]+) \|", section_of(root / PAGE, "data"))
    if found is None:
        raise UserError(f"{PAGE} has no row for threads in its data section; run python -m benchmarks.data --write.")
    return float(found[1].replace(",", ""))


def data_table(rows: Sequence[AcceleratorRow], each: float) -> Table:
    """Returns the images that a slice needs and that its hosts deliver, if a core decodes `each` images per second."""
    table = [["network, 224×224", "devices", "upper bound per chip, images/s", "upper bound of the slice, images/s",
              "vCPUs of a chip's share of the host", "vCPUs busy with decoding", "bottleneck"]]
    for row in rows:
        if row.target in SLICES and (row.program, row.modules, row.dtype, row.image_size) == (STEP, OURS, "bfloat16",
                                                                                              224):
            chip, most = CHIPS[row.target], fastest(row)
            busy = most / each / chip.cores
            table.append([row.network, f"{SLICES[row.target]} {chip.name}", f"{most:,.0f}",
                          f"{most * SLICES[row.target]:,.0f}", f"{chip.cores:g}", f"{100 * busy:,.0f} %",
                          "data" if busy > 1 else "the device"])
    return table


def program_table(rows: Sequence[AcceleratorRow]) -> Table:
    """Returns communication and memory per device, for rows with several devices."""
    table = [["program", "devices", "images per device", "all-reduces", "other collectives", "exchanged, MB",
              "collectives beside kernels", "arguments, MB", "temporary, MB", "of the device's memory"]]
    for row in rows:
        devices, chip = TARGETS[row.target].devices, CHIPS[row.target]
        if devices > 1 and not math.isnan(row.argument_bytes):
            held = row.argument_bytes + row.temporary_bytes
            table.append([f"{row.network}, {row.image_size}², {row.program}", f"{devices} {chip.name}",
                          f"{row.batch / devices:g}", str(row.all_reduces), str(row.other_collectives),
                          f"{row.exchanged_bytes / 1e6:,.2f}", f"{row.hidden_collectives:.0f}",
                          f"{row.argument_bytes / 1e6:,.0f}", f"{row.temporary_bytes / 1e6:,.0f}",
                          f"{100 * held / chip.memory:,.1f} %"])
    return table


def sections(root: Path = ROOT) -> dict[str, str]:
    """Returns the tables by the names of their sections in `DOC`."""
    rows = newest(records.read(root / FILE, AcceleratorRow))
    return {"data": markdown(data_table(rows, decoded(root))), "programs": markdown(program_table(rows))}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Prints the tables, and updates the page if requested.

    Raises:
      SystemExit: an option is invalid.
      UserError: an input file is missing or invalid.
    """
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"update the tables in {DOC}")
    options = parser.parse_args(arguments)
    for name, text in sections(root).items():
        print(text)
        if options.write:
            replace_section(root / DOC, name, text)


if __name__ == "__main__":
    run_and_exit(main)
