"""Analyses of a run's programs for accelerators that are not present, by their compilers; no time is measured.

    python -m benchmarks.accelerators --targets=h100x1 --networks=resnet32,resnet32-s16u1-double --append --write

Compiles the trainer's own step, also with the same network in stock Flax modules if available; with
--programs=evaluation, the scoring of a batch. --append adds a row for each to results/accelerators.csv and, for steps,
rows on the purposes of kernels to results/accelerator_kernels.csv; --write updates the tables of the newest rows in
benchmarks/README.md, which explains the figures.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # before JAX is imported: no device is needed
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two analyses at once; there is no TPU to share
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

from benchmarks import accelerator_kernels, hlo, records
from benchmarks.accelerator_kernels import KernelsRow
from benchmarks.accelerator_rows import OURS, AcceleratorRow, newest, tables
from benchmarks.accelerator_targets import EVALUATION, STEP, STOCK, TARGETS, Program, Target, compile_program
from benchmarks.cases import Case, make_case
from benchmarks.common import PAGE, Parser, names, positive, replace_section, versions
from benchmarks.records import ROOT
from benchmarks.stock_networks import has_stock
from shared_basis.cli.app import run_and_exit
from shared_basis.errors import UserError
from shared_basis.models import plain_counterpart

RESULTS = Path("results")
FILE, KERNELS = RESULTS / "accelerators.csv", RESULTS / "accelerator_kernels.csv"
"""Relative to the repository's root."""
NETWORKS = ("resnet32", "resnet32-s16u1-double", "resnet56", "resnet56-s16u1-double", "resnet34", "resnet34-s32u1",
            "resnet34@224", "resnet34-s32u1@224", "resnet50", "resnet50-shared", "mobilenetv2", "mobilenetv2-shared",
            "densenet121", "densenet121-s64u4", "resnext50_32x4d", "resnext50_32x4d-s64u4")
"""The default programs; '@' is followed by the image size, if it is not the usual one."""
DTYPES = ("float32", "bfloat16")
MODULES = (OURS, STOCK)
PROGRAMS = (STEP, EVALUATION)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    for option, usual, about in (("targets", tuple(TARGETS), "devices to compile for"),
                                 ("dtypes", DTYPES, "compute dtypes"),
                                 ("modules", MODULES, f"{OURS}, or the same networks in Flax's own modules")):
        parser.add_argument(f"--{option}", type=functools.partial(names, choices=usual), default=usual,
                            help=f"{about}: some of {','.join(usual)}; default: all")
    parser.add_argument("--programs", type=functools.partial(names, choices=PROGRAMS), default=PROGRAMS[:1],
                        help=f"programs of a run to compile: some of {','.join(PROGRAMS)}; default: {PROGRAMS[0]}")
    parser.add_argument("--networks", type=names, default=NETWORKS,
                        help="e.g. resnet34,resnet34-s32u1@224, for images of 224×224; default: the usual ones")
    parser.add_argument("--batch", type=positive, help="images per step, over all devices; default: by target and size")
    parser.add_argument("--norm-images", type=positive, default=0, metavar="N",
                        help="model.norm_images: batch statistics cover N images; default: the whole batch")
    parser.add_argument("--kernels", type=Path, metavar="DIRECTORY",
                        help="directory for each program's kernels (.tsv) and text (.hlo)")
    parser.add_argument("--append", action="store_true", help="add the rows to results/accelerators.csv")
    parser.add_argument("--write", action="store_true",
                        help="update the tables of the newest rows in benchmarks/README.md")
    return parser.parse_args(arguments)


def case_of(network: str, target: Target, dtype: str, batch: int | None) -> Case:
    """Returns the case for `network`, which may end with '@' and the image size.

    Raises:
      UserError: there is no such network, or the size is not a number.
    """
    name, at, size = network.partition("@")
    if at and not (size.isdecimal() and 8 <= int(size) <= 1024):
        raise UserError(f"--networks: {network!r}: '@' must precede the image size, 8 to 1024, as in {name}@224.")
    case = make_case(name, "tpu", batch, dtype)
    image_size = int(size) if at else case.image_size
    return Case(name, batch or target.batch(image_size), image_size, dtype)


