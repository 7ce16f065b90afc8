"""Plots of gradients: by depth, and over the epochs of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shared_basis.analysis.collect import Analysis
from shared_basis.analysis.gradient_flow import by_depth
from shared_basis.plotting import COLORS, DASHES, MARKERS, colormap, set_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _own_norms(layers: Sequence[str], norms: dict[str, float]) -> tuple[list[int], list[float]]:
    """Returns the depth of each layer with its own parameters, and their combined gradient norm."""
    by_layer: dict[str, float] = {}
    for path in by_depth(layers, norms):
        layer = path.rpartition("/")[0]
        if layer in layers:
            by_layer[layer] = math.hypot(by_layer.get(layer, 0.0), norms[path])
    return [layers.index(layer) for layer in by_layer], list(by_layer.values())


def paint_flow(runs: Sequence[Analysis], figure: Figure) -> None:
    """Paints gradient norms with respect to block outputs and to layers' own parameters, by depth."""
    blocks, parameters = figure.subplots(2, 1)
    for run, colour, marker in zip(runs, COLORS, MARKERS, strict=False):
        for step in _chosen(run):
            dash = "-" if step else ":"
            label = f"{run.drawn_name()}, " + ("initialisation" if not step else f"step {step:,}")
            norms = list(run.flow[step]["blocks"].values())
            blocks.plot(range(1, len(norms) + 1), norms, color=colour, linestyle=dash, marker=marker, label=label)
            depths, own = _own_norms(run.layers, run.flow[step]["parameters"])
            parameters.plot([depth + 1 for depth in depths], own, color=colour, linestyle=dash, marker=marker,
                            markersize=3)
    blocks.set_title("gradient with respect to the output of each block")
    blocks.set_xlabel("block, in order of depth")
    parameters.set_title("gradient with respect to each layer's own parameters")
    parameters.set_xlabel("layer, in order of depth")
    for axes in (blocks, parameters):
        axes.locator_params("x", integer=True)
        set_log(axes, "y")
        axes.set_ylabel("norm")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def _chosen(run: Analysis) -> list[int]:
    """Returns initialisation, if known, and the analysed step; the CSV also contains the other checkpoints."""
    return sorted({0, run.step} & run.flow.keys())


def paint_training(runs: Sequence[Analysis], figure: Figure) -> None:
    """Paints the norms recorded during training, one row per run: by depth and epoch, and those of shared arrays."""
    grid = figure.subplots(len(runs), 2, squeeze=False, width_ratios=(3, 2))
    depths = [_by_epoch(run, lambda path: path.endswith(("/coefficients", "/kernel"))) for run in runs]
    values = np.log10(np.concatenate([np.ravel(matrix) for _, matrix in depths if matrix.size]))
    for run, (paths, matrix), (heat, lines) in zip(runs, depths, grid, strict=True):
        epochs = [line["epoch"] for line in run.recorded]
        image = heat.pcolormesh(epochs, range(1, len(paths) + 1), np.log10(matrix), cmap=colormap("viridis"),
                                vmin=values.min(), vmax=values.max(), shading="nearest")
        heat.invert_yaxis()
        heat.grid(False)
        heat.set_ylabel("layer, in order of depth")
        heat.set_title(f"coefficients and kernels\n{run.drawn_name()}", fontsize=9)
        figure.colorbar(image, ax=heat, label="log10 of the norm")
        names, norms = _by_epoch(run, lambda path: path.startswith("bases/"))
        for name, row, colour, dash in zip(names, norms, itertools.cycle(COLORS), itertools.cycle(DASHES),
                                           strict=False):
            lines.plot(epochs, row, color=colour, linestyle=dash, label=name.removeprefix("bases/"))
        lines.set_title("shared arrays", fontsize=9)
        set_log(lines, "y")
        lines.set_ylabel("norm")
        heat.locator_params(integer=True)
        lines.locator_params("x", integer=True)
    limits = [axes.get_ylim() for axes in grid[:, 1]]
    for axes in grid[:, 1]:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    handles, labels = grid[0, 1].get_legend_handles_labels()
    if 0 < len(labels) <= 12:
        figure.legend(handles, labels, loc="outside lower right", ncols=4, fontsize=8)


def _by_epoch(run: Analysis, wanted: Callable[[str], bool]) -> tuple[list[str], np.ndarray]:
    """Returns the paths selected by `wanted`, ordered by depth, and the norms `[paths, lines of the record]`."""
    paths = [path for path in by_depth(run.layers, run.recorded[0]["norms"]) if wanted(path)]
    matrix = np.array([[line["norms"][path] for line in run.recorded] for path in paths])
    return paths, np.maximum(matrix, np.finfo(np.float32).tiny)
