"""Do gradients vanish or explode with the number of layers that share a basis, and does orthogonality prevent it?

    python benchmarks/depth.py [--layers=2,10,54] [--seeds=2]
    python benchmarks/depth.py --write                      the section of docs/results.md again, without training

The paper argues (section 3.2) that a shared basis multiplies gradients along the chain of layers that share it, as a
recurrence does, so that singular values away from 1 make them explode or vanish. Here ResNets of more and more blocks,
in which one basis a group serves 2, 10 or 54 layers, are trained on the digits, and the gradient is measured by depth
at initialisation and through training: with the penalty, without it, exactly orthonormal, and from bases whose
singular values are spread on purpose. The plain network of the same depth says what depth alone does.

Each training leaves rows in results/depth.csv when it is finished, and is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from benchmarks.common import Parser, Table, build, markdown, positive, replace_section, versions
from benchmarks.records import ROOT, append, commit, read
from shared_basis.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = ROOT / "results" / "depth.csv"
PICTURE = ROOT / "results" / "depth.png"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- depth -->\n", "<!-- end of depth -->\n"

EPOCHS = 12
MEASURED = (0, 1, 3, EPOCHS)
"""Epochs after which gradients are measured; 0 is initialisation."""

SPREAD = 4.0
"""Singular values of bases that are spread on purpose lie between 1 / SPREAD and SPREAD."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to hold bases orthonormal, or not to."""

    label: str
    form: str = "-s8u1"
    """The sharing, as a network's name has it: one basis a group for both layers of its blocks."""
    method: str = "none"
    """Of `orthogonality.method`."""
    spread: bool = False
    """Whether the singular values of the shared bases are spread at initialisation."""


VARIANTS = (Variant("plain, nothing shared", form=""), Variant("penalty", method="penalty"),
            Variant("exact", method="exact"), Variant("no penalty"),
            Variant("no penalty, singular values spread", spread=True))