def cases_of(options: argparse.Namespace) -> Iterator[tuple[str, Case, str, str]]:
    """Yields the requested combinations: name of a target, case, modules, and program."""
    for target in options.targets:
        for dtype in options.dtypes:
            for network in options.networks:
                case = case_of(network, TARGETS[target], dtype, options.batch)
                for modules in options.modules:
                    if modules == OURS or has_stock(case.network):
                        yield from ((target, case, modules, program) for program in options.programs)


def row_of(target: str, case: Case, modules: str, norm_images: int, kind: str, program: Program) -> AcceleratorRow:
    """Returns the row for a compiled program, including the command to reproduce it."""
    compiler, network = TARGETS[target].compiler, f"{case.network}@{case.image_size}"
    words = ["python", "-m", "benchmarks.accelerators", f"--targets={target}", f"--networks={network}",
             f"--dtypes={case.dtype}", f"--modules={modules}", f"--batch={case.batch}"]
    if norm_images:
        words.append(f"--norm-images={norm_images}")
        modules += f", norm_images={norm_images}"
    if kind != STEP:
        words.append(f"--programs={kind}")
    found = versions(("jax", "flax", compiler))
    return AcceleratorRow(
        datetime.date.today().isoformat(), records.commit(), found["jax"], found["flax"],
        f"{compiler} {found[compiler]}", target, case.network, plain_counterpart(case.network), modules, kind,
        program.batch, case.image_size, case.dtype, **vars(program.figures), command=shlex.join(words))


def keep_kernels(directory: Path, row: AcceleratorRow, program: Program) -> None:
    """Writes the list of a program's kernels, and its text, to `directory`."""
    name = "-".join((row.target.replace(":", "_"), row.network, str(row.image_size), row.dtype,
                     *row.modules.split(", "), *([] if row.program == STEP else [row.program])))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.tsv").write_text(hlo.render(hlo.kernels(program.text)), encoding="utf-8")
    (directory / f"{name}.hlo").write_text(program.text, encoding="utf-8")


def write_page(root: Path = ROOT) -> None:
    """Updates the tables of the newest rows on the page."""
    kept = newest(records.read(root / FILE, AcceleratorRow))
    replace_section(root / PAGE, "accelerators", tables(kept, kept))
    kernels = accelerator_kernels.of_the_page(records.read(root / KERNELS, KernelsRow))
    replace_section(root / PAGE, "accelerator kernels", kernels)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Compiles and prints; stores each row below `root` immediately, if requested.

    Raises:
      UserError: the options are inconsistent, or a compiler is missing.
      SystemExit: an option is invalid.
    """
    options = parse(arguments)
    earlier = records.read(root / FILE, AcceleratorRow)
    cases, rows = list(cases_of(options)), []
    for target in options.targets:
        TARGETS[target].mesh()  # raises if the compiler is missing, before compiling anything
    for target, case, modules, kind in cases:
        print(f"{target}: {case.network} at {case.image_size}, {case.dtype}, {modules}, {kind} …", file=sys.stderr,
              flush=True)
        program = compile_program(kind, case, TARGETS[target], modules, options.norm_images)
        rows.append(row_of(target, case, modules, options.norm_images, kind, program))
        if options.kernels:
            keep_kernels(options.kernels, rows[-1], program)
        if options.append:
            records.append(root / FILE, rows[-1:])
            if kind == STEP:
                records.append(root / KERNELS, accelerator_kernels.rows_of(
                    rows[-1], hlo.kernels(program.text), TARGETS[target].platform))
        jax.clear_caches()  # programs of many networks take gigabytes
    every = newest([*earlier, *rows])
    print(tables([row for row in every if row in rows], every))
    if options.write:
        write_page(root)


if __name__ == "__main__":
    run_and_exit(main)
