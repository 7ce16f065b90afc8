"""The rows of `results/depth.csv`, and the figure and section of docs/results.md derived from them."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import NOT_MEASURED, Table, markdown, replace_section
from benchmarks.records import ROOT, read
from shared_basis.plotting import COLORS, DASHES, png, set_log
from shared_basis.runtime.files import write_atomic
from studies.findings import NOT_RUN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE, PICTURE = Path("results") / "depth.csv", Path("results") / "depth.png"
PAGE = Path("docs") / "results.md"
"""Relative to the repository's root."""

EPOCHS = 12
MEASURED = (0, 1, 3, EPOCHS)
"""Epochs after which gradients are measured; 0 is initialisation."""


@dataclasses.dataclass(frozen=True)
class Treatment:
    """A way of keeping bases orthonormal, or a control."""

    label: str
    form: str = "-s8u1"
    """The sharing, as in network names: one basis per group for both layers of its blocks."""
    method: str = "none"
    """Of `orthogonality.method`."""
    spread: bool = False
    """Whether the singular values of the shared bases are spread at initialisation."""


TREATMENTS = (Treatment("plain, nothing shared", form=""), Treatment("penalty", method="penalty"),
              Treatment("exact", method="exact"), Treatment("no penalty"),
              Treatment("no penalty, singular values spread", spread=True))


@dataclasses.dataclass(frozen=True)
class DepthRow:
    """Gradients at one epoch of a training; the fields are the columns."""

    date: str
    commit: str
    device: str
    jax: str
    layers: int
    """Number of layers sharing each basis."""
    variant: str
    seed: int
    epoch: int
    train_loss: float
    """The finished epoch; 0 at initialisation."""
    test_error: float
    """In percent."""
    singular_min: float
    singular_max: float
    """Of the shared bases; 0 without bases."""
    blocks: str
    """The gradient norm with respect to each block's output, ordered by depth (`analysis.gradient_flow`)."""
    parameters: str
    """The gradient norm with respect to each layer's coefficients, or its kernel if it has none."""
    command: str


def growth(row: DepthRow) -> float:
    """Returns the ratio of gradient norms after the first and after the last sharing block of a group.

    This is the factor from all sharing layers of a group with their shortcuts; the geometric mean over groups.
    """
    norms = [float(norm) for norm in row.blocks.split()]
    blocks = len(norms) // 3
    # The first block of each group is plain: its output is the input of the first sharing block.
    return statistics.geometric_mean(norms[group * blocks] / norms[(group + 1) * blocks - 1] for group in range(3))


def _values(rows: Sequence[DepthRow], value: Callable[[DepthRow], Any], layers: int, label: str,
            epoch: int) -> list[Any]:
    """Returns a value for each run, one per seed, at one epoch."""
    return [value(row) for row in rows if (row.layers, row.variant, row.epoch) == (layers, label, epoch)]


def table(rows: Sequence[DepthRow]) -> Table:
    """Returns gradient growth, errors and singular values for each number of sharing layers and treatment."""
    lines: Table = [["layers sharing a basis", "variant", *(
        "growth at initialisation" if epoch == 0 else f"after epoch {epoch}" for epoch in MEASURED),
        "singular values at the end", "training loss, epoch 1", f"epoch {EPOCHS}", "final test error, %"]]
    for layers in sorted({row.layers for row in rows}):
        for treatment in TREATMENTS:
            last = [row for row in rows if (row.layers, row.variant, row.epoch) == (layers, treatment.label, EPOCHS)]
            if not last:
                lines.append([str(layers), treatment.label, *[NOT_RUN] * (len(lines[0]) - 2)])
                continue
            singular = (f"{min(row.singular_min for row in last):.2f} – {max(row.singular_max for row in last):.2f}"
                        if treatment.form else NOT_MEASURED)
            lines.append([str(layers), treatment.label, *(
                f"{statistics.geometric_mean(_values(rows, growth, layers, treatment.label, epoch)):.2f}"
                for epoch in MEASURED), singular, *(
                f"{statistics.mean(_values(rows, lambda row: row.train_loss, layers, treatment.label, epoch)):.3f}"
                for epoch in (1, EPOCHS)), f"{statistics.mean(row.test_error for row in last):.2f}"])
    return lines


def _paint(rows: Sequence[DepthRow], figure: Figure) -> None:
    """Draws gradients by depth, with a row of axes per number of sharing layers and a column per epoch."""
    numbers = sorted({row.layers for row in rows})
    grid = figure.subplots(len(numbers), len(MEASURED), sharex="row", sharey="row", squeeze=False)
    for axes_of_number, layers in zip(grid, numbers, strict=True):
        for axes, epoch in zip(axes_of_number, MEASURED, strict=True):
            for index, treatment in enumerate(TREATMENTS):
                runs = _values(rows, lambda row: [float(norm) for norm in row.blocks.split()], layers, treatment.label,
                              epoch)
                if runs:
                    means = [statistics.geometric_mean(norms) for norms in zip(*runs, strict=True)]
                    axes.plot(range(1, len(means) + 1), means, color=COLORS[index],
                              linestyle=DASHES[index], linewidth=1.2, label=treatment.label)
            set_log(axes, "y")
            if layers == numbers[0]:
                axes.set_title("initialisation" if epoch == 0 else f"after epoch {epoch}")
            if layers == numbers[-1]:
                axes.set_xlabel("block")
        axes_of_number[0].set_ylabel(f"{layers} layers share:\nnorm of the gradient")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)


def _seeds(rows: Sequence[DepthRow]) -> str:
    """Returns the number of seeds as text, by number of layers if it differs."""
    layers: dict[int, list[int]] = {}
    for number in sorted({row.layers for row in rows}):
        layers.setdefault(len({row.seed for row in rows if row.layers == number}), []).append(number)
    return ", ".join(
        f"{seeds} seed{'s' * (seeds > 1)}" + f" ({' and '.join(map(str, numbers))} layers)" * (len(layers) > 1)
        for seeds, numbers in layers.items())


def write_page(root: Path = ROOT) -> None:
    """Draws the figure and updates the section in docs/results.md.

    Raises:
      UserError: the rows cannot be read, or the page lacks the marks.
    """
    rows = read(root / FILE, DepthRow)
    if rows:
        write_atomic(root / PICTURE, png(functools.partial(_paint, rows), size=(11, 7.5)))
    replace_section(root / PAGE, "depth", section(rows))


def section(rows: Sequence[DepthRow]) -> str:
    """Returns the section in Markdown."""
    if not rows:
        return "**Not run** yet: `python -m studies.depth`.\n\n"
    facts = {name: ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))
             for name in ("date", "device", "jax", "commit")}
    runs = len({(row.layers, row.variant, row.seed) for row in rows})
    return (f"{runs} runs of {EPOCHS} epochs, means over {_seeds(rows)}, {facts['date']}, "
            f"{facts['device']}, JAX {facts['jax']}, commit {facts['commit']}: `results/depth.csv`, by "
            "`python -m studies.depth`. *Growth* is the norm of the gradient at the output of a group's first block "
            "over that at its last block, the geometric mean of the three groups: what the layers that share a basis, "
            "with their shortcuts, multiply gradients by on their way back.\n\n"
            f"{markdown(table(rows))}\n![Gradient by depth](../results/{PICTURE.name})\n\n")