@dataclasses.dataclass(frozen=True)
class Row:
    """Gradients at one moment of one training; its fields are the columns."""

    date: str
    commit: str
    device: str
    jax: str
    layers: int
    """That share each basis."""
    variant: str
    seed: int
    epoch: int
    train_loss: float
    """Of the epoch that ended; 0 at initialisation."""
    test_error: float
    """In percent."""
    singular_min: float
    singular_max: float
    """Of the shared bases; 0 for a network without."""
    blocks: str
    """In order of depth the norm of the gradient with respect to each block's output (`gradients.gradient_flow`)."""
    parameters: str
    """Likewise of the gradient with respect to each layer's coefficients, or kernel where it has none."""
    command: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def parse(arguments: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Returns the parser, for later mistakes, and the options."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=_even, default=(2, 10, 54), help="layers that share a basis, e.g. 2,10,54")
    parser.add_argument("--seeds", type=positive, default=2, help="how many")
    parser.add_argument("--write", action="store_true", help="only write the section of docs/results.md again")
    return parser, parser.parse_args(arguments)


def _even(text: str) -> tuple[int, ...]:
    """Returns even numbers, as a block has two layers; raises argparse's error for other text."""
    numbers = tuple(positive(part) for part in text.split(","))
    if any(number % 2 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: blocks have two layers, so even numbers are wanted")
    return numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what has no rows yet, and writes the section; returns 0."""
    parser, options = parse(arguments)
    if not options.write:
        rows = parser.end_with(read, FILE, Row)
        done = {(row.layers, row.variant, row.seed) for row in rows}
        todo = [(layers, variant, seed) for seed in range(options.seeds) for layers in options.layers
                for variant in VARIANTS if (layers, variant.label, seed) not in done]
        for number, (layers, variant, seed) in enumerate(todo):
            print(f"{number + 1}/{len(todo)}: {layers} layers, {variant.label}, seed {seed}", file=sys.stderr,
                  flush=True)
            append(FILE, list(train(layers, variant, seed)), COLUMNS)
    parser.end_with(write_page)
    return 0


def train(layers: int, variant: Variant, seed: int) -> Iterator[Row]:
    """Trains a network in which each basis serves `layers` layers, and yields a row at each moment of `MEASURED`."""
    import jax

    from configs.digits_resnet import get_config
    from shared_basis import data
    from shared_basis.analysis.gradient_flow import by_depth, gradient_flow, layer_paths
    from shared_basis.config import from_config_dict, replace
    from shared_basis.data import feeds
    from shared_basis.data.augment import normalize
    from shared_basis.runs.trained import build_model
    from shared_basis.runtime.distributed import make_mesh
    from shared_basis.runtime.reporter import Reporter

    config = replace(from_config_dict(get_config(f"resnet20{variant.form}")), {
        "seed": seed, "orthogonality.method": variant.method, "train.epochs": EPOCHS})
    mesh = make_mesh()
    images = feeds.load(data.open_source(config.data), config.data, mesh, Reporter(verbosity="quiet"))
    model = build_model(config, images.spec).clone(blocks=(layers // 2 + 1,) * 3)  # the first of a group is plain
    split, size = data.load_split(config.data, "train"), config.train.batch_size
    batch = normalize(jax.numpy.asarray(split.images[:size]), config.data), split.labels[:size]
    flow = gradient_flow(model)
    order = ["/".join(path) for path in layer_paths(model, images.spec.image_shape)]
    with tempfile.TemporaryDirectory() as root:
        state, program = build(config, images, model, mesh, Path(root))
    if variant.spread:
        state = state.replace(params={**state.params, "bases": jax.tree.map(_spread, state.params["bases"])})
    known = versions(("jax",))
    batches = program.batches(0)
    for epoch in range(EPOCHS + 1):
        if epoch:
            for _ in range(program.steps_per_epoch):
                state, _ = program.step(state, *next(batches))
            jax.block_until_ready(state)
        if epoch in MEASURED:
            outputs, parameters = flow(state.params, state.batch_stats, *batch)
            own = [parameters[path] for path in by_depth(order, parameters)
                   if path.startswith("group") and path.endswith(("/coefficients", "/kernel"))]
            scores = program.evaluate["test"]({"params": state.params, "batch_stats": state.batch_stats}, _nothing)
            loss = float(state.totals["loss"] / state.totals["count"]) if epoch else 0.0
            yield Row(datetime.date.today().isoformat(), commit(), jax.devices()[0].device_kind, known["jax"], layers,
                      variant.label, seed, epoch, loss, 100 * (1 - scores["accuracy"]),
                      *_singular_values(state.params), _joined(outputs.values()), _joined(own),
                      f"python benchmarks/depth.py --layers={layers}")
    batches.close()


def _nothing(scored: int) -> None:
    """Is told how far an evaluation is."""
    del scored


def _spread(basis: Any) -> Any:
    """Returns `basis [k, k, C, s]` with the same singular vectors, and singular values from 1 / SPREAD to SPREAD."""
    import numpy as np

    left, _, right = np.linalg.svd(np.asarray(basis).reshape(-1, basis.shape[-1]), full_matrices=False)
    return ((left * np.geomspace(1 / SPREAD, SPREAD, left.shape[1])) @ right).reshape(basis.shape).astype(np.float32)


def _singular_values(params: Any) -> tuple[float, float]:
    """Returns the least and the greatest singular value of the shared bases; zeros without bases."""
    import jax
    import numpy as np

    values = [np.linalg.svd(np.asarray(basis).reshape(-1, basis.shape[-1]), compute_uv=False)
              for basis in jax.tree.leaves(params.get("bases", {}))]
    return (float(min(map(min, values))), float(max(map(max, values)))) if values else (0.0, 0.0)


def _joined(norms: Iterable[float]) -> str:
    return " ".join(f"{norm:.4g}" for norm in norms)


# What the rows say

def growth(row: Row) -> float:
    """Returns how many times larger the gradient is after the first than after the last sharing block of a group.

    It is what all sharing layers of one group, with their shortcuts, multiply it by: the geometric mean of the groups.
    """
    norms = [float(norm) for norm in row.blocks.split()]
    blocks = len(norms) // 3
    # The first block of each group is plain: its output is the input of the first one that shares.
    return statistics.geometric_mean(norms[group * blocks] / norms[(group + 1) * blocks - 1] for group in range(3))


def _values(rows: Sequence[Row], value: Callable[[Row], Any], layers: int, label: str, epoch: int) -> list[Any]:
    """Returns a figure of each run, one for each seed, at one moment."""
    return [value(row) for row in rows if (row.layers, row.variant, row.epoch) == (layers, label, epoch)]


def table(rows: Sequence[Row]) -> Table:
    """Returns for each number of sharing layers and each variant the growth of gradients, errors, singular values."""
    lines: Table = [["layers sharing a basis", "variant", *(
        "growth at initialisation" if epoch == 0 else f"after epoch {epoch}" for epoch in MEASURED),
        "singular values at the end", "training loss, epoch 1", f"epoch {EPOCHS}", "final test error, %"]]
    for layers in sorted({row.layers for row in rows}):
        for variant in VARIANTS:
            last = [row for row in rows if (row.layers, row.variant, row.epoch) == (layers, variant.label, EPOCHS)]
            if not last:
                lines.append([str(layers), variant.label, *["not run"] * (len(lines[0]) - 2)])
                continue
            singular = (f"{min(row.singular_min for row in last):.2f} – {max(row.singular_max for row in last):.2f}"
                        if variant.form else "–")
            lines.append([str(layers), variant.label, *(
                f"{statistics.geometric_mean(_values(rows, growth, layers, variant.label, epoch)):.2f}"
                for epoch in MEASURED), singular, *(
                f"{statistics.mean(_values(rows, lambda row: row.train_loss, layers, variant.label, epoch)):.3f}"
                for epoch in (1, EPOCHS)), f"{statistics.mean(row.test_error for row in last):.2f}"])
    return lines


def _paint(rows: Sequence[Row], figure: Figure) -> None:
    """Draws the gradient by depth: a row of axes for each number of sharing layers, a column for each moment."""
    from shared_basis.plotting import COLORS, DASHES, set_log

    numbers = sorted({row.layers for row in rows})
    grid = figure.subplots(len(numbers), len(MEASURED), sharex="row", sharey="row", squeeze=False)
    for axes_of_number, layers in zip(grid, numbers, strict=True):
        for axes, epoch in zip(axes_of_number, MEASURED, strict=True):
            for index, variant in enumerate(VARIANTS):
                runs = _values(rows, lambda row: [float(norm) for norm in row.blocks.split()], layers, variant.label,
                              epoch)
                if runs:
                    means = [statistics.geometric_mean(norms) for norms in zip(*runs, strict=True)]
                    axes.plot(range(1, len(means) + 1), means, color=COLORS[index],
                              linestyle=DASHES[index], linewidth=1.2, label=variant.label)
            set_log(axes, "y")
            if layers == numbers[0]:
                axes.set_title("initialisation" if epoch == 0 else f"after epoch {epoch}")
            if layers == numbers[-1]:
                axes.set_xlabel("block")
        axes_of_number[0].set_ylabel(f"{layers} layers share:\nnorm of the gradient")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)


def _seeds(rows: Sequence[Row]) -> str:
    """Returns how many seeds there are, by number of layers where these differ in it."""
    layers: dict[int, list[int]] = {}
    for number in sorted({row.layers for row in rows}):
        layers.setdefault(len({row.seed for row in rows if row.layers == number}), []).append(number)
    return ", ".join(
        f"{seeds} seed{'s' * (seeds > 1)}" + f" ({' and '.join(map(str, numbers))} layers)" * (len(layers) > 1)
        for seeds, numbers in layers.items())


def write_page() -> None:
    """Draws the picture and replaces the section of docs/results.md."""
    from shared_basis.plotting import png

    rows = read(FILE, Row)
    if BEGIN not in PAGE.read_text():
        raise UserError(f"{PAGE.name} has no mark {BEGIN.strip()}.")
    if not rows:
        replace_section(PAGE, BEGIN, END, "**Not run** yet: `python benchmarks/depth.py`.\n\n")
        return
    PICTURE.write_bytes(png(lambda figure: _paint(rows, figure), size=(11, 7.5)))
    facts = {name: ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))
             for name in ("date", "device", "jax", "commit")}
    runs = len({(row.layers, row.variant, row.seed) for row in rows})
    text = (f"{runs} runs of {EPOCHS} epochs, means over {_seeds(rows)}, {facts['date']}, "
            f"{facts['device']}, JAX {facts['jax']}, commit {facts['commit']}: `results/depth.csv`, by "
            "`python benchmarks/depth.py`. *Growth* is the norm of the gradient at the output of a group's first block "
            "over that at its last block, the geometric mean of the three groups: what the layers that share a basis, "
            "with their shortcuts, multiply gradients by on their way back.\n\n"
            f"{markdown(table(rows))}\n![Gradient by depth](../results/{PICTURE.name})\n\n")
    replace_section(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    sys.exit(main())
